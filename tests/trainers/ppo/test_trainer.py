"""Tests of the PPO update: its gradient is that of the equation, for any split into microbatches and minibatches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import TrainingError
from rlhf.functional import masked_mean
from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.trainer import PPOTrainer
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import GRADIENT, assert_close, distance
from tests.trainers.setup import config, experienced, gradient, make

MINIBATCH = torch.tensor([11, 2, 5, 7, 0, 3, 8])


@pytest.fixture
def trainer(reward_folder: str) -> PPOTrainer:
    return make(reward_folder)


def accumulated(trainer: PPOTrainer, e: Experience, microbatch: int, minibatch: Tensor = MINIBATCH) -> Tensor:
    """Return the gradient of a minibatch as the trainer computes it."""
    optim = trainer.settings.optim.model_copy(update={"microbatch_size": microbatch})
    trainer.settings = trainer.settings.model_copy(update={"optim": optim})
    trainer.models.trained.zero_grad()
    trainer.models.trained.train()
    trainer.accumulate(e, minibatch, e.response_mask[minibatch].sum(), {})
    return gradient(trainer.models.trained)


def transcribed(trainer: PPOTrainer, e: Experience, mean_of_rows: bool = False) -> Tensor:
    """Return the gradient from the equation, one episode at a time, without padding and the package's losses."""
    trainer.models.trained.zero_grad()
    ppo, temperature = trainer.settings, trainer.settings.sampling.temperature
    policy, value_model = trainer.models.trained.policy, trainer.models.trained.value_model
    tokens = int(e.response_mask[MINIBATCH].sum())
    loss = torch.zeros(())
    for row in MINIBATCH.tolist():
        ids, n = e.ids[row][e.mask[row]], int(e.response_length[row])
        hidden = value_model.model(ids[None], use_cache=False).last_hidden_state[0, -n - 1 : -1]
        values = (hidden @ value_model.score.weight.T)[:, 0]
        logits = policy(ids[None], use_cache=False).logits[0, -n - 1 : -1] / temperature
        logprobs = (logits - logits.logsumexp(1, keepdim=True))[range(n), ids[-n:]]
        old, a, g, v_old = e.old_logprobs[row, :n], e.advantages[row, :n], e.returns[row, :n], e.values[row, :n]
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - ppo.clip_range, 1 + ppo.clip_range)
        near = v_old + (values - v_old).clamp(-ppo.value_clip_range, ppo.value_clip_range)
        policy_loss = -torch.minimum(ratio * a, clipped * a).sum()
        value_loss = 0.5 * torch.maximum((values - g) ** 2, (near - g) ** 2).sum()
        weight = 1 / (n * len(MINIBATCH)) if mean_of_rows else 1 / tokens
        loss = loss + (policy_loss + ppo.value_coef * value_loss) * weight
    loss.backward()
    return gradient(trainer.models.trained)


def test_the_gradient_is_that_of_the_equation_for_every_split(trainer: PPOTrainer) -> None:
    e = experienced(trainer)
    shake(trainer.models.trained, size=0.03)  # a policy that has moved: some ratios are clipped, some values too
    wanted = transcribed(trainer, e)
    assert wanted.norm() > 0.01
    for microbatch in (1, 2, 3, 5, 16):
        assert distance(accumulated(trainer, e, microbatch), wanted) < GRADIENT, microbatch
    assert distance(transcribed(trainer, e, mean_of_rows=True), wanted) > 0.01  # the check sees a mean of means


def test_the_gradient_does_not_depend_on_a_limit_of_tokens(reward_folder: str) -> None:
    found = {}
    for tokens in (None, 40, 1):
        trainer = make(reward_folder, optim={"microbatch_tokens": tokens, "microbatch_size": 12})
        e = experienced(trainer)
        trainer.models.trained.train()
        made = trainer.accumulate(e, torch.arange(len(e)), float(e.response_mask.sum()), {})
        found[tokens] = len(made.rows), gradient(trainer.models.trained)
    assert found[None][0] == 1 < found[40][0] < found[1][0] == 12
    for tokens in (40, 1):
        assert distance(found[tokens][1], found[None][1]) < GRADIENT


def test_moving_the_policy_clips_some_tokens_and_not_all(trainer: PPOTrainer) -> None:
    """The test above relies on this."""
    e = experienced(trainer)
    shake(trainer.models.trained, size=0.03)
    sums: dict[str, Tensor] = {}
    worst = trainer.accumulate(e, MINIBATCH, e.response_mask[MINIBATCH].sum(), sums).ratio_error
    share = float(sums["clip_fraction"] / e.response_mask[MINIBATCH].sum())
    assert 0.05 < share < 0.95
    assert worst > trainer.settings.clip_range


