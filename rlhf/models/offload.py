"""Offload frozen models to CPU memory between scoring passes.

Sharding their weights between processes (ZeRO-3) is not an alternative: the number of packed microbatches differs
between processes, so a forward pass that gathers weights would block forever; and scoring needs the full weights. An
offloaded model takes no device memory (a shard takes 1/n), also with a single GPU. The cost is one copy to the device a
step, and the full model in the CPU memory of every process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class OffloadedModels:
    """Frozen models by role, in eval mode, of which some roles are offloaded.

    Because the weights do not change, their tensors in CPU memory are kept, and leaving the device copies nothing. They
    are not page-locked: this would save seconds a step at most, and torch rounds locked memory up to powers of two.
    """

    def __init__(self, device: torch.device, offload: Collection[str] = (), **models: Sequence[nn.Module]) -> None:
        """Move every model to the device, or to CPU memory if its role is offloaded.

        Args:
            device: where the models compute.
            offload: roles to offload. If the device is the CPU, this changes nothing.
            models: the models of each role.
        """
        self.device = device
        self._offloaded: dict[str, list[_OffloadedModel]] = {}
        for role, members in models.items():
            is_offloaded = role in offload and device.type != "cpu"
            for model in members:
                model.eval()
                model.to("cpu" if is_offloaded else device)
            self._offloaded[role] = [_OffloadedModel(model) for model in members] if is_offloaded else []

    @contextmanager
    def on_device(self, role: str) -> Iterator[None]:
        """Context manager inside which a role's models are on the device; they leave it at its end or on an error."""
        offloaded = self._offloaded[role]
        try:
            for model in offloaded:
                model.model.to(self.device)
            yield
        finally:
            for model in offloaded:
                model.return_to_cpu()


class _OffloadedModel:
    """An offloaded model with its weights in CPU memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = [
            (module, name, parameter, parameter.data)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def return_to_cpu(self) -> None:
        """Point the parameters to CPU memory again. Buffers are copied, since the forward pass may change them."""
        for module, name, parameter, data in self.weights:
            parameter.data = data
            module._parameters[name] = parameter
        self.model.to("cpu")
