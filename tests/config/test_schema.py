"""Rules between values: batch arithmetic, one sampling distribution in PPO, a reference that is a model."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config.schema import EvaluateConfig, PPOConfig, SFTConfig
from rlhf.config.sections import split_batch
from rlhf.errors import ConfigError

PPO = {"output_dir": "x", "policy": {"path": "p"}, "reward_model": {"path": "r"}, "data": {"prompts": [{"path": "d"}]}}


@pytest.mark.parametrize(
    ("batch", "microbatch", "processes", "accumulation"),
    [(64, 16, 1, 4), (64, 16, 2, 2), (64, 16, 4, 1), (8, 16, 1, 1), (6, 16, 3, 1), (5, 1, 1, 5)],
)
def test_a_batch_is_processes_times_microbatch_times_accumulation(
    batch: int, microbatch: int, processes: int, accumulation: int
) -> None:
    assert split_batch(batch, microbatch, processes, "optim") == accumulation
    assert processes * min(microbatch, batch // processes) * accumulation == batch


def test_a_batch_that_processes_cannot_share_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"^optim\.batch_size: batch_size 10 .* by 4 processes; use one of the nearest: 8, 12$"
    ):
        split_batch(10, 2, 4, "optim")


def test_a_batch_smaller_than_the_processes_names_only_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"nearest: 4$"):
        split_batch(3, 2, 4, "optim")


def test_a_share_that_is_no_whole_number_of_microbatches_names_the_divisors() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.microbatch_size: 12 sequences .* choose one of 1, 2, 3, 4, 6, 12$"):
        split_batch(24, 5, 2, "optim")


def test_ppo_refuses_greedy_rollouts() -> None:
    with pytest.raises(ValidationError, match="PPO needs more than 0"):
        PPOConfig.model_validate(PPO | {"sampling": {"temperature": 0}})


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9, "top_k": 50, "temperature": 0.7}])
def test_ppo_samples_at_any_positive_temperature_and_under_any_filter(sampling: dict[str, float]) -> None:
    found = PPOConfig.model_validate(PPO | {"sampling": sampling}).sampling
    assert found.model_dump(include=set(sampling)) == sampling


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"offload": ["reference"], "peft": {"method": "lora"}},
            "offload: with peft.method=lora the reference is the policy's base",
        ),
        ({"offload": ["reward"], "reward_model": None, "rewards": [{"function": "a:b"}]}, "only functions"),
        ({"offload": ["policy"]}, "'reference' or 'reward'"),
    ],
)
def test_only_a_frozen_model_that_there_is_can_be_offloaded(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PPOConfig.model_validate(PPO | changes)


def test_any_reward_model_will_do_to_be_offloaded() -> None:
    other = {"reward_model": None, "rewards": [{"function": "a:b"}, {"model": {"path": "m"}}]}
    assert PPOConfig.model_validate(PPO | other | {"offload": ["reward"]}).offload == ("reward",)
    assert PPOConfig.model_validate(PPO | {"offload": ["reward"], "peft": {"method": "lora"}}).offload == ("reward",)


def test_the_reference_of_an_evaluation_is_one_of_its_models() -> None:
    values = {"output_dir": "x", "models": {"a": {"path": "p"}}, "prompts": {"s": {"path": "d"}}}
    with pytest.raises(ValidationError, match="reference 'b' is not one of models: a"):
        EvaluateConfig.model_validate(values | {"reference": "b"})
    assert EvaluateConfig.model_validate(values | {"reference": "a"}).reference == "a"


def test_a_configuration_is_frozen() -> None:
    config = SFTConfig.model_validate({"output_dir": "x", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}})
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2


MODEL = {"path": "m"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "exactly one of"),
        ({"model": MODEL, "function": "a:b"}, "exactly one of"),
        ({"ensemble": [MODEL]}, "two members"),
        ({"model": MODEL, "combine": "worst"}, "an ensemble only"),
        ({"classifier": MODEL}, "needs a label"),
        ({"classifier": MODEL, "label": {}}, "needs a label"),
        ({"model": MODEL, "label": "yes"}, "a classifier only"),
        ({"ensemble": [MODEL, MODEL], "uncertainty_penalty": 0.3}, "has no effect"),
    ],
)
def test_a_part_of_the_reward_says_one_thing(source: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PPOConfig.model_validate(PPO | {"rewards": [source]})


def test_parts_of_the_reward_that_are_whole_pass() -> None:
    sources = [
        {"model": MODEL},
        {"function": "a:b", "weight": -1.0},
        {"classifier": MODEL, "label": {"yes": 1.0, "no": -2.0}},
        {"ensemble": [MODEL, MODEL], "combine": "uncertainty", "uncertainty_penalty": 0.3},
    ]
    assert len(PPOConfig.model_validate(PPO | {"rewards": sources}).rewards) == 4
