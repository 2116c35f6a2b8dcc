"""Exponential moving average of a model's trained weights (Ouyang et al. 2022, arXiv:2203.02155, decay 0.992).

The main process keeps the average in CPU memory: it is needed only once a step, and takes no device memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf.distributed.zero_gather import gathered_parameters


class WeightAverage:
    """Average w_avg <- decay w_avg + (1 - decay) w of the trained parameters, in float32."""

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float, *, main: bool = True) -> None:
        """Start the average at the current weights. This and all other methods are collective.

        Args:
            trained: the trained parameters by name.
            decay: in (0, 1).
            main: this process is the main one; only there is `weights` filled.
        """
        self.decay, self.main = decay, main
        self.weights: dict[str, Tensor] = {}
        for name, p in trained.items():
            with gathered_parameters([p]):
                if main:
                    self.weights[name] = p.detach().to("cpu", torch.float32, copy=True)

    @torch.no_grad()
    def update(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Update the average with the current weights."""
        for name, p in trained.items():
            with gathered_parameters([p]):
                if self.main:
                    self.weights[name].lerp_(p.detach().to("cpu", torch.float32), 1.0 - self.decay)

    @contextmanager
    def applied(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Context manager inside which the model has the average weights, for saving it on the main process."""
        current: dict[str, Tensor] = {}
        for name, p in trained.items():
            with torch.no_grad(), gathered_parameters([p], changed=True):
                if self.main:
                    current[name] = p.detach().to("cpu", copy=True)
                    p.copy_(self.weights[name])
        try:
            yield
        finally:
            for name, p in trained.items():
                with torch.no_grad(), gathered_parameters([p], changed=True):
                    if self.main:
                        p.copy_(current[name])
