"""The interval between checkpoints."""

from __future__ import annotations

import pytest

from rlhf.checkpointing.interval import CheckpointInterval


def share_spent(share: float, cost: float, step: float, steps: int = 20000) -> tuple[float, int]:
    """Return the share of a run's time that went into checkpoints, and their number.

    The arguments are the seconds that a step and a checkpoint take.
    """
    now, spent, count = [0.0], 0.0, 0
    interval = CheckpointInterval(share, lambda: now[0])
    for _ in range(steps):
        now[0] += step
        if interval.due():
            with interval.saving():
                now[0] += cost
            spent, count = spent + cost, count + 1
    return spent / now[0], count


@pytest.mark.parametrize(("cost", "step"), [(0.1, 1.0), (5.0, 0.3), (60.0, 7.0)])
def test_checkpoints_take_no_more_than_their_share(cost: float, step: float) -> None:
    spent, count = share_spent(0.02, cost, step)
    assert 0.01 < spent <= 0.021
    assert count > 5


def test_what_costs_nothing_is_done_at_every_step() -> None:
    assert share_spent(0.02, 0.001, 1.0) == (pytest.approx(0.001, rel=0.01), 20000)


def test_a_share_of_nothing_is_never_due() -> None:
    assert share_spent(0.0, 0.0, 1.0) == (0.0, 0)


def test_the_next_one_waits_for_what_the_last_one_took() -> None:
    now = [0.0]
    interval = CheckpointInterval(0.5, lambda: now[0])
    assert interval.due()
    with interval.saving():
        now[0] += 3.0
    now[0] += 5.9
    assert not interval.due()
    now[0] += 0.1
    assert interval.due()
