"""Prompts to responses. Our own decode loop: nothing but the settings given here shapes the distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_left
from rlhf.models.heads import position_ids
from rlhf.rollout.types import Rollout, merge, pack_bits

Decode = Callable[[list[int]], str]


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[tuple[int, list[int]]], settings: Sampling, *, seed: int, step: int, end_id: int,
    pad_id: int, device: torch.device, decode: Decode | None = None,
) -> Rollout:  # fmt: skip
    """Draw one response for each prompt.

    Randomness belongs to (seed, step, prompt index), so a response does not depend on its batch neighbours or on the
    number of processes. Longest prompts are decoded together; the result is in the order given.

    Args:
        model: causal LM on `device`.
        prompts: (index in the data, token ids) pairs.
        step: rollout number; another step draws other responses.
        decode: ids to text, special tokens included; needed with stop strings only.
    Returns: Rollout of len(prompts) rows.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
    parts = []
    for start in range(0, len(order), settings.batch_size):
        chunk = [prompts[i] for i in order[start : start + settings.batch_size]]
        parts.append(_decode(model, chunk, settings, seed, step, end_id, pad_id, device, decode))
    model.train(was_training)
    rollout = merge(parts, pad_id)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    rollout = rollout.select(back.to(device))
    rollout.validate()
    return rollout


def _decode(
    model: Any, prompts: Sequence[tuple[int, list[int]]], settings: Sampling, seed: int, step: int, end_id: int,
    pad_id: int, device: torch.device, decode: Decode | None,
) -> Rollout:  # fmt: skip
    ids, mask = pad_left([p for _, p in prompts], pad_id)
    ids, mask = ids.to(device), mask.to(device)
    size, length = len(prompts), settings.max_new_tokens
    uniform = torch.stack([_draws(seed, step, index, length) for index, _ in prompts]).to(device)
    response = torch.full((size, length), pad_id, dtype=torch.long, device=device)
    response_mask = torch.zeros((size, length), dtype=torch.bool, device=device)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    logprobs = torch.zeros((size, length), device=device)
    supports: list[Tensor] = []
    live = torch.arange(size, device=device)  # rows still in the batch
    attention, positions, inputs, cache = mask.long(), position_ids(mask), ids, None
    for t in range(length):
        output = model(
            input_ids=inputs, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        logits = output.logits[:, -1]
        allowed = support(logits, settings, t, end_id)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
            supports.append(_spread(allowed, live, size))
        token, drawn = pick(logits, uniform[live, t], settings.temperature)
        going = ~finished[live]
        response[live[going], t] = token[going]
        logprobs[live[going], t] = drawn[going]
        response_mask[live[going], t] = True
        finished[live[going & (token == end_id)]] = True
        if settings.stop and decode is not None:
            _stop(finished, response, live, t, settings.stop, decode)
        going = ~finished[live]
        if not bool(going.any()):
            break
        if int(going.sum()) <= 0.75 * len(live):  # drop finished rows once it pays for copying the cache
            keep = going.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            live, token, attention, positions = live[keep], token[keep], attention[keep], positions[keep]
        inputs = token[:, None]
        attention = torch.cat([attention, attention.new_ones(len(live), 1)], dim=1)
        positions = positions[:, -1:] + 1
    used = int(response_mask.sum(dim=1).max())
    index = torch.tensor([i for i, _ in prompts], dtype=torch.long, device=device)
    kept = torch.stack(supports[:used], dim=1) if supports else torch.zeros((size, used, 0), dtype=torch.uint8)
    return Rollout(
        ids, mask, response[:, :used], response_mask[:, :used], finished, index, logprobs[:, :used], kept.to(device)
    )


def _spread(allowed: Tensor, live: Tensor, size: int) -> Tensor:
    """Packed support of all rows; rows that have left the batch get everything, which their mask hides."""
    packed = pack_bits(allowed)
    out = torch.full((size, packed.shape[1]), 255, dtype=torch.uint8, device=packed.device)
    out[live] = packed
    return out


def _stop(finished: Tensor, response: Tensor, live: Tensor, t: int, stops: Sequence[str], decode: Decode) -> None:
    """Mark the rows whose text now holds a stop string."""
    for row in live[~finished[live]].tolist():
        text = decode(response[row, : t + 1].tolist())
        if any(stop in text for stop in stops):
            finished[row] = True


def pick(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
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


def support(logits: Tensor, settings: Sampling, position: int, end_id: int) -> Tensor | None:
    """Which tokens may be drawn at a position of the response, [B, V] bool; None if nothing is filtered.

    First the end token before `min_new_tokens`, then top-k, then the nucleus of what is left (Holtzman et al. 2020,
    arXiv:1904.09751): the likeliest tokens until their probability reaches top_p. PPO's log-probs are those of the
    distribution restricted to this set, for the old, the new and the reference policy.
    """
    if not (settings.top_k or settings.top_p < 1.0 or settings.min_new_tokens):
        return None
    scaled = logits.float() / (settings.temperature or 1.0)
    allowed = torch.ones_like(scaled, dtype=torch.bool)
    if position + 1 < settings.min_new_tokens:
        allowed[:, end_id] = False
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
