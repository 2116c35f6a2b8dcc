"""Tests of PPO's checks: a sound run passes, and each planted fault stops it at the first step with its message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.errors import TrainingError
from rlhf.functional import masked_whiten
from rlhf.generation import native as sampling
from rlhf.models import output_layer, packed_batch
from rlhf.models.reward_models import load_scorer
from rlhf.rollout import experience
from rlhf.runs.metrics import METRICS
from rlhf.trainers.ppo.health import HEALTH_METRICS, UnhealthyError, find_unhealthy_metrics
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny
from tests.trainers.setup import make, memory, sometimes_ending, spiked

STOP = {"broken": "stop"}


def sound(reward_folder: str, **options: Any) -> PPOTrainer:
    """Return a trainer whose policy equals its reference, so that every invariant holds."""
    policy, reference = sometimes_ending(tiny.new(1)), sometimes_ending(tiny.new(1)).requires_grad_(False)
    return make(reward_folder, policy=policy, reference=reference, **{"watch": STOP} | options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": {"top_k": 20}},
        {"sampling": {"top_p": 0.8, "temperature": 0.7}},
        {"sampling": {"min_new_tokens": 4}},
        {"ppo": {"whiten_advantages": False}},
        {"ppo": {"normalize_scores": "running", "score_clip": 0.5, "missing_end_score": -1.0}},
    ],
)
def test_a_sound_run_breaks_nothing(reward_folder: str, changes: dict[str, Any]) -> None:
    trainer = sound(reward_folder, **changes)
    trainer.train()
    assert trainer.state.step == 2


def other_temperature(trainer: PPOTrainer, _: pytest.MonkeyPatch) -> None:
    """Sample rollouts at another temperature than they are scored at."""
    generator: Any = trainer.generator
    generator.settings = generator.settings.model_copy(update={"temperature": 0.6})


def hidden_filter(_: PPOTrainer, patch: pytest.MonkeyPatch) -> None:
    """Sample with a top-k filter that the log-probs do not include."""
    original = sampling.draw_token

    def pick(logits: Any, uniform: Any, temperature: float) -> Any:
        least = logits.topk(5).values[:, -1:]
        return original(logits.masked_fill(logits < least, -torch.inf), uniform, temperature)

    patch.setattr(sampling, "draw_token", pick)


def dropout_left_on(trainer: PPOTrainer, _: pytest.MonkeyPatch) -> None:
    for layer in trainer.models.trained.policy.model.layers:
        layer.self_attn.attention_dropout = 0.3


def shifted_mask(_: PPOTrainer, patch: pytest.MonkeyPatch) -> None:
    """Log-probs are read one position off."""
    original = output_layer.token_logprobs
    patch.setattr(output_layer, "token_logprobs", lambda logits, ids, **k: original(logits, ids.roll(1), **k))


def score_on_a_pad(_: PPOTrainer, patch: pytest.MonkeyPatch) -> None:
    """Put the score one position past the last token if there is one, as several code bases do."""

    def shaped(scores: Any, kl: Any, mask: Any, coef: float) -> Any:
        rewards = -coef * kl * mask
        at = mask.sum(dim=1).clamp_max(mask.shape[1] - 1)
        rewards[torch.arange(len(mask)), at] += scores
        return rewards

    patch.setattr(experience, "shaped_rewards", shaped)


def whitening_by_rank(_: PPOTrainer, patch: pytest.MonkeyPatch) -> None:
    def by_rank(x: Any, mask: Any) -> Any:
        halves = [masked_whiten(a, m) for a, m in zip(x.chunk(2), mask.chunk(2), strict=True)]
        return torch.cat(halves)

    patch.setattr(experience, "masked_whiten", by_rank)


def another_reference(trainer: PPOTrainer, _: pytest.MonkeyPatch) -> None:
    trainer.models.reference = tiny.new(2).requires_grad_(False)


class Noisy(nn.Module):
    """Score head with dropout before it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.dropout = head, nn.Dropout(0.3)

    def forward(self, hidden: Any) -> Any:
        return self.head(self.dropout(hidden))


def reward_model_in_training_mode(trainer: PPOTrainer, _: pytest.MonkeyPatch) -> None:
    model = trainer.models.rewards.parts[0][1].model  # type: ignore[union-attr]
    model.score = Noisy(model.score)
    model.train()


def padding_in_the_score(trainer: PPOTrainer, _: pytest.MonkeyPatch) -> None:
    """Make the reward model attend to padding."""
    model = trainer.models.rewards.parts[0][1].model  # type: ignore[union-attr]
    original = model.model.forward

    def forward(*args: Any, **kw: Any) -> Any:
        return original(*args, **kw | {"attention_mask": torch.ones_like(kw["attention_mask"])})

    model.model.forward = forward


def packed_rows_that_leak(_: PPOTrainer, patch: pytest.MonkeyPatch) -> None:
    """Make sequences in one packed row attend to each other."""
    original = packed_batch.pack

    def leaking(ids: torch.Tensor, mask: torch.Tensor) -> packed_batch.PackedBatch:
        made = original(ids, mask)
        return replace(made, positions=torch.arange(made.ids.shape[1]).expand_as(made.ids))

    patch.setattr(packed_batch, "pack", leaking)


FAULTS: list[tuple[Callable[[PPOTrainer, pytest.MonkeyPatch], None], str]] = [
    (other_temperature, "log-probs while sampling differ from teacher-forced ones"),
    (hidden_filter, "log-probs while sampling differ from teacher-forced ones"),
    (shifted_mask, "log-probs while sampling differ from teacher-forced ones"),
    (dropout_left_on, "the first importance ratio is not 1"),
    (score_on_a_pad, "the score is not entirely on the last real token"),
    (whitening_by_rank, "whitened over all processes together"),
    (another_reference, "the KL of a fresh policy is not 0"),
    (reward_model_in_training_mode, "it may be in training mode"),
    (padding_in_the_score, "the reward model's score depends on padding"),
    (packed_rows_that_leak, "the reward model's score depends on padding"),
]


