"""One plan for `rlhf check` and the stages: what is checked is what runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.ppo import PPO
from rlhf.config.run_plan import PPOPlan, SupervisedPlan
from rlhf.config.sections import Optim
from rlhf.config.tuning import TrainingPhase
from rlhf.errors import ConfigError
from tests.stages import setup
from tests.stages.setup import metrics


def test_batches_are_shared_and_the_last_one_is_filled_up() -> None:
    plan = SupervisedPlan(Optim(batch_size=8, microbatch_size=2, epochs=3), processes=2, rows=21)
    assert (plan.microbatch, plan.accumulation) == (2, 2)
    assert (plan.updates_per_epoch, plan.filled_rows, plan.updates()) == (3, 3, 9)
    assert plan.describe("pairs") == "batch: 2 processes x 2 pairs x 2 accumulation = 8 pairs per update"
    short = SupervisedPlan(Optim(batch_size=8, microbatch_size=2, epochs=3, max_updates=4), processes=1, rows=21)
    assert short.updates() == 4
    with pytest.raises(ConfigError, match="cannot be shared equally"):
        _ = SupervisedPlan(Optim(batch_size=8, microbatch_size=2), processes=3, rows=21).accumulation


def test_phases_count_updates_or_epochs() -> None:
    plan = SupervisedPlan(Optim(batch_size=8, microbatch_size=8), processes=1, rows=21)
    assert plan.updates((TrainingPhase(updates=5), TrainingPhase(epochs=0.1), TrainingPhase(epochs=2))) == 5 + 1 + 6


def test_a_rollout_is_shared_by_processes_and_minibatches() -> None:
    plan = PPOPlan(PPO(steps=5, rollout_size=24, epochs=2, minibatches=3), processes=2)
    assert (plan.episodes, plan.updates_per_step, plan.updates) == (120, 6, 30)
    assert "24 episodes a step = 2 processes x 12; 2 epochs x 3 minibatches of 8 = 6 updates a step" in plan.describe()


@pytest.mark.parametrize("stage", ["sft", "reward", "classify", "ppo"])
def test_what_is_checked_is_what_runs(stage: str, full: Any, call_cli: Any, tmp_path: Path) -> None:
    """The number of updates that check foretells is that of the finished run."""
    path = setup.write(tmp_path, stage, full.configs[stage])
    code, out, err = call_cli(["check", path])
    assert code == 0, err
    foretold = re.search(r"run: .*?([\d,]+) updates", out)
    assert foretold is not None, out
    lines = metrics(full.run(stage))
    made = sum(line["updates"] for line in lines) if stage == "ppo" else max(line["step"] for line in lines)
    assert int(foretold[1].replace(",", "")) == made
