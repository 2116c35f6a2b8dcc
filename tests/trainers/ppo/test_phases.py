"""Tests of freezing and unfreezing in PPO, of the policy and of the value model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models.shared_base import VALUE
from tests.models import tiny
from tests.trainers.ppo.test_shared_base import trainer as shared_trainer
from tests.trainers.setup import make, saved

HEAD_FIRST = {"value_model": [{"train": {"parts": ["score"]}, "steps": 1}, {"train": "all"}]}
LAST_FIRST = {"policy": [{"train": {"last": 1}, "steps": 1, "learning_rate": 0.02}, {"train": "all"}]}


def test_what_is_frozen_never_moves_and_the_rest_does(reward_folder: str) -> None:
    trainer = make(reward_folder, freeze={"policy": {"first": "50%", "parts": ["embeddings"]}}, ppo={"steps": 2})
    before = tiny.snapshot(trainer.models.trained)
    trainer.train()
    moved = tiny.moved(trainer.models.trained, before)
    frozen = {n for n in before if n.startswith("policy.") and (".layers.0." in n or "embed" in n)}
    assert frozen
    assert set(before) - moved == frozen


def test_a_value_head_warms_up_on_a_frozen_trunk(reward_folder: str) -> None:
    trainer = make(reward_folder, unfreeze=HEAD_FIRST, ppo={"steps": 2})
    before = tiny.snapshot(trainer.models.trained)
    trainer.run_step()
    moved = tiny.moved(trainer.models.trained, before)
    assert {name for name in moved if name.startswith("value_model.")} == {"value_model.score.weight"}
    assert {name for name in before if name.startswith("policy.")} <= moved
    trainer.run_step()
    assert tiny.moved(trainer.models.trained, before) == set(before)


def test_a_step_samples_in_the_phase_that_it_trains_in(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed step samples with the same requires_grad flags, which change the last digit of a product."""
    trainer = make(reward_folder, unfreeze=LAST_FIRST, ppo={"steps": 2})
    real, seen = trainer.sample, []

    def sample() -> Any:
        seen.append(
            {n.split(".layers.")[-1][0] for n, p in trainer.models.trained.policy.named_parameters() if p.requires_grad}
        )
        return real()

    monkeypatch.setattr(trainer, "sample", sample)
    trainer.train()
    assert seen[0] == {"1"}
    assert {"0", "1"} < seen[1]


def test_each_phase_of_each_model_has_its_rate(reward_folder: str) -> None:
    trainer = make(
        reward_folder,
        unfreeze=LAST_FIRST | HEAD_FIRST,
        ppo={"steps": 2},
        optim={"learning_rate": 0.01, "value_learning_rate": 0.03, "schedule": "constant"},
    )
    rates: list[set[tuple[str, float]]] = []
    for trainer.state.step in range(2):
        trainer.set_learning_rates(0)
        named = {id(p): n for n, p in trainer.models.trained.named_parameters()}
        rates.append({(named[id(p)], g["lr"]) for g in trainer.models.optimizer.param_groups for p in g["params"]})
    first, second = (dict(found) for found in rates)
    assert first["policy.model.layers.1.mlp.up_proj.weight"] == 0.02
    assert first["policy.model.layers.0.mlp.up_proj.weight"] == 0.0
    assert first["value_model.score.weight"] == 0.03
    assert first["value_model.model.layers.1.mlp.up_proj.weight"] == 0.0
    assert {rate for name, rate in second.items() if name.startswith("policy.")} == {0.01}
    assert {rate for name, rate in second.items() if name.startswith("value_model.")} == {0.03}


def test_phases_that_train_everything_change_nothing(reward_folder: str) -> None:
    plain = make(reward_folder, ppo={"steps": 3})
    phased = make(reward_folder, ppo={"steps": 3}, unfreeze={"policy": [{"steps": 1}, {"steps": 1}, {}]})
    plain.train()
    phased.train()
    assert not tiny.moved(phased.models.trained, tiny.snapshot(plain.models.trained))


@pytest.mark.parametrize("after", [1, 2])
def test_a_resumed_run_is_in_the_phase_of_the_uninterrupted_one(after: int, reward_folder: str, tmp_path: Path) -> None:
    """This holds at the unfreezing step and after it, with averaged weights."""
    settings: dict[str, Any] = {"unfreeze": LAST_FIRST | HEAD_FIRST, "ppo": {"steps": 3, "ema": 0.5}}
    one = make(reward_folder, **settings)
    while one.state.step < 3:
        one.run_step()
        saved(one, tmp_path / str(one.state.step))
    two = make(reward_folder, **settings)
    two.load(tmp_path / str(after))
    two.train()
    assert not tiny.moved(two.models.trained, tiny.snapshot(one.models.trained))
    assert one.models.average is not None
    assert two.models.average is not None
    assert one.models.average.weights.keys() == dict(one.models.trained.policy.named_parameters()).keys()
    assert all(
        torch.equal(two.models.average.weights[name], value) for name, value in one.models.average.weights.items()
    )


def test_a_value_model_on_the_policys_base_has_phases_of_its_own(adapter_folder: str, rewarder: str) -> None:
    trainer = shared_trainer(
        adapter_folder,
        rewarder,
        shared=True,
        unfreeze=HEAD_FIRST,
        ppo={"steps": 2},
        freeze={"policy": {"layers": "0"}},
    )
    before = tiny.snapshot(trainer.models.trained)
    trainer.run_step()
    moved = tiny.moved(trainer.models.trained, before)
    assert "value_model.score.weight" in moved
    assert not [name for name in moved if f".{VALUE}." in name]
    assert not [name for name in moved if ".layers.0." in name]
    trainer.run_step()
    moved = tiny.moved(trainer.models.trained, before)
    assert [name for name in moved if f".{VALUE}." in name and ".layers.0." in name]
    assert not [name for name in moved if ".default." in name and ".layers.0." in name]


def test_a_selection_that_matches_nothing_is_an_error(reward_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"freeze\.value_model\.names: no parameter has a name that matches"):
        make(reward_folder, freeze={"value_model": {"names": ["*.nothing.*"]}})
    with pytest.raises(ConfigError, match=r"unfreeze\.policy\[0\]\.train\.parts: the model has no score"):
        make(reward_folder, unfreeze={"policy": [{"train": {"parts": ["score"]}}]})


def test_lora_plus_trains_b_faster(adapter_folder: str, rewarder: str) -> None:
    trainer = shared_trainer(
        adapter_folder, rewarder, shared=True, peft=tiny.LORA.model_copy(update={"lora_plus": 16.0})
    )
    trainer.set_learning_rates(0)
    named = {id(p): n for n, p in trainer.models.trained.named_parameters()}
    rates = {named[id(p)]: g["lr"] for g in trainer.models.optimizer.param_groups for p in g["params"]}
    for adapter in ("default", VALUE):
        a, b = ({r for n, r in rates.items() if f".lora_{part}.{adapter}." in n} for part in "AB")
        assert len(a) == len(b) == 1
        assert max(b) == pytest.approx(16.0 * max(a))
