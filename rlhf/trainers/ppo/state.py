"""State and models of a PPO run, and how both are saved and restored.

Random numbers are a function of seed, step and episode, the order of minibatches of seed, step and epoch, learning
rates and phases of the number of the update. None of them is part of the state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.checkpointing.parameters_and_adam import (
    load_parameters_and_adam,
    parameters_and_adam_size,
    save_parameters_and_adam,
)
from rlhf.distributed.engine import all_gather_objects
from rlhf.models.ema import WeightAverage
from rlhf.models.offload import OffloadedModels
from rlhf.rollout.rewards import Rewards
from rlhf.rollout.running_stats import RunningStats
from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.policy_value import PolicyAndValue

STATE_FILE = "state.pt"
"""File of everything but trained parameters and Adam state, which `rlhf.checkpointing.parameters_and_adam` writes."""


@dataclass
class StepProgress:
    """Progress of a step after its scoring passes: the minibatches done and their metrics so far."""

    experience: Experience
    done: int = 0  # minibatches
    tokens: float = 0.0  # response tokens of those minibatches, over all processes
    first_error: float = 0.0  # largest |ratio - 1| of the first minibatch
    norms: list[float] = field(default_factory=list)  # gradient norm of each optimizer step
    sums: dict[str, Tensor] = field(default_factory=dict)  # metrics summed over this process's tokens
    time_sample: float = 0.0  # seconds
    time_score: float = 0.0


@dataclass
class PPOState:
    """Progress of a run and the values of its controllers. Everything else is determined by the settings."""

    kl_coef: float  # weight of the KL penalty; moves towards kl.target
    step: int = 0  # steps done
    learning_rate_scale: float = 1.0  # below 1 after a rollback
    rollbacks: int = 0
    running_stats: RunningStats = field(default_factory=RunningStats)  # of the raw scores so far
    first_response_length: float = 0.0  # mean tokens of the first rollout's responses
    progress: StepProgress | None = None  # of the current step after its scoring passes; None between steps


@dataclass
class PPOModels:
    """Models of a run: the trained pair in its engine, and the frozen ones."""

    accelerator: Any
    trained: Any  # `PolicyAndValue`, as its engine wraps it
    optimizer: Any
    reference: nn.Module | None  # None if the policy is an adapter; its starting point is then the reference
    rewards: Rewards
    offloaded: OffloadedModels  # the frozen models by role
    average: WeightAverage | None = None

    @property
    def pair(self) -> PolicyAndValue:
        """The module of policy and value model without its engine."""
        pair: PolicyAndValue = self.accelerator.unwrap_model(self.trained)
        return pair

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the run trains, of both models.

        Parameters that are never trained, such as the base model of an adapter, are loaded from their source again.
        """
        policy = {f"policy.{name}": p for name, p in self.pair.trained_policy().items()}
        return policy | {f"value_model.{name}": p for name, p in self.pair.trained_value().items()}

    def saved_buffers(self) -> dict[str, Tensor]:
        """Return the buffers of the trained models that belong to their state dict."""
        saved = self.pair.state_dict().keys()
        return {name: value.detach() for name, value in self.pair.named_buffers() if name in saved}


def update_stats(progress: StepProgress, accelerator: Any, ptx_coef: float | None) -> dict[str, float]:
    """Return the metrics of a step's updates, as means over tokens of all processes. Collective.

    Args:
        progress: progress of the finished step.
        accelerator: the Accelerator.
        ptx_coef: current coefficient of the text loss; None = there is none.
    """
    sums = {k: accelerator.reduce(v, "sum") for k, v in progress.sums.items()}
    ptx = {}
    if ptx_coef is not None and "ptx_loss" in sums:
        ptx = {"ptx_loss": float(sums.pop("ptx_loss")) / progress.done, "ptx_coef": ptx_coef}
    means = {k: float(v) / progress.tokens for k, v in sums.items()}
    return (
        ptx
        | means
        | {
            "first_ratio_error": progress.first_error,
            "grad_norm": sum(progress.norms) / max(len(progress.norms), 1),
            "updates": float(len(progress.norms)),
        }
    )


