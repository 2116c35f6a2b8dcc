"""The simulated human rater: noisy, sometimes undecided, better than chance by a known amount.

Choices follow Bradley-Terry on gold utility, P(a over b) = sigmoid((u_a - u_b) / temperature). The temperature is
fitted so that labels agree with the gold order about as often as people agree with each other on such comparisons. A
small share of pairs, mostly close ones, is declared a tie.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

AGREEMENT = 0.77
TIE_SHARE = 0.065
_TIE_WIDTH = 0.6


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _bisect(target: float, low: float, high: float, value: Callable[[float], float]) -> float:
    """Return where a falling function of a positive number crosses `target`."""
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if value(middle) > target else (low, middle)
    return low


@dataclass(frozen=True)
class Rater:
    """`temperature` in units of utility; `tie_scale` times exp(-gap / width) is the chance of a tie."""

    temperature: float
    tie_scale: float

    @classmethod
    def fitted(cls, gaps: Sequence[float], agreement: float = AGREEMENT, ties: float = TIE_SHARE) -> Rater:
        """Fit both numbers on the utility gaps |u_a - u_b| of a set of pairs (expected values, no sampling)."""
        closeness = [math.exp(-abs(gap) / _TIE_WIDTH) for gap in gaps]
        scale = 1.0 / _bisect(ties, 1.0, 1e6, lambda x: sum(min(1.0, c / x) for c in closeness) / len(gaps))
        decided = [(abs(gap), 1.0 - min(1.0, c * scale)) for gap, c in zip(gaps, closeness, strict=True) if gap]
        total = sum(weight for _, weight in decided)
        temperature = _bisect(
            agreement, 0.01, 100.0, lambda t: sum(w * _sigmoid(min(gap / t, 500.0)) for gap, w in decided) / total
        )
        return cls(temperature, scale)

    def label(self, rng: random.Random, first: float, second: float) -> float:
        """Return 1.0 if the first is preferred, 0.0 if the second, 0.5 for a tie."""
        gap = first - second
        if rng.random() < self.tie_scale * math.exp(-abs(gap) / _TIE_WIDTH):
            return 0.5
        return 1.0 if rng.random() < _sigmoid(gap / self.temperature) else 0.0
