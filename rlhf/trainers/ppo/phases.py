"""Phases of the two models that PPO trains: which weights learn in a step, in groups of the one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rlhf.config.ppo import PPOSettings
from rlhf.config.tuning import PPOPhase, Selection
from rlhf.distributed.zero_gather import reset_adam_steps
from rlhf.models.adapters import adapter_rate_factor
from rlhf.models.heads import AdapterScorer, SharedValueHead
from rlhf.models.parameter_selection import ParameterMap, ParameterPlace, map_parameters
from rlhf.trainers.phase_schedule import OptimizerGroup, PhaseSchedule, ResolvedPhase, make_ppo_schedule
from rlhf.trainers.ppo.policy_value import PolicyAndValue
from rlhf.trainers.supervised.phase_callback import groups_that_begin


def phase_schedules(settings: PPOSettings, model: PolicyAndValue) -> tuple[PhaseSchedule, PhaseSchedule]:
    """What is trained of the policy and of the value model, and when.

    Raises: ConfigError for a selection that matches nothing, or if nothing is left to train.
    """
    o = settings.optim
    return (
        _program(settings, "policy", lambda: map_parameters(model.policy), model.trained_policy(), o.learning_rate),
        _program(
            settings, "value_model", lambda: value_parameter_map(model), model.trained_value(), o.value_learning_rate
        ),
    )


def _program(settings: PPOSettings, name: str, of: Any, trained: Iterable[str], rate: float) -> PhaseSchedule:
    freeze: Selection = getattr(settings.freeze, name)
    unfreeze: Sequence[PPOPhase] = getattr(settings.unfreeze, name)
    factors = {parameter: adapter_rate_factor(parameter, settings.peft) for parameter in trained}
    if not freeze.given and not unfreeze:  # any module will do: it need not be a transformer
        return PhaseSchedule((ResolvedPhase(frozenset(factors), settings.steps, rate),), factors)
    return make_ppo_schedule(
        of().only(factors),
        freeze=freeze,
        unfreeze=unfreeze,
        steps=settings.steps,
        learning_rate=rate,
        where=name,
        factors=factors,
    )


def value_parameter_map(model: PolicyAndValue) -> ParameterMap:
    """Places of the value model's weights by the names of `trained_value`: some may lie on the policy's base."""
    value = model.value_model
    if not isinstance(value, AdapterScorer | SharedValueHead):
        return map_parameters(value)
    policy = map_parameters(model.policy)
    head = {name: ParameterPlace(None, "score", policy.blocks + 1) for name, _ in value.named_parameters()}
    on_policy = {name: policy.places[name] for name in model.trained_value() if name not in head}
    return ParameterMap(on_policy | head, policy.blocks, tied=False)


class PPOPhases:
    """Follows the programs of policy and value model."""

    def __init__(self, settings: PPOSettings, model: PolicyAndValue) -> None:
        """Freezes what is never trained."""
        self.programs = phase_schedules(settings, model)
        self.parameters: tuple[dict[str, nn.Parameter], ...] = (model.trained_policy(), model.trained_value())
        self.groups: list[tuple[int, OptimizerGroup]] = []
        for i, (plan, named) in enumerate(zip(self.programs, self.parameters, strict=True)):
            self.groups += [(i, group) for group in plan.groups()]
            for name, parameter in named.items():
                parameter.requires_grad_(name in plan.names)
        model.keep(policy=self.programs[0].names, value=self.programs[1].names)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """For an optimizer of both models."""
        return [
            {"params": [self.parameters[i][n] for n in group.names], "lr": self.programs[i].stretches[0].learning_rate}
            for i, group in self.groups
        ]

    def select(self, step: int) -> None:
        """Let the weights that are trained in a step take gradients, and no others.

        Before the step samples: torch multiplies by a weight that takes gradients in another way, also where none are
        asked for, so that a step which is done again would draw from probabilities that differ in the last digit.
        """
        for i, plan in enumerate(self.programs):
            trained = plan.stretches[plan.now(step).phase].names
            for name in plan.names:
                self.parameters[i][name].requires_grad_(name in trained)

    def enter(self, step: int, optimizer: Any) -> None:
        """Before the first update of a step: weights that learn from now on begin without a history."""
        fresh: list[int] = []
        for i, plan in enumerate(self.programs):
            now = plan.now(step)
            if step == now.begun:
                own = [number for number, (owner, _) in enumerate(self.groups) if owner == i]
                fresh += [own[k] for k in groups_that_begin([self.groups[number][1] for number in own], now.phase)]
        reset_adam_steps(optimizer, fresh)

    def set_rates(self, optimizer: Any, step: int, policy: float, value: float) -> None:
        """Learning rates of a step; `policy` and `value` multiply those of the phases."""
        for (i, group), target in zip(self.groups, optimizer.param_groups, strict=True):
            plan = self.programs[i]
            phase = plan.now(step).phase
            rate = plan.stretches[phase].learning_rate * group.factor if group.phases[phase] else 0.0
            target["lr"] = rate * (policy, value)[i]
