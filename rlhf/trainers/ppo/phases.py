"""Phases of the policy and the value model in PPO: which parameters are trained in a step, and at which learning rate.

Both models share one optimizer. It holds every parameter that is ever trained, in groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from rlhf.trainers.supervised.phase_callback import newly_trained


def phase_schedules(settings: PPOSettings, model: PolicyAndValue) -> tuple[PhaseSchedule, PhaseSchedule]:
    """Return the phase schedules of the policy and of the value model.

    Raises: ConfigError for a selection that matches nothing, or if nothing is left to train.
    """
    o = settings.optim
    return (
        _model_schedule(
            settings, "policy", lambda: map_parameters(model.policy), model.trained_policy(), o.learning_rate
        ),
        _model_schedule(
            settings, "value_model", lambda: value_parameter_map(model), model.trained_value(), o.value_learning_rate
        ),
    )


def _model_schedule(
    settings: PPOSettings, name: str, map_of: Callable[[], ParameterMap], trained: Iterable[str], rate: float
) -> PhaseSchedule:
    freeze: Selection = getattr(settings.freeze, name)
    unfreeze: Sequence[PPOPhase] = getattr(settings.unfreeze, name)
    factors = {parameter: adapter_rate_factor(parameter, settings.peft) for parameter in trained}
    if not freeze.given and not unfreeze:  # no parameter map is needed here, so the model need not be a transformer
        return PhaseSchedule((ResolvedPhase(frozenset(factors), settings.steps, rate),), factors)
    return make_ppo_schedule(
        map_of().only(factors),
        freeze=freeze,
        unfreeze=unfreeze,
        steps=settings.steps,
        learning_rate=rate,
        where=name,
        factors=factors,
    )


def value_parameter_map(model: PolicyAndValue) -> ParameterMap:
    """Return the places of the value model's parameters, under the names of `PolicyAndValue.trained_value`.

    An adapter value model is attached to the policy's base model, so some of its parameters belong to that model.
    """
    value = model.value_model
    if not isinstance(value, AdapterScorer | SharedValueHead):
        return map_parameters(value)
    policy = map_parameters(model.policy)
    head = {name: ParameterPlace(None, "score", policy.blocks + 1) for name, _ in value.named_parameters()}
    on_policy = {name: policy.places[name] for name in model.trained_value() if name not in head}
    return ParameterMap(on_policy | head, policy.blocks, tied=False)


class PPOPhases:
    """Applies the phase schedules of policy and value model during training."""

    def __init__(self, settings: PPOSettings, model: PolicyAndValue) -> None:
        """Resolve both schedules and freeze the parameters that are never trained."""
        self.schedules = phase_schedules(settings, model)
        self.parameters: tuple[dict[str, nn.Parameter], ...] = (model.trained_policy(), model.trained_value())
        self.groups: list[tuple[int, OptimizerGroup]] = []
        for i, (schedule, named) in enumerate(zip(self.schedules, self.parameters, strict=True)):
            self.groups += [(i, group) for group in schedule.groups()]
            for name, parameter in named.items():
                parameter.requires_grad_(name in schedule.names)
        model.set_trained_names(policy=self.schedules[0].names, value=self.schedules[1].names)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer, which both models share."""
        return [
            {"params": [self.parameters[i][n] for n in group.names], "lr": self.schedules[i].phases[0].learning_rate}
            for i, group in self.groups
        ]

    def select(self, step: int) -> None:
        """Set `requires_grad` to True for the parameters that are trained in a step, and to False for all others.

        Call it before the step samples. torch computes products with a weight that has requires_grad differently, even
        where gradients are disabled, so a step that is repeated after a resume would otherwise sample from
        probabilities that differ in the last digit.
        """
        for i, schedule in enumerate(self.schedules):
            trained = schedule.phases[schedule.position(step).phase].names
            for name in schedule.names:
                self.parameters[i][name].requires_grad_(name in trained)

    def enter(self, step: int, optimizer: Any) -> None:
        """Reset the Adam step counts of groups whose first phase begins at this step.

        Call it before the first update of the step.
        """
        starting: list[int] = []
        for i, schedule in enumerate(self.schedules):
            position = schedule.position(step)
            if step == position.start:
                own = [number for number, (model, _) in enumerate(self.groups) if model == i]
                starting += [own[k] for k in newly_trained([self.groups[number][1] for number in own], position.phase)]
        reset_adam_steps(optimizer, starting)

    def set_rates(self, optimizer: Any, step: int, policy: float, value: float) -> None:
        """Set the learning rates of a step. `policy` and `value` are factors on the rates of the phases."""
        for (i, group), target in zip(self.groups, optimizer.param_groups, strict=True):
            schedule = self.schedules[i]
            phase = schedule.position(step).phase
            rate = schedule.phases[phase].learning_rate * group.factor if group.trained_in[phase] else 0.0
            target["lr"] = rate * (policy, value)[i]
