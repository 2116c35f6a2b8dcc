"""Running mean and standard deviation of all scores of a run."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RunningStats(NamedTuple):
    """Moments of all raw scores of a run so far: number, mean, sum of squared residuals (Welford; Chan et al. 1979)."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, scores: Tensor) -> RunningStats:
        """Return the statistics that also include the given scores, [B] of all processes."""
        x = scores.double()
        n, mean = float(len(x)), float(x.mean())
        total, difference = self.number + n, mean - self.mean
        squares = self.squares + float((x - mean).square().sum()) + difference**2 * self.number * n / total
        return RunningStats(total, self.mean + difference * n / total, squares)

    @property
    def deviation(self) -> float:
        """Return the biased standard deviation, at least 1e-3, so that almost equal scores are not amplified."""
        return max((self.squares / max(self.number, 1.0)) ** 0.5, 1e-3)
