"""Consequences of the equations of `rlhf.functional`, each a line of algebra.

A law takes `f`, anything with the functions of `rlhf.functional` as attributes, and a seed. It asserts, so it can
run on the package and on a broken twin of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.oracles import GARBAGE, ragged, ragged_mask
from tests.tolerances import assert_close

F64 = torch.float64


def experience(seed: int, rows: int = 8, columns: int = 9) -> SimpleNamespace:
    """A ragged batch with large garbage on padding."""
    mask = ragged_mask(seed, rows, columns)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values", "rewards", "advantages")
    tensors = {name: ragged(seed + 10 * k, mask, F64, 0.5) for k, name in enumerate(names)}
    scores = torch.randn(rows, generator=torch.Generator().manual_seed(seed + 99), dtype=F64)
    return SimpleNamespace(mask=mask, scores=scores, lengths=mask.sum(1), **tensors)


def on_ranks(parts: list, function: Callable[[Any, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """Run function(part, reduce) for each part in a thread of its own, as ranks do; `reduce` sums over the ranks."""
    barrier = threading.Barrier(len(parts), timeout=20)
    shared: list[Tensor] = [torch.empty(0)] * len(parts)

    def rank(k: int) -> Tensor:
        def reduce(moments: Tensor) -> Tensor:
            shared[k] = moments
            barrier.wait()
            total = torch.stack(shared).sum(0)
            barrier.wait()
            return total

        return function(parts[k], reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))


def whitened_advantages_have_mean_0_and_variance_1(f, seed):
    e = experience(seed)
    kept = f.masked_whiten(3 * e.advantages + 5, e.mask)[e.mask]
    assert_close(kept.mean(), 0.0)
    assert_close(kept.var(correction=0), 1.0)


def uncentred_whitening_keeps_the_mean(f, seed):
    e = experience(seed)
    x = 3 * e.rewards + 5
    kept = f.masked_whiten(x, e.mask, center=False)[e.mask]
    assert_close(kept.mean(), x[e.mask].mean())
    assert_close(kept.var(correction=0), 1.0)


def lambda_1_is_return_minus_value(f, seed):
    e, gamma = experience(seed), 0.9
    advantages = f.gae(e.rewards, e.values, e.mask, gamma=gamma, lam=1.0)
    for b, n in enumerate(e.lengths.tolist()):
        for t in range(n):
            to_go = sum(gamma**k * e.rewards[b, t + k] for k in range(n - t))
            assert_close(advantages[b, t], to_go - e.values[b, t])


def lambda_0_is_the_one_step_temporal_difference(f, seed):
    e, gamma = experience(seed), 0.9
    advantages = f.gae(e.rewards, e.values, e.mask, gamma=gamma, lam=0.0)
    for b, n in enumerate(e.lengths.tolist()):
        for t in range(n):
            following = e.values[b, t + 1] if t + 1 < n else 0.0
            assert_close(advantages[b, t], e.rewards[b, t] + gamma * following - e.values[b, t])


def exact_values_give_no_advantage(f, seed):
    e, gamma = experience(seed), 0.9
    values = e.values.clone()  # garbage stays on padding
    for b, n in enumerate(e.lengths.tolist()):
        to_go = 0.0
        for t in reversed(range(n)):
            to_go = e.rewards[b, t] + gamma * to_go
            values[b, t] = to_go
    for lam in (0.0, 0.5, 1.0):
        assert_close(f.gae(e.rewards, values, e.mask, gamma=gamma, lam=lam), torch.zeros_like(values))


def rewards_sum_to_score_minus_penalty(f, seed):
    e, kl_coef = experience(seed), 0.3
    kl = f.kl_estimate(e.logprobs, e.ref_logprobs, "k1")
    total = f.shaped_rewards(e.scores, kl, e.mask, kl_coef).sum(1)
    for b, n in enumerate(e.lengths.tolist()):
        log_ratio = e.logprobs[b, :n].sum() - e.ref_logprobs[b, :n].sum()
        assert_close(total[b], e.scores[b] - kl_coef * log_ratio)


def without_drift_only_the_last_token_is_rewarded(f, seed):
    e = experience(seed)
    rewards = f.shaped_rewards(e.scores, f.kl_estimate(e.logprobs, e.logprobs, "k1"), e.mask, 0.3)
    expected = torch.zeros_like(rewards)
    for b, n in enumerate(e.lengths.tolist()):
        expected[b, n - 1] = e.scores[b]
    assert_close(rewards, expected)


def a_terminal_score_decays_with_distance(f, seed):
    e, gamma, lam = experience(seed), 0.9, 0.8
    nothing = torch.zeros_like(e.values)
    rewards = f.shaped_rewards(e.scores, nothing, e.mask, 0.3)
    advantages = f.gae(rewards, nothing, e.mask, gamma=gamma, lam=lam)
    for b, n in enumerate(e.lengths.tolist()):
        for t in range(n):
            assert_close(advantages[b, t], e.scores[b] * (gamma * lam) ** (n - 1 - t))


def the_first_ratio_is_exactly_1(f, seed):
    """Old and new log-probabilities of one model are equal bit by bit: the loss is -A and so is its gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, 17, generator=generator)
    ids = torch.randint(0, 17, (4, 5), generator=generator)
    advantages = torch.randn(4, 5, generator=generator)
    old = f.token_logprobs(logits, ids, temperature=0.7)
    new = f.token_logprobs(logits, ids, temperature=0.7).requires_grad_()
    for options in ({}, {"clip_range_high": 0.3}, {"dual_clip": 3.0}):
        new.grad = None
        loss = f.policy_loss(new, old, advantages, clip_range=0.2, **options)
        assert torch.equal(loss.detach(), -advantages)
        assert loss.requires_grad
        loss.sum().backward()
        assert_close(new.grad, -advantages)


