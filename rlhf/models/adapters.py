"""LoRA adapters: made fresh, continued from an earlier stage, or kept frozen as the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rlhf.config.sections import ModelSource, Peft
from rlhf.errors import CheckpointError, ConfigError
from rlhf.models.load import disable_dropout, grow_embeddings, is_adapter, load_causal, load_pretrained, resolve

REFERENCE = "reference"


def base_source(source: ModelSource, folder: str) -> ModelSource:
    """Where the base model of an adapter folder lies.

    Raises: CheckpointError if it is not there.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError("the adapter does not name its base model", where=folder)
    return source.model_copy(update={"path": base, "revision": config.get("revision")})


def load_adapter(source: ModelSource, folder: str, auto_class: Any, *, trainable: bool, **options: Any) -> Any:
    """Base model plus the adapter saved in `folder`, as a PeftModel."""
    from peft import PeftModel

    base = base_source(source, folder)
    model = load_pretrained(auto_class, base, resolve(base), **options)
    fit_vocabulary(model, folder)
    disable_dropout(model)  # the base's; the adapter keeps its own
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def fit_vocabulary(model: Any, folder: str) -> None:
    """Grow a base model's embeddings to those saved with an adapter whose stage had added tokens."""
    from safetensors import safe_open

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as tensors:
        key = f"base_model.model.{name}.weight"
        if key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            grow_embeddings(model, tensors.get_slice(key).get_shape()[0])


def adapter_config(peft: Peft, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """PEFT configuration. SEQ_CLS also trains and saves the score head: without it a random head would be frozen."""
    from peft import LoraConfig

    if peft.method != "lora":
        raise ConfigError("only LoRA can be trained yet", found=f"peft.method={peft.method}", where="peft.method")
    targets = peft.target_modules if isinstance(peft.target_modules, str) else list(peft.target_modules)
    return LoraConfig(
        r=peft.r, lora_alpha=peft.alpha, lora_dropout=peft.dropout, target_modules=targets, task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )  # fmt: skip


def add_adapter(model: Any, peft: Peft, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """Wrap a full model with a fresh adapter (B = 0: the output does not change)."""
    from peft import get_peft_model

    return get_peft_model(model, adapter_config(peft, task))


def check_same_shape(peft: Peft, folder: str) -> None:
    """Refuse to continue an adapter under other settings than it was made with.

    Raises: ConfigError.
    """
    saved = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    for key, ours, theirs in (("r", peft.r, saved["r"]), ("alpha", peft.alpha, saved["lora_alpha"])):
        if ours != theirs:
            raise ConfigError(
                f"the adapter in {folder} was trained with {key}={theirs}", found=f"peft.{key}={ours}",
                where=f"peft.{key}", do=f"set peft.{key}={theirs}, or peft.method=none to train all weights",
            )  # fmt: skip


def policy_with_adapter(source: ModelSource, peft: Peft) -> Any:
    """A trainable LoRA policy; `reference_policy` gives its starting point without a second copy of the base.

    From full weights: a fresh adapter (the reference is the adapter switched off). From an adapter: that adapter
    continues, and a frozen copy of it is the reference, since base weights alone are not the SFT model.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve(source)
    if not is_adapter(folder):
        return add_adapter(load_causal(source), peft, "CAUSAL_LM")
    check_same_shape(peft, folder)
    model = load_adapter(source, folder, AutoModelForCausalLM, trainable=True)
    model.load_adapter(folder, REFERENCE, is_trainable=False)
    model.set_adapter("default")
    return model


@contextmanager
def reference_policy(model: Any) -> Iterator[Any]:
    """Inside, an adapter policy computes as the model it started from."""
    with wearing(model, REFERENCE if REFERENCE in model.peft_config else None):
        yield model


@contextmanager
def wearing(model: Any, adapter: str | None) -> Iterator[None]:
    """Inside, a PeftModel computes with one of its adapters, or with the bare base (None).

    Nothing is copied and nothing else changes: `set_adapter` of PEFT would also switch what is trainable.
    """
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def worn(model: Any) -> str | None:
    """Name of the adapter that a PeftModel computes with now, or None."""
    layer = next(module for module in model.modules() if hasattr(module, "_disable_adapters"))
    return None if layer._disable_adapters else layer.active_adapters[0]


def adapter_parameters(model: Any, adapter: str) -> dict[str, Any]:
    """Named parameters of one adapter of a PeftModel."""
    return {
        name: p for name, p in model.named_parameters()
        if f".{adapter}." in f"{name}." and ("lora_" in name or "modules_to_save" in name)
    }  # fmt: skip
