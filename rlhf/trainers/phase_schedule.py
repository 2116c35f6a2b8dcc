"""Phase schedules: which parameters are trained in each phase, at which learning rate, and when the next phase begins.

The phase of an update is a function of the updates done and the held-out losses so far, and of nothing else. A resumed
run, which restores both, is therefore in the same phase as the uninterrupted run. This module only computes;
`phase_setup` applies a schedule to a model and prints it, and `supervised.phase_callback` and `ppo.phases` follow it
during training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.tuning import PPOPhase, Selection, TrainingPhase
from rlhf.errors import ConfigError
from rlhf.models.parameter_selection import HEAD_PARTS, ParameterMap, require_blocks, select_parameters, top_parameters
from rlhf.trainers.lr_schedule import schedule_factor

Evaluations = Sequence[tuple[int, float]]
"""(updates done, held-out loss) of each evaluation, in order."""


@dataclass(frozen=True)
class ResolvedPhase:
    """One phase with its defaults filled in and its selection resolved to parameter names of a model."""

    names: frozenset[str]
    length: int  # updates at most (PPO: steps)
    learning_rate: float
    schedule: str = "constant"
    warmup: float = 0.0  # updates
    patience: int | None = None

    def rate(self, update: int) -> float:
        """Return the learning rate of an update, which is counted from the start of the phase."""
        return self.learning_rate * schedule_factor(self.schedule, self.warmup, update, self.length)


@dataclass(frozen=True)
class PhasePosition:
    """Position of a run in its phase schedule."""

    phase: int  # index of the current phase
    start: int  # updates (PPO: steps) done before the phase
    finished: bool  # whether all phases are over


@dataclass(frozen=True)
class OptimizerGroup:
    """One group of the optimizer: parameters with the same phases, learning-rate factor and weight decay."""

    names: tuple[str, ...]
    trained_in: tuple[bool, ...]  # for each phase, whether the group is trained in it
    factor: float  # multiplies the phase's learning rate
    decays: bool  # whether weight decay applies


@dataclass(frozen=True)
class PhaseSchedule:
    """The phases of a run, and the factor by which each parameter multiplies the phase's learning rate."""

    phases: tuple[ResolvedPhase, ...]
    factors: Mapping[str, float]

    @property
    def updates(self) -> int:
        """Largest number of updates in the whole run; patience may end it earlier."""
        return sum(phase.length for phase in self.phases)

    @property
    def names(self) -> frozenset[str]:
        """Names of all parameters that are trained in at least one phase."""
        return frozenset().union(*(phase.names for phase in self.phases))

    def position(self, done: int, evaluations: Evaluations = ()) -> PhasePosition:
        """Return the position of a run after `done` updates.

        Patience counts only the evaluations that were made during the phase itself.
        """
        start: float = 0
        for i, phase in enumerate(self.phases):
            end = start + phase.length
            if phase.patience is not None:
                own = [(step, loss) for step, loss in evaluations if start < step <= min(end, done)]
                end = min(end, _end_by_patience(own, phase.patience))
            if done < end:
                return PhasePosition(i, int(start), finished=False)
            start = end
        return PhasePosition(len(self.phases) - 1, int(start), finished=True)

    def groups(self, without_decay: frozenset[str] = frozenset()) -> list[OptimizerGroup]:
        """Return the groups of the optimizer, with the group whose learning rate is logged first.

        It is the group trained in most phases, and among those the one with the factor closest to 1.
        """
        members: dict[tuple[tuple[bool, ...], float, bool], list[str]] = {}
        for name in sorted(self.names):
            trained_in = tuple(name in phase.names for phase in self.phases)
            members.setdefault((trained_in, self.factors.get(name, 1.0), name not in without_decay), []).append(name)
        groups = [OptimizerGroup(tuple(names), *key) for key, names in members.items()]
        return sorted(groups, key=lambda g: (-sum(g.trained_in), abs(math.log(g.factor)), not g.decays))

    def rates(self, groups: Sequence[OptimizerGroup], done: int, position: PhasePosition) -> list[float]:
        """Return the learning rate of each group in the update after `done`; 0 for groups not trained in the phase."""
        rate = self.phases[position.phase].rate(done - position.start)
        return [rate * group.factor if group.trained_in[position.phase] else 0.0 for group in groups]