def clipping_never_lowers_the_policy_loss(f, seed):
    e = experience(seed)
    loss = f.policy_loss(e.logprobs, e.old_logprobs, e.advantages, clip_range=0.2)[e.mask]
    unclipped = (-(e.logprobs - e.old_logprobs).exp() * e.advantages)[e.mask]
    assert (loss >= unclipped).all()
    assert (loss > unclipped).any()


def clipping_never_lowers_the_value_loss(f, seed):
    e = experience(seed)
    loss = f.value_loss(e.values, e.old_values, e.rewards, clip_range=0.2)[e.mask]
    unclipped = ((e.values - e.rewards) ** 2 / 2)[e.mask]
    assert (loss >= unclipped).all()
    assert (loss > unclipped).any()


def outputs_of_a_step(f, e: SimpleNamespace) -> dict[str, Tensor]:
    """Everything that a PPO step computes from an experience: tensors [B, R], losses, metrics and gradients."""
    policy, value = e.logprobs.clone().requires_grad_(), e.values.clone().requires_grad_()
    kl = f.kl_estimate(e.logprobs, e.ref_logprobs, "k1")
    rewards = f.shaped_rewards(e.scores, kl, e.mask, 0.3)
    advantages = f.gae(rewards, e.old_values, e.mask, gamma=0.95, lam=0.9)
    returns = advantages + e.old_values
    white = f.masked_whiten(advantages, e.mask)
    count = int(e.mask.sum())
    policy_loss = f.token_mean(f.policy_loss(policy, e.old_logprobs, white, clip_range=0.2), e.mask, total=count)
    value_loss = f.token_mean(f.value_loss(value, e.old_values, returns, clip_range=0.2), e.mask, total=count)
    (policy_loss + value_loss).backward()
    return {
        "rewards": rewards,
        "advantages": advantages,
        "whitened advantages": white,
        "policy loss": policy_loss,
        "value loss": value_loss,
        "policy gradient": policy.grad,
        "value gradient": value.grad,
        "kl per token": f.masked_mean(kl, e.mask),
        "kl per sequence": f.masked_sum(kl, e.mask, dim=1),
        "explained variance": f.explained_variance(e.values, returns, e.mask),
    }


