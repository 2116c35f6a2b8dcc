"""Phases of training: which weights learn, at which rate, and when the next phase begins.

The phase of an update follows from the updates done and the held-out losses so far, and from nothing else: a resumed
run that knows both is in the phase that the uninterrupted one was in.
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
    """A phase, resolved for a model."""

    names: frozenset[str]
    length: int  # updates at most (PPO: steps)
    learning_rate: float
    schedule: str = "constant"
    warmup: float = 0.0  # updates
    patience: int | None = None

    def rate(self, update: int) -> float:
        """Learning rate of an update, counted from the beginning of the phase."""
        return self.learning_rate * schedule_factor(self.schedule, self.warmup, update, self.length)


@dataclass(frozen=True)
class PhasePosition:
    """A place in a program: the phase, the updates done before it, whether all phases are over."""

    phase: int
    begun: int
    over: bool


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that are treated alike throughout: one group of the optimizer."""

    names: tuple[str, ...]
    phases: tuple[bool, ...]  # in which of them it is trained
    factor: float  # of the phase's learning rate
    decays: bool  # whether weight decay applies


@dataclass(frozen=True)
class PhaseSchedule:
    """The phases of a run, and the share of the phase's learning rate that each parameter has."""

    stretches: tuple[ResolvedPhase, ...]
    factors: Mapping[str, float]

    @property
    def updates(self) -> int:
        """Of the whole run, at most."""
        return sum(stretch.length for stretch in self.stretches)

    @property
    def names(self) -> frozenset[str]:
        """Every parameter that is trained at some time."""
        return frozenset().union(*(stretch.names for stretch in self.stretches))

    def now(self, done: int, evaluations: Evaluations = ()) -> PhasePosition:
        """Where a run is after `done` updates. An evaluation counts for the phase in which its updates were made."""
        begun: float = 0
        for i, stretch in enumerate(self.stretches):
            end = begun + stretch.length
            if stretch.patience is not None:
                own = [(step, loss) for step, loss in evaluations if begun < step <= min(end, done)]
                end = min(end, _out_of_patience(own, stretch.patience))
            if done < end:
                return PhasePosition(i, int(begun), over=False)
            begun = end
        return PhasePosition(len(self.stretches) - 1, int(begun), over=True)

    def groups(self, without_decay: frozenset[str] = frozenset()) -> list[OptimizerGroup]:
        """Groups of the optimizer. The first one, whose rate is logged, is trained longest at the phase's own rate."""
        alike: dict[tuple[tuple[bool, ...], float, bool], list[str]] = {}
        for name in sorted(self.names):
            phases = tuple(name in stretch.names for stretch in self.stretches)
            alike.setdefault((phases, self.factors.get(name, 1.0), name not in without_decay), []).append(name)
        groups = [OptimizerGroup(tuple(names), *key) for key, names in alike.items()]
        return sorted(groups, key=lambda g: (-sum(g.phases), abs(math.log(g.factor)), not g.decays))

    def rates(self, groups: Sequence[OptimizerGroup], done: int, now: PhasePosition) -> list[float]:
        """Learning rate of each group in the update after `done`; 0 for those that wait."""
        rate = self.stretches[now.phase].rate(done - now.begun)
        return [rate * group.factor if group.phases[now.phase] else 0.0 for group in groups]


def _out_of_patience(evaluations: Evaluations, patience: int) -> float:
    """Updates at the evaluation that makes `patience` in a row without a lower loss; infinite if none does."""
    best, worse = math.inf, 0
    for step, loss in evaluations:
        worse = 0 if loss < best else worse + 1
        best = min(best, loss)
        if worse >= patience:
            return step
    return math.inf


def parameter_rate_factors(of: ParameterMap, *, layer_decay: float, head_factor: float) -> dict[str, float]:
    """Share of the phase's learning rate for each parameter: smaller towards the input, another for a new head.

    factor = layer_decay ^ (n + 1 - depth), depth 0 the embeddings, i + 1 block i of n, n + 1 the output layer
    (ULMFiT, arXiv:1801.06146: 1 / 2.6 a layer).
    Raises: ConfigError for a layer_decay on a model whose blocks are not to be found.
    """
    if layer_decay != 1.0:
        require_blocks(of, "optim.layer_decay")
    return {
        name: layer_decay ** (of.blocks + 1 - place.depth) * (head_factor if place.part == "score" else 1.0)
        for name, place in of.places.items()
    }