def _end_by_patience(evaluations: Evaluations, patience: int) -> float:
    """Return the update of the first evaluation that completes `patience` in a row without a lower loss, or inf."""
    best, worse = math.inf, 0
    for step, loss in evaluations:
        worse = 0 if loss < best else worse + 1
        best = min(best, loss)
        if worse >= patience:
            return step
    return math.inf


def parameter_rate_factors(parameters: ParameterMap, *, layer_decay: float, head_factor: float) -> dict[str, float]:
    """Return the factor of each parameter on the phase's learning rate, for layer-wise decay and a new head.

    factor = layer_decay ^ (n + 1 - depth) with depth 0 for the embeddings, i + 1 for block i of n, and n + 1 for the
    output layer (ULMFiT, arXiv:1801.06146, uses 1 / 2.6 per layer). A new head's factor is also multiplied by
    `head_factor`.
    Raises: ConfigError for a layer_decay on a model whose blocks cannot be identified.
    """
    if layer_decay != 1.0:
        require_blocks(parameters, "optim.layer_decay")
    return {
        name: layer_decay ** (parameters.blocks + 1 - place.depth) * (head_factor if place.part == "score" else 1.0)
        for name, place in parameters.places.items()
    }


def make_schedule(
    parameters: ParameterMap,
    plan: SupervisedPlan,
    *,
    freeze: Selection,
    unfreeze: Sequence[TrainingPhase],
    factors: Mapping[str, float],
) -> PhaseSchedule:
    """Resolve the phases of a supervised run for a model.

    Args:
        parameters: the parameters that may be trained.
        plan: batch sizes and number of updates.
        freeze: parameters that no phase trains.
        unfreeze: the phases in order; empty = one phase that trains everything not frozen.
        factors: factor of each parameter on the phase's learning rate.
    Raises: ConfigError for a selection that matches nothing, and if nothing is left to train.
    """
    optim = plan.optim
    free = frozenset(parameters.places) - (select_parameters(freeze, parameters, "freeze") if freeze.given else set())
    if not unfreeze:
        selected = [(free, TrainingPhase(updates=plan.updates(), patience=optim.patience))]
    else:
        selected = [
            (names & free, phase) for i, phase in enumerate(unfreeze) for names in _names_trained(phase, parameters, i)
        ]
    phases = []
    for i, (names, phase) in enumerate(selected):
        if not names:
            raise ConfigError(
                "nothing is left to train",
                found=f"{len(parameters.places) - len(free)} of {len(parameters.places)} weights frozen",
                where=f"unfreeze[{i}]" if unfreeze else "freeze",
                do="freeze less",
            )
        length = plan.phase_updates(phase)
        warmup = optim.warmup_fraction if phase.warmup_fraction is None else phase.warmup_fraction
        phases.append(
            ResolvedPhase(
                names,
                length,
                phase.learning_rate or optim.learning_rate,
                phase.schedule or optim.schedule,
                math.ceil(warmup * length),
                phase.patience,
            )
        )
    return PhaseSchedule(tuple(phases), factors)