def padding_changes_nothing(f, seed):
    e = experience(seed)
    wide = SimpleNamespace(scores=e.scores, mask=torch.nn.functional.pad(e.mask, (0, 3)))
    for name, x in vars(e).items():
        if name not in ("mask", "scores", "lengths"):
            other = torch.where(e.mask, x, -0.7 * x)  # other garbage, and three more columns of it
            setattr(wide, name, torch.nn.functional.pad(other, (0, 3), value=0.3 * GARBAGE))
    expected, padded = outputs_of_a_step(f, e), outputs_of_a_step(f, wide)
    for name, x in expected.items():
        result = padded[name]
        if result.shape == wide.mask.shape:
            assert_close(result[:, -3:], torch.zeros(len(result), 3), name)
            result = result[:, :-3]
        assert_close(result, x, name)


def probabilities_sum_to_1_and_temperature_divides_log_odds(f, seed):
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for temperature in (0.5, 1.0, 2.0):
        ids = torch.arange(6).expand(3, 6)
        logp = f.token_logprobs(logits[:, None].expand(3, 6, 6), ids, temperature=temperature)
        assert_close(logp.exp().sum(-1), [1.0, 1.0, 1.0])
        assert_close(logp[:, 0] - logp[:, 1], (logits[:, 0] - logits[:, 1]) / temperature)


def entropy_is_the_mean_surprise(f, seed):
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for temperature in (0.5, 1.0, 2.0):
        logp = f.token_logprobs(logits.expand(6, 6), torch.arange(6), temperature=temperature)
        assert_close(f.token_entropy(logits, temperature=temperature), -(logp.exp() * logp).sum())


def expected_k1_and_k3_are_the_divergence(f, seed):
    generator = torch.Generator().manual_seed(seed)
    pi, ref = (torch.softmax(torch.randn(7, generator=generator, dtype=F64), 0) for _ in range(2))
    divergence = (pi * (pi / ref).log()).sum()
    for kind in ("k1", "k3"):
        assert_close((pi * f.kl_estimate(pi.log(), ref.log(), kind)).sum(), divergence, kind)


def k3_is_never_negative(f, seed):
    generator = torch.Generator().manual_seed(seed)
    ref = -10 * torch.rand(4000, generator=generator)
    for size in (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 10.0):
        noise = size * torch.randn(4000, generator=generator)
        assert (f.kl_estimate(noise, torch.zeros(4000), "k3") >= 0).all(), size
        assert (f.kl_estimate(ref + noise, ref, "k3") >= 0).all(), size
    assert (f.kl_estimate(ref, ref, "k3") == 0).all()


def the_controller_pulls_towards_its_target(f, seed):
    target = 3.0 + seed
    assert f.adaptive_kl(0.2, target, target, 100, 10) == 0.2
    assert f.adaptive_kl(0.2, 1.1 * target, target, 100, 10) > 0.2 > f.adaptive_kl(0.2, 0.9 * target, target, 100, 10)
    assert f.adaptive_kl(0.2, 50 * target, target, 100, 10) == f.adaptive_kl(0.2, 2 * target, target, 100, 10)


def _scores(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(20, generator=generator, dtype=F64) for _ in range(2)]


def shifting_all_scores_changes_no_preference(f, seed):
    chosen, rejected = _scores(seed)
    for options in ({}, {"margin": 0.4}, {"preference": 0.8}):
        expected = f.bradley_terry_loss(chosen, rejected, **options)
        assert_close(f.bradley_terry_loss(chosen + 7, rejected + 7, **options), expected)


