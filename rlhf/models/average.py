"""Exponential moving average of a model's trained weights (Ouyang et al. 2022, arXiv:2203.02155, decay 0.992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """w_avg <- decay w_avg + (1 - decay) w, for the parameters that are trained. Float32."""

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        """Start at the present weights; `decay` in (0, 1)."""
        self.decay = decay
        self.weights: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in trained.items()}

    @torch.no_grad()
    def update(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Take in the present weights."""
        for name, p in trained.items():
            self.weights[name].lerp_(p.detach().float(), 1.0 - self.decay)

    @contextmanager
    def applied(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The model with its average weights, for saving."""
        present = {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(present[name])
