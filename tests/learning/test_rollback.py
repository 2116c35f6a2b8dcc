"""A learning-rate spike ruins a run; with `watch.unhealthy=rollback` it ends no worse than where it began."""

from __future__ import annotations

import pytest

from rlhf.trainers.ppo import health
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.learning import optimum
from tests.trainers.setup import spiked

BETA, STEPS = 0.3, 30


def spike(trainer: PPOTrainer) -> None:
    spiked(trainer, at=8, size=300.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_rolls_back_ends_better_than_it_began(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the problem stands for the SFT model: what is compared is exact, by enumeration."""
    # Most responses of this problem reach the limit of four tokens: that is no trouble here.
    monkeypatch.setattr(health, "HEALTH_METRICS", ("kl", "approx_kl", "clip_fraction"))
    ruined = optimum.solve(BETA, seed, steps=STEPS, change=spike, tables=False)
    saved = optimum.solve(
        BETA, seed, steps=STEPS, change=spike, tables=False, watch={"unhealthy": "rollback", "kl_factor": 1.0}
    )
    assert ruined.share < 0.0  # worse than the reference: the spike is no mild one
    assert saved.share > 0.3
