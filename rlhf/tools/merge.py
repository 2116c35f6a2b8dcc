"""`rlhf merge`: an adapter folded into its base, as plain weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import ModelSource
from rlhf.console import Console
from rlhf.data.render import Renderer
from rlhf.distributed.engine import quiet_libraries
from rlhf.errors import CheckpointError, ConfigError
from rlhf.models import model_metadata
from rlhf.models.adapters import load_adapter, saved_adapter_method
from rlhf.models.load import context_length, is_adapter, load_pretrained, resolve_model, set_stop_tokens
from rlhf.models.reward_models import adapted_classifier, saved_head
from rlhf.stages.lifecycle import open_tokenizer

MAX_LOGIT_DIFFERENCE = 1e-5  # how far logits may differ, relative to the largest if that is above 1
ROWS_COMPARED, LENGTH = 2, 16  # of the tokens that are compared


def merge_adapter(adapter: str, output: Path, console: Console) -> None:
    """Write the folder, once the model in it is known to compute what the adapter does.

    Args:
        adapter: run directory or model folder.
        output: folder that does not exist; float32 weights, tokenizer, hand-over record, generation configuration.
    Raises: ConfigError if the output exists, or there is no adapter to fold; CheckpointError if a part is missing, or
        the logits differ by more than 1e-5.
    """
    source = ModelSource(path=adapter)
    folder = resolve_model(source)
    _refuse(folder, output)
    quiet_libraries(telemetry=False)
    tokenizer, renderer = open_tokenizer(source, console)
    record = model_metadata.read_handover(folder)
    auto_class, model = _open(source, folder)
    ids = _tokens(model)
    wanted = _logits(model, ids)
    whole = model.merge_and_unload()
    _describe(whole, renderer, record)
    with _beside(output) as temporary:
        whole.save_pretrained(str(temporary), safe_serialization=True)
        tokenizer.save_pretrained(str(temporary))
        if record is not None:
            record.write(temporary)
        del model, whole
        again = load_pretrained(auto_class, ModelSource(path=str(temporary)), str(temporary))
        difference = _check(_logits(again, ids), wanted, folder)
    console.note(
        f"{output}: plain weights; logits of {ids.numel()} tokens differ from the adapter's by {difference:.1e}"
    )


def _refuse(folder: str, output: Path) -> None:
    """What cannot be folded, or written.

    Raises: ConfigError.
    """
    if not is_adapter(folder):
        raise ConfigError(
            "not an adapter: there is nothing to fold",
            found="full weights",
            where=folder,
            do="use the folder as it is; transformers loads it",
        )
    if saved_adapter_method(folder) == "prompt":
        raise ConfigError(
            "a soft prompt has no weights to fold",
            found="an adapter of method prompt",
            where=folder,
            do="keep it as an adapter, or train with peft.method=ia3 (as small) or lora",
        )
    if output.exists():
        raise ConfigError("the output exists", where=str(output), do="choose another name")
    if not output.absolute().parent.is_dir():
        raise ConfigError("no such folder to write into", where=str(output.parent), do="make it first")


def _open(source: ModelSource, folder: str) -> tuple[Any, Any]:
    """The class that loads the merged model, and the adapter over its base; with a head if one was saved."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if any(True for _ in saved_head(folder)):
        model = adapted_classifier(source, folder, "classifier", "train it again", trainable=False)
        return AutoModelForSequenceClassification, model
    return AutoModelForCausalLM, load_adapter(source, folder, AutoModelForCausalLM, trainable=False)


def _describe(model: Any, renderer: Renderer, record: model_metadata.Handover | None) -> None:
    """What a plain loader should know: where to stop, what pads, what the outputs are called."""
    if getattr(model, "generation_config", None) is not None:
        set_stop_tokens(model, renderer)
    model.config.pad_token_id = renderer.pad_id
    if record is not None and record.labels is not None:
        model.config.id2label = dict(enumerate(record.labels))
        model.config.label2id = {name: i for i, name in enumerate(record.labels)}
        model.config.problem_type = (
            "multi_label_classification" if record.multi_label else "single_label_classification"
        )


def _tokens(model: Any) -> Tensor:
    """A few rows of random ids, [ROWS, LENGTH] int64; shorter if the model's context is."""
    size, length = model.config.get_text_config().vocab_size, min(LENGTH, context_length(model) or LENGTH)
    return torch.randint(0, size, (ROWS_COMPARED, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """Float32; of each row by itself, since a plain classifier without a pad token refuses more."""
    model.eval()
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in ids])


def _check(found: Tensor, wanted: Tensor, folder: str) -> float:
    """Largest difference of logits.

    Raises: CheckpointError if it is too large, or no number.
    """
    difference = float((found - wanted).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE * max(1.0, float(wanted.abs().max())):
        raise CheckpointError(
            "the merged model does not compute what the adapter does",
            found=f"logits differ by {difference:.1e}",
            where=folder,
            do="keep the adapter, which is unharmed; nothing was written",
        )
    return difference


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder beside the output that becomes it if all goes well, and else disappears."""
    temporary = output.absolute().with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
