"""A transformers Trainer that follows a program of phases.

One optimizer and one engine for the whole run: it holds every weight that is ever trained, in groups whose members
begin and end together. A weight that waits takes no gradient (so blocks below the first trained one run without
autograd) and has rate 0, so that no engine moves it. Optimizer state is therefore never rebuilt and never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from rlhf.distributed.zero_gather import reset_adam_steps
from rlhf.trainers.phase_schedule import OptimizerGroup, PhaseSchedule


def set_trained(model: Any, plan: PhaseSchedule, phase: int) -> None:
    """Let the parameters of a phase take gradients, and no other of the program's."""
    trained = plan.stretches[phase].names
    for name, parameter in model.named_parameters():
        if name in plan.names:
            parameter.requires_grad_(name in trained)


def groups_that_begin(groups: Sequence[OptimizerGroup], phase: int) -> list[int]:
    """Numbers of the groups that are trained in a phase for the first time, and that have waited until then."""
    return [i for i, g in enumerate(groups) if phase and g.phases[phase] and not any(g.phases[:phase])]


class PhaseCallback(TrainerCallback):
    """Moves a Trainer from phase to phase."""

    def __init__(self, plan: PhaseSchedule) -> None:
        self.plan = plan
        self.groups: list[OptimizerGroup] = []
        self.evaluations: list[tuple[int, float]] = []

    def rate(self, group: int, done: int) -> float:
        """Learning rate of a group in the update after `done`, for the scheduler."""
        return self.plan.rates(self.groups, done, self.plan.now(done, self.evaluations))[group]

    def optimizer_groups(self, model: Any, decays: frozenset[str], weight_decay: float) -> list[dict[str, Any]]:
        """Make the parameter groups of an optimizer, which hold everything that is ever trained.

        Args:
            decays: names of the parameters to which weight decay applies.
        """
        self.groups = self.plan.groups(frozenset(self.plan.names) - decays)
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
        """Enter the phase of this update; say its learning rates."""
        now = self.plan.now(state.global_step, self.evaluations)
        if state.global_step == now.begun:
            reset_adam_steps(optimizer, groups_that_begin(self.groups, now.phase))
            if now.phase == len(self.plan.stretches) - 1:
                # Earlier phases prepare this one: its best weights are looked for among its own evaluations.
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        set_trained(model, self.plan, now.phase)
        rates = self.plan.rates(self.groups, state.global_step, now)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        lr_scheduler._last_lr = rates

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Keep the held-out loss; the last phase may end here."""
        if metrics and "eval_loss" in metrics:
            self.evaluations.append((state.global_step, metrics["eval_loss"]))
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop when all phases are over."""
        if self.plan.now(state.global_step, self.evaluations).over:
            control.should_training_stop = True


def attach_phases(trainer: Any, plan: PhaseSchedule) -> PhaseCallback:
    """Make a Trainer follow a program. Its optimizer and schedule are made from the program when training begins."""
    trainer.phases = PhaseCallback(plan)
    trainer.add_callback(trainer.phases)
    phases: PhaseCallback = trainer.phases
    return phases
