"""Helpers that build the trainers based on TRL and transformers, with small defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.sections import Optim
from rlhf.config.tuning import EMPTY_SELECTION, Selection, TrainingPhase
from rlhf.data.render import Rendered
from rlhf.distributed.engine import reset_accelerator_state
from rlhf.models.parameter_selection import map_parameters
from rlhf.runs.metrics import MetricsWriter, read_jsonl
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule, make_schedule, parameter_rate_factors
from rlhf.trainers.supervised import classify, reward, sft
from rlhf.trainers.supervised.base import MetricsCallback, remove_printer, training_arguments
from rlhf.trainers.supervised.phase_callback import attach_phases
from tests.models import tiny


class NoBar:
    """Progress bar that shows nothing."""

    def update(self, done: int, numbers: Any) -> None:
        """Do nothing."""


def prepared(
    folder: Path,
    model: Any,
    records: int,
    evaluate: bool,
    *,
    freeze: Selection = EMPTY_SELECTION,
    unfreeze: tuple[TrainingPhase, ...] = (),
    evaluations: int = 5,
    **optim: Any,
) -> tuple[dict[str, Any], MetricsCallback, PhaseSchedule]:
    """Return trainer arguments, the metrics callback and the phase schedule of a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    reset_accelerator_state()  # a stage that an earlier test broke off may have left a data loader open
    settings = Optim(**{"batch_size": 8, "microbatch_size": 8, "warmup_fraction": 0.0} | optim)
    of = map_parameters(model)
    schedule = make_schedule(
        of.only(n for n, p in model.named_parameters() if p.requires_grad),
        SupervisedPlan(settings, 1, records),
        freeze=freeze,
        unfreeze=unfreeze,
        factors=parameter_rate_factors(of, layer_decay=settings.layer_decay, head_factor=settings.head_factor),
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in schedule.names)
    args = training_arguments(
        settings, RunDir(folder), seed=1, processes=1, schedule=schedule, evaluate=evaluate, evaluations=evaluations
    )
    return args, MetricsCallback(MetricsWriter(folder / "metrics.jsonl"), NoBar(), ("loss",)), schedule


def sft_trainer(
    folder: Path,
    model: Any,
    rows: list[Rendered],
    validation: list[Rendered] | None = None,
    *,
    packing: int | None = None,
    **settings: Any,
) -> Any:
    """Build an SFT trainer on rendered rows."""
    args, report, schedule = prepared(folder, model, len(rows), bool(validation), **settings)
    trainer = sft.build_sft_trainer(model, tiny.tokenizer(), rows, validation or [], args, report, packing=packing)
    return ready(trainer, schedule)


def reward_trainer(
    folder: Path,
    model: Any,
    pairs: list[dict[str, Any]],
    validation: list[dict[str, Any]] | None = None,
    *,
    center: float = 0.0,
    **settings: Any,
) -> Any:
    """Build a reward trainer on pairs."""
    args, report, schedule = prepared(folder, model, len(pairs), bool(validation), **settings)
    return ready(
        reward.build_reward_trainer(model, tiny.tokenizer(), pairs, validation or [], args, report, center=center),
        schedule,
    )


def label_trainer(
    folder: Path,
    model: Any,
    rows: list[dict[str, Any]],
    validation: list[dict[str, Any]] | None = None,
    *,
    multi_label: bool = False,
    weight: Any = None,
    **settings: Any,
) -> Any:
    """Build a classifier's trainer on rows with targets."""
    args, report, schedule = prepared(folder, model, len(rows), bool(validation), **settings)
    trainer = classify.build_classifier_trainer(
        model, tiny.tokenizer(), rows, validation or [], args, report, multi_label=multi_label, weight=weight
    )
    return ready(trainer, schedule)


def ready(trainer: Any, schedule: PhaseSchedule) -> Any:
    """Attach the phases and remove the printer, as a stage does before it trains."""
    attach_phases(trainer, schedule)
    remove_printer(trainer)
    return trainer


def written(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl."""
    return list(read_jsonl(folder / "metrics.jsonl"))
