"""The module that PPO trains: policy and value model together, with their forward passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.distributed.engine import all_gather_objects
from rlhf.models.adapters import adapter_parameters
from rlhf.models.heads import AdapterScorer, SharedValueHead, position_ids, trunk_owner
from rlhf.models.output_layer import logit_transform, next_token_positions, token_numbers
from rlhf.models.packed_batch import PackedBatch, can_pack
from rlhf.models.shared_base import enable_activation_checkpointing
from rlhf.rollout.teacher_forcing import policy_forward, response_logprobs, response_values
from rlhf.rollout.types import Rollout, ScoredRollout, merge_rollouts


@dataclass(frozen=True)
class TextBatch:
    """Documents of the text loss.

    Attributes:
        ids: [B, T] int64.
        mask: [B, T] bool, True on real tokens.
        counts: [B, T] bool, True on tokens with loss.
    """

    ids: Tensor
    mask: Tensor
    counts: Tensor


class PolicyAndValue(nn.Module):
    """Both trained models as one module, because an engine does not update a second model that is prepared separately.

    `value_model` is a scorer with its own trunk, an `AdapterScorer` on the policy's base model, or a `SharedValueHead`
    on the policy's trunk.
    """

    def __init__(
        self, policy: nn.Module, value_model: nn.Module, *, entropy_gradient: bool = False, bfloat16: bool = False
    ) -> None:
        """Take the two models.

        Args:
            entropy_gradient: the entropies of a forward pass are differentiable, as an entropy bonus needs them.
            bfloat16: matrix products are computed in bfloat16, whatever the dtype of the weights.
        """
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.entropy_gradient, self.computes_in_bfloat16 = entropy_gradient, bfloat16
        self.row_length: int | None = None  # of packed rows, if they come in few shapes
        logit_transform(policy)  # found out now: later an engine may have sharded the weights
        others = adapter_parameters(policy, value_model.adapter) if isinstance(value_model, AdapterScorer) else {}
        self._on_policy = frozenset(others)  # parameters of the value model that are part of the policy's base model
        self.set_trained_names(
            policy=(n for n, p in policy.named_parameters() if p.requires_grad and n not in others),
            value=(n for n, p in (*value_model.named_parameters(), *others.items()) if p.requires_grad),
        )

    def set_trained_names(self, *, policy: Iterable[str], value: Iterable[str]) -> None:
        """Set the names of the parameters that are trained at any time in the run, of each model."""
        self._policy_names, self._value_names = frozenset(policy), frozenset(value)

    def trained_policy(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of the policy by name, without a value-model adapter on its base model."""
        return {n: p for n, p in self.policy.named_parameters() if n in self._policy_names}

    def trained_value(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of the value model, by their names in it or, for an adapter, in the policy."""
        own = {n: p for n, p in self.value_model.named_parameters() if n in self._value_names}
        on_policy = {n: p for n, p in self.policy.named_parameters() if n in self._on_policy & self._value_names}
        return own | on_policy

    def recompute_activations(self) -> None:
        """Enable activation checkpointing in both models, to save memory."""
        enable_activation_checkpointing(self.policy)
        if self.separate_trunks:
            enable_activation_checkpointing(self.value_model)

    @property
    def separate_trunks(self) -> bool:
        """Whether policy and value model share no parameters, so that either can be run without the other."""
        return not isinstance(self.value_model, AdapterScorer | SharedValueHead)

    def forward(
        self,
        batch: Rollout | TextBatch,
        temperature: float = 1.0,
        *,
        part: Literal["both", "policy", "value"] = "both",
    ) -> Any:
        """Run the forward pass of a loss. All losses use it, so that an engine that wraps this module can hook it.

        The precision is set here, inside of what an engine wraps: DeepSpeed turns off an autocast that surrounds it.

        Args:
            part: run one of the models alone, if they have trunks of their own; what the other computes is None.
        Returns: for a rollout, log-probs [B, R] nats, entropy [B, R] nats and values [B, R] score units; for text, the
            negative log-likelihood summed over the tokens with loss, 0-d nats.
        """
        with self.autocast():
            if isinstance(batch, TextBatch):
                return _text_loss(self.policy, batch)
            if part == "policy":
                packed = self._packed(self.policy, batch)
                return *self._logprobs(batch, temperature, entropy=True, batch=packed), None
            if part == "value":
                packed = self._packed(trunk_owner(self.value_model), batch)
                return None, None, response_values(self.value_model, batch, batch=packed)
            return self.read(batch, temperature, entropy=True)

    def _packed(self, model: Any, rollout: Rollout) -> PackedBatch:
        return PackedBatch.for_model(model, rollout.ids, rollout.mask, row_length=self.row_length)

    def autocast(self) -> torch.autocast:
        """Return the context that sets the precision of sampling, scoring and updates."""
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16, enabled=self.computes_in_bfloat16)

    def _logprobs(
        self, rollout: Rollout, temperature: float, *, entropy: bool, batch: PackedBatch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return response_logprobs(
            self.policy, rollout, temperature, entropy=entropy, entropy_gradient=self.entropy_gradient, batch=batch
        )

    def read(
        self, rollout: Rollout, temperature: float, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return log-probs, entropy (or None) and values of a rollout. Old and new log-probs both come from here.

        The sequences are packed once for both models, unless only one of the models supports packed rows.
        """
        batch = self._packed(self.policy, rollout)
        if isinstance(self.value_model, SharedValueHead):
            output = policy_forward(
                self.policy,
                rollout,
                temperature,
                entropy=entropy,
                entropy_gradient=self.entropy_gradient,
                states=True,
                batch=batch,
            )
            values = self.value_model.score(output.states).squeeze(-1).masked_fill(~rollout.response_mask, 0.0)
            return output.logprobs, output.entropy, values
        logprobs, entropies = self._logprobs(rollout, temperature, entropy=entropy, batch=batch)
        shared = can_pack(trunk_owner(self.value_model)) == can_pack(self.policy)
        return logprobs, entropies, response_values(self.value_model, rollout, batch=batch if shared else None)

    def values_only(self, rollout: Rollout) -> Tensor:
        """Return the values of a rollout, [B, R] score units.

        The value model must not be a head on the policy's trunk.
        """
        return response_values(self.value_model, rollout)


def _text_loss(policy: Any, text: TextBatch) -> Tensor:
    """Return the negative log-likelihood summed over the tokens that count, 0-d nats."""
    inputs = {"input_ids": text.ids, "attention_mask": text.mask.long(), "position_ids": position_ids(text.mask)}
    targets = text.ids[:, 1:][text.counts[:, 1:]]
    return -token_numbers(
        policy, inputs | {"use_cache": False}, next_token_positions(text.counts), targets
    ).logprobs.sum()


def gather_rollouts(measured: ScoredRollout, accelerator: Any, pad_id: int) -> ScoredRollout:
    """Return the episodes of all processes in slot order, the same on every process. Collective."""
    device = measured.response_ids.device
    if accelerator.num_processes > 1:
        parts = all_gather_objects(
            {name: value.cpu() for name, value in vars(measured).items()}, accelerator.num_processes
        )
        measured = merge_rollouts(
            [ScoredRollout(**{k: v.to(device) for k, v in part.items()}) for part in parts], pad_id
        )
    return measured.select(measured.index.argsort())