@pytest.mark.parametrize(("plant", "words"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_fault_stops_the_first_step_before_anything_moves(
    reward_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any, words: str
) -> None:
    trainer = sound(reward_folder, folder=tmp_path)
    before = tiny.snapshot(trainer.models.trained)
    plant(trainer, monkeypatch)
    with pytest.raises(TrainingError, match=r"^step 0, before the update: ") as caught:
        trainer.train()
    assert words in str(caught.value)
    saved = next(tmp_path.glob("trouble_step0.pt"))
    assert str(saved) in str(caught.value)
    assert len(torch.load(saved, weights_only=True)["response_ids"]) == 12
    moved = tiny.moved(
        trainer.models.trained,
        {k: v for k, v in before.items() if k in dict(trainer.models.trained.named_parameters())},
    )
    assert not moved


def test_to_continue_says_it_once_and_goes_on(reward_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    trainer = sound(reward_folder, watch={"broken": "continue"}, log=logged.append)
    hidden_filter(trainer, monkeypatch)
    trainer.train()
    assert trainer.state.step == 2
    assert sum("while sampling" in line for line in logged) == 2  # the words name the size of the gap, which differs


# Health


def test_every_vital_number_has_a_range_and_is_seen_outside_it() -> None:
    for name in HEALTH_METRICS:
        metric = METRICS[name]
        outside = metric.high + 1 if metric.high < 1e9 else metric.low - 1
        assert len(find_unhealthy_metrics({name: outside})) == 1
        assert name in find_unhealthy_metrics({name: outside})[0]
        assert find_unhealthy_metrics({name: float("nan")})
    assert find_unhealthy_metrics({"kl": 3.0, "entropy": 1.0, "finished": 0.9}) == []


def test_a_fresh_value_model_may_explain_nothing() -> None:
    stats = {"explained_variance": -50.0, "kl": 99.0}
    assert len(find_unhealthy_metrics(stats)) == 2
    assert len(find_unhealthy_metrics(stats, fresh=True)) == 1


def test_a_rollback_returns_to_the_last_good_step_with_a_smaller_rate(reward_folder: str) -> None:
    kept, save, load = memory()
    logged: list[str] = []
    steps: list[int] = []
    trainer = sound(
        reward_folder,
        watch={"broken": "stop", "unhealthy": "rollback", "rate_factor": 0.25, "kl_factor": 2.0},
        ppo={"steps": 4},
        checkpoint=save,
        restore=load,
        log=logged.append,
        report=lambda step, *_: steps.append(step),
        optim={"learning_rate": 1e-4, "value_learning_rate": 1e-3},
        kl={"coef": 0.1, "target": None},
        sampling={"max_new_tokens": 60},
    )
    spiked(trainer, at=2, size=3e4)
    trainer.train()
    assert steps == [1, 2, 3, 4]
    assert trainer.state.rollbacks == 1
    assert trainer.state.learning_rate_scale == 0.25
    assert trainer.state.kl_coef == pytest.approx(0.2)
    assert len(logged) == 1
    assert "Rolled back from step 2 to step 2" in logged[0] or "Rolled back from step 3 to step 2" in logged[0]
    assert kept["state"]["rollbacks"] == 1


def test_each_rollback_raises_the_kl_coefficient_once(reward_folder: str) -> None:
    """The result is the same whether the checkpoint was written before or after the earlier rollback."""
    for held in (0, 1):

        def restore(trainer: PPOTrainer, held: int = held) -> bool:
            trainer.state.rollbacks, trainer.state.kl_coef = held, 0.1 * 2.0**held
            return True

        trainer = sound(reward_folder, watch={"unhealthy": "rollback", "kl_factor": 2.0}, restore=restore)
        trainer.state.rollbacks = 1
        trainer.roll_back(UnhealthyError("planted"))
        assert trainer.state.rollbacks == 2
        assert trainer.state.kl_coef == pytest.approx(0.4)


def test_too_many_rollbacks_end_the_run(reward_folder: str) -> None:
    _, save, load = memory()
    trainer = sound(
        reward_folder,
        watch={"unhealthy": "rollback", "rollbacks": 2},
        checkpoint=save,
        restore=load,
        ppo={"steps": 3},
        optim={"learning_rate": 10.0},
    )
    with pytest.raises(TrainingError, match="outside"):
        trainer.train()
    assert trainer.state.rollbacks == 2


def test_unhealthy_numbers_can_stop_a_run_or_be_said(reward_folder: str) -> None:
    with pytest.raises(TrainingError, match=r"outside .*lower optim.learning_rate"):
        sound(reward_folder, watch={"unhealthy": "stop"}, optim={"learning_rate": 10.0}).train()
    logged: list[str] = []
    sound(reward_folder, watch={"unhealthy": "continue"}, optim={"learning_rate": 10.0}, log=logged.append).train()
    assert any("outside" in line for line in logged)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_batch(
    reward_folder: str, tmp_path: Path
) -> None:
    trainer = sound(reward_folder, folder=tmp_path)
    e = trainer.score(trainer.sample())
    with pytest.raises(TrainingError, match=r"before the optimizer step: the loss is nan .*|the loss is nan") as caught:
        trainer.update(replace(e, returns=e.returns * float("nan")))
    assert "trouble_step0.pt" in str(caught.value)
    assert not trainer.models.optimizer.state_dict()["state"]


def test_a_gradient_that_is_not_finite_is_rolled_back_if_that_is_wanted(reward_folder: str) -> None:
    _, save, load = memory()
    logged: list[str] = []
    trainer = sound(
        reward_folder,
        watch={"unhealthy": "rollback"},
        checkpoint=save,
        restore=load,
        log=logged.append,
        ppo={"steps": 2},
        sampling={"max_new_tokens": 60},
        optim={"learning_rate": 1e-4, "value_learning_rate": 1e-3},
    )
    original, poisoned = trainer.accumulate, []

    def accumulate(*args: Any) -> Any:
        found = original(*args)
        if trainer.state.step == 1 and not poisoned:
            poisoned.append(True)
            next(trainer.models.trained.parameters()).grad[0] = torch.inf  # type: ignore[index]
        return found

    trainer.accumulate = accumulate  # type: ignore[method-assign]
    trainer.train()
    assert (trainer.state.step, trainer.state.rollbacks) == (2, 1)
    assert "the gradient norm is" in logged[0]
    assert all(bool(p.isfinite().all()) for p in trainer.models.trained.parameters())


def test_the_scorer_in_the_faults_above_is_sound_without_them(reward_folder: str) -> None:
    model = load_scorer(tiny.source(reward_folder)).eval()
    trainer = sound(reward_folder, reward_model=model)
    trainer.score(trainer.sample())