def equal_scores_cost_ln_2(f, seed):
    chosen, _ = _scores(seed)
    for options in ({}, {"preference": 0.5}, {"preference": 0.9}):
        assert_close(f.bradley_terry_loss(chosen, chosen, **options), [math.log(2)] * 20)


def the_preference_gradient_is_the_probability_of_error(f, seed):
    chosen, rejected = (x.requires_grad_() for x in _scores(seed))
    with torch.no_grad():
        rejected[0] = chosen[0] + 15  # badly wrong pairs must learn most
    f.bradley_terry_loss(chosen, rejected).sum().backward()
    error = torch.sigmoid(rejected - chosen).detach()
    assert_close(chosen.grad, -error)
    assert_close(rejected.grad, error)


def swapping_the_pair_swaps_the_preference(f, seed):
    chosen, rejected = _scores(seed)
    for margin in (None, 0.7):
        expected = f.bradley_terry_loss(chosen, rejected, margin=margin, preference=0.8)
        assert_close(f.bradley_terry_loss(rejected, chosen, margin=margin, preference=1 - 0.8), expected)


def _split(e: SimpleNamespace, sizes: list[int]) -> list[SimpleNamespace]:
    pieces = {name: x.split(sizes) for name, x in vars(e).items()}
    return [SimpleNamespace(**{name: x[k] for name, x in pieces.items()}) for k in range(len(sizes))]


def one_number_added_to_all_scores_is_added_to_the_ensemble(f, seed):
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for kind in ("mean", "worst", "uncertainty"):
        assert_close(f.ensemble_score(scores + 3, kind=kind), f.ensemble_score(scores, kind=kind) + 3)


def models_that_agree_are_one_and_doubt_never_pays(f, seed):
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)
    mean = f.ensemble_score(scores, kind="mean")
    for kind in ("mean", "worst", "uncertainty"):
        assert_close(f.ensemble_score(mean.expand(3, -1), kind=kind), mean)
        assert bool((f.ensemble_score(scores, kind=kind) <= mean + 1e-12).all())
        assert_close(f.ensemble_score(scores.repeat(2, 1), kind=kind), f.ensemble_score(scores, kind=kind))


def moments_add_up_over_parts(f, seed):
    e = experience(seed)
    parts = [f.masked_moments(p.rewards, p.mask) for p in _split(e, [1, 5, 2])]
    assert_close(torch.stack(parts).sum(0), f.masked_moments(e.rewards, e.mask))


def two_ranks_whiten_like_one(f, seed):
    e = experience(seed)
    e.advantages[:3] += 4  # ranks with different means
    for center in (True, False):
        expected = f.masked_whiten(e.advantages, e.mask, center=center)
        ranks = on_ranks(
            _split(e, [3, 5]),
            lambda p, add, center=center: f.masked_whiten(p.advantages, p.mask, center=center, reduce=add),
        )
        assert_close(torch.cat(ranks), expected)


def two_ranks_explain_like_one(f, seed):
    e = experience(seed)
    e.rewards[:3] += 4
    expected = f.explained_variance(e.values, e.rewards, e.mask)
    ranks = on_ranks(_split(e, [3, 5]), lambda p, add: f.explained_variance(p.values, p.rewards, p.mask, reduce=add))
    for result in ranks:
        assert_close(result, expected)


def four_microbatches_have_the_gradient_of_one_batch(f, seed):
    e = experience(seed)
    total = int(e.mask.sum())

    def gradient(parts: list[SimpleNamespace]) -> Tensor:
        weight = torch.tensor(0.5, dtype=F64, requires_grad=True)  # one parameter that all tokens share
        for p in parts:
            loss = f.value_loss(weight * p.values, p.old_values, p.rewards, clip_range=0.2)
            f.token_mean(loss, p.mask, total=total).backward()
        return weight.grad

    assert_close(gradient(_split(e, [1, 1, 4, 2])), gradient([e]))
    assert_close(gradient(_split(e, [8])), gradient([e]))