def test_the_gradient_does_not_depend_on_padding(trainer: PPOTrainer) -> None:
    e = experienced(trainer)
    wanted = accumulated(trainer, e, 3)
    wide = tiny.widen(e, 4, 0, fill=tiny.renderer().end_id)
    assert distance(accumulated(trainer, wide, 3), wanted) < GRADIENT


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_the_first_ratio_is_1_and_its_gradient_that_of_minus_the_advantage(
    temperature: float, reward_folder: str
) -> None:
    trainer = make(reward_folder, sampling={"temperature": temperature}, ppo={"value_coef": 0.0})
    e = experienced(trainer)
    trainer.models.trained.zero_grad()
    trainer.models.trained.train()
    minibatch = torch.arange(len(e))
    total = e.response_mask.sum()
    assert trainer.accumulate(e, minibatch, total, {}).ratio_error < GRADIENT
    ours = gradient(trainer.models.trained.policy)
    assert not gradient(trainer.models.trained.value_model).any()
    trainer.models.trained.zero_grad()
    logprobs, _, _ = trainer.models.trained(e, temperature)
    (-(logprobs * e.advantages * e.response_mask).sum() / total).backward()
    assert distance(ours, gradient(trainer.models.trained.policy)) < GRADIENT


def test_the_ratio_check_sees_dropout_and_another_temperature(reward_folder: str) -> None:
    trainer = make(reward_folder)
    e = experienced(trainer)
    for layer in trainer.models.trained.policy.model.layers:
        layer.self_attn.attention_dropout = 0.2
    assert trainer.update(e)["first_ratio_error"] > 0.01
    trainer = make(reward_folder)
    e = experienced(trainer)
    trainer.settings = config(sampling={"temperature": 0.95}).settings
    assert trainer.update(e)["first_ratio_error"] > 0.01


def test_an_update_reports_a_first_ratio_of_1(trainer: PPOTrainer) -> None:
    stats = trainer.update(experienced(trainer))
    assert stats["first_ratio_error"] < GRADIENT
    assert stats["approx_kl"] > 0.0


def test_advantages_are_whitened_over_real_tokens(trainer: PPOTrainer, reward_folder: str) -> None:
    e = experienced(trainer)
    white = e.advantages[e.response_mask]
    assert_close(torch.stack([white.mean(), white.std(unbiased=False)]), [0.0, 1.0])
    raw = experienced(make(reward_folder, ppo={"whiten_advantages": False}))
    assert_close(e.returns, raw.returns.tolist())  # whitening touches no return
    assert_close(raw.advantages, (raw.returns - raw.values).tolist())


def test_means_are_over_response_tokens(trainer: PPOTrainer) -> None:
    """With one minibatch and one epoch the reported entropy is that of the rollout."""
    trainer.settings = config(ppo={"epochs": 1, "minibatches": 1}).settings
    e = experienced(trainer)
    with torch.no_grad():
        _, entropy, _ = trainer.models.trained(e, trainer.settings.sampling.temperature)
    stats = trainer.update(e)
    assert_close(torch.tensor(stats["entropy"]), float(masked_mean(entropy, e.response_mask)))
    assert_close(torch.tensor(stats["policy_loss"]), 0.0)  # whitened advantages have mean 0


# Guards


def test_a_gradient_that_is_not_finite_stops_before_the_step(trainer: PPOTrainer) -> None:
    e = experienced(trainer)
    before = tiny.snapshot(trainer.models.trained)
    broken = replace(e, advantages=e.advantages * float("nan"))
    with pytest.raises(TrainingError, match=r"step 0, before the optimizer step: the loss is nan"):
        trainer.update(broken)
    assert not tiny.moved(trainer.models.trained, before)
    assert not trainer.models.optimizer.state_dict()["state"]


def norms(trainer: PPOTrainer) -> list[float]:
    """Return the gradient norms at each optimizer step."""
    seen: list[float] = []

    def look(optimizer: Any, *_: Any) -> None:
        grads = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        seen.append(float(torch.cat(grads).norm()))

    trainer.models.optimizer.optimizer.register_step_pre_hook(look)
    return seen


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_the_gradient_is_clipped_over_both_models_together(limit: float, reward_folder: str) -> None:
    trainer = make(reward_folder, optim={"max_grad_norm": limit})
    seen = norms(trainer)
    stats = trainer.update(experienced(trainer))
    assert len(seen) == 4
    assert stats["grad_norm"] > 0.01  # reported before clipping
    if limit < 1:
        assert_close(torch.tensor(seen), [limit] * 4)
    else:
        assert_close(torch.tensor(sum(seen) / 4), stats["grad_norm"])
