"""The distribution that tokens are sampled from: temperature, filters (min length, top-k, top-p) and the draw."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.config.sections import Sampling


def draw_token(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverting the cumulative distribution at a uniform number (argmax at temperature 0).

    Args:
        logits: [B, V]; a token with -inf cannot be sampled. uniform: [B] in [0, 1).
    Returns: the tokens, [B] int64, and the logs of the probabilities with which they were sampled, [B] float32 nats; at
        temperature 0, of their probabilities at temperature 1.
    """
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)
        return token.squeeze(1), logits.float().log_softmax(dim=-1).gather(1, token).squeeze(1)
    probabilities = (logits.float() / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    point = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    # right=True: a token of probability 0 is never chosen, not even if the uniform number is exactly 0.
    token = torch.searchsorted(cumulative, point, right=True).clamp_max(logits.shape[-1] - 1)
    return token.squeeze(1), probabilities.gather(1, token).squeeze(1).log()


def allowed_tokens(logits: Tensor, settings: Sampling, position: Tensor, end_id: int) -> Tensor | None:
    """Return which tokens may be sampled at a position of each response, [B, V] bool; None if nothing is filtered.

    Three filters are applied in this order: no end token before `min_new_tokens`; top-k; the nucleus (Holtzman et al.
    2020, arXiv:1904.09751), which is the likeliest remaining tokens until their probability reaches top_p. In PPO, the
    log-probs of the old, new and reference policy are those of the distribution restricted to this set.

    Args:
        logits: [B, V]. position: [B] int64, number of tokens before it in the response.
        end_id: id of the end token.
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
        ordered, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        allowed &= torch.zeros_like(allowed).scatter(1, order, before < settings.top_p)
    return allowed


def uniform_numbers(seed: int, step: int, index: int, length: int) -> Tensor:
    """Return the random numbers of one response, [length] in [0, 1): they depend on seed, step and prompt alone."""
    mixed = ((seed * 1_000_003 + step) * 1_000_003 + index) % (2**63 - 1)
    return torch.rand(length, generator=torch.Generator().manual_seed(mixed))
