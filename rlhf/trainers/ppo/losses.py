"""Loss of a PPO microbatch: policy and value terms, and the optional entropy and KL terms."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config.ppo import KL, PPO
from rlhf.functional import kl_estimate, policy_loss, value_loss
from rlhf.rollout.types import Experience


def summed_losses(
    part: Experience, logprobs: Tensor, entropy: Tensor, values: Tensor, settings: PPO, kl: KL, *, warming: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss summed over the response tokens of a microbatch, and the sums of the logged quantities.

        loss = policy + value_coef value - entropy_coef entropy + loss_coef KL(policy, reference)

    The arguments are those of `policy_terms` and `value_terms`.
    Returns: (0-d sum, name -> 0-d sum). `ratio_error` is a maximum instead of a sum.
    """
    policy, numbers = policy_terms(part, logprobs, entropy, settings, kl, warming=warming)
    value, more = value_terms(part, values, settings, warming=warming)
    return value + policy, numbers | more


def policy_terms(
    part: Experience, logprobs: Tensor, entropy: Tensor, settings: PPO, kl: KL, *, warming: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the terms of the loss that the policy is trained with, and the sums of what is logged about them.

    Args:
        part: the microbatch.
        logprobs: [B, R] nats, of the policy being updated.
        entropy: [B, R] nats, of the policy being updated.
        settings: clip ranges and coefficients.
        kl: settings of the KL term in the loss.
        warming: whether this is value warm-up: the terms are logged but have no gradient.
    """
    mask = part.response_mask
    policy = policy_loss(
        logprobs,
        part.old_logprobs,
        part.advantages,
        clip_range=settings.clip_range,
        clip_range_high=settings.clip_range_high,
        dual_clip=settings.dual_clip,
    )
    policy_sum, entropy_sum = (policy * mask).sum(), (entropy * mask).sum()
    loss = policy_sum
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy_sum
    if kl.loss is not None:
        # Outside the mask both log-probs are 0, and so is every estimate of their difference.
        loss = loss + kl.loss_coef * (kl_estimate(logprobs, part.ref_logprobs, kl.loss) * mask).sum()
    numbers = _policy_metrics(part, logprobs.detach(), settings)
    numbers |= {"policy_loss": policy_sum.detach(), "entropy": entropy_sum.detach()}
    return 0.0 * loss if warming else loss, numbers


def value_terms(part: Experience, values: Tensor, settings: PPO, *, warming: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the value loss times its coefficient, and the sum that is logged.

    Args:
        values: [B, R] score units, of the value model being updated.
        part, settings, warming: as for `policy_terms`.
    """
    # During warm-up the values are far off; clipping to clip_range per rollout would slow them down too much.
    value = value_loss(values, part.values, part.returns, clip_range=None if warming else settings.value_clip_range)
    value_sum = (value * part.response_mask).sum()
    return settings.value_coef * value_sum, {"value_loss": value_sum.detach()}


@torch.no_grad()
def _policy_metrics(part: Experience, logprobs: Tensor, settings: PPO) -> dict[str, Tensor]:
    mask = part.response_mask
    ratio = (logprobs - part.old_logprobs).exp()
    error = (ratio - 1.0).abs() * mask
    high = settings.clip_range if settings.clip_range_high is None else settings.clip_range_high
    clipped = ((ratio - 1.0 > high) | (1.0 - ratio > settings.clip_range)) & mask
    return {
        "clip_fraction": clipped.sum().to(error.dtype),
        # k3 of KL(old || new): the samples come from the old policy.
        "approx_kl": (kl_estimate(part.old_logprobs, logprobs, "k3") * mask).sum(),
        "ratio_error": error.max(),
    }
