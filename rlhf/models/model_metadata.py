"""Metadata that a stage saves beside its model for later stages, and the check that two models match.

The file is `handover.json`. It identifies the tokenizer and chat template, and has the scale of a reward model's scores
and the labels of a classifier.
"""

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
    """Contents of `handover.json`: the model's text-to-token settings, and facts that depend on its stage."""

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
    score_mean: float | None = None  # mean of a reward model's scores of held-out responses
    score_std: float | None = None  # their standard deviation
    labels: list[str] | None = None  # labels of a classifier, in the order of its outputs
    multi_label: bool | None = None  # whether several labels may hold at once
    reply_tokens: float | None = None  # mean response length in the training data, or of the last PPO rollout

    def write(self, folder: Path) -> None:
        """Write the record into a model folder."""
        write_json(folder / HANDOVER_FILE, asdict(self))


def make_handover(stage: str, identity: dict[str, Any], **more: Any) -> Handover:
    """Create the record of a model.

    Args:
        identity: `Renderer.identity()` of its tokenizer.
        more: other fields of `Handover`.
    """
    names = {f.name for f in fields(Handover)}
    return Handover(stage=stage, **{k: v for k, v in identity.items() if k in names}, **more)


def read_handover(folder: str | Path) -> Handover | None:
    """Return the record in a model folder, or None for a model that was not written by `rlhf`.

    Raises: CheckpointError if the file is damaged.
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
            "the file does not have the fields that this version reads", found=str(error), where=str(path)
        ) from None


def verify_handover(current: dict[str, Any], recorded: Handover | None, *, where: str, role: str) -> None:
    """Check that another model was trained with this stage's text-to-token settings. A model without a record passes.

    Args:
        current: `Renderer.identity()` of the tokenizer that this stage uses.
        recorded: the other model's record, if it has one.
        where: path of the other model, for the message.
        role: the other model's role as the message names it, e.g. "the reward model".
    Raises: CheckpointError that names each difference.
    """
    if recorded is None:
        return
    differences = [
        f"{description} ({name} {getattr(recorded, name)!r} there, {current[name]!r} here)"
        for name, description in MUST_AGREE.items()
        if getattr(recorded, name) != current[name]
    ]
    if differences:
        raise CheckpointError(
            f"{role} was trained with other text-to-token settings",
            found="; ".join(differences),
            where=where,
            do="use models of one pipeline, or train it again from this SFT model",
        )


def save_tokenizer_and_handover(folder: Path, stage: str, renderer: Renderer, tokenizer: Any, **more: Any) -> None:
    """Write the tokenizer and `handover.json` into a model's folder. Call it on the main process only."""
    tokenizer.save_pretrained(str(folder))
    make_handover(stage, renderer.identity(), **more).write(folder)
