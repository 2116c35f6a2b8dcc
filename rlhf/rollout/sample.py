"""Prompts to responses. Our own decode loop: nothing but the settings given here shapes the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config.sections import Sampling
from rlhf.data.collate import pad_left
from rlhf.models.heads import position_ids
from rlhf.rollout.types import Rollout, merge


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[tuple[int, list[int]]], settings: Sampling, *, seed: int, step: int, end_id: int,
    pad_id: int, device: torch.device,
) -> Rollout:  # fmt: skip
    """Draw one response for each prompt.

    Randomness belongs to (seed, step, prompt index), so a response does not depend on its batch neighbours or on the
    number of processes. Longest prompts are decoded together; the result is in the order given.

    Args:
        model: causal LM on `device`.
        prompts: (index in the data, token ids) pairs.
        step: rollout number; another step draws other responses.
    Returns: Rollout of len(prompts) rows.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
    parts = []
    for start in range(0, len(order), settings.batch_size):
        chunk = [prompts[i] for i in order[start : start + settings.batch_size]]
        parts.append(_decode(model, chunk, settings, seed, step, end_id, pad_id, device))
    model.train(was_training)
    rollout = merge(parts, pad_id)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    rollout = rollout.select(back.to(device))
    rollout.validate()
    return rollout


def _decode(
    model: Any, prompts: Sequence[tuple[int, list[int]]], settings: Sampling, seed: int, step: int, end_id: int,
    pad_id: int, device: torch.device,
) -> Rollout:  # fmt: skip
    ids, mask = pad_left([p for _, p in prompts], pad_id)
    ids, mask = ids.to(device), mask.to(device)
    size, length = len(prompts), settings.max_new_tokens
    uniform = torch.stack([_draws(seed, step, index, length) for index, _ in prompts]).to(device)
    response = torch.full((size, length), pad_id, dtype=torch.long, device=device)
    response_mask = torch.zeros((size, length), dtype=torch.bool, device=device)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    live = torch.arange(size, device=device)  # rows still in the batch
    attention, positions, inputs, cache = mask.long(), position_ids(mask), ids, None
    for t in range(length):
        output = model(
            input_ids=inputs, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        token = pick(output.logits[:, -1], uniform[live, t], settings)
        going = ~finished[live]
        response[live[going], t] = token[going]
        response_mask[live[going], t] = True
        finished[live[going & (token == end_id)]] = True
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
    return Rollout(ids, mask, response[:, :used], response_mask[:, :used], finished, index)


def pick(logits: Tensor, uniform: Tensor, settings: Sampling) -> Tensor:
    """One token a row, by inverting the cumulative distribution at a uniform draw (argmax at temperature 0).

    Args:
        logits: [B, V]. uniform: [B] in [0, 1).
    Returns: [B] int64.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / settings.temperature
    if settings.top_k:
        kth = scaled.topk(min(settings.top_k, scaled.shape[-1])).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if settings.top_p < 1.0:
        ordered, where = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(1, where, ordered)
    cumulative = probabilities.cumsum(dim=-1)
    point = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    # right=True: a token of probability 0 is never chosen, not even at a draw of exactly 0.
    chosen = torch.searchsorted(cumulative, point, right=True).squeeze(1)
    return chosen.clamp_max(logits.shape[-1] - 1)


def _draws(seed: int, step: int, index: int, length: int) -> Tensor:
    mixed = ((seed * 1_000_003 + step) * 1_000_003 + index) % (2**63 - 1)
    return torch.rand(length, generator=torch.Generator().manual_seed(mixed))
