"""Sums, means, whitening and explained variance over the positions where a mask is True."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.errors import ShapeError
from rlhf.functional.checks import as_float, bool_mask, same_shape

Reduce = Callable[[Tensor], Tensor]
"""Type of a function that sums a small tensor over ranks; every rank must call it equally often."""

MIN_STD = 1e-3
"""Standard deviation (score units) below which an input counts as constant, because what is left is noise."""

MIN_STD_PER_MEAN = 1e-6
"""The same limit relative to |mean|: about eight float32 roundings of a value of that size."""


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum over the positions that count.

        sum_i m_i x_i

    Args:
        x: any shape, any unit. Ignored where the mask is False, NaN and infinity included.
        mask: same shape, bool, True = counts.
        dim: dimension to sum over; None sums all.
    Returns: the unit of x, shape of x without `dim` (0-d for None). 0 where nothing counts. float32, or float64 for
        float64 x. Differentiable in x.
    Does not: divide by anything.
    Raises: ShapeError if the shapes differ; TypeError if the mask is not bool.
    """
    same_shape("masked_sum", x=x, mask=mask)
    bool_mask("masked_sum", mask)
    kept = as_float(x).masked_fill(~mask, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean over the positions that count.

        sum_i m_i x_i / sum_i m_i

    Args:
        x: any shape, any unit. Ignored where the mask is False.
        mask: same shape, bool, True = counts.
        dim: dimension to average over; None averages all.
    Returns: the unit of x, shape of x without `dim` (0-d for None). A full mask gives the ordinary mean.
        Differentiable in x.
    Does not: see other ranks or microbatches. A mean of such means weights tokens unequally; a loss uses `token_mean`.
    Raises: ShapeError if the shapes differ or a mean has no element; TypeError if the mask is not bool.
    """
    total = masked_sum(x, mask, dim)
    count = mask.sum() if dim is None else mask.sum(dim)
    if bool((count == 0).any()):
        raise ShapeError("mean over an empty mask", found=f"mask {list(mask.shape)}, dim {dim}", where="masked_mean")
    return total / count


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Return the additive moments of the positions that count: count, sum and sum of squares.

        ( sum_i m_i,  sum_i m_i x_i,  sum_i m_i x_i^2 )

    Args:
        x: any shape, any unit u. Ignored where the mask is False.
        mask: same shape, bool, True = counts.
    Returns: [3] float64 in (1, u, u^2). Moments of disjoint parts add up to the moments of the whole, so a sum over
        ranks gives global moments. All zero for an empty mask. Keeps no gradient.
    Does not: compute a variance. E[x^2] - E[x]^2 loses (mean/std)^2 in relative precision; `masked_whiten` centres
        first.
    Raises: ShapeError if the shapes differ; TypeError if the mask is not bool.
    """
    same_shape("masked_moments", x=x, mask=mask)
    bool_mask("masked_moments", mask)
    kept = x.detach().double().masked_fill(~mask, 0.0)
    return torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))


def _mean_and_variance(where: str, x: Tensor, mask: Tensor, reduce: Reduce | None) -> tuple[Tensor, Tensor]:
    """Return the global mean and biased variance, 0-d float64, in two passes: mean, then squares of residuals."""
    add = reduce if reduce is not None else (lambda moments: moments)
    count, total, _ = add(masked_moments(x, mask)).unbind()
    if bool(count == 0):  # after the reduction, so that all ranks agree to raise
        raise ShapeError("no position counts on any rank", found=f"mask {list(mask.shape)}", where=where)
    mean = total / count
    squares = add(masked_moments(x.detach().double() - mean, mask))[2]
    return mean, squares / count


def _least_std(mean: Tensor) -> Tensor:
    """Return the standard deviation below which values around `mean` count as constant."""
    return (mean.abs() * MIN_STD_PER_MEAN).clamp(min=MIN_STD)


def masked_whiten(x: Tensor, mask: Tensor, *, center: bool = True, reduce: Reduce | None = None) -> Tensor:
    """Rescale to variance 1 and, by default, shift to mean 0, over the positions that count.

        mu = sum_i m_i x_i / n          var = sum_i m_i (x_i - mu)^2 / n          n = sum_i m_i, over all ranks
        s  = max(sqrt(var), 1e-3, 1e-6 |mu|)
        y_i = (x_i - mu) / s            plus mu if center is False

    Whitening of advantages (mean removed) and of rewards (mean kept) comes from the code released with Ziegler et al.
    2019, arXiv:1909.08593; details in Huang et al. 2024, arXiv:2403.17031.

    The variance is biased (divided by n, not n - 1). The lower limit of s is the guard against collapse: when all
    rewards are equal up to rounding, dividing by their standard deviation would turn noise into advantages of size 1.
    Here the result shrinks in proportion instead (noise of 1e-5 gives 0.01) and there is no jump at the limit. Scores
    whose true spread is below 1e-3 must therefore be rescaled before whitening.

    Args:
        x: any shape, score units. Ignored where the mask is False.
        mask: same shape, bool, True = counts.
        center: True removes the mean; False keeps it.
        reduce: sums a small tensor over ranks; called twice. None means that this is the only rank.
    Returns: shape of x, zero off-mask, dimensionless (for center=False the mean keeps its unit). Keeps no gradient.
    Does not: clip, or whiten per row. A mask that is empty here but not on every rank is allowed.
    Raises: ShapeError if the shapes differ or nothing counts on any rank; TypeError if the mask is not bool.
    """
    mean, variance = _mean_and_variance("masked_whiten", x, mask, reduce)
    white = (x.detach().double() - mean) / torch.maximum(variance.sqrt(), _least_std(mean))
    if not center:
        white = white + mean
    return white.masked_fill(~mask, 0.0).to(as_float(x).dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Reduce | None = None) -> Tensor:
    """Share of the variance of the returns that the values predict.

        1 - Var(G - V) / Var(G)          biased variances over the positions that count, over all ranks

    Logged with the code of Ziegler et al. 2019, arXiv:1909.08593. Perfect values give 1, constant values give 0,
    values worse than a constant give less than 0. If the standard deviation of the returns is at most
    max(1e-3, 1e-6 |mean|) there is nothing to explain and the result is 0, not NaN and not a huge negative number.

    Args:
        values: any shape, score units. Ignored off-mask.
        returns: same shape, score units. Ignored off-mask.
        mask: same shape, bool, True = counts.
        reduce: sums a small tensor over ranks; called four times. None means that this is the only rank.
    Returns: 0-d, dimensionless, at most 1. NaN if an input that counts is not finite. Keeps no gradient.
    Does not: see a constant offset between values and returns (variance ignores it); watch the value loss for that.
    Raises: ShapeError if the shapes differ or nothing counts on any rank; TypeError if the mask is not bool.
    """
    same_shape("explained_variance", values=values, returns=returns, mask=mask)
    mean, variance = _mean_and_variance("explained_variance", returns, mask, reduce)
    _, unexplained = _mean_and_variance("explained_variance", as_float(returns) - as_float(values), mask, reduce)
    share = 1.0 - unexplained / variance
    return torch.where(variance.sqrt() <= _least_std(mean), 0.0, share).to(as_float(values).dtype)
