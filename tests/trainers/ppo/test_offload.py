"""Tests of offloading in PPO: the numbers are the same, and each frozen model is moved once per step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.errors import TrainingError
from rlhf.models.offload import OffloadedModels
from rlhf.models.reward_models import load_scorer
from rlhf.rollout.rewards import EnsembleReward, FunctionReward, ModelReward, Rewards
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny
from tests.trainers.setup import make, reward_of

BOTH = ["reference", "reward"]


def travelling(folder: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[PPOTrainer, list[str]]:
    """Return a trainer with (simulated) offloaded frozen models, and a list of their transfers.

    The models are not really moved, so that they can compute.
    """
    models = {"reference": tiny.new(2).requires_grad_(False), "reward": load_scorer(tiny.source(folder))}
    log: list[str] = []
    for name, model in models.items():
        monkeypatch.setattr(model, "to", lambda device, name=name: log.append(f"{name} to {device}"))
    trainer = make(
        folder, reference=models["reference"], rewards=reward_of(models["reward"]), **{"offload": BOTH} | options
    )
    members = {name: [model] for name, model in models.items()}
    trainer.models.offloaded = OffloadedModels(torch.device("meta"), trainer.settings.offload, **members)
    log.clear()
    return trainer, log


def test_each_goes_once_a_step_and_never_both_at_a_time(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, log = travelling(reward_folder, monkeypatch)
    sample, update = trainer.sample, trainer.update
    monkeypatch.setattr(trainer, "sample", lambda: (log.append("sample"), sample())[1])
    monkeypatch.setattr(trainer, "update", lambda e: (log.append("update"), update(e))[1])
    trainer.train()
    step = ["sample", "reward to meta", "reward to cpu", "reference to meta", "reference to cpu", "update"]
    assert log == step * trainer.settings.steps


@pytest.mark.parametrize("offload", [BOTH, ["reference"], ["reward"]])
def test_the_numbers_are_those_of_a_run_without(
    offload: list[str], reward_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: dict[str, list[dict[str, float]]] = {"stays": [], "rests": [], "config": []}
    reports = {name: (lambda _, __, stats, name=name: lines[name].append(stats)) for name in lines}
    make(reward_folder, report=reports["stays"]).train()
    travelling(reward_folder, monkeypatch, offload=offload, report=reports["rests"])[0].train()
    make(reward_folder, offload=offload, report=reports["config"]).train()
    plain = {name: [{k: v for k, v in s.items() if "time" not in k} for s in found] for name, found in lines.items()}
    assert len(plain["stays"]) == 2
    assert plain["rests"] == plain["stays"] == plain["config"]


def test_an_error_while_scoring_leaves_them_at_rest(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, log = travelling(reward_folder, monkeypatch, watch={"broken": "stop"})
    rewards = trainer.models.rewards.parts[0][1]
    assert isinstance(rewards, ModelReward)
    rewards.model.score.register_forward_hook(lambda _, __, out: out + torch.rand(()))  # never twice the same
    with pytest.raises(TrainingError, match="another score the second time"):
        trainer.score(trainer.sample())
    assert log == ["reward to meta", "reward to cpu"]
    log.clear()
    trainer, log = travelling(reward_folder, monkeypatch)
    trainer.models.reference.register_forward_hook(lambda *_: pytest.fail("no room"))  # type: ignore[union-attr]
    with pytest.raises(pytest.fail.Exception, match="no room"):
        trainer.score(trainer.sample())
    assert log[-2:] == ["reference to meta", "reference to cpu"]


def test_every_model_of_the_reward_is_known(reward_folder: str) -> None:
    def member() -> ModelReward:
        return ModelReward("m", load_scorer(tiny.source(reward_folder)), tiny.renderer())

    one, two, three = member(), member(), member()
    function = FunctionReward("f", lambda *_: 0.0, tiny.renderer())
    found = Rewards(((1.0, one), (0.5, function), (2.0, EnsembleReward((two, three), "mean", 0.0)))).models()
    assert [id(model) for model in found] == [id(part.model) for part in (one, two, three)]
