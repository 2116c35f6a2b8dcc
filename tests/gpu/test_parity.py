"""The CPU and the GPU compute the same numbers in float32: log-probs, gradients, and the metrics of every stage."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.heads import sequence_outputs
from rlhf.models.reward_models import load_scorer
from rlhf.rollout.teacher_forcing import response_logprobs, response_values
from tests.distributed.parity import compare
from tests.gpu.places import CPU, DEVICE, computing_on
from tests.models import tiny
from tests.stages import setup
from tests.tolerances import DEVICES, distance
from tests.trainers import setup as trainers

FLOAT32 = {"precision": "float32"}


@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_values_scores_and_gradients(packed: bool, device: torch.device, reward_folder: str) -> None:
    models = [tiny.new(1), load_scorer(tiny.source(reward_folder))]
    rollout = tiny.rollout(3, [4, 9, 2], [5, 1, 8])

    def numbers(place: torch.device) -> list[torch.Tensor]:
        policy, scorer = (copy.deepcopy(model).to(place) for model in models)
        policy._can_pack = scorer._can_pack = packed
        part = rollout.to(place)
        logprobs, entropy = response_logprobs(policy, part, 0.9, entropy=True)
        values = response_values(scorer, part)
        (logprobs.sum() + values.sum()).backward()
        assert entropy is not None
        assert logprobs.device.type == values.device.type == place.type
        scores = sequence_outputs(scorer, part.ids, part.mask)
        gradients = (trainers.gradient(model) for model in (policy, scorer))
        return [x.detach().cpu() for x in (logprobs, entropy, values, scores, *gradients)]

    *ours, policy_gradient, scorer_gradient = numbers(device)
    *theirs, policy_expected, scorer_expected = numbers(torch.device("cpu"))
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).abs().max()) < DEVICES
    assert distance(policy_gradient, policy_expected) < DEVICES
    assert distance(scorer_gradient, scorer_expected) < DEVICES


@pytest.fixture(scope="module")
def on_both(tiny_model_dir: Path, files: setup.Files, run_stage: Any, tmp_path_factory: Any) -> tuple[Path, Path]:
    """Runs of SFT, reward model and PPO on the device and on the CPU, each from the models that the CPU has made."""
    top = tmp_path_factory.mktemp("places")
    for place in (CPU, DEVICE):
        with computing_on(place):
            for name, config in setup.configs(top / CPU, str(tiny_model_dir), files).items():
                if name in ("sft", "reward", "ppo"):
                    changed = {"output_dir": str(top / place / name), "optim": config["optim"] | FLOAT32}
                    run_stage(name, config | changed)
    return top / DEVICE, top / CPU


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_metrics_of_a_stage(stage: str, on_both: tuple[Path, Path]) -> None:
    ours, theirs = on_both
    apart = compare(ours / stage, theirs / stage, stage)
    assert apart
    assert {name: value for name, value in apart.items() if not value < DEVICES} == {}


def test_a_ppo_step_on_the_same_rollout(device: torch.device, reward_folder: str) -> None:
    def make() -> Any:
        return trainers.make(reward_folder, optim={**trainers.OPTIM, **FLOAT32})

    with computing_on(CPU):
        trainer = make()
        assert trainer.accelerator.device.type == CPU
        rollout = trainer.sample()
        expected = trainer.score(rollout)
        losses = trainer.update(expected)
    with computing_on(DEVICE):
        trainer = make()
        assert trainer.accelerator.device.type == device.type
        found = trainer.score(rollout.to(trainer.accelerator.device))
        stats = trainer.update(found)
    for name in ("old_logprobs", "ref_logprobs", "values", "raw_scores", "rewards", "advantages"):
        mine, other = getattr(found, name), getattr(expected, name)
        assert mine.device.type == device.type
        assert float((mine.cpu() - other).abs().max()) < DEVICES, name
    for name in ("policy_loss", "value_loss", "approx_kl", "entropy", "grad_norm"):
        assert stats[name] == pytest.approx(losses[name], rel=DEVICES, abs=DEVICES), name


def test_accelerate_chooses_its_device_anew_after_a_change_of_place() -> None:
    from accelerate.state import PartialState

    with computing_on(CPU):
        assert os.environ["ACCELERATE_USE_CPU"] == "true"
        assert PartialState(cpu=True).device.type == CPU
    assert PartialState._shared_state == {}
    assert "ACCELERATE_USE_CPU" not in os.environ
