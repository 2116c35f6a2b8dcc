"""`rlhf merge`: merge an adapter into its base model and write plain weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
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
from rlhf.runs.run_dir import CONFIG_FILE, RUN_FILE
from rlhf.stages.lifecycle import open_tokenizer

MAX_LOGIT_DIFFERENCE = 1e-5  # tolerated difference of logits, relative to the largest logit if that is above 1
ROWS_COMPARED, LENGTH = 2, 16  # shape of the token ids whose logits are compared


def merge_adapter(adapter: str, output: Path, console: Console) -> None:
    """Merge an adapter into its base model, check that the merged model computes the same logits, and write it.

    Args:
        adapter: run directory or model folder of the adapter.
        output: folder to write, which must not exist: float32 weights, tokenizer, hand-over record, generation
            configuration.
        console: where notes are printed.
    Raises: ConfigError if the output exists, or there is no adapter to merge; CheckpointError if a file is missing, or
        the logits differ by more than 1e-5.

    An adapter that was trained on a quantized base is merged into the base as it is stored, which is not quantized.
    Both sides of the comparison are computed on that base, so the limit of 1e-5 holds for it too. By how much the
    logits differ from those on the quantized base is not compared: that is the error of the quantization, not of
    merging. A note says so if the adapter's run directory shows how it was trained.
    """
    source = ModelSource(path=adapter)
    folder = resolve_model(source)
    _check_arguments(folder, output)
    quiet_libraries(telemetry=False)
    tokenizer, renderer = open_tokenizer(source, console)
    record = model_metadata.read_handover(folder)
    auto_class, model = _load_adapter(source, folder)
    ids = _random_ids(model)
    expected = _logits(model, ids)
    merged = model.merge_and_unload()
    _complete_config(merged, renderer, record)
    with _temporary_folder(output) as temporary:
        merged.save_pretrained(str(temporary), safe_serialization=True)
        tokenizer.save_pretrained(str(temporary))
        if record is not None:
            record.write(temporary)
        del model, merged
        reloaded = load_pretrained(auto_class, ModelSource(path=str(temporary)), str(temporary))
        difference = _check_logits(_logits(reloaded, ids), expected, folder)
    if (quantized := _base_while_training(Path(folder))) is not None:
        console.note(
            f"the adapter was trained on a base quantized to {quantized} and is merged into the base that is not "
            "quantized, so the merged model's logits differ from those in training by the error of quantization"
        )
    console.note(
        f"{output}: plain weights; logits of {ids.numel()} tokens differ from the adapter's by {difference:.1e}"
    )


def _check_arguments(folder: str, output: Path) -> None:
    """Raise ConfigError if the folder is no adapter that can be merged, or the output cannot be written."""
    if not is_adapter(folder):
        raise ConfigError(
            "the model is not an adapter, so there is nothing to merge",
            found="full weights",
            where=folder,
            do="use the folder as it is; transformers loads it",
        )
    if saved_adapter_method(folder) == "prompt":
        raise ConfigError(
            "a soft prompt has no weights to merge",
            found="an adapter of method prompt",
            where=folder,
            do="keep it as an adapter, or train with peft.method=ia3 (as small) or lora",
        )
    if output.exists():
        raise ConfigError("the output exists already", where=str(output), do="choose another name")
    if not output.absolute().parent.is_dir():
        raise ConfigError("no such folder to write into", where=str(output.parent), do="create it first")


def _base_while_training(folder: Path) -> str | None:
    """Return how the base was quantized while the adapter in a run directory was trained; None if not, or unknown."""
    file = folder.parent / CONFIG_FILE
    if not (folder.parent / RUN_FILE).is_file() or not file.is_file():
        return None
    config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    source = config.get("policy") or config.get("model") or {}
    quantized: str | None = source.get("quantize")
    return quantized


def _load_adapter(source: ModelSource, folder: str) -> tuple[Any, Any]:
    """Return the class that loads the merged model, and the adapter on its base model, with its head if it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if any(True for _ in saved_head(folder)):
        model = adapted_classifier(source, folder, "classifier", "train it again", trainable=False)
        return AutoModelForSequenceClassification, model
    return AutoModelForCausalLM, load_adapter(source, folder, AutoModelForCausalLM, trainable=False)


def _complete_config(model: Any, renderer: Renderer, record: model_metadata.Handover | None) -> None:
    """Set stop tokens, pad token and label names in the model's configuration, for loading with transformers alone."""
    if getattr(model, "generation_config", None) is not None:
        set_stop_tokens(model, renderer)
    model.config.pad_token_id = renderer.pad_id
    if record is not None and record.labels is not None:
        model.config.id2label = dict(enumerate(record.labels))
        model.config.label2id = {name: i for i, name in enumerate(record.labels)}
        model.config.problem_type = (
            "multi_label_classification" if record.multi_label else "single_label_classification"
        )


def _random_ids(model: Any) -> Tensor:
    """Return random token ids, [ROWS_COMPARED, LENGTH] int64, or shorter if the model's context is shorter."""
    size, length = model.config.get_text_config().vocab_size, min(LENGTH, context_length(model) or LENGTH)
    return torch.randint(0, size, (ROWS_COMPARED, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """Return float32 logits, computed row by row because a classifier without a pad token accepts one row only."""
    model.eval()
    return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in ids])


def _check_logits(found: Tensor, expected: Tensor, folder: str) -> float:
    """Return the largest difference of logits. Raises: CheckpointError if it is too large or nan."""
    difference = float((found - expected).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE * max(1.0, float(expected.abs().max())):
        raise CheckpointError(
            "the merged model does not compute the same logits as the adapter",
            found=f"logits differ by {difference:.1e}",
            where=folder,
            do="keep using the adapter, which is unchanged; nothing was written",
        )
    return difference


@contextmanager
def _temporary_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder beside the output, which is renamed to the output on success and deleted on failure."""
    temporary = output.absolute().with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
