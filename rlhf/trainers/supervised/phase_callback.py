"""Callback that makes a transformers Trainer follow a phase schedule.

One optimizer and one engine serve the whole run. The optimizer holds every parameter that is ever trained, in groups
that are trained in the same phases. Outside its phases a parameter has requires_grad=False, so that blocks below the
first trained one run without autograd, and learning rate 0, so that no engine changes it. Optimizer state is therefore
never rebuilt and never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from rlhf.distributed.zero_gather import reset_adam_steps
from rlhf.trainers.phase_schedule import OptimizerGroup, PhaseSchedule


def set_trained(model: Any, schedule: PhaseSchedule, phase: int) -> None:
    """Set `requires_grad` to True for the parameters of a phase, and to False for the others that the schedule trains.

    Parameters that the schedule never trains are not changed.
    """
    trained = schedule.phases[phase].names
    for name, parameter in model.named_parameters():
        if name in schedule.names:
            parameter.requires_grad_(name in trained)


def newly_trained(groups: Sequence[OptimizerGroup], phase: int) -> list[int]:
    """Return the indices of the groups that are trained in this phase for the first time; none in the first phase."""
    return [i for i, g in enumerate(groups) if phase and g.trained_in[phase] and not any(g.trained_in[:phase])]


class PhaseCallback(TrainerCallback):
    """Sets what a Trainer trains and its learning rates, update by update, and stops it after the last phase."""

    def __init__(self, schedule: PhaseSchedule) -> None:
        self.schedule = schedule
        self.groups: list[OptimizerGroup] = []
        self.evaluations: list[tuple[int, float]] = []

    def rate(self, group: int, done: int) -> float:
        """Return the learning rate of a group in the update after `done`, for the scheduler."""
        return self.schedule.rates(self.groups, done, self.schedule.position(done, self.evaluations))[group]

    def optimizer_groups(self, model: Any, decays: frozenset[str], weight_decay: float) -> list[dict[str, Any]]:
        """Make the parameter groups of an optimizer, which hold everything that is ever trained.

        Args:
            decays: names of the parameters to which weight decay applies.
        """
        self.groups = self.schedule.groups(frozenset(self.schedule.names) - decays)
        named = dict(model.named_parameters())
        return [
            {
                "params": [named[name].requires_grad_(True) for name in group.names],
                "weight_decay": weight_decay if group.decays else 0.0,
            }
            for group in self.groups
        ]

    def scheduler(self, optimizer: Any) -> Any:
        """Make the learning-rate schedule of an optimizer with the groups of `optimizer_groups`."""
        rates: list[Callable[[int], float]] = [partial(self.rate, i) for i in range(len(self.groups))]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, rates)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the held-out losses of the run so far; the checkpoint has them."""
        self.evaluations = [(line["step"], line["eval_loss"]) for line in state.log_history if "eval_loss" in line]

    def on_step_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Enter the phase of this update and set its learning rates."""
        position = self.schedule.position(state.global_step, self.evaluations)
        if state.global_step == position.start:
            reset_adam_steps(optimizer, newly_trained(self.groups, position.phase))
            if position.phase == len(self.schedule.phases) - 1:
                # The best checkpoint is chosen among the evaluations of the last phase only.
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        set_trained(model, self.schedule, position.phase)
        rates = self.schedule.rates(self.groups, state.global_step, position)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        lr_scheduler._last_lr = rates

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Record the held-out loss, and stop training if it ends the last phase."""
        if metrics and "eval_loss" in metrics:
            self.evaluations.append((state.global_step, metrics["eval_loss"]))
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop training when all phases are over."""
        if self.schedule.position(state.global_step, self.evaluations).finished:
            control.should_training_stop = True


def attach_phases(trainer: Any, schedule: PhaseSchedule) -> PhaseCallback:
    """Make a Trainer follow a phase schedule. Call before training begins, when it creates optimizer and scheduler."""
    callback = PhaseCallback(schedule)
    trainer.phase_callback = callback
    trainer.add_callback(callback)
    return callback
