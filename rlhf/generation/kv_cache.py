"""KV caches for decoding a changing set of rows: finished rows are removed, and new prompts are added in their place.

All rows end at the same column, so that the next token of every row is written to one column. The columns before a
row's first token are masked. Keys and values are written in place, because a cache that grows by concatenation copies
itself at every step.

    column    0 1 2 3 4 5 6 7
    row 0         p p p r r r      p prompt, r response so far
    row 1     p p p p p p r r
    row 2               p p r      added later
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

GROWTH_COLUMNS = 32  # columns by which the buffers grow


def open_cache(model: Any) -> SlotCache | BatchCache:
    """Return a `SlotCache` if every layer of the model caches plain keys and values, else a `BatchCache`."""
    layers = DynamicCache(config=model.config).layers if hasattr(model, "config") else []
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return SlotCache(model, len(layers)) if plain else BatchCache(model)


class _Layer(CacheLayerMixin):
    """Buffers of one layer, [rows, heads, columns, width]; the owner defines which part of them is in use."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Create empty buffers with the heads, width and dtype of the first keys and values."""
        self.keys, self.values = (new.new_empty(0, new.shape[1], 0, new.shape[3]) for new in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns, and return all columns that the rows of this forward pass may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow()
        cache = self.owner
        end = cache.end + key_states.shape[2]
        self.keys[cache.rows, :, cache.end : end], self.values[cache.rows, :, cache.end : end] = (
            key_states,
            value_states,
        )
        return self.keys[cache.rows, :, cache.start : end], self.values[cache.rows, :, cache.start : end]

    def move(self, rows: Tensor | slice, start: int, end: int, target: int) -> None:
        """Copy columns start to end of some rows into the first rows, beginning at column `target`."""
        if not self.is_initialized:  # a layer that shares another layer's keys and values
            return
        self._grow()
        for buffer in (self.keys, self.values):
            part = buffer[rows, :, start:end].clone()
            buffer[: len(part), :, target : target + end - start] = part

    def _grow(self) -> None:
        size, columns = self.owner.size, self.owner.columns
        if self.keys.shape[0] < size or self.keys.shape[2] < columns:
            self.keys, self.values = (_grown(old, size, columns) for old in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Return how many earlier columns the rows of this forward pass may attend to."""
        return self.owner.end - self.owner.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of the attention mask, and its offset 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1


def _grown(buffer: Tensor, rows: int, columns: int) -> Tensor:
    rows, columns = max(rows, buffer.shape[0]), max(columns, buffer.shape[2])
    new = buffer.new_zeros(rows, buffer.shape[1], columns, buffer.shape[3])  # masked columns must be finite
    new[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return new


class SlotCache:
    """KV cache whose rows can be removed and added at every step."""

    accepts_new_rows = True

    def __init__(self, model: Any, layers: int) -> None:
        self.model, self.cache = model, Cache(layers=[_Layer(self) for _ in range(layers)])
        self.first = torch.zeros(0, dtype=torch.long)  # [a] column of the first token of every row being decoded
        self.size = self.columns = 0  # rows and columns of the buffers
        # The next forward pass: its rows, the first column that it reads, the first column that it writes.
        self.rows, self.start, self.end = slice(0, 0), 0, 0

    def admit(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Add rows, each with a prompt.

        Args:
            ids, mask, positions: [n, P], left-padded.
        Returns: logits of the next token, [n, V].
        """
        (number, width), active = ids.shape, len(self.first)
        if not active:
            self.first, self.end = self.first.to(ids.device), 0
        self.size = max(self.size, active + number)
        self._shift(max(0, width - self.end))
        end = self.end
        self.rows, self.start, self.end = slice(active, active + number), end - width, end - width
        logits = self._forward(ids, mask.long(), positions)
        self.first, self.end = torch.cat([self.first, end - mask.sum(dim=1)]), end
        return logits

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Append one token to every row, and return the logits of the next token.

        Args:
            tokens, positions: [a] int64.
        Returns: [a, V].
        """
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
        """Remove all rows but the given ones, [n] int64, and put them in the given order."""
        self.first = self.first[rows]
        if len(rows):
            start = int(self.first.min())
            for layer in self.cache.layers:
                layer.move(rows, start, self.end, start)

    def _shift(self, shift: int) -> None:
        """Move all columns in use to the right, or to the left if `shift` is negative."""
        start, end = int(self.first.min()) if len(self.first) else self.end, self.end
        self.first, self.end = self.first + shift, end + shift
        self.columns = max(self.columns, self.end)
        if shift and start < end:
            for layer in self.cache.layers:
                layer.move(slice(0, len(self.first)), start, end, start + shift)

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
    """KV cache for models whose layers cache something else (a sliding window, a state).

    All rows start together; rows can be removed, but not added.
    """

    accepts_new_rows = False

    def __init__(self, model: Any) -> None:
        self.model, self.mask = model, torch.empty(0)
        self.cache: Any = None

    def admit(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Start a new batch of rows, each with a prompt; arguments and result as for `SlotCache.admit`."""
        self.cache, self.mask = None, mask.long()
        return self._forward(ids, positions)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Append one token to every row; arguments and result as for `SlotCache.step`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None], positions[:, None])

    def keep(self, rows: Tensor) -> None:
        """Remove all rows but the given ones; arguments as for `SlotCache.keep`."""
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
