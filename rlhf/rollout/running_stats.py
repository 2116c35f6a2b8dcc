"""Running mean and deviation of the scores that a run has seen."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RunningStats(NamedTuple):
    """Moments of all raw scores of a run so far: number, mean, sum of squared residuals (Welford; Chan et al. 1979)."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def seen(self, scores: Tensor) -> RunningStats:
        """With more scores, [B] of all processes."""
        x = scores.double()
        n, mean = float(len(x)), float(x.mean())
        total, apart = self.number + n, mean - self.mean
        squares = self.squares + float((x - mean).square().sum()) + apart**2 * self.number * n / total
        return RunningStats(total, self.mean + apart * n / total, squares)

    @property
    def deviation(self) -> float:
        """Biased standard deviation, at least 1e-3 so that equal scores are not blown up."""
        return max((self.squares / max(self.number, 1.0)) ** 0.5, 1e-3)
