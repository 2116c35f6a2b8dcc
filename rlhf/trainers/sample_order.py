"""Order in which rows are used. It is a function of integers such as seed and epoch, so a run can resume at any row."""

from __future__ import annotations

import torch
from torch import Tensor


def shuffled_indices(count: int, *parts: int) -> Tensor:
    """Return a permutation of 0 .. count - 1 that is determined by the integers `parts`."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def cyclic_indices(count: int, first: int, size: int, *parts: int) -> list[int]:
    """Return the rows at positions first .. first + size - 1 of repeated passes over `count` rows.

    Each pass is shuffled differently, as determined by `parts` and the number of the pass.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(first, first + size):
        epoch, index = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = shuffled_indices(count, *parts, epoch).tolist()
        chosen.append(orders[epoch][index])
    return chosen
