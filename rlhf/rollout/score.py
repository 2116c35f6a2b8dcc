"""Rollout to Experience: measure (log-probs, values, raw scores), then shape (scores, rewards, advantages)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.config.schema import PPO
from rlhf.functional import gae, masked_whiten, shaped_rewards, token_entropy, token_logprobs
from rlhf.models.heads import position_ids, token_scores
from rlhf.rollout.types import Experience, Measured, Rollout, unpack_bits


def response_logprobs(
    policy: Any, rollout: Rollout, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Teacher-forced log-probabilities of the response tokens: the one code path for old, new and reference.

    Where sampling was restricted to some tokens, these are log-probabilities of the distribution restricted likewise.

    Returns: ([B, R] nats, 0 off-mask; [B, R] nats of entropy or None).
    """
    return read_logits(run_policy(policy, rollout).logits, rollout, temperature, entropy=entropy)


def run_policy(policy: Any, rollout: Rollout, **options: Any) -> Any:
    """The policy's forward on prompt and response; the output layer sees only the last R+1 positions."""
    mask = rollout.mask
    return policy(
        input_ids=rollout.ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False,
        logits_to_keep=rollout.response_ids.shape[1] + 1, **options,
    )  # fmt: skip


def read_logits(
    logits: Tensor, rollout: Rollout, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, R+1, V] of the last positions to log-probs and entropy; position t scores response token t."""
    logits = logits[:, :-1]
    if rollout.support.shape[-1]:
        logits = logits.masked_fill(~unpack_bits(rollout.support, logits.shape[-1]), -torch.inf)
    logprobs = token_logprobs(logits, rollout.response_ids, temperature=temperature)
    logprobs = logprobs.masked_fill(~rollout.response_mask, 0.0)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, token_entropy(logits.detach() / temperature).masked_fill(~rollout.response_mask, 0.0)


def response_values(value_model: Any, rollout: Rollout) -> Tensor:
    """V before each response token, [B, R] score units, 0 off-mask."""
    return align_values(token_scores(value_model, rollout.ids, rollout.mask), rollout)


def align_values(outputs: Tensor, rollout: Rollout) -> Tensor:
    """Outputs at every position [B, P+R] to [B, R]: the value before response token t is read at position P-1+t."""
    return outputs[:, rollout.prompt_ids.shape[1] - 1 : -1].masked_fill(~rollout.response_mask, 0.0)


class Spread(NamedTuple):
    """Moments of all raw scores of a run so far: number, mean, sum of squared residuals (Welford; Chan et al. 1979)."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def seen(self, scores: Tensor) -> Spread:
        """With more scores, [B] of all processes."""
        x = scores.double()
        n, mean = float(len(x)), float(x.mean())
        total, apart = self.number + n, mean - self.mean
        squares = self.squares + float((x - mean).square().sum()) + apart**2 * self.number * n / total
        return Spread(total, self.mean + apart * n / total, squares)

    @property
    def deviation(self) -> float:
        """Biased standard deviation, at least 1e-3 so that equal scores are not blown up."""
        return max((self.squares / max(self.number, 1.0)) ** 0.5, 1e-3)


@torch.no_grad()
def measure(
    rollout: Rollout, *, read: Callable[[Rollout], tuple[Tensor, Any, Tensor]],
    reference: Callable[[Rollout], Tensor], rewards: Callable[[Rollout], Tensor], microbatch: int,
) -> Measured:  # fmt: skip
    """What policy, reference, value model and rewards say about a rollout; rows do not depend on each other.

    Args:
        read: rollout -> log-probs, entropy and values of the trained models, [B, R] each.
        reference: rollout -> [B, R] log-probs under the reference. rewards: rollout -> [B] raw scores.
        microbatch: rows per forward.
    """
    order = (rollout.mask.sum(dim=1)).argsort()
    old = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
    ref, values, raw = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old[:, 0])
    for rows in order.split(microbatch):
        part = rollout.select(rows)
        width = part.response_ids.shape[1]
        old[rows, :width], _, values[rows, :width] = read(part)
        ref[rows, :width] = reference(part)
        raw[rows] = rewards(part)
    own = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return Measured(**own, old_logprobs=old, ref_logprobs=ref, values=values, raw_scores=raw)


def shape(measured: Measured, *, kl_coef: float, deviation: float, settings: PPO) -> Experience:
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
    own = {f.name: getattr(measured, f.name) for f in fields(Measured)}
    return Experience(**own, scores=scores, rewards=rewards, advantages=advantages, returns=returns)
