"""PPO reaches the known optimum of a problem that can be enumerated, and not with the KL penalty's sign turned."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.learning import optimum
from tests.tolerances import assert_close


def test_the_enumeration_is_complete() -> None:
    policy, _, _ = optimum.models(1)
    assert len(optimum.responses()) == 781
    assert_close(optimum.log_distribution(policy).exp().sum(dim=1).float(), [1.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("beta", optimum.BETAS)
def test_most_of_the_achievable_improvement_is_reached(beta: float) -> None:
    """A third of the steps of the table in configs/LOG.md, one of its seeds."""
    found = optimum.solve(beta, 1, steps=60)
    assert found.share > 0.9
    assert abs(found.kl / found.best_kl - 1) < 0.2


@pytest.mark.slow
def test_a_penalty_of_the_wrong_sign_does_not_get_there() -> None:
    def turn(trainer: PPOTrainer) -> None:
        trainer.state.kl_coef = -1.0

    assert optimum.solve(1.0, 1, steps=40, change=turn).share < 0.3


def test_the_optimum_is_no_less_than_any_policy() -> None:
    """J* by the formula against a few policies tilted towards the reward."""
    policy, reference, _ = optimum.models(2)
    table, ref = optimum.Table(2), optimum.log_distribution(reference)
    best = float(0.3 * (ref + table.values / 0.3).logsumexp(dim=1).mean())
    for tilt in (0.0, 1.0, 1 / 0.3, 10.0):
        log_pi = torch.log_softmax(ref + tilt * table.values, dim=1)
        value = ((log_pi.exp() * table.values).sum(dim=1) - 0.3 * (log_pi.exp() * (log_pi - ref)).sum(dim=1)).mean()
        assert float(value) <= best + 1e-9
        if tilt == 1 / 0.3:
            assert math.isclose(float(value), best, abs_tol=1e-9)
    assert policy is not reference
