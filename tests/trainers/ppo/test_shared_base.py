"""PPO with four adapters on one base is PPO with four models: the same rollouts, numbers and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config.sections import Peft
from rlhf.models.adapters import adapter_parameters, add_adapter
from rlhf.models.policy import load_causal, policy_with_adapter
from rlhf.models.reward_models import load_scorer
from rlhf.models.shared_base import REWARD, VALUE, attach_scorer
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny
from tests.models.fixtures import rewarder_of, shake
from tests.tolerances import assert_close
from tests.trainers.setup import make, reward_of


def settings(peft: Peft) -> dict[str, Any]:
    return {"peft": peft.model_dump()}


def trainer(
    sft: str, reward: str, *, shared: bool, report: Any = None, peft: Peft = tiny.LORA, **sections: Any
) -> PPOTrainer:
    policy = policy_with_adapter(tiny.source(sft), peft)
    if shared:
        scorer: Any = attach_scorer(policy, tiny.source(reward), REWARD)
        value: Any = attach_scorer(policy, tiny.source(reward), VALUE, trainable=True)
    else:
        scorer = load_scorer(tiny.source(reward)).requires_grad_(False)
        value = load_scorer(tiny.source(reward), trainable=True, peft=peft)
    made = make(
        "",
        policy=policy,
        value_model=value,
        reward_model=scorer,
        rewards=reward_of(scorer),
        report=report,
        **settings(peft) | sections,
    )
    made.models.reference = None  # the policy is an adapter over it
    return made


def check_alike(sft: str, reward: str, peft: Peft, **sections: Any) -> dict[bool, list[dict[str, float]]]:
    """Train with shared and with separate roles, and return the metrics of each."""
    lines: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    trained = {}
    for shared in (True, False):
        trained[shared] = trainer(
            sft, reward, shared=shared, report=lambda _, __, s, to=lines[shared]: to.append(s), peft=peft, **sections
        )
        trained[shared].train()
    for ours, theirs in zip(lines[True], lines[False], strict=True):
        assert {k: v for k, v in ours.items() if "time" not in k} == pytest.approx(
            {k: v for k, v in theirs.items() if "time" not in k}, rel=1e-4, abs=1e-5
        )
    one, other = trained[True].models.trained, trained[False].models.trained
    for name, p in adapter_parameters(one.policy, "default").items():
        assert_close(p.detach(), other.policy.get_parameter(name).tolist())
    assert_close(one.value_model.score.weight.detach(), _head(other.value_model).tolist())
    if trained[True].models.average is not None:
        assert set(trained[True].models.average.weights) == set(trained[False].models.average.weights)
    return lines


@pytest.mark.parametrize("sections", [{}, {"ppo": {"ema": 0.5, "value_warmup": 1}}], ids=["plain", "warm-up and ema"])
def test_shared_and_separate_roles_train_alike(sections: dict[str, Any], adapter_folder: str, rewarder: str) -> None:
    check_alike(adapter_folder, rewarder, tiny.LORA, **sections)


@pytest.mark.parametrize("name", ["rsLoRA", "DoRA", "IA3"])
def test_other_methods_train_alike_too_and_start_at_a_ratio_of_1(name: str, sft_folder: str, tmp_path: Any) -> None:
    peft = tiny.METHODS[name]
    sft = tiny.save(shake(add_adapter(load_causal(tiny.source(sft_folder)), peft, "CAUSAL_LM")), tmp_path / "sft")
    lines = check_alike(sft, rewarder_of(sft, peft, tmp_path / "reward"), peft)
    for steps in lines.values():
        assert [line["first_ratio_error"] for line in steps] == pytest.approx([0.0, 0.0], abs=1e-5)
        assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-5)
        assert abs(steps[1]["kl"]) > 1e-3  # it has moved


def test_only_the_two_trained_adapters_move(adapter_folder: str, rewarder: str) -> None:
    made = trainer(adapter_folder, rewarder, shared=True)
    before = tiny.snapshot(made.models.trained.policy)
    made.train()
    trained = {
        *adapter_parameters(made.models.trained.policy, "default"),
        *adapter_parameters(made.models.trained.policy, VALUE),
    }
    assert tiny.moved(made.models.trained.policy, before) == trained


def test_while_the_value_model_warms_up_the_policys_adapter_waits(adapter_folder: str, rewarder: str) -> None:
    made = trainer(adapter_folder, rewarder, shared=True, ppo={"value_warmup": 2})
    before = tiny.snapshot(made.models.trained.policy)
    made.train()
    assert tiny.moved(made.models.trained.policy, before) == set(adapter_parameters(made.models.trained.policy, VALUE))


def _head(value_model: Any) -> torch.Tensor:
    weight: torch.Tensor = next(p for n, p in value_model.named_parameters() if "score" in n and "default" in n)
    return weight.detach()
