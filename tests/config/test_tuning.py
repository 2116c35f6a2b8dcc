"""Validation of selections of weights and of training phases."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config.schema import PPOConfig, RewardConfig, SFTConfig
from rlhf.config.tuning import Selection, TrainingPhase

SFT: dict[str, Any] = {"output_dir": "x", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}}
PPO: dict[str, Any] = {
    "output_dir": "x",
    "policy": {"path": "m"},
    "reward_model": {"path": "r"},
    "data": {"prompts": [{"path": "d"}]},
}


@pytest.mark.parametrize("layers", ["0-", "a", "1-2-3", "", "50%", True, 1.5, [0]])
def test_no_range_of_blocks(layers: Any) -> None:
    with pytest.raises(ValidationError, match="expected"):
        Selection(layers=layers)


@pytest.mark.parametrize("amount", [0, "0%", "101%", -1, "x", True])
def test_no_number_of_blocks(amount: Any) -> None:
    for field in ("first", "last"):
        with pytest.raises(ValidationError, match="expected"):
            Selection(**{field: amount})


def test_a_broken_pattern() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        Selection(names=("re:(",))


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({}, "exactly one of epochs and updates"),
        ({"epochs": 1, "updates": 1}, "exactly one"),
        ({"epochs": 1, "train": {}}, "the selection is empty"),
        ({"epochs": 1, "train": "bottom-up"}, "top-down"),
    ],
)
def test_no_phase(phase: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainingPhase.model_validate(phase)


@pytest.mark.parametrize("name", ["epochs", "max_updates", "patience"])
def test_the_length_of_a_run_is_said_once(name: str) -> None:
    phases = [{"train": "all", "epochs": 1}]
    SFTConfig.model_validate(SFT | {"unfreeze": phases})
    with pytest.raises(ValidationError, match=f"remove optim.{name}"):
        RewardConfig.model_validate(SFT | {"unfreeze": phases, "optim": {name: 7}})


def test_only_the_last_phase_of_ppo_is_open() -> None:
    phases = [{"train": {"last": 1}, "steps": 2}, {"train": "all"}]
    made = PPOConfig.model_validate(PPO | {"unfreeze": {"policy": phases}})
    assert [phase.steps for phase in made.unfreeze.policy] == [2, None]
    with pytest.raises(ValidationError, match="value_model: only the last phase"):
        PPOConfig.model_validate(PPO | {"unfreeze": {"value_model": phases[::-1]}})
