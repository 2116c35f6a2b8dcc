"""The frozen models that only scoring reads: on the device throughout, or at rest in CPU memory until they are asked.

Why rest and not share the weights between processes (ZeRO-3): packed microbatches differ in number from process to
process, so that a forward that gathers its weights from the others would wait for ever; and scoring needs them whole in
any case. At rest a model costs no device memory instead of 1/n, on one GPU too. The price is one copy to the device a
step, and the model whole in the CPU memory of every process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class OffloadedModels:
    """Models by role, in eval mode.

    Their weights do not change, so leaving the device copies nothing: those in CPU memory have stayed there. They are
    not page-locked: that would be faster by seconds a step at most, and torch rounds locked memory up to powers of two.
    """

    def __init__(self, device: torch.device, offload: Collection[str] = (), **models: Sequence[nn.Module]) -> None:
        """Put every model where it belongs.

        Args:
            offload: roles that rest in CPU memory. Where the device is the CPU they are there already.
            models: of each role.
        """
        self.device = device
        self._resting: dict[str, list[_Resting]] = {}
        for role, members in models.items():
            rests = role in offload and device.type != "cpu"
            for model in members:
                model.eval()
                model.to("cpu" if rests else device)
            self._resting[role] = [_Resting(model) for model in members] if rests else []

    @contextmanager
    def on_device(self, role: str) -> Iterator[None]:
        """A role's models are on the device inside, and at rest again afterwards, also after an error."""
        resting = self._resting[role]
        try:
            for one in resting:
                one.model.to(self.device)
            yield
        finally:
            for one in resting:
                one.rest()


class _Resting:
    """A model and its weights in CPU memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = [
            (module, name, parameter, parameter.data)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def rest(self) -> None:
        """Let go of the device's copy. Buffers may have changed there: they are copied."""
        for module, name, parameter, data in self.places:
            parameter.data = data
            module._parameters[name] = parameter
        self.model.to("cpu")
