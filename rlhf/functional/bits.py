"""Bool flags packed into bytes: the sets of tokens that sampling allowed take an eighth of the memory."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(flags: Tensor) -> Tensor:
    """Pack [.., V] bool into [.., ceil(V / 8)] uint8, the first flag in the lowest bit."""
    short = -flags.shape[-1] % 8
    bits = torch.nn.functional.pad(flags, (0, short)).unflatten(-1, (-1, 8)).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (bits * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Unpack what `pack_bits` packed: [.., ceil(V / 8)] uint8 -> [.., size] bool."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) & weights) != 0).flatten(-2)[..., :size]
