"""Tests of a value head on the policy's trunk: the same policy, one trunk, and a gradient through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.models.heads import SharedValueHead
from rlhf.models.load import backbone, count_parameters
from rlhf.models.reward_models import load_scorer
from rlhf.rollout.types import Rollout
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from tests.models import tiny
from tests.tolerances import assert_close
from tests.trainers.setup import gradient, make, sometimes_ending

TEMPERATURE = 0.9


@pytest.fixture
def rollout() -> Rollout:
    return tiny.rollout(1, [3, 8, 1], [4, 2, 9])


def shared(head: float = 0.0) -> PolicyAndValue:
    policy = sometimes_ending(tiny.new(1))
    value = SharedValueHead(policy.config.hidden_size)
    if head:
        torch.nn.init.normal_(value.score.weight, std=head, generator=torch.Generator().manual_seed(1))
    return PolicyAndValue(policy, value)


def test_it_reads_the_policy_as_two_trunks_do_and_starts_at_0(rollout: Rollout, reward_folder: str) -> None:
    one, two = shared(), PolicyAndValue(sometimes_ending(tiny.new(1)), load_scorer(tiny.source(reward_folder)))
    with torch.no_grad():
        ours, theirs = (m.read(rollout, TEMPERATURE, entropy=True) for m in (one, two))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])  # type: ignore[arg-type]
    assert not ours[2].any()
    assert theirs[2].any()
    assert count_parameters(one)[1] == count_parameters(one.policy)[1] + one.policy.config.hidden_size + 1


def test_a_value_is_the_head_on_the_trunks_output_before_its_token(rollout: Rollout) -> None:
    model = shared(1.0)
    with torch.no_grad():
        values = model.read(rollout, TEMPERATURE)[2]
        for row in range(len(values)):
            ids = rollout.ids[row][rollout.mask[row]]
            n = int(rollout.response_mask[row].sum())
            hidden = backbone(model.policy)(ids[None], use_cache=False).last_hidden_state[0, -n - 1 : -1]
            expected = model.value_model.score(hidden)[:, 0]
            assert_close(values[row][rollout.response_mask[row]], expected.tolist())
    assert not values[~rollout.response_mask].any()


def test_the_value_loss_reaches_the_trunk_only_when_it_is_shared(rollout: Rollout, reward_folder: str) -> None:
    two = PolicyAndValue(tiny.new(1), load_scorer(tiny.source(reward_folder)))
    for model, reaches in ((shared(1.0), True), (two, False)):
        model.read(rollout, TEMPERATURE)[2].sum().backward()
        assert bool(gradient(backbone(model.policy)).any()) is reaches


def trained(reward_folder: str, **options: Any) -> Any:
    trainer = make(reward_folder, value_model=shared().value_model, **options)
    trainer.train()
    return trainer


def test_training_moves_head_and_trunk_and_the_first_ratio_is_1(reward_folder: str) -> None:
    lines: list[dict[str, float]] = []
    trainer = trained(reward_folder, report=lambda _, __, stats: lines.append(stats))
    assert trainer.models.trained.value_model.score.weight.any()
    assert all(line["first_ratio_error"] < 1e-5 for line in lines)
    assert lines[0]["explained_variance"] == pytest.approx(0.0, abs=1e-5)


def test_while_the_value_warms_up_the_trunk_waits(reward_folder: str) -> None:
    trainer = make(reward_folder, value_model=shared().value_model, ppo={"value_warmup": 2})
    before = tiny.snapshot(trainer.models.trained.policy)
    trainer.train()
    assert not tiny.moved(trainer.models.trained.policy, before)
    assert trainer.models.trained.value_model.score.weight.any()


def test_the_head_is_saved_by_itself(tmp_path: Path) -> None:
    model = shared(1.0).value_model
    model.save_pretrained(str(tmp_path / "value"))
    saved = load_file(tmp_path / "value" / "value_head.safetensors")
    assert torch.equal(saved["score.weight"], model.score.weight)
    assert set(saved) == {"score.weight", "score.bias"}
