"""Exponential moving average of a model's trained weights (Ouyang et al. 2022, arXiv:2203.02155, decay 0.992).

The main process keeps it, in CPU memory: it is read once a step, and no device has to hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf.distributed.zero_gather import gathered_parameters


class WeightAverage:
    """w_avg <- decay w_avg + (1 - decay) w, for the parameters that are trained. Float32."""

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float, *, main: bool = True) -> None:
        """Start at the present weights; `decay` in (0, 1). Collective, as the rest; only `main` has `weights`."""
        self.decay, self.main = decay, main
        self.weights: dict[str, Tensor] = {}
        for name, p in trained.items():
            with gathered_parameters([p]):
                if main:
                    self.weights[name] = p.detach().to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def update(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Take in the present weights."""
        for name, p in trained.items():
            with gathered_parameters([p]):
                if self.main:
                    self.weights[name].lerp_(p.detach().to("cpu", torch.float32), 1.0 - self.decay)

    @contextmanager
    def applied(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """The model of the main process with its average weights, for saving."""
        present: dict[str, Tensor] = {}
        for name, p in trained.items():
            with torch.no_grad(), gathered_parameters([p], changed=True):
                if self.main:
                    present[name] = p.detach().to("cpu", copy=True)
                    p.copy_(self.weights[name])
        try:
            yield
        finally:
            for name, p in trained.items():
                with torch.no_grad(), gathered_parameters([p], changed=True):
                    if self.main:
                        p.copy_(present[name])
