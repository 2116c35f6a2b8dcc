"""Load models and tokenizers from folders or the hub, and set dtype, vocabulary size, dropout and stop tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.sections import ModelSource
from rlhf.data.render import Renderer
from rlhf.errors import CheckpointError, ConfigError
from rlhf.models.quantization import prepare_quantized, quantized_loading, weight_count

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def resolve_model(source: ModelSource) -> str:
    """Return the folder (or hub id) of a model path; the path of a finished run resolves to the model that it wrote.

    Raises: CheckpointError if a local folder holds no model, with the files found there and finished runs nearby; also
        if a hub model has no pinned revision.
    """
    path = Path(source.path)
    if not path.exists():
        looks_local = source.path.startswith((".", "/", "~")) or source.path.count("/") != 1 or path.parent.is_dir()
        if looks_local:
            raise CheckpointError("no such model", where=source.path, do=_finished_runs(path))
        if source.revision is None:
            raise CheckpointError(
                "a hub model needs a pinned revision", where=source.path, do="set 'revision' to a commit hash"
            )
        return source.path
    if (path / "run.json").is_file() and (path / "model").is_dir():
        path = path / "model"
    has_config = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
    has_weights = any((path / name).is_file() for name in WEIGHT_FILES)
    if not (has_config and has_weights):
        missing = "weights (.safetensors)" if has_config else "config.json or adapter_config.json"
        files = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else "a file, not a folder"
        raise CheckpointError(
            f"no {missing} here", found=files or "empty folder", where=str(path), do=_finished_runs(path)
        )
    return str(path)


def _finished_runs(path: Path) -> str:
    """Return a hint that names finished runs in the parent folders."""
    for parent in list(path.parents)[:3]:
        if parent.is_dir():
            runs = [p for p in sorted(parent.glob("*/run.json")) if _status(p) == "finished"]
            if runs:
                return "finished runs here: " + ", ".join(str(p.parent) for p in runs[:5])
    return "train the stage that makes it first"


def _status(run_json: Path) -> str:
    try:
        return str(json.loads(run_json.read_text(encoding="utf-8")).get("status"))
    except (OSError, ValueError):
        return "unreadable"


def dtype_of(source: ModelSource) -> torch.dtype:
    """Return the dtype of the weights in memory. 'auto' is float32: bfloat16 weights lose small AdamW updates."""
    if source.dtype == "auto":
        return torch.float32
    dtype: torch.dtype = getattr(torch, source.dtype)
    return dtype


def is_adapter(folder: str) -> bool:
    """Return whether a model folder holds a PEFT adapter rather than full weights."""
    return (Path(folder) / "adapter_config.json").is_file()


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer that is stored with a model.

    Raises: CheckpointError if there is none.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(source)
    try:
        return AutoTokenizer.from_pretrained(
            folder, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("no readable tokenizer", found=str(error).split("\n")[0][:200], where=folder) from None


def load_pretrained(auto_class: Any, source: ModelSource, folder: str, **options: Any) -> Any:
    """Call `from_pretrained` with the source's settings; only safetensors files are read.

    Every model with `quantize` is quantized here, see `quantized_loading`.

    Raises: CheckpointError if the model does not load; ConfigError if it cannot be quantized in this environment.
    """
    options |= quantized_loading(source)
    if source.attention != "auto":
        options["attn_implementation"] = source.attention
    try:
        model = auto_class.from_pretrained(
            folder,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=dtype_of(source),
            use_safetensors=True,
            **options,
        )
    except Exception as error:
        kind = type(error).__name__
        if isinstance(error, OSError | ValueError | RuntimeError | KeyError | ImportError) or kind == "SafetensorError":
            raise CheckpointError(
                "the model does not load", found=f"{kind}: {str(error).splitlines()[0][:200]}", where=folder
            ) from None
        raise
    if source.quantize is not None:
        prepare_quantized(model, folder)
    return model


def grow_embeddings(model: Any, vocab_size: int) -> None:
    """Add embedding rows if the tokenizer has more tokens than the model. Rows are never removed."""
    if vocab_size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(vocab_size)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that sampling and update compute the same policy (arXiv:2403.17031, on dropout)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # some models store probabilities as attributes
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def backbone(model: Any) -> nn.Module:
    """Return the transformer below the output layer, adapters included."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk: nn.Module = getattr(inner, inner.base_model_prefix)
    return trunk


def context_length(model: Any) -> int | None:
    """Return the model's maximum number of positions, or None if its configuration does not state it."""
    if not hasattr(model, "config"):  # a `SoftPrompt`, whose prompt takes some of the positions
        remaining: int | None = getattr(model, "context", None)
        return remaining
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters and the number of all parameters."""
    total = sum(weight_count(p) for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def set_stop_tokens(model: Any, renderer: Renderer) -> None:
    """Set the end and pad tokens of the model's configuration, so that `model.generate` stops and pads correctly."""
    model.generation_config.eos_token_id = renderer.end_id
    model.generation_config.pad_token_id = renderer.pad_id
    model.config.pad_token_id = renderer.pad_id


def check_context(length: int, context: int | None, where: str) -> None:
    """Check that sequences of `length` tokens fit the model's maximum number of positions.

    Raises: ConfigError if they do not.
    """
    if context is not None and length > context:
        raise ConfigError(
            f"sequences of {length} tokens do not fit the model's context of {context}",
            where=where,
            do=f"lower it to at most {context}",
        )
