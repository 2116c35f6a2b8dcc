"""Rollout to Experience: log-probs, values, scores, rewards, advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import PPO
from rlhf.functional import gae, shaped_rewards, token_entropy, token_logprobs
from rlhf.models.heads import position_ids, token_scores
from rlhf.rollout.types import Experience, Rollout


def response_logprobs(
    policy: Any, rollout: Rollout, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Teacher-forced log-probabilities of the response tokens: the one code path for old, new and reference.

    Logits at position P-1+t score response token t, so only the last R+1 positions go through the output layer.

    Returns: ([B, R] nats, 0 off-mask; [B, R] nats of entropy or None).
    """
    mask = rollout.mask
    width = rollout.response_ids.shape[1]
    logits = policy(
        input_ids=rollout.ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]  # fmt: skip
    logprobs = token_logprobs(logits, rollout.response_ids, temperature=temperature)
    logprobs = logprobs.masked_fill(~rollout.response_mask, 0.0)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, token_entropy(logits.detach() / temperature).masked_fill(~rollout.response_mask, 0.0)


def response_values(value_model: Any, rollout: Rollout) -> Tensor:
    """V before each response token, [B, R] score units, 0 off-mask. Value t reads position P-1+t."""
    prompt = rollout.prompt_ids.shape[1]
    values = token_scores(value_model, rollout.ids, rollout.mask)[:, prompt - 1 : -1]
    return values.masked_fill(~rollout.response_mask, 0.0)


@torch.no_grad()
def score(
    rollout: Rollout, *, policy: Any, reference: Callable[[Rollout], Tensor], value_model: Any,
    rewards: Callable[[Rollout], Tensor], normalise: tuple[float, float], kl_coef: float, settings: PPO,
    temperature: float, microbatch: int,
) -> Experience:  # fmt: skip
    """Everything PPO needs to know about a rollout. Advantages are not whitened yet: that needs every process.

    Args:
        reference: rollout -> [B, R] log-probs under the reference. rewards: rollout -> [B] raw scores.
        normalise: (mean, deviation) taken off the raw scores.
        kl_coef: weight of the k1 penalty.
        microbatch: rows per forward.
    """
    order = (rollout.mask.sum(dim=1)).argsort()
    old = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
    ref, values, raw = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old[:, 0])
    for rows in order.split(microbatch):
        part = rollout.select(rows)
        width = part.response_ids.shape[1]
        old[rows, :width] = response_logprobs(policy, part, temperature)[0]
        ref[rows, :width] = reference(part)
        values[rows, :width] = response_values(value_model, part)
        raw[rows] = rewards(part)
    mean, deviation = normalise
    scores = (raw - mean) / deviation - settings.missing_end_penalty * (~rollout.finished).float()
    shaped = shaped_rewards(scores, old - ref, rollout.response_mask, kl_coef)
    advantages = gae(shaped, values, rollout.response_mask, gamma=settings.gamma, lam=settings.lam)
    own = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return Experience(
        **own, old_logprobs=old, ref_logprobs=ref, values=values, scores=scores, raw_scores=raw, rewards=shaped,
        advantages=advantages, returns=advantages + values * rollout.response_mask,
    )  # fmt: skip
