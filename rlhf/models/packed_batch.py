"""Pack sequences of unequal length into rows without padding; each sequence attends only to itself.

A batch of B padded rows becomes fewer rows that are about equally full. Position ids start at 0 in each packed
sequence; without an attention mask, transformers builds the block-diagonal mask from them. `slot` maps the positions of
the padded batch to those of the packed rows.

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
from rlhf.models.quantization import least_precise_dtype

LINEAR_COST_LENGTH = (
    512  # row length at which attention costs as much as all the rest of a token; smaller for narrow models
)
MAX_ROW_COUNTS_TRIED = 6  # how many row counts, from the largest useful one downward, `pack` compares
ROUNDING_SHARE = 64  # rounding up may add about 1/64 to the size of a batch
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative to the largest hidden state


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in the layout that a model's trunk computes on: packed into fewer rows, or padded.

    Create it with `of` or `for_model`, once for each microbatch, and pass it to every model that reads these sequences.
    """

    ids: Tensor  # [b, L] int64
    positions: Tensor  # [b, L] int64, from 0 in each sequence; 0 on padding, which then attends only to itself
    slot: Tensor  # [B, T] int64: index of a token of the padded batch in the flattened rows; 0 where mask is False
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
    def for_model(cls, model: Any, ids: Tensor, mask: Tensor, *, row_length: int | None = None) -> PackedBatch:
        """Pack sequences if the model computes the same on packed rows, else pad them.

        Args:
            row_length: pack into rows of this length, in few shapes; None = into the shape that costs least.
        """
        if row_length is not None and can_pack(model):
            return pack(ids, mask, row_length)
        return cls.of(ids, mask, packed=can_pack(model))

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a transformers model's forward pass."""
        given = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False}
        return given if self.mask is None else given | {"attention_mask": self.mask.long()}

    @property
    def fill(self) -> float:
        """Return the share of the batch's positions that are real tokens."""
        return float((self.slot > 0).sum() + 1) / self.ids.numel()  # exactly one real token has slot 0