def make_schedule(
    of: ParameterMap,
    plan: SupervisedPlan,
    *,
    freeze: Selection,
    unfreeze: Sequence[TrainingPhase],
    factors: Mapping[str, float],
) -> PhaseSchedule:
    """Resolve the phases of a run for a model.

    Args:
        of: the parameters that may be trained at all.
    Raises: ConfigError for a selection that matches nothing, and if nothing is left to train.
    """
    optim = plan.optim
    free = frozenset(of.places) - (select_parameters(freeze, of, "freeze") if freeze.given else set())
    if not unfreeze:
        phases = [(free, TrainingPhase(updates=plan.updates(), patience=optim.patience))]
    else:
        phases = [(names & free, phase) for i, phase in enumerate(unfreeze) for names in _trained(phase, of, i)]
    stretches = []
    for i, (names, phase) in enumerate(phases):
        if not names:
            raise ConfigError(
                "nothing is left to train",
                found=f"{len(of.places) - len(free)} of {len(of.places)} weights frozen",
                where=f"unfreeze[{i}]" if unfreeze else "freeze",
                do="freeze less",
            )
        length = plan.phase_updates(phase)
        warmup = optim.warmup_fraction if phase.warmup_fraction is None else phase.warmup_fraction
        stretches.append(
            ResolvedPhase(
                names,
                length,
                phase.learning_rate or optim.learning_rate,
                phase.schedule or optim.schedule,
                math.ceil(warmup * length),
                phase.patience,
            )
        )
    return PhaseSchedule(tuple(stretches), factors)


def make_ppo_schedule(
    of: ParameterMap,
    *,
    freeze: Selection,
    unfreeze: Sequence[PPOPhase],
    steps: int,
    learning_rate: float,
    where: str,
    factors: Mapping[str, float],
) -> PhaseSchedule:
    """The same for one of the models of PPO, counted in steps.

    Raises: ConfigError, as `make_schedule`.
    """
    free = frozenset(of.places) - (select_parameters(freeze, of, f"freeze.{where}") if freeze.given else set())
    phases = unfreeze or (PPOPhase(),)
    resolved = [(names & free, p) for i, p in enumerate(phases) for names in _trained(p, of, i, f"unfreeze.{where}")]
    if not all(names for names, _ in resolved):
        raise ConfigError("nothing is left to train", where=f"freeze.{where}", do="freeze less")
    rates = [phase.learning_rate or learning_rate for _, phase in resolved]
    return PhaseSchedule(
        tuple(ResolvedPhase(n, p.steps or steps, r) for (n, p), r in zip(resolved, rates, strict=True)), factors
    )


def _trained(
    phase: TrainingPhase | PPOPhase, of: ParameterMap, number: int, where: str = "unfreeze"
) -> list[frozenset[str]]:
    """Names that a phase trains; a list of them if it is repeated from the top down."""
    everything = frozenset(of.places)
    if phase.train == "all":
        return [everything]
    if phase.train == "top-down":
        require_blocks(of, f"{where}[{number}].train")
        return [*(frozenset(top_parameters(of, blocks)) for blocks in range(1, of.blocks + 1)), everything]
    assert isinstance(phase.train, Selection)
    return [frozenset(select_parameters(phase.train, of, f"{where}[{number}].train"))]


def phase_table(of: ParameterMap, counts: Mapping[str, int], plan: PhaseSchedule) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every group of a model, and when and how fast it is trained.

    Args:
        counts: parameters of each tensor of the model.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in sorted(counts, key=lambda n: (of.places[n].depth, of.places[n].part in HEAD_PARTS)):
        place = of.places[name]
        label = f"block {place.block}" if place.block is not None else (place.part or "other")
        groups.setdefault((label, place.block), []).append(name)
    rows: list[list[str]] = []
    for (label, block), names in groups.items():
        trained = [name for name in names if name in plan.names]
        row = [
            label,
            str(len(names)),
            f"{sum(counts[n] for n in names):,}",
            f"{sum(counts[n] for n in trained):,}",
            _when(trained, plan),
            _rates(trained, plan),
        ]
        if block is not None and rows and rows[-1][0].startswith("block") and rows[-1][1:] == row[1:]:
            first = re.findall(r"\d+", rows[-1][0])[0]
            rows[-1][0] = f"blocks {first} to {block}, each"
        else:
            rows.append(row)
    return ["weights", "tensors", "parameters", "trained", "in phases", "peak rate"], rows


def _when(names: Sequence[str], plan: PhaseSchedule) -> str:
    phases = [str(i + 1) for i, stretch in enumerate(plan.stretches) if stretch.names & set(names)]
    return (phases[0] if len(phases) == 1 else f"{phases[0]}-{phases[-1]}") if phases else "never"


def _rates(names: Sequence[str], plan: PhaseSchedule) -> str:
    found = {
        stretch.learning_rate * plan.factors.get(name, 1.0)
        for stretch in plan.stretches
        for name in names
        if name in stretch.names
    }
    ends = sorted({f"{rate:.3g}": rate for rate in found}.items(), key=lambda item: item[1])
    return "-" if not ends else ends[0][0] if len(ends) == 1 else f"{ends[0][0]} to {ends[-1][0]}"
