"""Rows of unequal length without padding: several in one row of the batch, each attending to itself alone.

A batch of B padded rows becomes fewer rows of like fill. Positions start at 0 in each of the packed sequences, and
without an attention mask transformers builds the block-diagonal one from them. What comes out is read back by `slot`.

    ids  _ a b c d        mask  0 1 1 1 1       packed ids  a b c d e f     positions  0 1 2 3 0 1
         _ _ _ e f              0 0 0 1 1       slot        - 0 1 2 3 / - - - 4 5
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf.models.load import backbone

LINEAR_COST_LENGTH = (
    512  # row length at which attention costs as much as all the rest of a token; smaller for narrow models
)
MAX_ROW_COUNTS_TRIED = 6  # numbers of rows
ROUNDING_SHARE = 64  # rounding the places of a batch may cost one part in so many
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative to the largest


@dataclass(frozen=True)
class PackedBatch:
    """B sequences as a model's trunk reads them: packed into fewer rows, or padded as they are.

    Make one with `of` or `for_model`, once for each microbatch, and pass it to every model that reads these sequences.
    """

    ids: Tensor  # [b, L] int64
    positions: Tensor  # [b, L] int64, from 0 in each sequence; 0 on padding, which so attends to itself alone
    slot: Tensor  # [B, T] int64: where a token of the padded batch lies in the flattened rows; 0 where mask is False
    mask: Tensor | None = None  # [b, L] bool, True = real token, of padded rows; None where sequences are packed

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, *, packed: bool = True) -> PackedBatch:
        """Pack sequences, or lay them out as padded rows.

        Args:
            ids: [B, T] int64. mask: [B, T] bool, True = real token, padding on either side, at least one token a row.
        """
        if packed:
            return pack(ids, mask)
        positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        slot = torch.arange(ids.numel(), device=ids.device).view(ids.shape) * mask
        return cls(ids, positions, slot, mask)

    @classmethod
    def for_model(cls, model: Any, ids: Tensor, mask: Tensor) -> PackedBatch:
        """Pack sequences if the model computes the same on packed rows, else pad them."""
        return cls.of(ids, mask, packed=can_pack(model))

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a transformers model's forward pass."""
        given = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False}
        return given if self.mask is None else given | {"attention_mask": self.mask.long()}

    @property
    def fill(self) -> float:
        """Share of the batch's places that hold real tokens."""
        return float((self.slot > 0).sum() + 1) / self.ids.numel()  # exactly one real token has slot 0


