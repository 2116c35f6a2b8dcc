"""Exponential moving average of a model's trained weights (Ouyang et al. 2022, arXiv:2203.02155, decay 0.992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """w_avg <- decay w_avg + (1 - decay) w, for the parameters that are trained. Float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the model's present weights; `decay` in (0, 1)."""
        self.decay = decay
        self.weights: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        for name, p in _trained(model):
            self.weights[name].lerp_(p.detach().float(), 1.0 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with its average weights, for saving."""
        present = {name: p.detach().clone() for name, p in _trained(model)}
        with torch.no_grad():
            for name, p in _trained(model):
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in _trained(model):
                    p.copy_(present[name])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
