"""Rollout to experience: score the responses by every model, then compute rewards, advantages and returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import PPO
from rlhf.functional import gae, masked_whiten, shaped_rewards
from rlhf.models.packed_batch import microbatches
from rlhf.rollout.types import Experience, Rollout, ScoredRollout

ScoringContext = AbstractContextManager[Callable[[Rollout], Tensor]]


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    *,
    read: Callable[[Rollout], tuple[Tensor, Any, Tensor]],
    reference: ScoringContext,
    rewards: ScoringContext,
    microbatch: int,
    packed: bool,
) -> ScoredRollout:
    """What policy, reference, value model and rewards say about a rollout; rows do not depend on each other.

    They are asked one after the other, each about all rows, so that no two of the frozen ones need be there at a time.

    Args:
        read: rollout -> log-probs, entropy and values of the trained models, [B, R] each.
        reference: rollout -> [B, R] log-probs under the reference. rewards: rollout -> [B] raw scores.
        microbatch: rows per forward.
        packed: rows will be packed rather than padded.
    """
    old = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
    ref, values, raw = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old[:, 0])
    parts = microbatches(rollout.mask.sum(dim=1), microbatch, packed=packed)
    with rewards as say:
        for rows in parts:
            raw[rows] = say(rollout.select(rows))
    with reference as say:
        for rows in parts:
            part = rollout.select(rows)
            ref[rows, : part.response_ids.shape[1]] = say(part)
    for rows in parts:
        part = rollout.select(rows)
        width = part.response_ids.shape[1]
        old[rows, :width], _, values[rows, :width] = read(part)
    own = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return ScoredRollout(**own, old_logprobs=old, ref_logprobs=ref, values=values, raw_scores=raw)


def make_experience(measured: ScoredRollout, *, kl_coef: float, deviation: float, settings: PPO) -> Experience:
    """Scores, per-token rewards and advantages of all processes' episodes together.

        score  = clip(raw / deviation) - penalty without an end token      (or a fixed score without an end token)
        reward = -kl_coef (log pi - log pi_ref), plus the score on the last real token
        A, G   = GAE of the rewards and the values, and A + V; A is whitened if configured

    Args:
        kl_coef: weight of the k1 penalty.
        deviation: what raw scores are divided by; 1 leaves them.
    """
    scores = measured.raw_scores / deviation
    if settings.score_clip is not None:
        scores = scores.clamp(-settings.score_clip, settings.score_clip)
    cut = ~measured.finished
    if settings.missing_end_score is not None:
        scores = scores.masked_fill(cut, settings.missing_end_score)
    else:
        scores = scores - settings.missing_end_penalty * cut.float()
    mask = measured.response_mask
    rewards = shaped_rewards(scores, measured.old_logprobs - measured.ref_logprobs, mask, kl_coef)
    advantages = gae(rewards, measured.values, mask, gamma=settings.gamma, lam=settings.lam)
    returns = advantages + measured.values * mask
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    own = {f.name: getattr(measured, f.name) for f in fields(ScoredRollout)}
    return Experience(**own, scores=scores, rewards=rewards, advantages=advantages, returns=returns)