def make_ppo_schedule(
    parameters: ParameterMap,
    *,
    freeze: Selection,
    unfreeze: Sequence[PPOPhase],
    steps: int,
    learning_rate: float,
    where: str,
    factors: Mapping[str, float],
) -> PhaseSchedule:
    """Resolve the phases of the policy or of the value model in PPO. Lengths are in PPO steps.

    Args:
        parameters: the parameters that may be trained.
        freeze: parameters that no phase trains.
        unfreeze: the phases in order; empty = one phase that trains everything not frozen.
        steps: steps of the whole run.
        learning_rate: rate of phases that set none.
        where: "policy" or "value_model", for error messages.
        factors: factor of each parameter on the phase's learning rate.
    Raises: ConfigError for a selection that matches nothing, and if nothing is left to train.
    """
    free = frozenset(parameters.places) - (
        select_parameters(freeze, parameters, f"freeze.{where}") if freeze.given else set()
    )
    phases = unfreeze or (PPOPhase(),)
    resolved = [
        (names & free, p)
        for i, p in enumerate(phases)
        for names in _names_trained(p, parameters, i, f"unfreeze.{where}")
    ]
    if not all(names for names, _ in resolved):
        raise ConfigError("nothing is left to train", where=f"freeze.{where}", do="freeze less")
    rates = [phase.learning_rate or learning_rate for _, phase in resolved]
    return PhaseSchedule(
        tuple(ResolvedPhase(n, p.steps or steps, r) for (n, p), r in zip(resolved, rates, strict=True)), factors
    )


def _names_trained(
    phase: TrainingPhase | PPOPhase, parameters: ParameterMap, number: int, where: str = "unfreeze"
) -> list[frozenset[str]]:
    """Return the parameter names that a phase trains; for train: top-down, one set for each of its sub-phases."""
    everything = frozenset(parameters.places)
    if phase.train == "all":
        return [everything]
    if phase.train == "top-down":
        require_blocks(parameters, f"{where}[{number}].train")
        return [
            *(frozenset(top_parameters(parameters, blocks)) for blocks in range(1, parameters.blocks + 1)),
            everything,
        ]
    assert isinstance(phase.train, Selection)
    return [frozenset(select_parameters(phase.train, parameters, f"{where}[{number}].train"))]


def phase_table(
    parameters: ParameterMap, counts: Mapping[str, int], schedule: PhaseSchedule
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table: each part of a model, the phases that train it, and its peak rate.

    Args:
        counts: parameters of each tensor of the model.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(counts, key=lambda n: (parameters.places[n].depth, parameters.places[n].part in HEAD_PARTS)):
        place = parameters.places[name]
        label = f"block {place.block}" if place.block is not None else (place.part or "other")
        groups.setdefault((label, place.block), []).append(name)
    rows: list[list[str]] = []
    for (label, block), names in groups.items():
        trained = [name for name in names if name in schedule.names]
        row = [
            label,
            str(len(names)),
            f"{sum(counts[n] for n in names):,}",
            f"{sum(counts[n] for n in trained):,}",
            _phase_range(trained, schedule),
            _rate_range(trained, schedule),
        ]
        if block is not None and rows and rows[-1][0].startswith("block") and rows[-1][1:] == row[1:]:
            first = re.findall(r"\d+", rows[-1][0])[0]
            rows[-1][0] = f"blocks {first} to {block}, each"
        else:
            rows.append(row)
    return ["weights", "tensors", "parameters", "trained", "in phases", "peak rate"], rows


def _phase_range(names: Sequence[str], schedule: PhaseSchedule) -> str:
    phases = [str(i + 1) for i, phase in enumerate(schedule.phases) if phase.names & set(names)]
    return (phases[0] if len(phases) == 1 else f"{phases[0]}-{phases[-1]}") if phases else "never"


def _rate_range(names: Sequence[str], schedule: PhaseSchedule) -> str:
    found = {
        phase.learning_rate * schedule.factors.get(name, 1.0)
        for phase in schedule.phases
        for name in names
        if name in phase.names
    }
    ends = sorted({f"{rate:.3g}": rate for rate in found}.items(), key=lambda item: item[1])
    return "-" if not ends else ends[0][0] if len(ends) == 1 else f"{ends[0][0]} to {ends[-1][0]}"