def save_state(folder: Path | None, state: PPOState, models: PPOModels, *, ptx_coef: float | None) -> None:
    """Write everything that settings and source models do not determine. Collective.

    Args:
        folder: folder to write into on the main process; None on the others.
        state: the state of the run.
        models: the models of the run.
        ptx_coef: current coefficient of the text loss; None = there is none.
    """
    save_parameters_and_adam(folder, models.trained_parameters(), models.optimizer)
    values = {
        "step": state.step,
        "kl_coef": state.kl_coef,
        "rate": state.learning_rate_scale,
        "rollbacks": state.rollbacks,
        "spread": list(state.running_stats),
        "first_length": state.first_response_length,
        "average": models.average.weights if models.average is not None else None,
        "ptx_coef": ptx_coef,
        "rates": [group["lr"] for group in models.optimizer.param_groups],  # of the last update, for the step's metrics
        "buffers": models.saved_buffers(),
        "work": _to_plain(state.progress, models.accelerator) if state.progress is not None else None,
    }
    if folder is not None:
        torch.save(values, folder / STATE_FILE)


def load_state(folder: Path, models: PPOModels) -> tuple[PPOState, float | None]:
    """Restore the models from files that `save_state` wrote, possibly with another engine. Collective.

    Returns: the state, and the coefficient of the text loss (None if there is none).
    Raises: CheckpointError if the checkpoint holds other parameters.
    """
    values = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    load_parameters_and_adam(folder, models.trained_parameters(), models.optimizer)
    if models.average is not None and models.average.main:
        models.average.weights = values["average"]
    for group, rate in zip(models.optimizer.param_groups, values["rates"], strict=True):
        group["lr"] = rate
    for name, buffer in models.saved_buffers().items():
        buffer.copy_(values["buffers"][name])
    state = PPOState(
        kl_coef=values["kl_coef"],
        step=values["step"],
        learning_rate_scale=values["rate"],
        rollbacks=values["rollbacks"],
        running_stats=RunningStats(*values["spread"]),
        first_response_length=values["first_length"],
        progress=_from_plain(values["work"], models.accelerator) if values["work"] is not None else None,
    )
    return state, values["ptx_coef"]


def state_size(state: PPOState, models: PPOModels) -> int:
    """Return the largest number of bytes that a checkpoint takes, with optimizer state and rollout."""
    size = parameters_and_adam_size(models.trained_parameters())
    if models.average is not None:
        size += sum(value.nbytes for value in models.average.weights.values())
    if state.progress is not None:
        size += sum(value.nbytes for value in vars(state.progress.experience).values())
    return size + 2**16


def _to_plain(progress: StepProgress, accelerator: Any) -> dict[str, Any]:
    """Return the progress as plain values and tensors, with the sums of every process in rank order.

    They are added only at the end of the step, in the same order as without a resume. Collective.
    """
    sums = {name: value.cpu() for name, value in progress.sums.items()}
    ranks = accelerator.num_processes
    values = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name not in ("experience", "sums")}
    return values | {
        "experience": dict(vars(progress.experience)),
        "sums": all_gather_objects(sums, ranks) if ranks > 1 else [sums],
    }


def _from_plain(values: dict[str, Any], accelerator: Any) -> StepProgress:
    device, ranks = accelerator.device, accelerator.num_processes
    experience = Experience(**{name: value.to(device) for name, value in values["experience"].items()})
    sums_by_rank = values["sums"]
    if len(sums_by_rank) == ranks:
        sums = sums_by_rank[accelerator.process_index]
    else:  # with another number of processes, the first process takes the total
        total = {name: torch.stack([part[name] for part in sums_by_rank]).sum(dim=0) for name in sums_by_rank[0]}
        first = accelerator.process_index == 0
        sums = {name: value if first else torch.zeros_like(value) for name, value in total.items()}
    rest = {name: value for name, value in values.items() if name not in ("experience", "sums")}
    return StepProgress(experience, sums={name: value.to(device) for name, value in sums.items()}, **rest)
