"""Set-up of phases at the start of a stage: resolve the schedule, freeze what it never trains, and print it as tables.

The schedule itself is in `phase_schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf.config.ppo import PPOSettings
from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.schema import (
    FineTuningStage,
    PretrainConfig,
    SupervisedConfig,
)
from rlhf.config.tuning import EMPTY_SELECTION
from rlhf.console import Console
from rlhf.distributed.launch_env import world_size
from rlhf.errors import ConfigError
from rlhf.models.adapters import adapter_rate_factor
from rlhf.models.load import count_parameters
from rlhf.models.parameter_selection import ParameterMap, map_parameters
from rlhf.models.quantization import weight_count
from rlhf.trainers.phase_schedule import PhaseSchedule, make_schedule, parameter_rate_factors, phase_table
from rlhf.trainers.ppo.phases import phase_schedules, value_parameter_map
from rlhf.trainers.ppo.policy_value import PolicyAndValue

SMALL_DATASET = 1000  # below this many records, full fine-tuning soon memorizes them


def set_up_phases(
    model: Any, config: SupervisedConfig, *, rows: int, evaluate: bool, console: Console
) -> PhaseSchedule:
    """Resolve the phases of a run, freeze the parameters that no phase trains, and print the schedule.

    Args:
        rows: sequences (or pairs) of one epoch.
        evaluate: whether there are held-out records.
    Raises: ConfigError for a selection that matches nothing, if nothing is left to train, and for patience without
        held-out records.
    """
    optim = config.optim
    freeze, unfreeze = (
        (config.freeze, config.unfreeze) if isinstance(config, FineTuningStage) else (EMPTY_SELECTION, ())
    )
    if not evaluate and (optim.patience or any(phase.patience for phase in unfreeze)):
        raise ConfigError(
            "patience needs held-out records", where="data", do="set data.validation or data.validation_fraction"
        )
    parameters = map_parameters(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = parameter_rate_factors(parameters, layer_decay=optim.layer_decay, head_factor=optim.head_factor)
    if not isinstance(config, PretrainConfig):
        factors = {name: factor * adapter_rate_factor(name, config.peft) for name, factor in factors.items()}
    schedule = make_schedule(
        parameters.only(trainable),
        SupervisedPlan(optim, world_size(), rows),
        freeze=freeze,
        unfreeze=unfreeze,
        factors=factors,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in schedule.names)
    print_phases(dict(model.named_parameters()), parameters, schedule, console)
    if schedule.names == set(parameters.places) and len(schedule.phases) == 1 and isinstance(config, FineTuningStage):
        _note_small_dataset(model, rows, console)
    return schedule


def print_phases(
    weights: Mapping[str, Tensor],
    parameters: ParameterMap,
    schedule: PhaseSchedule,
    console: Console,
    *,
    title: str = "",
    unit: str = "updates",
) -> None:
    """Print a table of the model's parts and when they are trained, and a table of the phases if there are several.

    Adds a note if trained embeddings below frozen blocks keep the activations of those blocks in memory.

    Args:
        weights: parameters of the model by name.
        parameters: their places in the model.
        schedule: the phases.
        title: begins the titles of both tables.
        unit: what the lengths of phases count, updates or steps.
    """
    if console.quiet:
        return
    counts = {name: weight_count(tensor) for name, tensor in weights.items() if name in parameters.places}
    trained, total = sum(counts[n] for n in schedule.names), sum(counts.values())
    console.table(
        f"{title}{total:,} parameters, {trained:,} trained ({100 * trained / total:.1f} %)",
        *phase_table(parameters, counts, schedule),
    )
    if parameters.tied:
        console.note("the output layer shares its weights with the embeddings: they are frozen and trained together")
    if len(schedule.phases) > 1:
        rows = [
            [
                str(i),
                f"{sum(counts[n] for n in s.names):,}",
                f"{s.length}",
                f"{s.learning_rate:.3g}",
                s.schedule,
                f"after {s.patience} evaluations without a lower held-out loss" if s.patience else f"after its {unit}",
            ]
            for i, s in enumerate(schedule.phases, 1)
        ]
        console.table(f"{title}phases", ["phase", "trained", unit, "peak rate", "schedule", "ends"], rows)
    lowest = min(parameters.places[name].depth for name in schedule.names)
    frozen = {p.block for n, p in parameters.places.items() if p.block is not None} - {
        parameters.places[name].block for name in schedule.names
    }
    if lowest == 0 and 0 in frozen and any(parameters.places[name].part == "embeddings" for name in schedule.names):
        console.note(
            "the embeddings are trained below frozen blocks, which therefore keep their activations: freeze them too "
            "(freeze.parts=[embeddings]) to save time and memory"
        )


def _note_small_dataset(model: Any, rows: int, console: Console) -> None:
    _, total = count_parameters(model)
    if rows < SMALL_DATASET:
        console.note(
            f"{rows} records for {total:,} trained parameters: full fine-tuning of a small data set over-fits soon; "
            "cheaper: adapters (a percent of the parameters), or a new head first and the rest later (unfreeze)"
        )


def print_ppo_phases(settings: PPOSettings, model: PolicyAndValue, console: Console) -> None:
    """Print the tables of policy and value model or, with nothing frozen and no phases, the number of parameters.

    Raises: ConfigError for a selection that matches nothing, or if nothing is left to train.
    """
    policy, value = phase_schedules(settings, model)
    freeze, unfreeze = settings.freeze, settings.unfreeze
    if not (freeze.policy.given or freeze.value_model.given or unfreeze.policy or unfreeze.value_model):
        print_model_size(model, console)
        return
    own = dict(model.value_model.named_parameters()) | model.trained_value()
    for name, parameters, weights, schedule in (
        ("policy", map_parameters(model.policy), dict(model.policy.named_parameters()), policy),
        ("value model", value_parameter_map(model), own, value),
    ):
        print_phases(weights, parameters, schedule, console, title=f"{name}: ", unit="steps")


def print_model_size(model: Any, console: Console) -> None:
    """Print the numbers of trainable and of all parameters."""
    trainable, total = count_parameters(model)
    console.note(f"model: {total:,} parameters, {trainable:,} trainable ({100 * trainable / total:.1f} %)")
