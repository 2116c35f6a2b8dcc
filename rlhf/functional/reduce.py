"""Reduction of a per-token loss to the scalar that is differentiated."""

from __future__ import annotations

from torch import Tensor

from rlhf.errors import ShapeError
from rlhf.functional.masked import masked_sum


def token_mean(x: Tensor, mask: Tensor, *, total: int | float | Tensor) -> Tensor:
    """Return this part's share of the mean over all tokens of an optimizer step.

        sum_i m_i x_i / N          N = number of tokens that count in all microbatches of all ranks

    Summed over microbatches and ranks this is the mean of one big batch, and so is its gradient. Dividing each part
    by its own count instead would give tokens of short parts more weight. With one part and total = number of True in
    the mask this is `masked_mean`.

    Args:
        x: any shape, any unit, usually losses [B, R]. Ignored where the mask is False.
        mask: same shape, bool, True = counts. May be empty (the share is 0).
        total: N, a number or a 0-d tensor, > 0.
    Returns: 0-d, unit of x. Differentiable in x.
    Does not: count or communicate. Where gradients are averaged over ranks (data parallel) instead of summed, the
        caller multiplies by the number of ranks. Does not stop NaN gradients: x may hold anything finite off-mask,
        but NaN there reaches whatever x was multiplied with.
    Raises: ShapeError if the shapes differ or total is not a scalar; TypeError if the mask is not bool; ValueError if
        total <= 0.
    """
    if isinstance(total, Tensor) and total.dim() != 0:
        raise ShapeError("total must be a scalar", found=str(list(total.shape)), where="token_mean")
    if not bool(total > 0):
        raise ValueError(f"token_mean: total must be > 0 (found: {total})")
    return masked_sum(x, mask) / total
