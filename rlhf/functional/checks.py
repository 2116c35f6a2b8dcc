"""Checks of shapes and masks before arithmetic, and the rule for the dtype that values are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.errors import ShapeError


def same_shape(where: str, **tensors: Tensor) -> None:
    """Raise ShapeError unless all named tensors have one shape."""
    if len({t.shape for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise ShapeError("shapes must be equal", found=found, where=where, do="align them; nothing is broadcast")


def bool_mask(where: str, mask: Tensor) -> None:
    """Raise TypeError unless the mask is bool.

    Most arithmetic would accept an integer or float mask but treat it as weights.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"{where}: mask must be bool with True = counts (found: {mask.dtype}); use mask.bool()")


def response_prefix(where: str, response_mask: Tensor) -> None:
    """Raise unless the mask is bool [B, R] and each row is True on a non-empty prefix and False after it."""
    bool_mask(where, response_mask)
    if response_mask.dim() != 2:
        raise ShapeError("response_mask must be [B, R]", found=str(list(response_mask.shape)), where=where)
    empty = (~response_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ShapeError("a response has no real token", found=f"rows {empty}", where=where, do="drop these rows")
    gaps = (response_mask[:, 1:] & ~response_mask[:, :-1]).any(dim=1).nonzero().flatten().tolist()
    if gaps:
        raise ShapeError(
            "response_mask must be a prefix of each row",
            found=f"rows {gaps}",
            where=where,
            do="pad responses on the right",
        )


def as_float(x: Tensor) -> Tensor:
    """Return the tensor in its computing dtype: float64 stays float64, every other dtype becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
