"""Win rates and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """Return the estimate in percent, such as '84.1 % [80.9, 87.2]'."""
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def win_indicators(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """Return for each prompt 1 if our utility is higher, 0.5 for a tie, 0 if it is lower.

    Utilities are given per response, so there is no order of presentation; swapping the arguments gives 1 - wins.
    Raises: ValueError if the two differ in length.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} utilities: a win rate needs the same prompts")
    return np.where(a == b, 0.5, (a > b).astype(float))


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, resamples: int, seed: int) -> MeanEstimate:
    """Return the mean and its percentile bootstrap interval (2.5 % to 97.5 %) over prompts."""
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return MeanEstimate(float(data.mean()), float(low), float(high))


def best_of_n_kl(n: int) -> float:
    """Return an upper bound of KL(best-of-n || reference) in nats: log n - (n - 1) / n.

    Source: Beirami et al. 2024, arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n
