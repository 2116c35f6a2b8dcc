"""PPO with four adapters on one base is PPO with four models: the same rollouts, numbers and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.models.adapters import adapter_parameters, policy_with_adapter
from rlhf.models.roles import REWARD, VALUE, put_on
from rlhf.models.scorers import load_scorer, new_reward_model
from rlhf.trainers.ppo import PPOTrainer
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close
from tests.trainers.setup import make, reward_of

SETTINGS: dict[str, Any] = {"peft": {"method": "lora", "r": tiny.LORA.r, "alpha": tiny.LORA.alpha}}


@pytest.fixture(scope="module")
def rewarder(adapter_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model that continues the SFT adapter."""
    model = new_reward_model(
        tiny.source(adapter_folder), tiny.LORA, pad_id=tiny.renderer().pad_id, vocab_size=len(tiny.tokenizer()), seed=3
    )
    return tiny.save(shake(model, 8), tmp_path_factory.mktemp("reward"), with_tokenizer=False)


def trainer(sft: str, reward: str, *, shared: bool, report: Any = None, **sections: Any) -> PPOTrainer:
    policy = policy_with_adapter(tiny.source(sft), tiny.LORA)
    if shared:
        scorer: Any = put_on(policy, tiny.source(reward), REWARD)
        value: Any = put_on(policy, tiny.source(reward), VALUE, trainable=True)
    else:
        scorer = load_scorer(tiny.source(reward)).requires_grad_(False)
        value = load_scorer(tiny.source(reward), trainable=True, peft=tiny.LORA)
    made = make(
        "", policy=policy, value_model=value, reward_model=scorer, rewards=reward_of(scorer), report=report,
        **SETTINGS | sections,
    )  # fmt: skip
    made.reference = None  # the policy is an adapter over it
    return made


@pytest.mark.parametrize("sections", [{}, {"ppo": {"ema": 0.5, "value_warmup": 1}}], ids=["plain", "warm-up and ema"])
def test_shared_and_separate_roles_train_alike(sections: dict[str, Any], adapter_folder: str, rewarder: str) -> None:
    lines: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    trained = {}
    for shared in (True, False):
        trained[shared] = trainer(
            adapter_folder, rewarder, shared=shared, report=lambda _, __, s, to=lines[shared]: to.append(s), **sections
        )
        trained[shared].train()
    for ours, theirs in zip(lines[True], lines[False], strict=True):
        assert {k: v for k, v in ours.items() if "time" not in k} == pytest.approx(
            {k: v for k, v in theirs.items() if "time" not in k}, rel=1e-4, abs=1e-5
        )
    one, other = trained[True].model, trained[False].model
    for name, p in adapter_parameters(one.policy, "default").items():
        assert_close(p.detach(), other.policy.get_parameter(name).tolist())
    assert_close(one.value_model.score.weight.detach(), _head(other.value_model).tolist())
    if trained[True].average is not None:
        assert set(trained[True].average.weights) == set(trained[False].average.weights)


def test_only_the_two_trained_adapters_move(adapter_folder: str, rewarder: str) -> None:
    made = trainer(adapter_folder, rewarder, shared=True)
    before = tiny.snapshot(made.model.policy)
    made.train()
    trained = {*adapter_parameters(made.model.policy, "default"), *adapter_parameters(made.model.policy, VALUE)}
    assert tiny.moved(made.model.policy, before) == trained


def test_while_the_value_model_warms_up_the_policys_adapter_waits(adapter_folder: str, rewarder: str) -> None:
    made = trainer(adapter_folder, rewarder, shared=True, ppo={"value_warmup": 2})
    before = tiny.snapshot(made.model.policy)
    made.train()
    assert tiny.moved(made.model.policy, before) == set(adapter_parameters(made.model.policy, VALUE))


def _head(value_model: Any) -> torch.Tensor:
    weight: torch.Tensor = next(p for n, p in value_model.named_parameters() if "score" in n and "default" in n)
    return weight.detach()
