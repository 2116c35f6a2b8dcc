"""What a stage tells the next one about its model, and the check that the two fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlhf.data.render import Renderer
from rlhf.errors import CheckpointError
from rlhf.runs.run_dir import read_json, write_json

HANDOVER_FILE = "handover.json"
MUST_AGREE = {
    "template_sha256": "the chat template",
    "tokenizer_sha256": "the tokenizer",
    "end_id": "the end token",
    "pad_id": "the pad token",
    "bos_id": "the begin token",
    "tail_ids": "the tokens that close a response",
}


@dataclass(frozen=True)
class Handover:
    """The record beside a model. Identity of the text-to-token path, and the scale of a reward model's scores."""

    stage: str
    template_sha256: str
    tokenizer_sha256: str
    end_id: int
    pad_id: int
    eos_id: int | None
    bos_id: int | None
    tail_ids: list[int]
    vocab_size: int
    head_dtype: str | None = None  # dtype of the score head
    score_mean: float | None = None  # of the reward model on held-out responses
    score_std: float | None = None
    labels: list[str] | None = None  # of a classifier, in the order of its outputs
    multi_label: bool | None = None  # whether they may hold at once
    reply_tokens: float | None = None  # mean length of what it has learnt to say, or of what it said last

    def write(self, folder: Path) -> None:
        """Write the record into a model folder."""
        write_json(folder / HANDOVER_FILE, asdict(self))


def make_handover(stage: str, identity: dict[str, Any], **more: Any) -> Handover:
    """A record from `Renderer.identity()`."""
    names = {f.name for f in fields(Handover)}
    return Handover(stage=stage, **{k: v for k, v in identity.items() if k in names}, **more)


def read_handover(folder: str | Path) -> Handover | None:
    """The record of a model folder, or None for a model that no stage of ours made.

    Raises: CheckpointError if it is damaged.
    """
    path = Path(folder) / HANDOVER_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        if "several" in values:  # the name of `multi_label` in records of earlier releases
            values["multi_label"] = values.pop("several")
        return Handover(**values)
    except TypeError as error:
        raise CheckpointError(
            "the hand-over record does not fit this version", found=str(error), where=str(path)
        ) from None


def verify_handover(ours: dict[str, Any], theirs: Handover | None, *, where: str, role: str) -> None:
    """Refuse a model whose text-to-token path differs from ours. A foreign model without a record passes.

    Args:
        ours: `Renderer.identity()` of the tokenizer this stage uses.
        role: what the other model is for, in words.
    Raises: CheckpointError naming each difference.
    """
    if theirs is None:
        return
    differences = [
        f"{words} ({name} {getattr(theirs, name)!r} there, {ours[name]!r} here)"
        for name, words in MUST_AGREE.items()
        if getattr(theirs, name) != ours[name]
    ]
    if differences:
        raise CheckpointError(
            f"{role} was trained with other text-to-token settings",
            found="; ".join(differences),
            where=where,
            do="use models of the same pipeline, or retrain it from this SFT model",
        )


def save_tokenizer_and_handover(folder: Path, stage: str, renderer: Renderer, tokenizer: Any, **more: Any) -> None:
    """Write tokenizer and hand-over record beside a model (main process)."""
    tokenizer.save_pretrained(str(folder))
    make_handover(stage, renderer.identity(), **more).write(folder)
