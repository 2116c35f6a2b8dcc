"""What a PPO run continues from: trained weights, optimizer, controllers, and the rollout in hand.

Random numbers follow from seed, step and episode, the order of minibatches from seed, step and epoch, learning rates
and phases from the number of the update: none of them is state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.checkpointing.parameters_and_adam import (
    load_parameters_and_adam,
    parameters_and_adam_size,
    save_parameters_and_adam,
)
from rlhf.distributed.engine import all_gather_objects
from rlhf.rollout.score import RunningStats
from rlhf.rollout.types import Experience

if TYPE_CHECKING:
    from rlhf.trainers.ppo.trainer import PPOTrainer

STATE_FILE = "state.pt"
"""Beside the trained weights; their files are those of `rlhf.checkpointing.parameters_and_adam`."""


@dataclass
class StepProgress:
    """A step that has its experience: which of its minibatches are done, and their numbers so far."""

    experience: Experience
    done: int = 0
    tokens: float = 0.0
    first_error: float = 0.0
    norms: list[float] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of this process's share
    time_sample: float = 0.0
    time_score: float = 0.0


def save_state(trainer: PPOTrainer, folder: Path | None) -> None:
    """Write everything that does not follow from the configuration and the models it names. Collective.

    Args:
        folder: on the main process; None on the others.
    """
    t = trainer
    save_parameters_and_adam(folder, trained_parameters(t), t.optimizer)
    state = {
        "step": t.step,
        "kl_coef": t.kl_coef,
        "rate": t.rate,
        "rollbacks": t.rollbacks,
        "spread": list(t.spread),
        "first_length": t.first_length,
        "average": t.average.weights if t.average is not None else None,
        "ptx_coef": t.text.coef if t.text is not None else None,
        "rates": [group["lr"] for group in t.optimizer.param_groups],  # of the last update, for the step's line
        "buffers": saved_buffers(t),
        "work": _packed(t.work, t.accelerator) if t.work is not None else None,
    }
    if folder is not None:
        torch.save(state, folder / STATE_FILE)


def load_state(trainer: PPOTrainer, folder: Path) -> None:
    """Continue from what `save_state` has written, perhaps under another engine. Collective.

    Raises: CheckpointError if it is of other weights.
    """
    t = trainer
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    load_parameters_and_adam(folder, trained_parameters(t), t.optimizer)
    t.step, t.kl_coef, t.rate, t.rollbacks = (state[name] for name in ("step", "kl_coef", "rate", "rollbacks"))
    t.spread, t.first_length = RunningStats(*state["spread"]), state["first_length"]
    if t.average is not None and t.average.main:
        t.average.weights = state["average"]
    if t.text is not None:
        t.text.coef = state["ptx_coef"]
    for group, rate in zip(t.optimizer.param_groups, state["rates"], strict=True):
        group["lr"] = rate
    for name, buffer in saved_buffers(t).items():
        buffer.copy_(state["buffers"][name])
    t.work = _unpacked(state["work"], t.accelerator) if state["work"] is not None else None


def trained_parameters(trainer: PPOTrainer) -> dict[str, nn.Parameter]:
    """The weights that the run changes, of both models.

    What is frozen throughout, such as the base under an adapter, is read again from where it came from.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {f"policy.{name}": p for name, p in model.trained_policy().items()} | {
        f"value_model.{name}": p for name, p in model.trained_value().items()
    }


def saved_buffers(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Numbers of the models that are saved with them and are no weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    saved = model.state_dict().keys()
    return {name: value.detach() for name, value in model.named_buffers() if name in saved}


def state_size(trainer: PPOTrainer) -> int:
    """Bytes that a checkpoint takes at most, optimizer state and rollout included."""
    size = parameters_and_adam_size(trained_parameters(trainer))
    if trainer.average is not None:
        size += sum(value.nbytes for value in trainer.average.weights.values())
    if trainer.work is not None:
        size += sum(value.nbytes for value in vars(trainer.work.experience).values())
    return size + 2**16


def _packed(work: StepProgress, accelerator: Any) -> dict[str, Any]:
    """Plain values and tensors. The sums are of every process: they are added at the end of the step, in rank order."""
    sums = {name: value.cpu() for name, value in work.sums.items()}
    ranks = accelerator.num_processes
    values = {f.name: getattr(work, f.name) for f in fields(work) if f.name not in ("experience", "sums")}
    return values | {
        "experience": dict(vars(work.experience)),
        "sums": all_gather_objects(sums, ranks) if ranks > 1 else [sums],
    }


def _unpacked(values: dict[str, Any], accelerator: Any) -> StepProgress:
    device, ranks = accelerator.device, accelerator.num_processes
    experience = Experience(**{name: value.to(device) for name, value in values["experience"].items()})
    every = values["sums"]
    if len(every) == ranks:
        sums = every[accelerator.process_index]
    else:  # another number of processes: the first has all
        total = {name: torch.stack([part[name] for part in every]).sum(dim=0) for name in every[0]}
        first = accelerator.process_index == 0
        sums = {name: value if first else torch.zeros_like(value) for name, value in total.items()}
    rest = {name: value for name, value in values.items() if name not in ("experience", "sums")}
    return StepProgress(experience, sums={name: value.to(device) for name, value in sums.items()}, **rest)
