"""Sample responses with a decoding loop of our own, so that only the given settings shape the distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.functional.bits import pack_bits
from rlhf.generation.interface import NumberedPrompt
from rlhf.generation.kv_cache import open_cache
from rlhf.generation.request import DecodingRequest
from rlhf.generation.sampling import allowed_tokens, draw_token
from rlhf.generation.static_decoder import StaticDecoder, can_decode_statically
from rlhf.generation.stop_strings import Decode, StopStrings
from rlhf.models.heads import position_ids
from rlhf.rollout.types import Rollout

REFILL_THRESHOLD = 0.75
"""Finished rows are removed when at most this share of the rows is unfinished, and prompts are added when at most this
share of the batch size is in use."""


@torch.no_grad()
def generate_rollout(
    model: Any,
    prompts: Sequence[tuple[int, list[int]]],
    settings: Sampling,
    *,
    seed: int,
    step: int,
    end_id: int,
    pad_id: int,
    device: torch.device,
    decode: Decode | None = None,
) -> Rollout:
    """Sample one response for each prompt.

    The random numbers of a response are derived from (seed, step, prompt index), so it does not depend on the other
    rows of its batch or on the number of processes. Pending prompts take the places of finished rows; prompts of
    similar length are decoded together.

    Args:
        model: causal LM on `device`.
        prompts: (index in the data, token ids) pairs.
        step: rollout number; another step gives other responses.
        decode: converts ids to text, special tokens included; needed only with stop strings.
    Returns: Rollout of len(prompts) rows, in the order given.
    """
    stops = StopStrings(settings.stop, decode) if settings.stop and decode is not None else None
    was_training = model.training
    model.eval()
    request = DecodingRequest(prompts, settings, seed, step, end_id, pad_id, device, stops)
    if wants_static_buffers(settings, device) and can_decode_statically(model):
        rollout = StaticDecoder(model, request).run()
    else:
        rollout = _decode_with_growing_cache(model, request)
    model.train(was_training)
    rollout.validate()
    return rollout


def wants_static_buffers(settings: Sampling, device: torch.device) -> bool:
    """Return whether `sampling.compile` asks for buffers of fixed shape on this device, as CUDA graphs need them."""
    return settings.compile == "always" or (settings.compile == "auto" and device.type == "cuda")


def _decode_with_growing_cache(model: Any, request: DecodingRequest) -> Rollout:
    """Decode step by step; finished rows are removed, so that a step on a CPU costs no more than its active rows."""
    ids, mask = request.padded_prompts()
    responses, settings = _Responses(request), request.settings
    lengths, slots = mask.sum(dim=1), open_cache(model)
    pending = lengths.argsort(stable=True)
    active = pending[:0]  # rows that are being decoded
    while len(active) or len(pending):
        if len(active):
            positions = lengths[active] + responses.lengths[active] - 1
            responses.draw(active, slots.step(responses.last[active], positions))
            unfinished = (~responses.done[active]).nonzero().squeeze(1)
            if len(unfinished) <= REFILL_THRESHOLD * len(active):  # often enough to outweigh the cost of moving rows
                slots.keep(unfinished)
                active = active[unfinished]
        has_room = slots.accepts_new_rows and len(active) <= REFILL_THRESHOLD * settings.batch_size
        if len(pending) and (not len(active) or has_room):
            new, pending = pending.split([n := min(settings.batch_size - len(active), len(pending)), len(pending) - n])
            width = int(lengths[new].max())
            new_mask = mask[new, -width:]
            responses.draw(new, slots.admit(ids[new, -width:], new_mask, position_ids(new_mask)))
            active = torch.cat([active, new])
    return responses.rollout(ids, mask)


class _Responses:
    """Tokens of the responses sampled so far, [B, R], and the state of each row."""

    def __init__(self, request: DecodingRequest) -> None:
        self.settings, self.end_id, self.stops = request.settings, request.end_id, request.stops
        size, longest, device = len(request.prompts), request.settings.max_new_tokens, request.device
        self.index, self.uniform = request.prompt_numbers(), request.uniform_numbers()
        self.ids = torch.full((size, longest), request.pad_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros((size, longest), device=device)
        self.support: Tensor | None = None
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.last = torch.full_like(self.lengths, request.pad_id)  # last token of each row
        self.finished = torch.zeros(size, dtype=torch.bool, device=device)  # ended by an end token or a stop string
        self.done = self.finished.clone()  # finished, or of the maximum length

    def draw(self, rows: Tensor, logits: Tensor) -> None:
        """Sample one token for each of the given rows that is not done; logits [n, V]."""
        columns = self.lengths[rows].clamp_max(self.settings.max_new_tokens - 1)
        allowed = allowed_tokens(logits, self.settings, columns, self.end_id)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        token, logprob = draw_token(logits, self.uniform[rows, columns], self.settings.temperature)
        unfinished = ~self.done[rows]
        rows, columns, token, logprob = rows[unfinished], columns[unfinished], token[unfinished], logprob[unfinished]
        if allowed is not None:
            self._keep_support(rows, columns, allowed[unfinished])
        self.ids[rows, columns], self.logprobs[rows, columns], self.last[rows] = token, logprob, token
        self.lengths[rows] = columns + 1
        self.finished[rows] = token == self.end_id
        if self.stops is not None:
            self._finish_at_stop_strings(rows)
        self.done[rows] = self.finished[rows] | (columns + 1 == self.settings.max_new_tokens)

    def _keep_support(self, rows: Tensor, columns: Tensor, allowed: Tensor) -> None:
        packed = pack_bits(allowed)
        if self.support is None:  # positions off the mask keep 255: all tokens are allowed
            self.support = packed.new_full((*self.ids.shape, packed.shape[1]), 255)
        self.support[rows, columns] = packed

    def _finish_at_stop_strings(self, rows: Tensor) -> None:
        """Mark the rows whose text contains a stop string as finished."""
        assert self.stops is not None
        for row in rows[~self.finished[rows]].tolist():
            ids = self.ids[row, : self.lengths[row]].tolist()
            if self.stops.find(ids, len(ids) - 1) is not None:
                self.finished[row] = True

    def rollout(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollout:
        """Return all rows as a rollout, cut to the length of the longest response."""
        used = int(self.lengths.max())
        mask = torch.arange(used, device=self.ids.device) < self.lengths[:, None]
        support = (
            self.support if self.support is not None else self.ids.new_zeros(*self.ids.shape, 0, dtype=torch.uint8)
        )
        return Rollout(
            prompt_ids,
            prompt_mask,
            self.ids[:, :used],
            mask,
            self.finished,
            self.index,
            self.logprobs[:, :used],
            support[:, :used],
        )


class NativeGenerator:
    """Generator that runs a decoding loop over any causal language model of transformers."""

    def __init__(
        self,
        open_model: Callable[[], AbstractContextManager[Any]],
        settings: Sampling,
        *,
        seed: int,
        end_id: int,
        pad_id: int,
        device: torch.device,
        decode: Decode | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Create a generator; the model is opened only in `generate`.

        Args:
            open_model: returns a context manager that yields the causal LM, with unsharded weights, on `device`.
            decode: converts ids to text, special tokens included; needed only with stop strings.
            log: told once if the model cannot be decoded in the way that `settings.compile` asks for.
        """
        self.log: Callable[[str], None] | None = log
        self.open_model, self.settings, self.seed = open_model, settings, seed
        self.end_id, self.pad_id, self.device, self.decode = end_id, pad_id, device, decode

    def generate(self, prompts: Sequence[NumberedPrompt], step: int) -> Rollout:
        """Sample one response for each prompt; see `Generator.generate`."""
        with self.open_model() as model:
            if self.log is not None:
                if wants_static_buffers(self.settings, self.device) and not can_decode_statically(model):
                    self.log("sampling: without CUDA graphs, because the model's cache or mask does not allow them")
                self.log = None
            return generate_rollout(
                model,
                prompts,
                self.settings,
                seed=self.seed,
                step=step,
                end_id=self.end_id,
                pad_id=self.pad_id,
                device=self.device,
                decode=self.decode,
            )
