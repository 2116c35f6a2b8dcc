"""Estimators of the KL divergence to the reference policy, and the controller of its coefficient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.functional.checks import as_float, same_shape

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Return the per-sample estimate of KL(pi || pi_ref) from tokens sampled from pi.

        d  = log pi(x) - log pi_ref(x)
        k1 = d                          unbiased; may be negative; large variance
        k2 = d^2 / 2                    biased by O(d^3); never negative
        k3 = exp(-d) - 1 + d            unbiased; never negative; small variance near pi = pi_ref

    J. Schulman 2020, "Approximating KL Divergence" (web note). Gradients differ from values (Tang and Munos 2025,
    arXiv:2506.09477): as a loss, the expected gradient is 0 for k1, that of KL(pi || pi_ref) for k2 and that of
    KL(pi_ref || pi) for k3. Inside a reward only k1 is right; the gradient of k3 vanishes there near pi = pi_ref.

    Args:
        logprobs: any shape, nats, at the sampling temperature.
        ref_logprobs: same shape, nats, same tokens, same temperature.
        kind: "k1", "k2" or "k3".
    Returns: same shape, nats. Differentiable in both arguments; detach where the estimate is a reward. Nothing is
        clamped from above, so in float32 k3 is inf where the reference is more than 88 nats more likely.
    Does not: mask, sum over the sequence, or correct for samples of another policy.
    Raises: ShapeError if the shapes differ; ValueError for another kind.
    """
    same_shape("kl_estimate", logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = as_float(logprobs) - as_float(ref_logprobs)
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        # expm1 keeps k3 precise for small d, where exp(-d) - 1 rounds to noise. The clamp handles an expm1
        # that is too small by one rounding, which accelerators may return.
        return (torch.expm1(-d) + d).clamp(min=0.0)
    raise ValueError(f"kl_estimate: kind must be one of {', '.join(KL_ESTIMATORS)} (found: {kind!r})")


def adaptive_kl(coef: float, observed: float, target: float, horizon: float, n: int) -> float:
    """Return the KL coefficient after n more episodes: a proportional controller in log space.

        e     = clip(observed / target - 1, -0.2, 0.2)
        coef' = coef (1 + e n / horizon)

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2. observed = target keeps the coefficient; a saturated error
    changes it by a fraction 0.2 n / horizon.

    Args:
        coef: current coefficient, score units per nat, >= 0 (0 stays 0).
        observed: mean over sequences of the KL summed over response tokens, nats; may be negative (k1 is an estimate).
        target: nats per sequence, > 0.
        horizon: episodes, > 0; larger is slower.
        n: episodes since the last call, 0 <= n < 5 horizon (beyond that the coefficient could reach 0 or less).
    Returns: score units per nat.
    Does not: bound the coefficient, smooth the observation, or average over ranks.
    Raises: ValueError if an argument is outside its range or not finite.
    """
    ok = all(math.isfinite(v) for v in (coef, observed, target, horizon)) and coef >= 0 and target > 0 and horizon > 0
    if not ok or not 0 <= n < 5 * horizon:
        raise ValueError(
            "adaptive_kl: needs finite numbers with coef >= 0, target > 0, horizon > 0 and 0 <= n < 5 horizon "
            f"(found: coef={coef}, observed={observed}, target={target}, horizon={horizon}, n={n})"
        )
    error = min(max(observed / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * n / horizon)
