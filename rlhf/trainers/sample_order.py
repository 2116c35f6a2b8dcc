"""In which order rows are used. Every order follows from whole numbers alone, so that a run can continue anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled_indices(count: int, *parts: int) -> Tensor:
    """The numbers below `count` in an order that follows from some whole numbers."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def cyclic_indices(count: int, first: int, size: int, *parts: int) -> list[int]:
    """Rows at positions first .. first + size of endless passes over `count` rows, each pass in another order."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(first, first + size):
        lap, place = divmod(position, count)
        if lap not in orders:
            orders[lap] = shuffled_indices(count, *parts, lap).tolist()
        chosen.append(orders[lap][place])
    return chosen
