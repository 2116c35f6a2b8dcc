"""Tokens and states of responses in buffers of fixed shape, written without the host: what a CUDA graph can replay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.functional.bits import pack_bits


class ResponseBuffers:
    """Responses in fixed buffers: of the slots while they are decoded, and of all prompts when they are done."""

    def __init__(self, ids: Tensor, logprobs: Tensor, support: Tensor | None) -> None:
        self.ids, self.logprobs, self.support = ids, logprobs, support
        self.length = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        self.last = torch.zeros_like(self.length)  # the last token drawn
        self.finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # by the end token or a stop string
        self.done = self.finished.clone()  # finished, as long as allowed, or not in use

    @classmethod
    def empty(cls, rows: int, settings: Sampling, model: Any, pad_id: int, device: torch.device) -> ResponseBuffers:
        """Allocate empty responses."""
        shape, support = (rows, settings.max_new_tokens), None
        if settings.top_k or settings.top_p < 1.0 or settings.min_new_tokens:
            width = -(-model.config.get_text_config().vocab_size // 8)
            support = torch.full((*shape, width), 255, dtype=torch.uint8, device=device)
        ids = torch.full(shape, pad_id, dtype=torch.long, device=device)
        return cls(ids, torch.zeros(shape, device=device), support)

    def state(self) -> list[Tensor]:
        """Return every buffer."""
        found = [self.ids, self.logprobs, self.length, self.last, self.finished, self.done]
        return found if self.support is None else [*found, self.support]

    def clear(self, rows: Tensor, pad_id: int) -> None:
        """Empty some rows."""
        self.ids[rows], self.logprobs[rows], self.length[rows], self.last[rows] = pad_id, 0.0, 0, pad_id
        self.finished[rows], self.done[rows] = False, False
        if self.support is not None:
            self.support[rows] = 255  # off the mask, everything is allowed

    def write(self, place: Tensor, token: Tensor, logprob: Tensor, allowed: Tensor | None, active: Tensor) -> None:
        """Append a token to the active rows; place [rows] int64 is where."""
        column = place[:, None]
        self.ids.scatter_(1, column, torch.where(active, token, self.ids.gather(1, column).squeeze(1))[:, None])
        kept = self.logprobs.gather(1, column).squeeze(1)
        self.logprobs.scatter_(1, column, torch.where(active, logprob, kept)[:, None])
        if self.support is not None and allowed is not None:
            bits = pack_bits(allowed)[:, None]
            where = place.view(-1, 1, 1).expand_as(bits)
            self.support.scatter_(1, where, torch.where(active.view(-1, 1, 1), bits, self.support.gather(1, where)))
        self.last.copy_(torch.where(active, token, self.last))
        self.length.add_(active.long())

    def cut(self, row: int, length: int, pad_id: int) -> None:
        """Shorten a response to its first tokens."""
        self.ids[row, length:], self.logprobs[row, length:], self.length[row] = pad_id, 0.0, length
        if self.support is not None:
            self.support[row, length:] = 255

    def copy_rows(self, rows: Tensor, source: ResponseBuffers, source_rows: Tensor) -> None:
        """Take over responses from other buffers."""
        for ours, theirs in zip(self.state(), source.state(), strict=True):
            ours[rows] = theirs[source_rows]
