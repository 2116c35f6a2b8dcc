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

    Args:
        part: the microbatch.
        logprobs: [B, R] nats, of the policy being updated.
        entropy: [B, R] nats, of the policy being updated.
        values: [B, R] score units, of the value model being updated.
        settings: clip ranges and coefficients.
        kl: settings of the KL term in the loss.
        warming: whether this is value warm-up: all terms but the value loss are logged but have no gradient.
    Returns: (0-d sum, name -> 0-d sum). `ratio_error` is a maximum instead of a sum.
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
    # During warm-up the values are far off; clipping to clip_range per rollout would slow them down too much.
    value = value_loss(values, part.values, part.returns, clip_range=None if warming else settings.value_clip_range)
    policy_sum, value_sum, entropy_sum = ((x * mask).sum() for x in (policy, value, entropy))
    actor = policy_sum
    if settings.entropy_coef:
        actor = actor - settings.entropy_coef * entropy_sum
    if kl.loss is not None:
        # Outside the mask both log-probs are 0, and so is every estimate of their difference.
        actor = actor + kl.loss_coef * (kl_estimate(logprobs, part.ref_logprobs, kl.loss) * mask).sum()
    loss = settings.value_coef * value_sum + (0.0 * actor if warming else actor)
    return loss, _logged(part, logprobs.detach(), policy_sum, value_sum, entropy_sum, settings)


@torch.no_grad()
def _logged(
    part: Experience, logprobs: Tensor, policy_sum: Tensor, value_sum: Tensor, entropy_sum: Tensor, settings: PPO
) -> dict[str, Tensor]:
    mask = part.response_mask
    ratio = (logprobs - part.old_logprobs).exp()
    error = (ratio - 1.0).abs() * mask
    high = settings.clip_range if settings.clip_range_high is None else settings.clip_range_high
    clipped = ((ratio - 1.0 > high) | (1.0 - ratio > settings.clip_range)) & mask
    return {
        "policy_loss": policy_sum.detach(),
        "value_loss": value_sum.detach(),
        "entropy": entropy_sum.detach(),
        "clip_fraction": clipped.sum().to(error.dtype),
        # k3 of KL(old || new): the samples come from the old policy.
        "approx_kl": (kl_estimate(part.old_logprobs, logprobs, "k3") * mask).sum(),
        "ratio_error": error.max(),
    }
