"""The module that PPO trains: policy and value model together, and what passes through them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.distributed.engine import all_gather_objects
from rlhf.models.adapters import adapter_parameters
from rlhf.models.heads import AdapterScorer, SharedValueHead, position_ids, trunk_owner
from rlhf.models.packed_batch import PackedBatch, can_pack
from rlhf.models.shared_base import enable_activation_checkpointing
from rlhf.rollout.teacher_forcing import policy_forward, response_logprobs, response_values
from rlhf.rollout.types import Rollout, ScoredRollout, merge_rollouts


@dataclass(frozen=True)
class TextBatch:
    """Documents: ids [B, T] int64, mask [B, T] bool (real tokens), counts [B, T] bool (tokens that carry loss)."""

    ids: Tensor
    mask: Tensor
    counts: Tensor


class PolicyAndValue(nn.Module):
    """The two trained models as one module: a second model prepared beside the first would silently not be stepped.

    `value_model` is a scorer with a trunk of its own, an `AdapterScorer` on the policy's base, or a `SharedValue` head
    on the policy's trunk.
    """

    def __init__(self, policy: nn.Module, value_model: nn.Module) -> None:
        super().__init__()
        self.policy, self.value_model = policy, value_model
        others = adapter_parameters(policy, value_model.adapter) if isinstance(value_model, AdapterScorer) else {}
        self._on_policy = frozenset(others)  # weights of the value model that lie on the policy's base
        self.keep(
            policy=(n for n, p in policy.named_parameters() if p.requires_grad and n not in others),
            value=(n for n, p in (*value_model.named_parameters(), *others.items()) if p.requires_grad),
        )

    def keep(self, *, policy: Iterable[str], value: Iterable[str]) -> None:
        """Say which weights are trained in the run; not all of them need take gradients all the time."""
        self._policy_names, self._value_names = frozenset(policy), frozenset(value)

    def trained_policy(self) -> dict[str, nn.Parameter]:
        """Named parameters of the policy that are trained; an adapter of the value model on its base is not among
        them."""
        return {n: p for n, p in self.policy.named_parameters() if n in self._policy_names}

    def trained_value(self) -> dict[str, nn.Parameter]:
        """Parameters of the value model that are trained, by their names in it or, of an adapter, in the policy."""
        own = {n: p for n, p in self.value_model.named_parameters() if n in self._value_names}
        on_policy = {n: p for n, p in self.policy.named_parameters() if n in self._on_policy & self._value_names}
        return own | on_policy

    def recompute_activations(self) -> None:
        """In both models, to save memory."""
        enable_activation_checkpointing(self.policy)
        if not isinstance(self.value_model, AdapterScorer | SharedValueHead):
            enable_activation_checkpointing(self.value_model)

    def forward(self, batch: Rollout | TextBatch, temperature: float = 1.0) -> Any:
        """Everything that is differentiated passes here, so that an engine around this module sees it.

        Returns: of a rollout, log-probs [B, R] nats, entropy [B, R] nats and values [B, R] score units; of text, the
            negative log-likelihood summed over the tokens that count, 0-d nats.
        """
        if isinstance(batch, TextBatch):
            return _text_loss(self.policy, batch)
        return self.read(batch, temperature, entropy=True)

    def read(
        self, rollout: Rollout, temperature: float, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return log-probs, entropy (if asked for) and values of a rollout: one code path for old and new ones.

        The sequences are packed once and read by both models, unless only one of them computes the same on packed rows.
        """
        batch = PackedBatch.for_model(self.policy, rollout.ids, rollout.mask)
        if isinstance(self.value_model, SharedValueHead):
            output = policy_forward(self.policy, rollout, temperature, entropy=entropy, states=True, batch=batch)
            values = self.value_model.score(output.states).squeeze(-1).masked_fill(~rollout.response_mask, 0.0)
            return output.logprobs, output.entropy, values
        logprobs, spread = response_logprobs(self.policy, rollout, temperature, entropy=entropy, batch=batch)
        alike = can_pack(trunk_owner(self.value_model)) == can_pack(self.policy)
        return logprobs, spread, response_values(self.value_model, rollout, batch=batch if alike else None)

    def values_only(self, rollout: Rollout) -> Tensor:
        """Values of a rollout whose log-probs are known; not for a head on the policy's trunk. [B, R] score units."""
        return response_values(self.value_model, rollout)


def _text_loss(policy: Any, text: TextBatch) -> Tensor:
    ids, mask = text.ids, text.mask
    logits = policy(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False).logits[
        :, :-1
    ]
    nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * text.counts[:, 1:]).sum()


def gather_rollouts(measured: ScoredRollout, accelerator: Any, pad_id: int) -> ScoredRollout:
    """Everybody's episodes on every process, in slot order."""
    device = measured.response_ids.device
    if accelerator.num_processes > 1:
        parts = all_gather_objects(
            {name: value.cpu() for name, value in vars(measured).items()}, accelerator.num_processes
        )
        measured = merge_rollouts(
            [ScoredRollout(**{k: v.to(device) for k, v in part.items()}) for part in parts], pad_id
        )
    return measured.select(measured.index.argsort())
