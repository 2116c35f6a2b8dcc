"""What a PPO run continues from: trained weights, optimizer, controllers, and the rollout in hand.

Random numbers follow from seed, step and episode, the order of minibatches from seed, step and epoch, learning rates
and phases from the number of the update: none of them is state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.errors import CheckpointError
from rlhf.models.distributed import everybody
from rlhf.rollout.score import Spread
from rlhf.rollout.types import Experience

if TYPE_CHECKING:
    from rlhf.trainers.ppo import PPOTrainer


@dataclass
class Work:
    """A step that has its experience: which of its minibatches are done, and their numbers so far."""

    experience: Experience
    done: int = 0
    tokens: float = 0.0
    first_error: float = 0.0
    norms: list[float] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of this process's share
    time_sample: float = 0.0
    time_score: float = 0.0


def state_of(trainer: PPOTrainer) -> dict[str, Any]:
    """Everything that does not follow from the configuration and the models it names. Collective."""
    t = trainer
    return {
        "step": t.step, "kl_coef": t.kl_coef, "rate": t.rate, "rollbacks": t.rollbacks,
        "spread": list(t.spread), "first_length": t.first_length,
        "average": t.average.weights if t.average is not None else None,
        "ptx_coef": t.text.coef if t.text is not None else None,
        "model": own_weights(t.accelerator.unwrap_model(t.model)), "optimizer": t.optimizer.state_dict(),
        "work": _packed(t.work, t.accelerator) if t.work is not None else None,
    }  # fmt: skip


def load_state(trainer: PPOTrainer, state: dict[str, Any]) -> None:
    """Continue from `state_of`.

    Raises: CheckpointError if it is of other weights.
    """
    t = trainer
    t.step, t.kl_coef, t.rate, t.rollbacks = (state[name] for name in ("step", "kl_coef", "rate", "rollbacks"))
    t.spread, t.first_length = Spread(*state["spread"]), state["first_length"]
    if t.average is not None:
        t.average.weights = state["average"]
    if t.text is not None:
        t.text.coef = state["ptx_coef"]
    model = t.accelerator.unwrap_model(t.model)
    wanted = set(own_weights(model))
    if wanted != set(state["model"]):
        raise CheckpointError(
            "the checkpoint is of other weights", where=f"step {t.step}", do="start over in another output_dir",
            found=", ".join(sorted(wanted ^ set(state["model"]))[:3]),
        )  # fmt: skip
    model.load_state_dict(state["model"], strict=False)
    t.optimizer.load_state_dict(state["optimizer"])
    t.work = _unpacked(state["work"], t.accelerator) if state["work"] is not None else None


def own_weights(model: Any) -> dict[str, Tensor]:
    """The entries of a `PolicyAndValue`'s state that the run may have changed: trained weights, and buffers.

    What is frozen throughout, such as the base under an adapter, is read again from where it came from.
    """
    trained = {id(p) for p in (*model.trained_policy().values(), *model.trained_value().values())}
    return {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, nn.Parameter) or id(value) in trained
    }


def size_of_state(trainer: PPOTrainer) -> int:
    """Bytes that a checkpoint takes at most, optimizer state and rollout included."""
    weights = own_weights(trainer.accelerator.unwrap_model(trainer.model)).values()
    size = sum(value.numel() * (value.element_size() + 8) for value in weights)  # two float32 moments
    if trainer.average is not None:
        size += sum(value.nbytes for value in trainer.average.weights.values())
    if trainer.work is not None:
        size += sum(value.nbytes for value in vars(trainer.work.experience).values())
    return size + 2**16


def _packed(work: Work, accelerator: Any) -> dict[str, Any]:
    """Plain values and tensors. The sums are of every process: they are added at the end of the step, in rank order."""
    sums = {name: value.cpu() for name, value in work.sums.items()}
    ranks = accelerator.num_processes
    values = {f.name: getattr(work, f.name) for f in fields(work) if f.name not in ("experience", "sums")}
    return values | {
        "experience": dict(vars(work.experience)), "sums": everybody(sums, ranks) if ranks > 1 else [sums]
    }  # fmt: skip


def _unpacked(values: dict[str, Any], accelerator: Any) -> Work:
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
    return Work(experience, sums={name: value.to(device) for name, value in sums.items()}, **rest)
