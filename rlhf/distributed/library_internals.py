"""Private names of accelerate, DeepSpeed, PEFT and transformers that no public name stands for.

Beside `rlhf.trainers.supervised.base`, which overrides methods of the Trainers, this is the only file that touches
private names of these libraries. A test for each says loudly when a new release has changed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def reset_accelerate() -> None:
    """Forget the precision and the plugins that an earlier Accelerator of this process has settled."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def link_adam_state(zero: Any) -> None:
    """Make a DeepSpeed ZeRO optimizer look for the Adam state of every parameter again.

    DeepSpeed does so once, in the first update of the first group, when the others have no state yet.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def set_attention(config: Any, kind: str) -> None:
    """Choose the attention kernel of a model that is to be built from a configuration."""
    config._attn_implementation = kind


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a PeftModel that hold adapters."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def switched_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Have the layers of a PeftModel compute with one of their adapters, or without any (None), inside the context.

    Nothing is copied and nothing else changes; PEFT's public `set_adapter` would also switch what is trainable.
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
    """Return the name of the adapter that a PeftModel computes with now, or None."""
    layer = adapter_layers(model)[0]
    return None if layer._disable_adapters else str(layer.active_adapters[0])
