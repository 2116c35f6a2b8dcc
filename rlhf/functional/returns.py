"""Per-token rewards from sequence scores, and advantages from per-token rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.errors import ShapeError
from rlhf.functional.checks import as_float, response_prefix, same_shape


def shaped_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Return per-token rewards: a KL penalty on every real token and the score on the last one.

        r_t = - kl_coef kl_t + [t = n - 1] score          t < n, n = number of real tokens;  r_t = 0 for t >= n

    The sum over a row is score - kl_coef (sum of kl_t), the objective of Ziegler et al. 2019, arXiv:1909.08593, eq. 2.
    The score sits on the last real token (the end token if one was sampled), not one position later: a position
    later would need a second mask and changes the advantage unless lam = 1.

    Args:
        scores: [B] score units, one for each sequence.
        kl: [B, R] nats, k1 (other estimators give a wrong gradient inside a reward). Ignored off-mask.
        response_mask: [B, R] bool, True on real tokens, a non-empty prefix of each row.
        kl_coef: score units per nat. 0 leaves the score alone.
    Returns: [B, R] score units, zero off-mask. Keeps no gradient.
    Does not: clip, scale or whiten, or penalise a missing end token (that belongs to the score).
    Raises: ShapeError on a shape mismatch, an empty row or a row that is not a prefix; TypeError if the mask is not
        bool.
    """
    same_shape("shaped_rewards", kl=kl, response_mask=response_mask)
    response_prefix("shaped_rewards", response_mask)
    if scores.shape != kl.shape[:1]:
        found = f"scores {list(scores.shape)}, kl {list(kl.shape)}"
        raise ShapeError("scores must be [B] for kl [B, R]", found=found, where="shaped_rewards")
    last_index = response_mask.sum(dim=1, keepdim=True) - 1
    scores, kl = as_float(scores.detach()), as_float(kl.detach())
    penalty = (-kl_coef * kl).masked_fill(~response_mask, 0.0)
    is_last = torch.arange(kl.shape[1], device=kl.device) == last_index
    return penalty + scores.unsqueeze(1).masked_fill(~is_last, 0.0)


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Return generalized advantage estimates over response tokens.

        delta_t = r_t + gamma V_{t+1} - V_t          V after the last real token is 0
        A_t     = delta_t + gamma lam A_{t+1}        A after the last real token is 0

    Schulman et al. 2015, arXiv:1506.02438, eq. 16. lam = 0 is the one-step temporal difference; lam = 1 is the
    discounted sum of later rewards minus the value. If every value equals that sum, all advantages are 0 for every
    lam.

    Args:
        rewards: [B, R] score units, KL penalty included. Ignored off-mask.
        values: [B, R] score units, V(s_t) before token t is emitted. Ignored off-mask.
        response_mask: [B, R] bool, True on real tokens, a non-empty prefix of each row.
        gamma, lam: dimensionless, in [0, 1].
    Returns: [B, R] score units, zero off-mask. Keeps no gradient. The returns that the value model learns are this
        plus values.
    Does not: whiten, or bootstrap from a value after a truncated response (every response counts as finished).
    Raises: ShapeError on a shape mismatch, an empty row or a row that is not a prefix; TypeError if the mask is not
        bool; ValueError if gamma or lam is outside [0, 1].
    """
    same_shape("gae", rewards=rewards, values=values, response_mask=response_mask)
    response_prefix("gae", response_mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma and lam must lie in [0, 1] (found: gamma={gamma}, lam={lam})")
    rewards = as_float(rewards.detach()).masked_fill(~response_mask, 0.0)
    values = as_float(values.detach()).masked_fill(~response_mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    delta = rewards + gamma * next_values - values
    advantage = torch.zeros_like(delta[:, 0])
    columns = []
    for t in reversed(range(delta.shape[1])):
        advantage = delta[:, t] + gamma * lam * advantage
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1)
