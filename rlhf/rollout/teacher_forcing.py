"""Teacher-forced forward passes over rollouts: log-probabilities, entropies and values of the response tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.models.heads import token_scores, trunk_owner
from rlhf.models.output_layer import token_numbers
from rlhf.models.packed_batch import PackedBatch
from rlhf.rollout.types import Rollout


class PolicyOutput(NamedTuple):
    """Output of one teacher-forced forward pass of the policy."""

    logprobs: Tensor  # [B, R] nats, 0 off-mask
    entropy: Tensor | None  # [B, R] nats, 0 off-mask
    states: Tensor | None  # [B, R, H], last hidden states before each response token


def response_logprobs(
    policy: Any,
    rollout: Rollout,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
    batch: PackedBatch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return teacher-forced log-probabilities of the response tokens, for the old, new and reference policy alike.

    If sampling was restricted to some tokens, they are those of the distribution restricted to the same tokens.

    Args:
        entropy: also return the entropy of the distribution of each token.
        batch: the rollout's sequences, packed or padded; None = packed if the policy allows it.
    Returns: ([B, R] nats, 0 off-mask; [B, R] nats of entropy or None).
    """
    output = policy_forward(
        policy, rollout, temperature, entropy=entropy, entropy_gradient=entropy_gradient, batch=batch
    )
    return output.logprobs, output.entropy


def policy_forward(
    policy: Any,
    rollout: Rollout,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
    states: bool = False,
    batch: PackedBatch | None = None,
) -> PolicyOutput:
    """Run the policy on prompt and response; logits are computed at the response positions only.

    Args:
        entropy: also return the entropy of the distribution of each token.
        entropy_gradient: the entropy is differentiable, for an entropy bonus.
        states: also return the last hidden states before each response token.
        batch: the rollout's sequences, packed or padded; None = packed if the policy allows it.
    """
    real, width = rollout.response_mask, rollout.response_ids.shape[1]
    if batch is None:
        batch = PackedBatch.for_model(policy, rollout.ids, rollout.mask)
    before = batch.slot[:, -width - 1 : -1]  # the position that each response token is predicted from
    numbers = token_numbers(
        policy,
        batch.inputs(),
        before[real],
        rollout.response_ids[real],
        temperature=temperature,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
        allowed=rollout.support[real] if rollout.support.shape[-1] else None,
        states=states,
    )
    return PolicyOutput(
        _unflatten(numbers.logprobs, real),
        None if numbers.entropy is None else _unflatten(numbers.entropy, real),
        None if numbers.states is None else numbers.states[before],
    )


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Scatter the [n] values of the real tokens to [B, R], 0 off-mask. Differentiable."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def response_values(value_model: Any, rollout: Rollout, *, batch: PackedBatch | None = None) -> Tensor:
    """Return V before each response token, [B, R] score units, 0 off-mask; token t's is read start position P - 1 + t.

    Args:
        batch: the rollout's sequences, packed or padded; None = packed if the value model allows it.
    """
    prompt, (size, width) = rollout.prompt_ids.shape[1], rollout.response_ids.shape
    if batch is None:
        batch = PackedBatch.for_model(trunk_owner(value_model), rollout.ids, rollout.mask)
    before = torch.arange(prompt - 1, prompt - 1 + width, device=rollout.response_ids.device).expand(size, -1)
    return token_scores(value_model, batch, before).masked_fill(~rollout.response_mask, 0.0)
