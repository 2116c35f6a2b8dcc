"""Teacher-forced forward passes over rollouts: log-probabilities, entropies and values of the response tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf.functional import token_entropy, token_logprobs
from rlhf.models.heads import token_scores, trunk_owner
from rlhf.models.load import backbone
from rlhf.models.packed_batch import PackedBatch, has_plain_head, head_reads, output_layer
from rlhf.rollout.types import Rollout, unpack_bits

MAX_LOGITS_AT_ONCE = 2**25
"""Most logits that exist at once (128 MiB in float32); if there are more, they are computed in chunks."""


class PolicyOutput(NamedTuple):
    """Output of one teacher-forced forward pass of the policy."""

    logprobs: Tensor  # [B, R] nats, 0 off-mask
    entropy: Tensor | None  # [B, R] nats, 0 off-mask
    states: Tensor | None  # [B, R, H], last hidden states before each response token


def response_logprobs(
    policy: Any, rollout: Rollout, temperature: float, *, entropy: bool = False, batch: PackedBatch | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return teacher-forced log-probabilities of the response tokens, for the old, new and reference policy alike.

    If sampling was restricted to some tokens, they are those of the distribution restricted to the same tokens.

    Args:
        entropy: also return the entropy of the distribution of each token.
        batch: the rollout's sequences, packed or padded; None = packed if the policy allows it.
    Returns: ([B, R] nats, 0 off-mask; [B, R] nats of entropy or None).
    """
    output = policy_forward(policy, rollout, temperature, entropy=entropy, batch=batch)
    return output.logprobs, output.entropy


def policy_forward(
    policy: Any,
    rollout: Rollout,
    temperature: float,
    *,
    entropy: bool = False,
    states: bool = False,
    batch: PackedBatch | None = None,
) -> PolicyOutput:
    """Run the policy on prompt and response; logits are computed at the response positions only.

    Args:
        entropy: also return the entropy of the distribution of each token.
        states: also return the last hidden states before each response token.
        batch: the rollout's sequences, packed or padded; None = packed if the policy allows it.
    """
    real, width = rollout.response_mask, rollout.response_ids.shape[1]
    if batch is None:
        batch = PackedBatch.for_model(policy, rollout.ids, rollout.mask)
    if batch.mask is not None:
        output = policy(**batch.inputs(), logits_to_keep=width + 1, output_hidden_states=states)
        hidden = output.hidden_states[-1][:, -width - 1 : -1] if states else None
        return _finish(
            rollout, *_logprobs_and_entropy(output.logits[:, :-1][real], rollout, temperature, entropy), hidden
        )
    before = batch.slot[:, -width - 1 : -1]  # the position that each response token is predicted from
    at_once = max(1, MAX_LOGITS_AT_ONCE // policy.config.get_text_config().vocab_size)
    if int(real.sum()) > at_once and has_plain_head(policy):
        all_states = backbone(policy)(**batch.inputs()).last_hidden_state.flatten(0, 1)
        computed = _in_chunks(output_layer(policy), all_states[before[real]], rollout, temperature, entropy, at_once)
        return _finish(rollout, *computed, all_states[before] if states else None)
    with head_reads(policy, before[real]):
        output = policy(**batch.inputs(), output_hidden_states=states)
    hidden = output.hidden_states[-1].flatten(0, 1)[before] if states else None
    return _finish(rollout, *_logprobs_and_entropy(output.logits[0], rollout, temperature, entropy), hidden)


LogprobsAndEntropy = tuple[Tensor, Tensor | None]  # log-probs and entropies of the real response tokens, [n] nats


def _logprobs_and_entropy(
    logits: Tensor, rollout: Rollout, temperature: float, entropy: bool, part: slice = slice(None)
) -> LogprobsAndEntropy:
    """Return log-probabilities and entropies from the logits [n, V] of all real response tokens, or of a part of them.

    Args:
        part: which of the real response tokens, in row-major order, the logits belong to.
    """
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
    """Compute output layer and `_logprobs_and_entropy` from the last hidden states [n, H], in chunks of `size` tokens.

    Only the logits of one chunk exist at a time. The backward pass computes them again (2 H V more operations a token).
    """

    def compute_chunk(chunk: Tensor, part: slice) -> LogprobsAndEntropy:
        return _logprobs_and_entropy(head(chunk), rollout, temperature, entropy, part)

    found = [
        checkpoint(
            compute_chunk,
            states[start : start + size],
            slice(start, start + size),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(states), size)
    ]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]) if entropy else None


def _finish(rollout: Rollout, logprobs: Tensor, entropy: Tensor | None, states: Tensor | None) -> PolicyOutput:
    real = rollout.response_mask
    return PolicyOutput(_unflatten(logprobs, real), None if entropy is None else _unflatten(entropy, real), states)


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
