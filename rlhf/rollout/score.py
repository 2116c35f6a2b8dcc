"""Rollout to Experience: measure (log-probs, values, raw scores), then shape (scores, rewards, advantages)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.config.schema import PPO
from rlhf.functional import gae, masked_whiten, shaped_rewards, token_entropy, token_logprobs
from rlhf.models.heads import position_ids, token_scores
from rlhf.models.load import backbone
from rlhf.models.packed_batch import can_pack, has_plain_head, head_reads, microbatches, output_layer, pack
from rlhf.rollout.types import Experience, Rollout, ScoredRollout, unpack_bits

MAX_LOGITS_AT_ONCE = (
    2**25
)  # logits that a policy's output layer may hold at once (128 MiB in float32); more go in parts


ScoringContext = AbstractContextManager[Callable[[Rollout], Tensor]]
"""Numbers about a rollout from models that are there while the context lasts."""


class PolicyOutput(NamedTuple):
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
) -> PolicyOutput:
    """The policy's forward on prompt and response. The output layer sees the response positions only.

    Args:
        states: also return the last hidden states before each response token.
    """
    real, width = rollout.response_mask, rollout.response_ids.shape[1]
    if not can_pack(policy):
        output = policy(
            input_ids=rollout.ids,
            attention_mask=rollout.mask.long(),
            position_ids=position_ids(rollout.mask),
            use_cache=False,
            logits_to_keep=width + 1,
            output_hidden_states=states,
        )
        hidden = output.hidden_states[-1][:, -width - 1 : -1] if states else None
        return _finish(rollout, *_numbers(output.logits[:, :-1][real], rollout, temperature, entropy), hidden)
    packing = pack(rollout.ids, rollout.mask)
    before = packing.slot[:, -width - 1 : -1]  # the position that each response token is predicted from
    inputs = {"input_ids": packing.ids, "position_ids": packing.positions, "use_cache": False}
    at_once = max(1, MAX_LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size)
    if int(real.sum()) > at_once and has_plain_head(policy):
        every = backbone(policy)(**inputs).last_hidden_state.flatten(0, 1)
        numbers = _in_chunks(output_layer(policy), every[before[real]], rollout, temperature, entropy, at_once)
        return _finish(rollout, *numbers, every[before] if states else None)
    with head_reads(policy, before[real]):
        output = policy(**inputs, output_hidden_states=states)
    hidden = output.hidden_states[-1].flatten(0, 1)[before] if states else None
    return _finish(rollout, *_numbers(output.logits[0], rollout, temperature, entropy), hidden)


LogprobsAndEntropy = tuple[Tensor, Tensor | None]  # log-probs and entropies of the real response tokens, [n] nats


def _numbers(
    logits: Tensor, rollout: Rollout, temperature: float, entropy: bool, part: slice = slice(None)
) -> LogprobsAndEntropy:
    """Of logits [n, V] that predict the real response tokens, or a part of them."""
    real = rollout.response_mask
    if rollout.support.shape[-1]:
        allowed = unpack_bits(rollout.support[real][part], logits.shape[-1])
        logits = logits.masked_fill(~allowed, -torch.inf)
    logprobs = token_logprobs(logits, rollout.response_ids[real][part], temperature=temperature)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, token_entropy(logits.detach() / temperature)


def _in_chunks(
    head: Any, states: Tensor, rollout: Rollout, temperature: float, entropy: bool, size: int
) -> LogprobsAndEntropy:
    """`_numbers` from the states [n, H] before the output layer: logits of no more than `size` tokens exist at once.

    The backward pass computes them a second time (2 H V more operations a token).
    """

    def some(chunk: Tensor, part: slice) -> LogprobsAndEntropy:
        return _numbers(head(chunk), rollout, temperature, entropy, part)

    found = [
        checkpoint(some, states[at : at + size], slice(at, at + size), use_reentrant=False, preserve_rng_state=False)
        for at in range(0, len(states), size)
    ]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]) if entropy else None


def _finish(rollout: Rollout, logprobs: Tensor, entropy: Tensor | None, states: Tensor | None) -> PolicyOutput:
    real = rollout.response_mask
    return PolicyOutput(_unflatten(logprobs, real), None if entropy is None else _unflatten(entropy, real), states)


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[n] values of the real tokens to [B, R], 0 off-mask. Differentiable."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def response_values(value_model: Any, rollout: Rollout) -> Tensor:
    """V before each response token, [B, R] score units, 0 off-mask: token t's is read at position P-1+t."""
    prompt, (size, width) = rollout.prompt_ids.shape[1], rollout.response_ids.shape
    before = torch.arange(prompt - 1, prompt - 1 + width, device=rollout.response_ids.device).expand(size, -1)
    return token_scores(value_model, rollout.ids, rollout.mask, before).masked_fill(~rollout.response_mask, 0.0)


class RunningStats(NamedTuple):
    """Moments of all raw scores of a run so far: number, mean, sum of squared residuals (Welford; Chan et al. 1979)."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def seen(self, scores: Tensor) -> RunningStats:
        """With more scores, [B] of all processes."""
        x = scores.double()
        n, mean = float(len(x)), float(x.mean())
        total, apart = self.number + n, mean - self.mean
        squares = self.squares + float((x - mean).square().sum()) + apart**2 * self.number * n / total
        return RunningStats(total, self.mean + apart * n / total, squares)

    @property
    def deviation(self) -> float:
        """Biased standard deviation, at least 1e-3 so that equal scores are not blown up."""
        return max((self.squares / max(self.number, 1.0)) ** 0.5, 1e-3)


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
