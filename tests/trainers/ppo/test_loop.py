"""Tests of the PPO loop: prompts, rows, number of updates, learning rates and reported metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

from rlhf.config.run_plan import PPOPlan
from rlhf.errors import ConfigError
from rlhf.functional import adaptive_kl
from rlhf.models.policy import policy_with_adapter
from rlhf.models.reward_models import load_scorer
from rlhf.runs.metrics import METRICS
from rlhf.trainers.ppo import gradients
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close
from tests.trainers.setup import LENGTHS, experienced, make


def test_every_prompt_is_used_once_a_lap_and_laps_differ(reward_folder: str) -> None:
    trainer = make(reward_folder, ppo={"steps": 5, "rollout_size": 4})
    used = []
    for trainer.state.step in range(5):  # slots() looks at the step
        slots = trainer.slots()
        assert [slot for slot, _ in slots] == [0, 1, 2, 3]
        used += [prompt for _, prompt in slots]
    laps = [used[i : i + len(LENGTHS)] for i in range(0, 20, len(LENGTHS))]
    assert all(sorted(lap) == list(range(len(LENGTHS))) for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 1
    assert make(reward_folder, seed=2).slots() != make(reward_folder).slots()


def test_the_slots_of_a_step_do_not_depend_on_how_it_was_reached(reward_folder: str) -> None:
    first, second = make(reward_folder), make(reward_folder)
    first.slots()
    first.step = second.step = 1
    assert first.slots() == second.slots()


def test_ranks_share_the_slots_and_draw_what_one_process_would(reward_folder: str) -> None:
    """Two simulated ranks together have exactly the episodes of one process."""
    trainer = make(reward_folder)
    whole = trainer.sample()
    accelerator = trainer.accelerator
    together: dict[int, list[int]] = {}

    class Rank:
        num_processes, device, state = 2, accelerator.device, accelerator.state
        unwrap_model = staticmethod(accelerator.unwrap_model)

        def __init__(self, index: int) -> None:
            self.process_index = index

    for index in (0, 1):
        trainer.accelerator = Rank(index)
        part = trainer.sample()
        assert len(part) == 6
        together |= {
            int(i): r[m].tolist() for i, r, m in zip(part.index, part.response_ids, part.response_mask, strict=True)
        }
    for row, slot in enumerate(whole.index.tolist()):
        assert together[slot] == whole.response_ids[row][whole.response_mask[row]].tolist()


def test_each_row_is_used_once_an_epoch_in_another_order(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(reward_folder, ppo={"epochs": 3, "minibatches": 4})
    seen: list[list[int]] = []
    original = trainer.accumulate

    def spy(experience: Any, minibatch: Any, *rest: Any) -> Any:
        seen.append(minibatch.tolist())
        return original(experience, minibatch, *rest)

    monkeypatch.setattr(trainer, "accumulate", spy)
    trainer.update(experienced(trainer))
    assert [len(rows) for rows in seen] == [3] * 12
    epochs = [list(chain.from_iterable(seen[i : i + 4])) for i in (0, 4, 8)]
    assert all(sorted(rows) == list(range(12)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 3


def test_every_row_of_a_minibatch_is_used_once(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(reward_folder)
    used: Counter[int] = Counter()
    original = gradients.policy_terms

    def spy(part: Any, *rest: Any, **more: Any) -> Any:
        used.update(part.index.tolist())
        return original(part, *rest, **more)

    monkeypatch.setattr(gradients, "policy_terms", spy)
    trainer.update(experienced(trainer))
    assert used == dict.fromkeys(range(12), 2)


@pytest.mark.parametrize("microbatch", [1, 3, 12])
def test_updates_are_steps_x_epochs_x_minibatches(microbatch: int, reward_folder: str) -> None:
    trainer = make(reward_folder, optim={"microbatch_size": microbatch})
    steps = []
    trainer.models.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.train()
    assert len(steps) == PPOPlan(trainer.settings, 1).updates == 2 * 2 * 2
    assert trainer.state.step == 2


def test_a_rollout_that_cannot_be_shared_is_refused(reward_folder: str) -> None:
    with pytest.raises(ConfigError, match="multiple of 5"):
        make(reward_folder, ppo={"minibatches": 5})


# Learning rates


def rates(reward_folder: str, **optim: Any) -> list[tuple[float, float]]:
    """Return both learning rates at each of the 8 updates of a run."""
    trainer = make(reward_folder, optim={"learning_rate": 0.8, "value_learning_rate": 1.6, **optim})
    seen = []
    for update in range(PPOPlan(trainer.settings, 1).updates):
        trainer.set_learning_rates(update)
        policy, value = trainer.models.optimizer.param_groups
        seen.append((policy["lr"], value["lr"]))
    return seen


def test_linear_decay_reaches_0_after_the_last_update(reward_folder: str) -> None:
    wanted = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    seen = rates(reward_folder)
    assert [p for p, _ in seen] == pytest.approx(wanted)
    assert [v for _, v in seen] == pytest.approx([2 * w for w in wanted])


def test_warm_up_comes_before_either_schedule(reward_folder: str) -> None:
    seen = rates(reward_folder, warmup_fraction=0.25)
    assert [p for p, _ in seen] == pytest.approx([0.4, 0.8, 0.8, *(0.8 * k / 6 for k in (5, 4, 3, 2, 1))])
    seen = rates(reward_folder, warmup_fraction=0.5, schedule="constant")
    assert [v for _, v in seen] == pytest.approx([0.4, 0.8, 1.2, *[1.6] * 5])


def test_the_optimizer_meets_these_rates(reward_folder: str) -> None:
    trainer = make(reward_folder, optim={"learning_rate": 0.008, "value_learning_rate": 0.016})
    met: list[tuple[float, ...]] = []
    trainer.models.optimizer.optimizer.register_step_pre_hook(
        lambda o, *_: met.append(tuple(g["lr"] for g in o.param_groups))
    )
    trainer.train()
    assert [p for p, _ in met] == pytest.approx([0.001 * k for k in range(8, 0, -1)])
    assert [v for _, v in met] == pytest.approx([0.002 * k for k in range(8, 0, -1)])


def test_each_group_holds_its_own_model_and_nothing_frozen(reward_folder: str, sft_folder: str) -> None:
    policy = policy_with_adapter(tiny.source(sft_folder), tiny.LORA)
    trainer = make(reward_folder, policy=policy)
    groups = [{id(p) for p in g["params"]} for g in trainer.models.optimizer.param_groups]
    assert groups[0] == {id(p) for p in policy.parameters() if p.requires_grad}
    assert groups[1] == {id(p) for p in trainer.models.trained.value_model.parameters()}


# KL


def with_kl(trainer: Any, nats: float) -> Any:
    """Return an experience with the same KL in every row."""
    e = experienced(trainer)
    first = torch.zeros_like(e.old_logprobs)
    first[:, 0] = nats
    return replace(e, ref_logprobs=e.old_logprobs - first)


def test_the_kl_coefficient_moves_towards_its_target(reward_folder: str) -> None:
    for observed, sign in ((9.0, 1), (3.0, 0), (1.0, -1)):
        trainer = make(reward_folder, kl={"coef": 0.1, "target": 3.0, "horizon": 100.0})
        trainer.steer_kl(with_kl(trainer, observed))
        assert_close(torch.tensor(trainer.state.kl_coef), 0.1 * (1 + sign * 0.2 * 12 / 100))


def test_without_a_target_the_coefficient_stays(reward_folder: str) -> None:
    trainer = make(reward_folder, kl={"coef": 0.1, "target": None})
    trainer.steer_kl(with_kl(trainer, 50.0))
    assert trainer.state.kl_coef == 0.1


# What is reported


def run(reward_folder: str, **options: Any) -> tuple[Any, list[tuple[int, Any, dict[str, float]]]]:
    lines: list[tuple[int, Any, dict[str, float]]] = []
    trainer = make(reward_folder, report=lambda *line: lines.append(line), **options)
    trainer.train()
    return trainer, lines


def test_every_step_reports_declared_finite_numbers(reward_folder: str) -> None:
    _, lines = run(reward_folder)
    assert [step for step, _, _ in lines] == [1, 2]
    for _, e, stats in lines:
        assert set(stats) <= set(METRICS)
        assert all(torch.isfinite(torch.tensor(v)) for v in stats.values())
        assert stats["response_length"] == e.response_length.float().mean()
        assert stats["finished"] == e.finished.float().mean()
        assert stats["score_std"] > 0
    assert [stats["episodes"] for _, _, stats in lines] == [12, 24]


def test_the_reported_kl_is_the_one_in_the_reward(reward_folder: str) -> None:
    _, lines = run(reward_folder)
    coef = 0.1
    for _, e, stats in lines:
        assert stats["kl_coef"] == pytest.approx(coef)
        assert_close((e.scores - e.rewards.sum(dim=1)).mean() / stats["kl_coef"], stats["kl"])
        assert stats["kl_k3"] > 0
        coef = adaptive_kl(coef, stats["kl"], 3.0, 10_000.0, 12)


def test_the_same_seed_gives_the_same_run_and_another_does_not(reward_folder: str) -> None:
    def numbers(**options: Any) -> list[dict[str, float]]:
        _, lines = run(reward_folder, **options)
        return [{k: v for k, v in stats.items() if not k.startswith("time")} for _, _, stats in lines]

    assert numbers() == numbers()
    assert numbers(seed=2) != numbers()


def test_only_the_two_trained_models_move(reward_folder: str) -> None:
    reference, reward_model = tiny.new(2).requires_grad_(False), load_scorer(tiny.source(reward_folder))
    frozen = [(m, tiny.snapshot(m)) for m in (reference, reward_model)]
    trainer, _ = run(reward_folder, reference=reference, reward_model=reward_model)
    for model, before in frozen:
        assert not tiny.moved(model, before)
        assert not model.training
    fresh = make(reward_folder).models.trained
    for part in ("policy", "value_model"):
        assert tiny.moved(getattr(trainer.models.trained, part), tiny.snapshot(getattr(fresh, part)))


def test_an_adapter_policy_starts_at_no_kl_and_trains_adapters_only(reward_folder: str, adapter_folder: str) -> None:
    policy = policy_with_adapter(tiny.source(adapter_folder), tiny.LORA)
    before = tiny.snapshot(policy)
    trainer = make(reward_folder, policy=policy)
    trainer.models.reference = None
    e = trainer.score(trainer.sample())
    assert_close(e.kl_per_sequence, [0.0] * 12)
    shake(policy, size=0.05)
    shaken = tiny.snapshot(policy)
    assert trainer.score(trainer.sample()).kl_per_sequence.abs().max() > 0.01
    trainer.update(trainer.score(trainer.sample()))
    moved = tiny.moved(policy, shaken)
    assert moved
    assert all(".default." in name for name in moved | tiny.moved(policy, before))
