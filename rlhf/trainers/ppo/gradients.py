"""Gradients of a PPO minibatch: its microbatches, one forward and backward pass after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.config.ppo import PPOSettings
from rlhf.distributed import engine
from rlhf.models.packed_batch import can_pack, microbatch_count, microbatches
from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.losses import policy_terms, value_terms
from rlhf.trainers.ppo.policy_value import PolicyAndValue


@dataclass
class MinibatchGradients:
    """What the backward passes of a minibatch found. Everything stays on the device until somebody asks."""

    rows: list[Tensor]  # of each microbatch, int64 on the CPU
    losses: list[Tensor] = field(default_factory=list)  # of each backward pass, 0-d
    passes: list[int] = field(default_factory=list)  # the microbatch that each loss belongs to
    ratio_error: Tensor = field(default_factory=lambda: torch.zeros(()))  # largest |ratio - 1|, 0-d

    def first_not_finite(self) -> tuple[float, Tensor] | None:
        """Return the first loss that is not finite and the rows of its microbatch. Waits for the device."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        return next(
            ((value, self.rows[i]) for value, i in zip(values, self.passes, strict=True) if not math.isfinite(value)),
            None,
        )


def _microbatches(
    pair: PolicyAndValue, accelerator: Any, experience: Experience, minibatch: Tensor, settings: PPOSettings
) -> list[Tensor]:
    """Return the rows of this process's microbatches; every process has equally many.

    An engine that shards parameters gathers them in every forward pass, so the numbers of passes must agree: the number
    is what the process with most tokens needs. Every process knows the whole experience.
    """
    optim, packed = settings.optim, can_pack(pair.policy)
    lengths = experience.mask.sum(dim=1).cpu()
    shares = [minibatch[process :: accelerator.num_processes] for process in range(accelerator.num_processes)]
    count = max(
        microbatch_count(lengths[share], optim.microbatch_size, optim.microbatch_tokens, packed=packed)
        for share in shares
    )
    mine = shares[accelerator.process_index]
    parts = microbatches(
        lengths[mine],
        optim.microbatch_size,
        packed=packed,
        count=None if optim.microbatch_tokens is None else count,
    )
    return [mine[part] for part in parts]


def accumulate_gradients(
    model: Any,
    pair: PolicyAndValue,
    accelerator: Any,
    experience: Experience,
    minibatch: Tensor,
    settings: PPOSettings,
    sums: dict[str, Tensor],
    *,
    total: float,
    warming: bool,
) -> MinibatchGradients:
    """Add the gradient of this process's share of a minibatch to the parameters' gradients.

    Where policy and value model have trunks of their own and no engine counts backward passes, the policy's graph is
    gone before the value model's is built: the activations of one of them exist at a time.

    Args:
        model: `pair`, wrapped by its engine.
        minibatch: [n] int64, rows of the experience, over all processes.
        sums: sums over tokens of what is logged; added to.
        total: response tokens of the minibatch over all processes, by which the loss is divided.
        warming: only the value model is trained.
    """
    a = accelerator
    parts = _microbatches(pair, accelerator, experience, minibatch, settings)
    found = MinibatchGradients(parts, ratio_error=torch.zeros((), device=experience.rewards.device))
    one_by_one = pair.separate_trunks and a.num_processes == 1 and not engine.under_deepspeed()

    def backward(loss: Tensor, microbatch: int) -> None:
        found.losses.append(loss.detach())
        found.passes.append(microbatch)
        # The engine averages gradients over processes; the global count already divides by all tokens.
        engine.backward(loss / total * a.num_processes, model, a)

    for i, rows in enumerate(parts):
        part = experience.select(rows)
        with engine.gradient_accumulation(model, a, last=i == len(parts) - 1):
            if one_by_one:
                logprobs, entropy, _ = model(part, settings.sampling.temperature, part="policy")
                loss, numbers = policy_terms(part, logprobs, entropy, settings, settings.kl, warming=warming)
                backward(loss, i)
                del logprobs, entropy, loss
                _, _, values = model(part, settings.sampling.temperature, part="value")
                loss, more = value_terms(part, values, settings, warming=warming)
                backward(loss, i)
            else:
                logprobs, entropy, values = model(part, settings.sampling.temperature)
                actor, numbers = policy_terms(part, logprobs, entropy, settings, settings.kl, warming=warming)
                loss, more = value_terms(part, values, settings, warming=warming)
                backward(loss + actor, i)
        found.ratio_error = torch.maximum(found.ratio_error, numbers.pop("ratio_error"))
        for key, value in (numbers | more).items():
            sums[key] = sums.get(key, torch.zeros_like(value)) + value
    return found
