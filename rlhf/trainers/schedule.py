"""How the learning rates of PPO change over a run."""

from __future__ import annotations

import math

from rlhf.config.ppo import PPOOptim


def rate_factor(optim: PPOOptim, update: int, updates: int) -> float:
    """What multiplies the learning rates in an update (counted from 0) of `updates`: warm-up, then decay to 0."""
    warmup = optim.warmup_fraction * updates
    factor = min(1.0, (update + 1) / warmup) if warmup else 1.0
    left = max(0.0, 1.0 - max(0.0, update - warmup) / max(1.0, updates - warmup))
    if optim.schedule == "linear":
        return factor * left
    if optim.schedule == "cosine":
        return factor * 0.5 * (1.0 - math.cos(math.pi * left))
    return factor
