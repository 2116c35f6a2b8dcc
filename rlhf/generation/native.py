"""Prompts to responses. Our own decode loop: nothing but the settings given here shapes the distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_left
from rlhf.functional.bits import pack_bits
from rlhf.generation.interface import NumberedPrompt
from rlhf.generation.kv_cache import open_cache
from rlhf.models.heads import position_ids
from rlhf.rollout.types import Rollout

Decode = Callable[[list[int]], str]
REFILL_THRESHOLD = (
    0.75  # share of the rows below which finished ones are dropped, and of the slots below which others join
)


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
    """Draw one response for each prompt.

    Randomness belongs to (seed, step, prompt index), so a response does not depend on its batch neighbours or on the
    number of processes. Where rows have finished, waiting prompts take their place; prompts of like length are decoded
    together.

    Args:
        model: causal LM on `device`.
        prompts: (index in the data, token ids) pairs.
        step: rollout number; another step draws other responses.
        decode: ids to text, special tokens included; needed with stop strings only.
    Returns: Rollout of len(prompts) rows, in the order given.
    """
    was_training = model.training
    model.eval()
    ids, mask = (t.to(device) for t in pad_left([p for _, p in prompts], pad_id))
    drawn = _Drawn(prompts, settings, seed, step, end_id, pad_id, device, decode)
    lengths, slots = mask.sum(dim=1), open_cache(model)
    waiting = lengths.argsort(stable=True)
    live = waiting[:0]  # rows that are in a slot
    while len(live) or len(waiting):
        if len(live):
            at = lengths[live] + drawn.lengths[live] - 1
            drawn.draw(live, slots.step(drawn.last[live], at))
            going = (~drawn.done[live]).nonzero().squeeze(1)
            if len(going) <= REFILL_THRESHOLD * len(live):  # drop finished rows once it pays for moving the others
                slots.keep(going)
                live = live[going]
        if len(waiting) and (not len(live) or (slots.joins and len(live) <= REFILL_THRESHOLD * settings.batch_size)):
            new, waiting = waiting.split([n := min(settings.batch_size - len(live), len(waiting)), len(waiting) - n])
            width = int(lengths[new].max())
            cut = mask[new, -width:]
            drawn.draw(new, slots.admit(ids[new, -width:], cut, position_ids(cut)))
            live = torch.cat([live, new])
    model.train(was_training)
    rollout = drawn.rollout(ids, mask)
    rollout.validate()
    return rollout


class _Drawn:
    """The responses so far, [B, R], and how each row goes on."""

    def __init__(
        self,
        prompts: Sequence[tuple[int, list[int]]],
        settings: Sampling,
        seed: int,
        step: int,
        end_id: int,
        pad_id: int,
        device: torch.device,
        decode: Decode | None,
    ) -> None:
        self.settings, self.end_id, self.decode = settings, end_id, decode
        size, longest = len(prompts), settings.max_new_tokens
        self.index = torch.tensor([index for index, _ in prompts], dtype=torch.long, device=device)
        self.uniform = torch.stack([_draws(seed, step, index, longest) for index, _ in prompts]).to(device)
        self.ids = torch.full((size, longest), pad_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros((size, longest), device=device)
        self.support: Tensor | None = None
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.last = torch.full_like(self.lengths, pad_id)  # token
        self.finished = torch.zeros(size, dtype=torch.bool, device=device)  # by an end token or a stop string
        self.done = self.finished.clone()  # finished, or as long as it may be

    def draw(self, rows: Tensor, logits: Tensor) -> None:
        """One token for each of some rows that is not done; logits [n, V]."""
        at = self.lengths[rows].clamp_max(self.settings.max_new_tokens - 1)
        allowed = allowed_tokens(logits, self.settings, at, self.end_id)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        token, logprob = draw_token(logits, self.uniform[rows, at], self.settings.temperature)
        going = ~self.done[rows]
        rows, at, token, logprob = rows[going], at[going], token[going], logprob[going]
        if allowed is not None:
            self._keep_support(rows, at, allowed[going])
        self.ids[rows, at], self.logprobs[rows, at], self.last[rows] = token, logprob, token
        self.lengths[rows] = at + 1
        self.finished[rows] = token == self.end_id
        if self.settings.stop and self.decode is not None:
            self._stop(rows)
        self.done[rows] = self.finished[rows] | (at + 1 == self.settings.max_new_tokens)

    def _keep_support(self, rows: Tensor, at: Tensor, allowed: Tensor) -> None:
        packed = pack_bits(allowed)
        if self.support is None:  # off the mask, everything is allowed
            self.support = packed.new_full((*self.ids.shape, packed.shape[1]), 255)
        self.support[rows, at] = packed

    def _stop(self, rows: Tensor) -> None:
        """Mark the rows whose text now holds a stop string."""
        assert self.decode is not None
        for row in rows[~self.finished[rows]].tolist():
            text = self.decode(self.ids[row, : self.lengths[row]].tolist())
            if any(stop in text for stop in self.settings.stop):
                self.finished[row] = True

    def rollout(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollout:
        """All rows, cut to the longest response."""
        used = int(self.lengths.max())
        mask = torch.arange(used, device=self.ids.device) < self.lengths[:, None]
        allowed_tokens = (
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
            allowed_tokens[:, :used],
        )


def draw_token(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution at a uniform draw (argmax at temperature 0).

    Args:
        logits: [B, V]; -inf = cannot be drawn. uniform: [B] in [0, 1).
    Returns: ([B] int64, [B] float32 nats: log of the probability with which it was drawn; at temperature 0, of its
        probability at temperature 1).
    """
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)
        return token.squeeze(1), logits.float().log_softmax(dim=-1).gather(1, token).squeeze(1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    point = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    # right=True: a token of probability 0 is never chosen, not even at a draw of exactly 0.
    token = torch.searchsorted(cumulative, point, right=True).clamp_max(logits.shape[-1] - 1)
    return token.squeeze(1), probabilities.gather(1, token).squeeze(1).log()


def allowed_tokens(logits: Tensor, settings: Sampling, position: Tensor, end_id: int) -> Tensor | None:
    """Which tokens may be drawn at a position of each response ([B] int64), [B, V] bool; None if nothing is filtered.

    First the end token before `min_new_tokens`, then top-k, then the nucleus of what is left (Holtzman et al. 2020,
    arXiv:1904.09751): the likeliest tokens until their probability reaches top_p. PPO's log-probs are those of the
    distribution restricted to this set, for the old, the new and the reference policy.
    """
    if not (settings.top_k or settings.top_p < 1.0 or settings.min_new_tokens):
        return None
    scaled = logits.float() / (settings.temperature or 1.0)
    allowed = torch.ones_like(scaled, dtype=torch.bool)
    if settings.min_new_tokens:
        allowed[:, end_id] = position + 1 >= settings.min_new_tokens
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    if settings.top_k:
        kth = scaled.topk(min(settings.top_k, scaled.shape[-1])).values[:, -1:]
        allowed &= scaled >= kth
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    if settings.top_p < 1.0:
        ordered, where = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        allowed &= torch.zeros_like(allowed).scatter(1, where, before < settings.top_p)
    return allowed


def _draws(seed: int, step: int, index: int, length: int) -> Tensor:
    mixed = ((seed * 1_000_003 + step) * 1_000_003 + index) % (2**63 - 1)
    return torch.rand(length, generator=torch.Generator().manual_seed(mixed))


class NativeGenerator:
    """The generator of this package: a decoding loop over any causal language model of transformers."""

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
    ) -> None:
        """Remember how to sample; nothing is computed yet.

        Args:
            open_model: returns a context manager that yields the causal LM, with whole weights, on `device`.
            decode: ids to text, special tokens included; needed with stop strings only.
        """
        self.open_model, self.settings, self.seed = open_model, settings, seed
        self.end_id, self.pad_id, self.device, self.decode = end_id, pad_id, device, decode

    def generate(self, prompts: Sequence[NumberedPrompt], step: int) -> Rollout:
        """Draw one response for each prompt, as `Generator.generate` says."""
        with self.open_model() as model:
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
