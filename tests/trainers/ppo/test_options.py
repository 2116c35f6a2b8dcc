"""Tests of PPO's options: each has its effect, and none when it is off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlhf.config.ppo import KL, PPO, RewardSource
from rlhf.config.run_plan import PPOPlan
from rlhf.functional import kl_estimate, policy_loss
from rlhf.models.ema import WeightAverage
from rlhf.rollout.teacher_forcing import response_logprobs
from rlhf.trainers.ppo.losses import summed_losses
from tests.models import tiny
from tests.models.fixtures import shake
from tests.tolerances import assert_close
from tests.trainers.setup import Hooks, config, experienced, make, saved

# The loss


@pytest.fixture(scope="module")
def parts(reward_folder: str) -> tuple[Any, ...]:
    """Return an experience, and the outputs of a changed policy for it."""
    trainer = make(reward_folder)
    e = experienced(trainer)
    shake(trainer.models.trained, size=0.05)
    with torch.no_grad():
        logprobs, entropy, values = trainer.models.trained(e, trainer.settings.sampling.temperature)
    return e, logprobs, entropy, values


def total(parts: tuple[Any, ...], settings: PPO | None = None, kl: KL | None = None, *, warming: bool = False) -> float:
    return float(summed_losses(*parts, settings or PPO(), kl or KL(), warming=warming)[0])


def test_the_entropy_bonus_lowers_the_loss_by_the_entropy(parts: tuple[Any, ...]) -> None:
    entropy = float(parts[2].sum())
    assert entropy > 1
    assert total(parts) - total(parts, PPO(entropy_coef=0.3)) == pytest.approx(0.3 * entropy, rel=1e-4)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_kl_loss_adds_the_estimate_over_real_tokens(parts: tuple[Any, ...], kind: str) -> None:
    e, logprobs = parts[0], parts[1]
    wanted = float(kl_estimate(logprobs, e.ref_logprobs, kind)[e.response_mask].sum())
    assert wanted > 0.1
    found = total(parts, kl=KL(loss=kind, loss_coef=0.5)) - total(parts)  # type: ignore[arg-type]
    assert found == pytest.approx(0.5 * wanted, rel=1e-4)


def test_clip_limits_reach_the_policy_loss(parts: tuple[Any, ...]) -> None:
    e, logprobs, _, _ = parts
    for options in ({"clip_range": 0.05, "clip_range_high": 0.4}, {"dual_clip": 1.2}):
        settings = PPO(value_coef=0.0, **options)
        wanted = policy_loss(
            logprobs,
            e.old_logprobs,
            e.advantages,
            clip_range=settings.clip_range,
            clip_range_high=settings.clip_range_high,
            dual_clip=settings.dual_clip,
        )
        assert total(parts, settings) == pytest.approx(float((wanted * e.response_mask).sum()), rel=1e-4)
        assert total(parts, settings) != pytest.approx(total(parts, PPO(value_coef=0.0)), rel=1e-3)


def test_tokens_count_as_clipped_beyond_their_own_limit(parts: tuple[Any, ...]) -> None:
    e, logprobs, _, _ = parts
    ratio = (logprobs - e.old_logprobs).exp()[e.response_mask]
    wide = PPO(clip_range=0.1, clip_range_high=0.5)
    counted = summed_losses(*parts, wide, KL(), warming=False)[1]["clip_fraction"]
    assert float(counted) == float(((ratio > 1.5) | (ratio < 0.9)).sum()) > 0


# KL estimators


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_another_estimator_in_the_reward_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(ValidationError, match="gradient that vanishes near the reference"):
        KL(reward=kind)  # type: ignore[arg-type]


def test_half_of_a_kl_loss_is_refused() -> None:
    for half in ({"loss": "k2"}, {"loss_coef": 0.1}):
        with pytest.raises(ValidationError, match="set both or neither"):
            KL.model_validate(half)


# Updates


def test_target_kl_ends_an_update_early(reward_folder: str) -> None:
    eager = make(reward_folder, ppo={"epochs": 4, "target_kl": 1e-4})
    stats = eager.update(experienced(eager))
    assert 1 <= stats["updates"] < 8
    assert not any(p.grad is not None and p.grad.any() for p in eager.models.trained.parameters())
    patient = make(reward_folder, ppo={"epochs": 4, "target_kl": 1e3})
    assert patient.update(experienced(patient))["updates"] == 8


def test_warm_up_moves_the_value_model_and_not_one_bit_of_the_policy(reward_folder: str) -> None:
    trainer = make(reward_folder, ppo={"value_warmup": 1, "entropy_coef": 0.1}, optim={"weight_decay": 0.1})
    policy, value = (
        tiny.snapshot(trainer.models.trained.policy),
        tiny.snapshot(trainer.models.trained.value_model),
    )
    trainer.run_step()
    assert not tiny.moved(trainer.models.trained.policy, policy)
    assert tiny.moved(trainer.models.trained.value_model, value)
    trainer.run_step()
    assert tiny.moved(trainer.models.trained.policy, policy)


def test_warm_up_passes_are_counted_apart_and_not_clipped(reward_folder: str) -> None:
    def moved(warmup: int) -> tuple[float, float]:
        settings = {"value_warmup": warmup, "value_warmup_epochs": 5, "value_clip_range": 1e-6, "epochs": 3}
        trainer = make(reward_folder, ppo=settings, optim={"value_learning_rate": 2e-3})
        experience = experienced(trainer)
        updates = trainer.update(experience)["updates"]
        values = trainer.models.trained.read(experience, 0.9)[2].detach()
        errors = (values - experience.returns).square(), (experience.values - experience.returns).square()
        return updates, float(errors[0].sum() / errors[1].sum())

    warm, cold = moved(1), moved(0)
    assert (warm[0], cold[0]) == (5 * 2, 3 * 2)
    assert warm[1] < 0.5 * cold[1]


def test_bfloat16_reaches_sampling_scoring_and_update_and_not_the_weights(reward_folder: str) -> None:
    lines: list[dict[str, float]] = []
    trainers = {
        name: make(reward_folder, optim={"precision": name}, report=lambda _, __, stats: lines.append(stats))
        for name in ("float32", "bfloat16")
    }
    rollout, other = (trainers[name].sample() for name in ("bfloat16", "float32"))
    half, full = (trainers[name].score(rollout) for name in ("bfloat16", "float32"))
    error = (half.old_logprobs - full.old_logprobs).abs().mean()
    assert 1e-4 < error < 0.03
    # Drawn in the precision that scores: the log-probs of sampling are nearer to those than float32's are.
    apart = [(a.sampled_logprobs - trainers["bfloat16"].score(a).old_logprobs).abs().mean() for a in (rollout, other)]
    assert apart[0] < apart[1] / 2
    assert half.values.dtype == half.raw_scores.dtype == torch.float32
    trainers["bfloat16"].train()
    assert lines[0]["first_ratio_error"] < 0.05
    assert {p.dtype for p in trainers["bfloat16"].models.trained.parameters()} == {torch.float32}


def test_cosine_decay_starts_at_the_rate_and_ends_near_0(reward_folder: str) -> None:
    trainer = make(reward_folder, optim={"schedule": "cosine", "learning_rate": 1.0})
    rates = []
    for update in range(PPOPlan(trainer.settings, 1).updates):
        trainer.set_learning_rates(update)
        rates.append(trainer.models.optimizer.param_groups[0]["lr"])
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(0.5)
    assert rates[-1] < 0.05


def test_a_smaller_rate_after_a_rollback_reaches_both_groups(reward_folder: str) -> None:
    trainer = make(reward_folder)
    trainer.state.learning_rate_scale = 0.5
    trainer.set_learning_rates(0)
    assert [g["lr"] for g in trainer.models.optimizer.param_groups] == [0.5e-2, 1e-2]


def test_running_normalisation_divides_by_the_spread_so_far(reward_folder: str) -> None:
    trainer = make(reward_folder, ppo={"normalize_scores": "running", "missing_end_penalty": 0.0})
    first = trainer.score(trainer.sample())
    assert_close(first.scores, (first.raw_scores / first.raw_scores.std(correction=0)).tolist())
    trainer.state.step = 1
    second = trainer.score(trainer.sample())
    both = torch.cat([first.raw_scores, second.raw_scores])
    assert_close(second.scores, (second.raw_scores / both.std(correction=0)).tolist())


# The average of the policy


def test_the_average_is_the_closed_form() -> None:
    model = torch.nn.Linear(2, 1)
    start = model.weight.detach().clone()
    trained = dict(model.named_parameters())
    average = WeightAverage(trained, 0.9)
    with torch.no_grad():
        model.weight.copy_(start + 1.0)
    for _ in range(5):
        average.update(trained)
    assert_close(average.weights["weight"], (start + 1 - 0.9**5).tolist())
    with average.applied(trained):
        assert_close(model.weight.detach(), average.weights["weight"].tolist())
    assert torch.equal(model.weight.detach(), start + 1.0)


def test_the_trainer_averages_once_a_step(reward_folder: str) -> None:
    trainer = make(reward_folder, ppo={"ema": 0.5})
    assert trainer.models.average is not None
    expected = {n: p.detach().clone() for n, p in trainer.models.trained.policy.named_parameters()}
    for _ in range(2):
        trainer.run_step()
        for name, p in trainer.models.trained.policy.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * p.detach()
    for name, value in expected.items():
        assert_close(trainer.models.average.weights[name], value.tolist())


def test_everything_that_a_run_continues_from_is_in_its_state(reward_folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ppo": {"ema": 0.5, "steps": 3, "normalize_scores": "running"}}
    whole, lines = make(reward_folder, **options), []
    whole.callbacks.append(Hooks(report=lambda step, e, stats: lines.append(stats)))
    whole.train()
    first, again = make(reward_folder, **options), []
    first.run_step()
    second = make(reward_folder, **options)
    second.callbacks.append(Hooks(report=lambda step, e, stats: again.append(stats)))
    second.load(saved(first, tmp_path / "first"))
    second.train()
    drop = {"time_sample", "time_score", "time_update"}
    assert [{k: v for k, v in s.items() if k not in drop} for s in again] == [
        {k: v for k, v in s.items() if k not in drop} for s in lines[1:]
    ]
    assert whole.models.average is not None
    assert second.models.average is not None
    for name, value in whole.models.average.weights.items():
        assert torch.equal(second.models.average.weights[name], value)


# Rollouts under a filter


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.5}, {"min_new_tokens": 5}])
def test_log_probs_are_those_of_the_filtered_distribution(reward_folder: str, how: dict[str, Any]) -> None:
    trainer = make(reward_folder, sampling=how)
    rollout = trainer.sample()
    with torch.no_grad():
        logprobs, _ = response_logprobs(trainer.models.trained.policy, rollout, 0.9)
        unfiltered, _ = response_logprobs(
            trainer.models.trained.policy, replace(rollout, support=rollout.support[..., :0]), 0.9
        )
    assert (logprobs - rollout.sampled_logprobs).abs().max() < 1e-4
    assert (logprobs - unfiltered).max() > 0.05  # the check sees log-probs of the whole softmax
    if "min_new_tokens" in how:
        assert int(rollout.response_length.min()) >= 5


def test_stop_strings_end_a_response_and_stay_in_it(reward_folder: str) -> None:
    plain = make(reward_folder)
    decode = tiny.tokenizer().decode
    text = decode(plain.sample().response_ids[0][:2].tolist())
    stop = text[-1]
    rollout = make(reward_folder, sampling={"stop": [stop]}).sample()
    stopped = 0
    for row in range(len(rollout)):
        said = decode(rollout.response_ids[row][rollout.response_mask[row]].tolist())
        if stop in said:
            stopped += 1
            assert bool(rollout.finished[row])
            ids = rollout.response_ids[row][rollout.response_mask[row]].tolist()
            assert stop not in decode(ids[:-1])
    assert stopped > 0


# Configuration


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"model": {"path": "a"}, "function": "m:f"},
        {"classifier": {"path": "a"}},
        {"function": "m:f", "label": "good"},
        {"ensemble": [{"path": "a"}]},
        {"function": "m:f", "combine": "worst"},
    ],
)
def test_a_reward_part_is_of_exactly_one_kind(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"exactly one of|needs a label|two members"):
        RewardSource.model_validate(wrong)


def test_a_run_without_any_reward_is_refused() -> None:
    with pytest.raises(ValidationError, match="no reward"):
        config(reward_model=None)


def test_the_entropy_bonus_is_trained_and_not_only_counted(reward_folder: str) -> None:
    entropies = {}
    for coef in (0.0, 3.0):
        trainer = make(reward_folder, ppo={"entropy_coef": coef})
        experience = experienced(trainer)
        trainer.update(experience)
        with torch.no_grad():
            after = trainer.models.trained(experience, trainer.settings.sampling.temperature)[1]
        entropies[coef] = float(after[experience.response_mask].mean())
    assert entropies[3.0] > entropies[0.0] + 1e-3
