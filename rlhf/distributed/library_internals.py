"""Uses of private names of accelerate, DeepSpeed, PEFT and transformers that have no public equivalent.

Besides `rlhf.trainers.supervised.base`, which overrides methods of the Trainers, this is the only file that touches
private names of these libraries. Each has a test that fails if a new release has changed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def reset_accelerate() -> None:
    """Reset the precision and the plugins that an earlier Accelerator of this process has set globally."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def link_adam_state(zero: Any) -> None:
    """Make a DeepSpeed ZeRO optimizer link the Adam state to every parameter again.

    DeepSpeed does so once, in the first update of the first parameter group, when the other groups have no state yet.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def set_attention(config: Any, kind: str) -> None:
    """Set the attention kernel of a model that will be built from this configuration."""
    config._attn_implementation = kind


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a PeftModel that hold adapters."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def switched_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Context manager inside which the layers of a PeftModel compute with one adapter, or with none (None).

    Nothing is copied and `requires_grad` does not change; PEFT's public `set_adapter` would change it.
    """
    layers = adapter_layers(model)
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


def name_of_active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter that a PeftModel currently computes with, or None."""
    layer = adapter_layers(model)[0]
    return None if layer._disable_adapters else str(layer.active_adapters[0])


def attention_implementation(model: Any) -> str:
    """Return the kernel that a transformers model computes attention with: 'sdpa', 'eager' or another."""
    name: str = model.config.get_text_config()._attn_implementation
    return name


def raise_recompile_limit(limit: int = 64) -> None:
    """Allow so many compiled versions of one function; beyond torch's 8 it would silently run uncompiled.

    A block is compiled for every number of rows of a packed batch, with and without gradients.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
