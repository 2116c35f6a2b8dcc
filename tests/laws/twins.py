"""Broken twins: each differs from the function of the package by one mistake that people really make."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import logsigmoid, softplus

from rlhf import functional as F


def broken(name: str, twin) -> SimpleNamespace:
    """The functions of the package with one of them replaced."""
    assert name in F.__all__
    return SimpleNamespace(**{**{each: getattr(F, each) for each in F.__all__}, name: twin})


# masked_whiten


def whiten_inverted_flag(x, mask, *, center=True, reduce=None):
    return F.masked_whiten(x, mask, center=not center, reduce=reduce)


def whiten_ignores_mask(x, mask, *, center=True, reduce=None):
    return F.masked_whiten(x, torch.ones_like(mask), center=center, reduce=reduce).masked_fill(~mask, 0.0)


def whiten_unbiased(x, mask, *, center=True, reduce=None):
    mean, n = F.masked_mean(x, mask), mask.sum()
    white = (F.masked_whiten(x, mask, reduce=reduce)) * ((n - 1) / n).sqrt()
    return (white if center else white + mean).masked_fill(~mask, 0.0)


def whiten_only_divides(x, mask, *, center=True, reduce=None):
    if center:
        return F.masked_whiten(x, mask, reduce=reduce)
    return (x / x[mask].std(correction=0)).masked_fill(~mask, 0.0)


def whiten_on_each_rank(x, mask, *, center=True, reduce=None):
    return F.masked_whiten(x, mask, center=center)


def whiten_averages_the_ranks(x, mask, *, center=True, reduce=None):
    """Mean of the ranks' means and variances, whatever their counts."""
    moments = torch.stack((torch.ones((), dtype=x.dtype), x[mask].mean(), x[mask].var(correction=0)))
    ranks, mean, variance = moments if reduce is None else reduce(moments)
    white = (x - mean / ranks) / (variance / ranks).sqrt()
    return (white if center else white + mean / ranks).masked_fill(~mask, 0.0)


# other masked functions


def mean_ignores_mask(x, mask, dim=None):
    return F.masked_mean(x, torch.ones_like(mask), dim)


def mean_divides_by_all(x, mask, dim=None):
    return F.masked_sum(x, mask, dim) / mask.numel()


def sum_ignores_mask(x, mask, dim=None):
    return F.masked_sum(x, torch.ones_like(mask), dim)


def moments_are_means(x, mask):
    return F.masked_moments(x, mask) / mask.sum()


def explained_variance_ignores_mask(values, returns, mask, *, reduce=None):
    return F.explained_variance(values, returns, torch.ones_like(mask), reduce=reduce)


def explained_variance_on_each_rank(values, returns, mask, *, reduce=None):
    return F.explained_variance(values, returns, mask)


def token_mean_of_each_microbatch(x, mask, *, total):
    return F.masked_mean(x, mask)


def token_mean_is_mean_of_means(x, mask, *, total):
    parts = 1 if len(mask) == 8 else 4
    return F.masked_mean(x, mask) / parts


def token_mean_divides_by_all(x, mask, *, total):
    return F.masked_sum(x, mask) / mask.numel()


def token_mean_ignores_mask(x, mask, *, total):
    return x.sum() / total


# gae


def _gae(rewards, values, mask, gamma, trace, *, next_sign=1.0, after_last=0.0):
    """The correct recursion for next_sign = 1 and after_last = 0; `trace` multiplies the next advantage."""
    result = torch.zeros_like(values)
    for b, n in enumerate(mask.sum(1).tolist()):
        advantage = 0.0
        for t in reversed(range(n)):
            following = values[b, t + 1] if t + 1 < n else after_last * values[b, t]
            advantage = rewards[b, t] + next_sign * gamma * following - values[b, t] + trace * advantage
            result[b, t] = advantage
    return result


def gae_correct(rewards, values, response_mask, *, gamma, lam):
    """Not broken: shows that the helper above is only rejected for the mistakes put into it."""
    return _gae(rewards, values, response_mask, gamma, gamma * lam)


def gae_ignores_mask(rewards, values, response_mask, *, gamma, lam):
    everything = torch.ones_like(response_mask)
    return _gae(rewards, values, everything, gamma, gamma * lam).masked_fill(~response_mask, 0.0)


def gae_bootstraps_after_the_end(rewards, values, response_mask, *, gamma, lam):
    return _gae(rewards, values, response_mask, gamma, gamma * lam, after_last=1.0)


def gae_flips_the_next_value(rewards, values, response_mask, *, gamma, lam):
    return _gae(rewards, values, response_mask, gamma, gamma * lam, next_sign=-1.0)


def gae_forgets_lambda(rewards, values, response_mask, *, gamma, lam):
    return _gae(rewards, values, response_mask, gamma, gamma)


def gae_forgets_gamma_in_the_trace(rewards, values, response_mask, *, gamma, lam):
    return _gae(rewards, values, response_mask, gamma, lam)


def gae_swaps_gamma_and_lambda(rewards, values, response_mask, *, gamma, lam):
    return _gae(rewards, values, response_mask, lam, gamma * lam)


# shaped_rewards


def _rewards(scores, penalty, mask, index):
    result = penalty.masked_fill(~mask, 0.0)
    rows = torch.arange(len(scores))
    result[rows, index] += scores
    return result


def rewards_correct(scores, kl, response_mask, kl_coef):
    """Not broken: see gae_correct."""
    return _rewards(scores, -kl_coef * kl, response_mask, response_mask.sum(1) - 1)


def rewards_length_for_index(scores, kl, response_mask, kl_coef):
    """The score one position late, and at the end token where the row is full."""
    index = response_mask.sum(1).clamp(max=kl.shape[1] - 1)
    return _rewards(scores, -kl_coef * kl, response_mask, index)


def rewards_in_last_column(scores, kl, response_mask, kl_coef):
    return _rewards(scores, -kl_coef * kl, response_mask, -torch.ones_like(response_mask.sum(1)))


def rewards_on_every_token(scores, kl, response_mask, kl_coef):
    return (scores[:, None] - kl_coef * kl).masked_fill(~response_mask, 0.0)


def rewards_flipped_penalty(scores, kl, response_mask, kl_coef):
    return F.shaped_rewards(scores, kl, response_mask, -kl_coef)


def rewards_penalise_padding(scores, kl, response_mask, kl_coef):
    return _rewards(scores, -kl_coef * kl, torch.ones_like(response_mask), response_mask.sum(1) - 1)


# policy_loss and value_loss


def policy_flipped_sign(logprobs, old_logprobs, advantages, **options):
    return -F.policy_loss(logprobs, old_logprobs, advantages, **options)


def policy_swapped_ratio(logprobs, old_logprobs, advantages, *, clip_range, **_):
    ratio = (old_logprobs - logprobs).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def policy_without_gradient(logprobs, old_logprobs, advantages, **options):
    return F.policy_loss(logprobs.detach(), old_logprobs, advantages, **options)


def policy_old_is_new(logprobs, old_logprobs, advantages, **options):
    """No detach: the ratio is 1 by construction and has no derivative."""
    return -advantages * (logprobs - logprobs).exp()


def policy_takes_the_smaller(logprobs, old_logprobs, advantages, *, clip_range):
    ratio = (logprobs - old_logprobs).exp()
    return torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_takes_the_smaller(values, old_values, returns, *, clip_range):
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.minimum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def value_only_clipped(values, old_values, returns, *, clip_range):
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return (clipped - returns) ** 2 / 2


# log-probabilities, KL, controller


def logprobs_unnormalised(logits, ids, *, temperature=1.0):
    return (logits / temperature).gather(-1, ids[..., None])[..., 0]


def logprobs_temperature_too_late(logits, ids, *, temperature=1.0):
    return F.token_logprobs(logits, ids) / temperature


def logprobs_temperature_multiplies(logits, ids, *, temperature=1.0):
    return F.token_logprobs(logits, ids, temperature=1 / temperature)


def logprobs_of_the_next_position(logits, ids, *, temperature=1.0):
    return F.token_logprobs(logits.roll(1, -1), ids, temperature=temperature)


def logprobs_not_repeatable(logits, ids, *, temperature=1.0):
    """As with dropout left on: a forward pass differs from the one before."""
    return F.token_logprobs(logits + 1e-4 * torch.randn_like(logits), ids, temperature=temperature)


def entropy_ignores_temperature(logits, *, temperature=1.0):
    return F.token_entropy(logits)


def entropy_in_bits(logits, *, temperature=1.0):
    return F.token_entropy(logits, temperature=temperature) / math.log(2)


def kl_swapped(logprobs, ref_logprobs, kind):
    return F.kl_estimate(ref_logprobs, logprobs, kind)


def kl_k3_of_the_inverse_ratio(logprobs, ref_logprobs, kind):
    d = logprobs - ref_logprobs
    return d.exp() - 1 - d if kind == "k3" else F.kl_estimate(logprobs, ref_logprobs, kind)


def kl_k3_cancels(logprobs, ref_logprobs, kind):
    d = logprobs - ref_logprobs
    return (-d).exp() - 1 + d


def kl_k1_for_all(logprobs, ref_logprobs, kind):
    return F.kl_estimate(logprobs, ref_logprobs, "k1")


def controller_flipped(coef, observed, target, horizon, n):
    return coef * (2 - F.adaptive_kl(1.0, observed, target, horizon, n))


def controller_unclipped(coef, observed, target, horizon, n):
    return coef * (1 + (observed / target - 1) * n / horizon)


# bradley_terry_loss


def preference_flipped_sign(chosen, rejected, *, margin=None, preference=None):
    return F.bradley_terry_loss(rejected, chosen, margin=margin, preference=preference)


def preference_of_single_scores(chosen, rejected, *, margin=None, preference=None):
    return softplus(-chosen) / 2 + softplus(rejected) / 2


def preference_fixed_margin(chosen, rejected, *, margin=None, preference=None):
    return F.bradley_terry_loss(chosen - 0.5, rejected, margin=margin, preference=preference)


def preference_ignored(chosen, rejected, *, margin=None, preference=None):
    return F.bradley_terry_loss(chosen, rejected, margin=margin)


def preference_one_sided_margin(chosen, rejected, *, margin=None, preference=None):
    return F.bradley_terry_loss(chosen - (margin or 0.0), rejected, preference=preference)


def preference_floored_sigmoid(chosen, rejected, *, margin=None, preference=None):
    """log(sigma + 1e-5), which stops learning from badly wrong pairs."""
    return -(logsigmoid(chosen - rejected).exp() + 1e-5).log()


# ensemble_score


def ensemble_takes_the_best(scores, *, kind, penalty=0.5):
    return scores.amax(dim=0) if kind == "worst" else F.ensemble_score(scores, kind=kind, penalty=penalty)


def ensemble_sums(scores, *, kind, penalty=0.5):
    return scores.sum(dim=0) if kind == "mean" else F.ensemble_score(scores, kind=kind, penalty=penalty)


def ensemble_rewards_doubt(scores, *, kind, penalty=0.5):
    return F.ensemble_score(scores, kind="mean") + penalty * scores.var(dim=0, correction=0) * (kind == "uncertainty")


def ensemble_unbiased(scores, *, kind, penalty=0.5):
    m = len(scores)
    return F.ensemble_score(scores, kind=kind, penalty=penalty * m / (m - 1))
