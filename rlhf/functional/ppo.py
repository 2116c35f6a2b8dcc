"""The policy loss and the value loss of proximal policy optimization, elementwise."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.functional.checks import as_float, same_shape

MAX_LOG_RATIO = 20.0
"""Nats; the exponential of a larger log ratio overflows or dominates the sum. Healthy training stays far below."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Return the clipped surrogate objective of the policy, as a loss.

        rho  = exp(clamp(logp - logp_old, -20, 20))
        loss = max(-A rho, -A clamp(rho, 1 - clip_range, 1 + clip_range_high))
        with dual_clip = c, where A < 0:  loss = min(loss, -c A)

    Schulman et al. 2017, arXiv:1707.06347, eq. 7 (negated). A higher upper limit: Yu et al. 2025, arXiv:2503.14476.
    Dual clip: Ye et al. 2019, arXiv:1912.09729. At rho = 1 the loss is -A and its derivative by logp is -A. The
    gradient is 0 where A > 0 and rho > 1 + clip_range_high, where A < 0 and rho < 1 - clip_range, where dual_clip is
    set, A < 0 and rho > c, and where the log ratio is beyond 20 nats.

    Args:
        logprobs: any shape, nats, of the policy being updated.
        old_logprobs: same shape, nats, of the policy that sampled, by the same code path and temperature.
        advantages: same shape, usually whitened.
        clip_range: dimensionless, in (0, 1).
        clip_range_high: dimensionless, > 0; None means clip_range.
        dual_clip: dimensionless, > 1, usually 3; None is off.
    Returns: same shape, unit of the advantages. Differentiable in logprobs only.
    Does not: mask, average (`token_mean` does both), or add a KL or entropy term.
    Raises: ShapeError if the shapes differ; ValueError if a range is outside its limits.
    """
    same_shape("policy_loss", logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    high = clip_range if clip_range_high is None else clip_range_high
    if not (0 < clip_range < 1 and high > 0 and (dual_clip is None or dual_clip > 1)):
        raise ValueError(
            "policy_loss: needs 0 < clip_range < 1, clip_range_high > 0 and dual_clip > 1 "
            f"(found: clip_range={clip_range}, clip_range_high={clip_range_high}, dual_clip={dual_clip})"
        )
    advantages = as_float(advantages.detach())
    log_ratio = as_float(logprobs) - as_float(old_logprobs.detach())
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None) -> Tensor:
    """Return the squared error of the values, with steps away from the old values clipped.

        V_c  = V_old + clamp(V - V_old, -clip_range, clip_range)
        loss = 1/2 max((V - G)^2, (V_c - G)^2)

    From the code released with arXiv:1707.06347 (the paper does not mention it); described by Engstrom et al. 2020,
    arXiv:2005.12729. The larger of the two errors counts, so clipping never lowers the loss. The gradient by V
    is V - G, or 0 where the clipped error is larger (V has moved past the limit towards G). V = V_old gives the plain
    squared error.

    Args:
        values: any shape, score units, of the value model being updated.
        old_values: same shape, score units, at the time of sampling.
        returns: same shape, score units, advantages before whitening + old_values.
        clip_range: score units, > 0; None turns clipping off.
    Returns: same shape, squared score units. Differentiable in values only.
    Does not: mask, average, or multiply by a coefficient.
    Raises: ShapeError if the shapes differ; ValueError if clip_range <= 0.
    """
    same_shape("value_loss", values=values, old_values=old_values, returns=returns)
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"value_loss: clip_range must be > 0 or None (found: {clip_range})")
    values, old_values, returns = as_float(values), as_float(old_values.detach()), as_float(returns.detach())
    error = (values - returns).square()
    if clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns).square())
    return error / 2