def pack(ids: Tensor, mask: Tensor, row_length: int | None = None) -> PackedBatch:
    """Pack sequences into rows that are full but short, because the cost of attention grows with the row length.

    Args:
        ids: [B, T] int64. mask: [B, T] bool, padding on either side, at least one token a row.
        row_length: length of the rows, at least that of the longest sequence; their number is then rounded up to one of
            1, 2, 3, 4, 6, 8, 12, 16, ..., so that batches come in few shapes. None = the shape that costs least.
    Returns: a batch with every token once; the tokens of a sequence are adjacent and in order.
    """
    lengths = mask.sum(dim=1).tolist()
    if row_length is not None:
        places, needed, _ = _best_fit(lengths, row_length)
        return _placed(ids, mask, places, few_row_counts(needed), row_length)
    longest = max(lengths)
    max_row_count = -(-sum(lengths) // longest)
    powers = (2**n for n in range(max_row_count.bit_length()))
    row_counts = dict.fromkeys(
        (
            *range(max_row_count, max_row_count - MAX_ROW_COUNTS_TRIED, -1),
            max_row_count // 2,
            max_row_count // 4,
            *powers,
        )
    )
    candidates = [_best_fit(lengths, longest), *(_balanced(lengths, rows) for rows in row_counts if rows > 0)]
    rounded = [_rounded(layout, sum(lengths)) for layout in candidates]
    places, rows, capacity = min(rounded, key=lambda c: c[1] * c[2] * (1 + c[2] / LINEAR_COST_LENGTH))
    return _placed(ids, mask, places, rows, capacity)


def few_row_counts(needed: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least the number of rows needed."""
    power = 2 ** max(0, (needed - 1).bit_length())
    return 3 * power // 4 if power >= 4 and needed <= 3 * power // 4 else power


def _placed(ids: Tensor, mask: Tensor, places: list[tuple[int, int]], rows: int, capacity: int) -> PackedBatch:
    """Write every sequence at its row and offset."""
    start = torch.tensor([row * capacity + offset for row, offset in places], device=ids.device)
    within = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    slot = (start[:, None] + within) * mask
    packed = torch.zeros(rows * capacity, dtype=ids.dtype, device=ids.device)
    positions = torch.zeros_like(packed)
    packed[slot[mask]], positions[slot[mask]] = ids[mask], within[mask].to(ids.dtype)
    return PackedBatch(packed.view(rows, capacity), positions.view(rows, capacity), slot)


def microbatches(lengths: Tensor, size: int, *, packed: bool, count: int | None = None) -> list[Tensor]:
    """Split rows into microbatches of at most `size` rows.

    If they will be packed, the microbatches have about equally many tokens. Otherwise each has rows of similar length,
    so that there is little padding.

    Args:
        lengths: [B] int64, tokens of every row.
        count: number of microbatches (`microbatch_count`); None = as few as `size` allows.
    Returns: int64 row indices on the CPU; every row is in exactly one microbatch.
    """
    order = lengths.cpu().argsort(descending=True, stable=True)
    parts = count if count is not None else -(-len(order) // size)
    if not packed:
        return list(order.split(size)) if count is None else list(order.tensor_split(count))
    rounds = [
        r if i % 2 == 0 else r.flip(0) for i, r in enumerate(order.split(parts))
    ]  # alternate the order, to balance the sums
    return [torch.stack([r[i] for r in rounds if i < len(r)]) for i in range(parts)]


def microbatch_count(lengths: Tensor, size: int, tokens: int | None, *, packed: bool) -> int:
    """Return the smallest number of microbatches with at most `size` rows and `tokens` tokens each.

    Padding counts as tokens if the rows will be padded. A row that is longer than `tokens` has a microbatch of its own.

    Args:
        lengths: [B] int64 on the CPU, tokens of every row.
        tokens: None = no limit.
    """
    count = -(-len(lengths) // size)
    if tokens is None:
        return count

    def largest(parts: list[Tensor]) -> int:
        return max(int(lengths[p].sum() if packed else lengths[p].max() * len(p)) for p in parts)

    count = max(count, min(len(lengths), -(-int(lengths.sum()) // tokens)))
    while count < len(lengths) and largest(microbatches(lengths, size, packed=packed, count=count)) > tokens:
        count += 1
    return count


RowLayout = tuple[list[tuple[int, int]], int, int]  # (row, offset) of every sequence, rows, their length


def packed_rows(lengths: Sequence[int], capacity: int) -> int:
    """Return how many rows of `capacity` tokens sequences take if they are packed as by `trl.pack_dataset`.

    Args:
        lengths: tokens of each sequence, at most `capacity`.
    """
    return _best_fit(list(lengths), capacity)[1]


def _best_fit(lengths: list[int], capacity: int) -> RowLayout:
    """Pack by best fit: longest sequence first, each into the fullest row of `capacity` tokens with enough room."""
    places, room = [(0, 0)] * len(lengths), list[tuple[int, int]]()  # room left and row, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[i], -1))
        left, row = room.pop(at) if at < len(room) else (capacity, len(room))
        places[i] = (row, capacity - left)
        bisect.insort(room, (left - lengths[i], row))
    return places, len(room), capacity


def _balanced(lengths: list[int], rows: int) -> RowLayout:
    """Pack into a given number of rows: longest sequence first, each into the emptiest row."""
    places, used = [(0, 0)] * len(lengths), [(0, row) for row in range(rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, row = heapq.heappop(used)
        places[i] = (row, length)
        heapq.heappush(used, (length + lengths[i], row))
    return places, rows, max(used)[0]


def _rounded(layout: RowLayout, tokens: int) -> RowLayout:
    """Lengthen the rows so that the number of positions is a multiple of 128 (of less if there are few tokens).

    This limits the number of different batch shapes: kernels are prepared once for each shape, and oneDNN caches one
    pre-packed copy of each bfloat16 weight per shape.
    """
    places, rows, capacity = layout
    grain = min(128, 2 ** max(0, (tokens // ROUNDING_SHARE).bit_length() - 1))
    multiple = grain // math.gcd(rows, grain)
    return places, rows, -(-capacity // multiple) * multiple


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
    """Return whether a model's trunk computes the same on packed as on padded rows.

    The answer is determined once for each model, by comparing both on two short sequences. Models whose layers carry a
    state along the row (such as Mamba), or that ignore the position ids, do not, and are run on padded rows.
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
    was_training = model.training
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
        model.train(was_training)
    expected = torch.cat([padded.last_hidden_state[0], padded.last_hidden_state[1, 3:]]).float()
    found = together.last_hidden_state[0].float()
    if found.shape != expected.shape:
        return False
    tolerance = TOLERANCE.get(least_precise_dtype(model, padded.last_hidden_state.dtype), 1e-3)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
