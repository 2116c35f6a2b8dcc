"""Tests of phase schedules: when a phase ends, what it trains and at which rate. No model is trained here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.sections import Optim
from rlhf.config.tuning import EMPTY_SELECTION, PPOPhase, Selection, TrainingPhase
from rlhf.errors import ConfigError
from rlhf.models.parameter_selection import ParameterMap, ParameterPlace
from rlhf.trainers.lr_schedule import schedule_factor
from rlhf.trainers.phase_schedule import (
    PhaseSchedule,
    ResolvedPhase,
    make_ppo_schedule,
    make_schedule,
    parameter_rate_factors,
    phase_table,
)

BLOCKS = 3
PLACES = {
    "embed": ParameterPlace(None, "embeddings", 0),
    **{f"b{i}": ParameterPlace(i, "mlp", i + 1) for i in range(BLOCKS)},
    "norm": ParameterPlace(None, "norms", BLOCKS + 1),
    "score": ParameterPlace(None, "score", BLOCKS + 1),
}
PARAMETERS = ParameterMap(PLACES, BLOCKS, tied=False)
HEAD, LAST, ALL = frozenset({"score"}), frozenset({"score", "b2"}), frozenset(PLACES)


def schedule_of_lengths(*lengths: int, patience: int | None = None) -> PhaseSchedule:
    return PhaseSchedule(tuple(ResolvedPhase(ALL, n, 1.0, patience=patience) for n in lengths), {})


def made(
    unfreeze: Sequence[TrainingPhase] = (), freeze: Selection = EMPTY_SELECTION, per_epoch: int = 10, **optim: Any
) -> PhaseSchedule:
    settings = Optim(**{"learning_rate": 0.1, "schedule": "constant"} | optim)
    factors = parameter_rate_factors(PARAMETERS, layer_decay=settings.layer_decay, head_factor=settings.head_factor)
    plan = SupervisedPlan(settings, 1, per_epoch * settings.batch_size)
    return make_schedule(PARAMETERS, plan, freeze=freeze, unfreeze=unfreeze, factors=factors)


def test_phases_follow_one_another() -> None:
    schedule = schedule_of_lengths(3, 2, 4)
    places = [schedule.position(done) for done in range(10)]
    assert [place.phase for place in places] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert [place.start for place in places] == [0, 0, 0, 3, 3, 5, 5, 5, 5, 9]
    assert [place.finished for place in places] == [False] * 9 + [True]


LOSSES = [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0), (10, 1.0), (12, 0.9), (14, 1.5), (16, 1.5), (18, 1.5)]
"""With patience 2 the first phase ends after 8 updates. The second counts its own losses only and ends after 16."""


def test_patience_ends_a_phase_and_the_next_one_has_its_own() -> None:
    schedule = schedule_of_lengths(100, 100, patience=2)
    wanted = {7: (0, 0), 8: (1, 8), 12: (1, 8), 15: (1, 8)}
    assert {d: (schedule.position(d, LOSSES).phase, schedule.position(d, LOSSES).start) for d in wanted} == wanted
    assert schedule.position(16, LOSSES).finished


def test_what_is_known_later_does_not_change_where_a_run_was() -> None:
    """A resumed run is in the right phase: at any update the phase depends only on the evaluations until then."""
    schedule = schedule_of_lengths(5, 100, 100, patience=2)
    for done in range(20):
        known = [line for line in LOSSES if line[0] <= done]
        assert schedule.position(done, known) == schedule.position(done, LOSSES)


def test_an_equal_loss_is_no_lower_loss() -> None:
    schedule = schedule_of_lengths(100, patience=2)
    assert schedule.position(6, [(2, 1.0), (4, 1.0), (6, 1.0)]).finished
    assert not schedule.position(6, [(2, 1.0), (4, 0.9), (6, 0.9)]).finished


def test_a_loss_that_is_no_number_is_no_improvement() -> None:
    assert schedule_of_lengths(100, patience=2).position(4, [(2, math.nan), (4, math.nan)]).finished


def test_a_run_without_phases_is_one() -> None:
    schedule = made(epochs=2, patience=3)
    assert [(s.names, s.length, s.patience) for s in schedule.phases] == [(ALL, 20, 3)]
    assert made(epochs=0.01).updates == 1
    assert made(epochs=2, max_updates=5).updates == 5


def test_probe_then_fine_tune() -> None:
    schedule = made(
        [
            TrainingPhase(
                train=Selection(parts=("score",)), epochs=3, learning_rate=1.0, warmup_fraction=0.5, schedule="linear"
            ),
            TrainingPhase(train="all", updates=7),
        ],
    )
    probe, tune = schedule.phases
    assert (probe.names, probe.length, probe.learning_rate, probe.warmup, probe.schedule) == (
        HEAD,
        30,
        1.0,
        15,
        "linear",
    )
    assert (tune.names, tune.length, tune.learning_rate, tune.schedule) == (ALL, 7, 0.1, "constant")


def test_top_down_ends_with_everything_and_never_freezes_again() -> None:
    schedule = made([TrainingPhase(train="top-down", updates=2)])
    assert [len(s.names) for s in schedule.phases] == [3, 4, 5, 6]
    assert schedule.phases[0].names == {"score", "norm", "b2"}
    assert all(before.names < after.names for before, after in pairwise(schedule.phases))


def test_what_is_frozen_is_in_no_phase() -> None:
    schedule = made([TrainingPhase(train="top-down", updates=2)], Selection(parts=("embeddings",), layers="0"))
    assert schedule.names == ALL - {"embed", "b0"}


def test_nothing_left_to_train() -> None:
    with pytest.raises(ConfigError, match=r"nothing is left to train \(found: 6 of 6"):
        made(freeze=Selection(names=("*",)))
    with pytest.raises(ConfigError, match=r"unfreeze\[1\]: nothing is left"):
        made(
            [TrainingPhase(updates=1), TrainingPhase(train=Selection(parts=("score",)), updates=1)],
            Selection(parts=("score",)),
        )


def test_layer_decay_falls_towards_the_input() -> None:
    factors = parameter_rate_factors(PARAMETERS, layer_decay=0.5, head_factor=10.0)
    assert factors == {"embed": 1 / 16, "b0": 1 / 8, "b1": 1 / 4, "b2": 1 / 2, "norm": 1.0, "score": 10.0}
    assert set(parameter_rate_factors(PARAMETERS, layer_decay=1.0, head_factor=1.0).values()) == {1.0}


def test_groups_hold_together_what_begins_and_ends_together_and_waits_with_rate_0() -> None:
    schedule = made(
        [
            TrainingPhase(train=Selection(parts=("score",)), updates=2, learning_rate=1.0),
            TrainingPhase(train="all", updates=2),
        ],
        layer_decay=0.5,
    )
    groups = schedule.groups(frozenset({"norm"}))
    assert sorted(name for group in groups for name in group.names) == sorted(ALL)
    assert groups[0].names == ("score",)
    assert [group.names for group in groups if not group.decays] == [("norm",)]
    probe, tune = (schedule.rates(groups, done, schedule.position(done)) for done in (0, 2))
    assert [rate > 0 for rate in probe] == [group.names == ("score",) for group in groups]
    assert all(rate > 0 for rate in tune)
    by_name = {name: rate for group, rate in zip(groups, tune, strict=True) for name in group.names}
    assert by_name["b2"] / by_name["b1"] == 2.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_each_phase_has_a_schedule_of_its_own(schedule: Any) -> None:
    phase = {"schedule": schedule, "warmup_fraction": 0.2, "updates": 10}
    run = made([TrainingPhase(**phase, learning_rate=1.0), TrainingPhase(**phase, learning_rate=0.5)])
    groups = run.groups()
    rates = [run.rates(groups, done, run.position(done))[0] for done in range(20)]
    assert rates[10:] == [0.5 * rate for rate in rates[:10]]
    assert rates[0] == 0.5
    assert max(rates[:10]) == rates[1] == 1.0
    assert (rates[9] < 0.2) is (schedule != "constant")


def test_the_factor_of_a_rate() -> None:
    assert [schedule_factor("linear", 0, u, 4) for u in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert schedule_factor("cosine", 0, 2, 4) == pytest.approx(0.5)
    assert [schedule_factor("constant", 4, u, 8) for u in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_phases_of_ppo_and_the_rest_of_the_run() -> None:
    phases = [PPOPhase(train=Selection(last=1), steps=2, learning_rate=3.0), PPOPhase()]
    schedule = make_ppo_schedule(
        PARAMETERS, freeze=EMPTY_SELECTION, unfreeze=phases, steps=5, learning_rate=1.0, where="policy", factors={}
    )
    assert [schedule.position(step).phase for step in range(5)] == [0, 0, 1, 1, 1]
    assert [s.learning_rate for s in schedule.phases] == [3.0, 1.0]
    short = make_ppo_schedule(
        PARAMETERS,
        freeze=EMPTY_SELECTION,
        unfreeze=[PPOPhase(steps=2)],
        steps=5,
        learning_rate=1.0,
        where="policy",
        factors={},
    )
    assert short.position(4).phase == 0  # a run longer than its phases stays in the last
    with pytest.raises(ConfigError, match=r"freeze\.policy: nothing is left"):
        make_ppo_schedule(
            PARAMETERS,
            freeze=Selection(names=("*",)),
            unfreeze=(),
            steps=1,
            learning_rate=1.0,
            where="policy",
            factors={},
        )


def test_the_table_says_what_is_trained_when_and_how_fast() -> None:
    schedule = made(
        [
            TrainingPhase(train=Selection(parts=("score",)), updates=2, learning_rate=1.0),
            TrainingPhase(train="all", updates=2),
        ],
        Selection(parts=("embeddings",)),
    )
    header, rows = phase_table(PARAMETERS, dict.fromkeys(PLACES, 1000), schedule)
    assert header == ["weights", "tensors", "parameters", "trained", "in phases", "peak rate"]
    assert rows == [
        ["embeddings", "1", "1,000", "0", "never", "-"],
        ["blocks 0 to 2, each", "1", "1,000", "1,000", "2", "0.1"],
        ["norms", "1", "1,000", "1,000", "2", "0.1"],
        ["score", "1", "1,000", "1,000", "1-2", "0.1 to 1"],
    ]
