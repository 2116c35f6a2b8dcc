"""Learning-rate schedules: linear, cosine or constant, after a linear warm-up."""

from __future__ import annotations

import math


def schedule_factor(schedule: str, warmup: float, update: int, updates: int) -> float:
    """Return the factor on the peak learning rate in an update: linear warm-up, then decay to 0.

    Args:
        schedule: 'linear', 'cosine' or 'constant'.
        warmup: updates of linear warm-up; the first has 1 / warmup of the peak rate.
        update: number of the update, counted from 0.
        updates: number of updates until the decay ends.
    """
    factor = min(1.0, (update + 1) / warmup) if warmup else 1.0
    left = max(0.0, 1.0 - max(0.0, update - warmup) / max(1.0, updates - warmup))
    if schedule == "linear":
        return factor * left
    if schedule == "cosine":
        return factor * 0.5 * (1.0 - math.cos(math.pi * left))
    return factor
