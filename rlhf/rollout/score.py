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
from rlhf.models.packing import can_pack, head_reads, microbatches, pack
from rlhf.rollout.types import Experience, Measured, Rollout, unpack_bits


class Read(NamedTuple):
    """What a policy says about a rollout: [B, R] nats, 0 off-mask; entropy or None; states [B, R, H] or None."""

    logprobs: Tensor
    entropy: Tensor | None
    states: Tensor | None


def response_logprobs(
    policy: Any, rollout: Rollout, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Teacher-forced log-probabilities of the response tokens: the one code path for old, new and reference.

    Where sampling was restricted to some tokens, these are log-probabilities of the distribution restricted likewise.

    Returns: ([B, R] nats, 0 off-mask; [B, R] nats of entropy or None).
    """
    read = read_policy(policy, rollout, temperature, entropy=entropy)
    return read.logprobs, read.entropy


def read_policy(
    policy: Any, rollout: Rollout, temperature: float, *, entropy: bool = False, states: bool = False
) -> Read:
    """The policy's forward on prompt and response. The output layer sees the response positions only.

    Args:
        states: also return the last hidden states before each response token.
    """
    mask, width = rollout.mask, rollout.response_ids.shape[1]
    real = rollout.response_mask
    if not can_pack(policy):
        output = policy(
            input_ids=rollout.ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False,
            logits_to_keep=width + 1, output_hidden_states=states,
        )  # fmt: skip
        logits = output.logits[:, :-1][real]
        hidden = output.hidden_states[-1][:, -width - 1 : -1] if states else None
    else:
        packing = pack(rollout.ids, mask)
        before = packing.slot[:, -width - 1 : -1]  # the position that each response token is predicted from
        with head_reads(policy, before[real]):
            output = policy(
                input_ids=packing.ids, position_ids=packing.positions, use_cache=False, output_hidden_states=states
            )
        logits = output.logits[0]
        hidden = output.hidden_states[-1].flatten(0, 1)[before] if states else None
    if rollout.support.shape[-1]:
        logits = logits.masked_fill(~unpack_bits(rollout.support[real], logits.shape[-1]), -torch.inf)
    flat = token_logprobs(logits, rollout.response_ids[real], temperature=temperature)
    spread = None
    if entropy:
        with torch.no_grad():
            spread = _unflatten(token_entropy(logits.detach() / temperature), real)
    return Read(_unflatten(flat, real), spread, hidden)


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[n] values of the real tokens to [B, R], 0 off-mask. Differentiable."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def response_values(value_model: Any, rollout: Rollout) -> Tensor:
    """V before each response token, [B, R] score units, 0 off-mask: token t's is read at position P-1+t."""
    prompt, (size, width) = rollout.prompt_ids.shape[1], rollout.response_ids.shape
    before = torch.arange(prompt - 1, prompt - 1 + width, device=rollout.response_ids.device).expand(size, -1)
    return token_scores(value_model, rollout.ids, rollout.mask, before).masked_fill(~rollout.response_mask, 0.0)


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
    reference: Callable[[Rollout], Tensor], rewards: Callable[[Rollout], Tensor], microbatch: int, packed: bool,
) -> Measured:  # fmt: skip
    """What policy, reference, value model and rewards say about a rollout; rows do not depend on each other.

    Args:
        read: rollout -> log-probs, entropy and values of the trained models, [B, R] each.
        reference: rollout -> [B, R] log-probs under the reference. rewards: rollout -> [B] raw scores.
        microbatch: rows per forward.
        packed: rows will be packed rather than padded.
    """
    old = torch.zeros(rollout.response_ids.shape, device=rollout.response_ids.device)
    ref, values, raw = torch.zeros_like(old), torch.zeros_like(old), torch.zeros_like(old[:, 0])
    for rows in microbatches(rollout.mask.sum(dim=1), microbatch, packed=packed):
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