def pack(ids: Tensor, mask: Tensor) -> PackedBatch:
    """Pack rows so that they are full and yet short, because attention grows with their length.

    Args:
        ids: [B, T] int64. mask: [B, T] bool, padding on either side, at least one token a row.
    Returns: every token in one place, those of a sequence side by side and in order.
    """
    lengths = mask.sum(dim=1).tolist()
    longest = max(lengths)
    most = -(-sum(lengths) // longest)
    powers = (2**n for n in range(most.bit_length()))
    fewer = dict.fromkeys((*range(most, most - MAX_ROW_COUNTS_TRIED, -1), most // 2, most // 4, *powers))
    candidates = [_fitted(lengths, longest), *(_dealt(lengths, rows) for rows in fewer if rows > 0)]
    rounded = [_rounded(layout, sum(lengths)) for layout in candidates]
    places, rows, capacity = min(rounded, key=lambda c: c[1] * c[2] * (1 + c[2] / LINEAR_COST_LENGTH))
    start = torch.tensor([row * capacity + offset for row, offset in places], device=ids.device)
    within = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    slot = (start[:, None] + within) * mask
    packed = torch.zeros(rows * capacity, dtype=ids.dtype, device=ids.device)
    positions = torch.zeros_like(packed)
    packed[slot[mask]], positions[slot[mask]] = ids[mask], within[mask].to(ids.dtype)
    return PackedBatch(packed.view(rows, capacity), positions.view(rows, capacity), slot)


def microbatches(lengths: Tensor, size: int, *, packed: bool) -> list[Tensor]:
    """Rows in parts of at most `size`: with about the same number of tokens each if they will be packed, else of like
    length, so that there is little padding.

    Args:
        lengths: [B] int64, tokens of every row.
    Returns: int64 row indices on the CPU, like all row numbers; every row is in exactly one part.
    """
    order = lengths.cpu().argsort(descending=True, stable=True)
    if not packed:
        return list(order.split(size))
    parts = -(-len(order) // size)
    rounds = [r if i % 2 == 0 else r.flip(0) for i, r in enumerate(order.split(parts))]  # to and fro: even sums
    return [torch.stack([r[i] for r in rounds if i < len(r)]) for i in range(parts)]


RowLayout = tuple[list[tuple[int, int]], int, int]  # (row, offset) of every sequence, rows, their length


def packed_rows(lengths: Sequence[int], capacity: int) -> int:
    """Rows of `capacity` tokens that sequences of some lengths are packed into, as `trl.pack_dataset` packs them.

    Args:
        lengths: tokens of each, at most `capacity`.
    """
    return _fitted(list(lengths), capacity)[1]


def _fitted(lengths: list[int], capacity: int) -> RowLayout:
    """Best fit: longest first, each into the fullest row of a given length that has room."""
    places, room = [(0, 0)] * len(lengths), list[tuple[int, int]]()  # room left and row, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[i], -1))
        left, row = room.pop(at) if at < len(room) else (capacity, len(room))
        places[i] = (row, capacity - left)
        bisect.insort(room, (left - lengths[i], row))
    return places, len(room), capacity


def _dealt(lengths: list[int], rows: int) -> RowLayout:
    """A given number of rows: longest first, each to the emptiest."""
    places, used = [(0, 0)] * len(lengths), [(0, row) for row in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, row = heapq.heappop(used)
        places[i] = (row, length)
        heapq.heappush(used, (length + lengths[i], row))
    return places, rows, max(used)[0]


def _rounded(layout: RowLayout, tokens: int) -> RowLayout:
    """Longer rows, so that the number of places is a multiple of 128 (less if there are few tokens).

    Kernels are prepared, and weights kept rearranged, once for each number of places: oneDNN's cache of bfloat16
    products takes a copy of a weight for every one.
    """
    places, rows, capacity = layout
    grain = min(128, 2 ** max(0, (tokens // ROUNDING_SHARE).bit_length() - 1))
    by = grain // math.gcd(rows, grain)
    return places, rows, -(-capacity // by) * by


def trunk_states(model: Any, batch: PackedBatch, where: Tensor | None = None) -> Tensor:
    """Return the last hidden states of a model's trunk at some positions of each sequence.

    Args:
        where: [B, N] int64, columns of the padded batch to read in each row; None = all.
    Returns: [B, N, H] (or [B, T, H]); meaningless where the sequences' mask is False.
    """
    hidden = backbone(model)(**batch.inputs()).last_hidden_state
    slots = batch.slot if where is None else batch.slot.gather(1, where)
    return hidden.flatten(0, 1)[slots]


# Found out once a model, and kept for as long as it lives.
_packable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_pack(model: Any) -> bool:
    """Whether a model's trunk computes the same packed as padded; found out once a model, on two short sequences.

    Models whose layers carry a state along the row (Mamba and its like), or that take positions from elsewhere, do
    not: they are given padded rows.
    """
    if model not in _packable:
        _packable[model] = False
        if hasattr(model, "config") and hasattr(model.config, "get_text_config"):
            with torch.autocast(next(model.parameters()).device.type, enabled=False):
                _packable[model] = _probe(model)
    return _packable[model]


@torch.no_grad()
def _probe(model: Any) -> bool:
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (2, 7), generator=generator).to(device)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[1, :3] = False  # 7 and 4 tokens
    was = model.training
    model.eval()
    trunk = backbone(model)
    positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    padded = trunk(input_ids=rows, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    packed = torch.cat([rows[0], rows[1, 3:]])[None]
    restarts = torch.cat([positions[0], positions[1, 3:]])[None]
    try:
        together = trunk(input_ids=packed, position_ids=restarts, use_cache=False)
    except Exception:  # whatever an architecture that cannot be packed raises
        return False
    finally:
        model.train(was)
    wanted = torch.cat([padded.last_hidden_state[0], padded.last_hidden_state[1, 3:]]).float()
    found = together.last_hidden_state[0].float()
    if found.shape != wanted.shape:
        return False
    tolerance = TOLERANCE.get(padded.last_hidden_state.dtype, 1e-3)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
