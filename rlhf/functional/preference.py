"""The reward model's loss on pairs of responses, and the combination of an ensemble's scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.functional.checks import as_float, same_shape


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float | None = None, preference: Tensor | float | None = None
) -> Tensor:
    """Return the negative log-likelihood of the preferences under the Bradley-Terry model.

        d    = chosen - rejected
        loss = - p log sigma(d - m) - (1 - p) log sigma(-d - m)
        p    = preference, 1 if absent          m = margin, 0 if absent

    Bradley and Terry 1952; as a reward-model loss Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin is that of
    Touvron et al. 2023, arXiv:2307.09288, eq. 2; soft labels as in Wang et al. 2024, arXiv:2401.06080. The margin
    widens the gap that either side must reach, so that swapping the two responses together with p -> 1 - p changes
    nothing.

    Limits: d = 0 gives ln 2; d -> infinity gives 0; d -> -infinity gives -d. Without margin the derivative
    by d is sigma(d) - p, so the minimum lies at d = logit(p). Adding one number to all scores changes nothing.

    Args:
        chosen: any shape, score units.
        rejected: same shape, score units.
        margin: score units; same shape, or one number for all, or None.
        preference: P(chosen is better), in [0, 1]; 0.5 is a tie, 1 - a is label smoothing by a. Same shape, or one
            number, or None for 1.
    Returns: same shape, nats, >= 0, finite for finite scores. Differentiable in the scores.
    Does not: average, weight pairs of one prompt, or fix the free constant of the scores.
    Raises: ShapeError if two tensors differ in shape; ValueError if a preference is outside [0, 1].
    """
    given = {"chosen": chosen, "rejected": rejected, "margin": margin, "preference": preference}
    same_shape("bradley_terry_loss", **{name: value for name, value in given.items() if isinstance(value, Tensor)})
    d = as_float(chosen) - as_float(rejected)
    m = 0.0 if margin is None else margin
    if preference is None:
        return -logsigmoid(d - m)
    p = as_float(preference) if isinstance(preference, Tensor) else torch.as_tensor(preference, dtype=d.dtype)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"bradley_terry_loss: preference must lie in [0, 1] (found: {p.min()} to {p.max()})")
    return -p * logsigmoid(d - m) - (1 - p) * logsigmoid(-d - m)


def ensemble_score(scores: Tensor, *, kind: str, penalty: float = 0.5) -> Tensor:
    """Return one score from the scores of several reward models (Coste et al. 2023, arXiv:2310.02743, section 3).

        mean          1/M sum_m s_m
        worst         min_m s_m                                       WCO, worst-case optimization
        uncertainty   mean - penalty 1/M sum_m (s_m - mean)^2         UWO, uncertainty-weighted optimization

    Limits: equal models give their score; penalty 0 makes uncertainty the mean. A number added to all scores adds to
    the result.

    Args:
        scores: [M, ...] of M >= 1 models, score units of one common scale.
        kind: mean, worst or uncertainty.
        penalty: 1 / score units, >= 0; only for uncertainty.
    Returns: [...], score units.
    Does not: bring the models to a common scale.
    Raises: ValueError for another kind, no models, or a negative penalty.
    """
    if not scores.dim() or not len(scores) or penalty < 0:
        raise ValueError(f"ensemble_score: M >= 1 models and penalty >= 0 (found: {list(scores.shape)}, {penalty})")
    values = as_float(scores)
    if kind == "worst":
        return values.amin(dim=0)
    if kind not in ("mean", "uncertainty"):
        raise ValueError(f"ensemble_score: kind is mean, worst or uncertainty (found: {kind})")
    mean = values.mean(dim=0)
    return mean if kind == "mean" else mean - penalty * values.var(dim=0, correction=0)
