"""What a stage trains: its program of phases, said as a table before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf.config.schema import ClassifyConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig, Tuned
from rlhf.config.tuning import NOTHING
from rlhf.console import Console
from rlhf.errors import ConfigError
from rlhf.models.adapters import rate_factor
from rlhf.models.load import count_parameters
from rlhf.models.parameter_selection import Layout, layout
from rlhf.stages.lifecycle import say_model
from rlhf.trainers.phase_schedule import Program, program, rate_factors, table
from rlhf.trainers.ppo.phases import programs, value_layout
from rlhf.trainers.ppo.policy_value import PolicyAndValue

SMALL = 1000  # records below which all weights of a pretrained model learn the records themselves


Trains = PretrainConfig | SFTConfig | RewardConfig | ClassifyConfig


def plan(model: Any, config: Trains, *, rows: int, evaluate: bool, console: Console) -> Program:
    """The phases of a run; freezes what none of them trains, and prints what is trained, when and how fast.

    Args:
        rows: sequences (or pairs) of one epoch. evaluate: whether there are held-out records.
    Raises: ConfigError for a selection that matches nothing, for nothing left to train, and for patience without
        held-out records.
    """
    optim = config.optim
    freeze, unfreeze = (config.freeze, config.unfreeze) if isinstance(config, Tuned) else (NOTHING, ())
    if not evaluate and (optim.patience or any(phase.patience for phase in unfreeze)):
        raise ConfigError(
            "patience needs held-out records", where="data", do="set data.validation or data.validation_fraction"
        )
    everything = layout(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    factors = rate_factors(everything, layer_decay=optim.layer_decay, head_factor=optim.head_factor)
    if not isinstance(config, PretrainConfig):
        factors = {name: factor * rate_factor(name, config.peft) for name, factor in factors.items()}
    made = program(
        everything.only(trainable),
        optim,
        freeze=freeze,
        unfreeze=unfreeze,
        per_epoch=math.ceil(rows / optim.batch_size),
        factors=factors,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in made.names)
    say(dict(model.named_parameters()), everything, made, console)
    if made.names == set(everything.places) and len(made.stretches) == 1 and isinstance(config, Tuned):
        _say_small(model, rows, console)
    return made


def say(
    weights: Mapping[str, Tensor],
    everything: Layout,
    made: Program,
    console: Console,
    *,
    title: str = "",
    unit: str = "updates",
) -> None:
    """The table of weights, that of the phases if there are several, and what follows for the blocks below."""
    if console.quiet:
        return
    counts = {name: tensor.numel() for name, tensor in weights.items() if name in everything.places}
    trained, total = sum(counts[n] for n in made.names), sum(counts.values())
    console.table(
        f"{title}{total:,} parameters, {trained:,} trained ({100 * trained / total:.1f} %)",
        *table(everything, counts, made),
    )
    if everything.tied:
        console.note("the output layer shares its weights with the embeddings: they are frozen and trained together")
    if len(made.stretches) > 1:
        rows = [
            [
                str(i),
                f"{sum(counts[n] for n in s.names):,}",
                f"{s.length}",
                f"{s.learning_rate:.3g}",
                s.schedule,
                f"after {s.patience} evaluations without a lower held-out loss" if s.patience else f"after its {unit}",
            ]
            for i, s in enumerate(made.stretches, 1)
        ]
        console.table(f"{title}phases", ["phase", "trained", unit, "peak rate", "schedule", "ends"], rows)
    lowest = min(everything.places[name].depth for name in made.names)
    frozen = {p.block for n, p in everything.places.items() if p.block is not None} - {
        everything.places[name].block for name in made.names
    }
    if lowest == 0 and 0 in frozen and any(everything.places[name].part == "embeddings" for name in made.names):
        console.note(
            "the embeddings are trained below frozen blocks, which therefore keep their activations: freeze them too "
            "(freeze.parts=[embeddings]) to save time and memory"
        )


def _say_small(model: Any, rows: int, console: Console) -> None:
    _, total = count_parameters(model)
    if rows < SMALL:
        console.note(
            f"{rows} records for {total:,} trained parameters: full fine-tuning of a small data set over-fits soon; "
            "cheaper: adapters (a percent of the parameters), or a new head first and the rest later (unfreeze)"
        )


def say_phases(config: PPOConfig, model: PolicyAndValue, console: Console) -> None:
    """The tables of policy and value model; without phases, the number of parameters alone.

    Raises: ConfigError for a selection that matches nothing, or if nothing is left to train.
    """
    policy, value = programs(config, model)
    frozen, waiting = config.freeze, config.unfreeze
    if not (frozen.policy.given or frozen.value_model.given or waiting.policy or waiting.value_model):
        say_model(model, console)
        return
    own = dict(model.value_model.named_parameters()) | model.trained_value()
    for name, everything, weights, made in (
        ("policy", layout(model.policy), dict(model.policy.named_parameters()), policy),
        ("value model", value_layout(model), own, value),
    ):
        say(weights, everything, made, console, title=f"{name}: ", unit="steps")
