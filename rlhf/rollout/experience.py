"""From rollout to experience: score the responses with every model, then compute rewards, advantages and returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import PPO
from rlhf.functional import gae, masked_whiten, shaped_rewards
from rlhf.models.packed_batch import microbatch_count, microbatches
from rlhf.rollout.types import Experience, Rollout, ScoredRollout

ScoringContext = AbstractContextManager[Callable[[Rollout], Tensor]]
"""A context manager that yields a scoring function; inside it, offloaded models are on the device."""


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    *,
    score_trained: Callable[[Rollout], tuple[Tensor, Any, Tensor]],
    reference: ScoringContext,
    rewards: ScoringContext,
    microbatch: int,
    packed: bool,
    tokens: int | None = None,
) -> ScoredRollout:
    """Score a rollout with the policy, the reference, the value model and the rewards; each row is scored by itself.

    Each model scores all rows before the next one starts, so that only one offloaded model is on the device at a time.

    Args:
        score_trained: rollout -> log-probs, entropy and values of the trained models, [B, R] each.
        reference: yields rollout -> [B, R] log-probs under the reference.
        rewards: yields rollout -> [B] raw scores.
        microbatch: rows per forward pass.
        packed: rows will be packed rather than padded.
        tokens: tokens per forward pass; None = no limit.
    """
    old = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
    ref, values, raw = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old[:, 0])
    lengths = rollout.mask.sum(dim=1).cpu()
    count = None if tokens is None else microbatch_count(lengths, microbatch, tokens, packed=packed)
    parts = microbatches(lengths, microbatch, packed=packed, count=count)
    with rewards as score_part:
        for rows in parts:
            raw[rows] = score_part(rollout.select(rows))
    with reference as score_part:
        for rows in parts:
            part = rollout.select(rows)
            ref[rows, : part.response_ids.shape[1]] = score_part(part)
    for rows in parts:
        part = rollout.select(rows)
        width = part.response_ids.shape[1]
        old[rows, :width], _, values[rows, :width] = score_trained(part)
    own = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return ScoredRollout(**own, old_logprobs=old, ref_logprobs=ref, values=values, raw_scores=raw)


def make_experience(scored: ScoredRollout, *, kl_coef: float, deviation: float, settings: PPO) -> Experience:
    """Compute scores, per-token rewards, advantages and returns from the scored episodes of all processes together.

        score  = clip(raw / deviation) - penalty without an end token      (or a fixed score without an end token)
        reward = -kl_coef (log pi - log pi_ref), plus the score on the last real token
        A, G   = GAE of the rewards and the values, and A + V; A is whitened if configured

    Args:
        kl_coef: weight of the k1 penalty.
        deviation: raw scores are divided by it.
    """
    scores = scored.raw_scores / deviation
    if settings.score_clip is not None:
        scores = scores.clamp(-settings.score_clip, settings.score_clip)
    unfinished = ~scored.finished
    if settings.missing_end_score is not None:
        scores = scores.masked_fill(unfinished, settings.missing_end_score)
    else:
        scores = scores - settings.missing_end_penalty * unfinished.float()
    mask = scored.response_mask
    rewards = shaped_rewards(scores, scored.old_logprobs - scored.ref_logprobs, mask, kl_coef)
    advantages = gae(rewards, scored.values, mask, gamma=settings.gamma, lam=settings.lam)
    returns = advantages + scored.values * mask
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    own = {f.name: getattr(scored, f.name) for f in fields(ScoredRollout)}
    return Experience(**own, scores=scores, rewards=rewards, advantages=advantages, returns=returns)
