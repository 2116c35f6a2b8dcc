"""Keys and values of the rows being decoded. Rows leave when they are finished, and others join in their place.

All rows end at the same column, so that the next token of each goes to one column; before its first token a row is
masked. Keys and values are written in place: a cache that grows by concatenation copies itself at every step.

    column    0 1 2 3 4 5 6 7
    row 0         p p p r r r      p prompt, r response so far
    row 1     p p p p p p r r
    row 2               p p r      joined later
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

GROWTH_COLUMNS = 32  # columns by which the buffers grow


def open_cache(model: Any) -> SlotCache | BatchCache:
    """`Slots` where every layer of a model keeps plain keys and values, else `Batches`."""
    layers = DynamicCache(config=model.config).layers if hasattr(model, "config") else []
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return SlotCache(model, len(layers)) if plain else BatchCache(model)


class _Layer(CacheLayerMixin):
    """One layer's buffers [rows, heads, columns, width]; which part of them is in use, the owner knows."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first keys and values say how many heads there are, and their width and dtype."""
        self.keys, self.values = (new.new_empty(0, new.shape[1], 0, new.shape[3]) for new in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns; returns all columns that the rows of this forward may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._fit()
        at = self.owner
        end = at.end + key_states.shape[2]
        self.keys[at.rows, :, at.end : end], self.values[at.rows, :, at.end : end] = key_states, value_states
        return self.keys[at.rows, :, at.start : end], self.values[at.rows, :, at.start : end]

    def move(self, rows: Tensor | slice, start: int, end: int, to: int) -> None:
        """Some rows' columns start to end, to the first rows and another column."""
        if not self.is_initialized:  # a layer that reads another one's
            return
        self._fit()
        for buffer in (self.keys, self.values):
            part = buffer[rows, :, start:end].clone()
            buffer[: len(part), :, to : to + end - start] = part

    def _fit(self) -> None:
        size, columns = self.owner.size, self.owner.columns
        if self.keys.shape[0] < size or self.keys.shape[2] < columns:
            self.keys, self.values = (_grown(old, size, columns) for old in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Columns that the rows of this forward may look at, besides new ones."""
        return self.owner.end - self.owner.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns, the first of them)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _grown(buffer: Tensor, rows: int, columns: int) -> Tensor:
    rows, columns = max(rows, buffer.shape[0]), max(columns, buffer.shape[2])
    new = buffer.new_zeros(rows, buffer.shape[1], columns, buffer.shape[3])  # what is masked must still be finite
    new[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return new


class SlotCache:
    """Rows that come and go."""

    joins = True

    def __init__(self, model: Any, layers: int) -> None:
        self.model, self.cache = model, Cache(layers=[_Layer(self) for _ in range(layers)])
        self.first = torch.zeros(0, dtype=torch.long)  # [a] column of the first token of every row being decoded
        self.size = self.columns = 0  # of the buffers
        self.rows, self.start, self.end = (
            slice(0, 0),
            0,
            0,
        )  # the next forward: its rows, what it reads, where it writes

    def admit(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Let rows join, each with a prompt.

        Args:
            ids, mask, positions: [n, P], left-padded.
        Returns: logits of the next token, [n, V].
        """
        (number, width), live = ids.shape, len(self.first)
        if not live:
            self.first, self.end = self.first.to(ids.device), 0
        self.size = max(self.size, live + number)
        self._shift(max(0, width - self.end))
        end = self.end
        self.rows, self.start, self.end = slice(live, live + number), end - width, end - width
        logits = self._forward(ids, mask.long(), positions)
        self.first, self.end = torch.cat([self.first, end - mask.sum(dim=1)]), end
        return logits

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """One token more for every row: [a] int64 each -> logits of the next one, [a, V]."""
        if self.end == self.columns:
            start = int(self.first.min())
            self._shift(-start if start >= GROWTH_COLUMNS else 0)
            self.columns = max(self.columns, self.end + GROWTH_COLUMNS)
        self.rows, self.start = slice(0, len(self.first)), int(self.first.min())
        columns = torch.arange(self.start, self.end + 1, device=tokens.device)
        logits = self._forward(tokens[:, None], (columns >= self.first[:, None]).long(), positions[:, None])
        self.end += 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Only some rows stay, in this order; [n] int64."""
        self.first = self.first[rows]
        if len(rows):
            start = int(self.first.min())
            for layer in self.cache.layers:
                layer.move(rows, start, self.end, start)

    def _shift(self, by: int) -> None:
        """Move all columns in use to the right, or to the left."""
        start, end = int(self.first.min()) if len(self.first) else self.end, self.end
        self.first, self.end = self.first + by, end + by
        self.columns = max(self.columns, self.end)
        if by and start < end:
            for layer in self.cache.layers:
                layer.move(slice(0, len(self.first)), start, end, start + by)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class BatchCache:
    """For models whose layers keep something else (a window, a state): rows begin together, and none joins later."""

    joins = False

    def __init__(self, model: Any) -> None:
        self.model, self.mask = model, torch.empty(0)
        self.cache: Any = None

    def admit(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Begin anew, as in `Slots.admit`."""
        self.cache, self.mask = None, mask.long()
        return self._forward(ids, positions)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As in `Slots.step`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None], positions[:, None])

    def keep(self, rows: Tensor) -> None:
        """As in `Slots.keep`."""
        if len(rows):
            self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits
