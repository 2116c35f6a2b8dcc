"""Builds the trainers that stand on those of TRL and transformers, with small defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.sections import Optim
from rlhf.data.render import Rendered
from rlhf.runs.metrics import MetricsWriter, read_lines
from rlhf.runs.run_dir import RunDir
from rlhf.trainers import classify, reward, sft
from rlhf.trainers.hf import Report, arguments, silence, updates_of
from tests.models import tiny


class NoBar:
    """A progress bar that shows nothing."""

    def update(self, done: int, numbers: Any) -> None:
        """Nothing."""


def prepared(folder: Path, records: int, evaluate: bool, **optim: Any) -> tuple[dict[str, Any], Report]:
    """Trainer arguments and the report of a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Optim(**{"batch_size": 8, "microbatch_size": 8, "warmup_fraction": 0.0} | optim)
    updates = updates_of(settings, records)
    args = arguments(settings, RunDir(folder), seed=1, processes=1, updates=updates, evaluate=evaluate)
    return args, Report(MetricsWriter(folder / "metrics.jsonl"), NoBar(), ("loss",))


def sft_trainer(folder: Path, model: Any, rows: list[Rendered], *, packing: int | None = None, **optim: Any) -> Any:
    """An SFT trainer on rendered rows."""
    args, report = prepared(folder, len(rows), False, **optim)
    trainer = sft.build(model, tiny.tokenizer(), rows, [], args, report, packing=packing)
    silence(trainer)
    return trainer


def reward_trainer(
    folder: Path, model: Any, pairs: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None, *,
    center: float = 0.0, **optim: Any,
) -> Any:  # fmt: skip
    """A reward trainer on pairs."""
    args, report = prepared(folder, len(pairs), bool(validation), **optim)
    trainer = reward.build(model, tiny.tokenizer(), pairs, validation or [], args, report, center=center)
    silence(trainer)
    return trainer


def label_trainer(
    folder: Path, model: Any, rows: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None, *,
    several: bool = False, weight: Any = None, **optim: Any,
) -> Any:  # fmt: skip
    """A classifier's trainer on rows with targets."""
    args, report = prepared(folder, len(rows), bool(validation), **optim)
    trainer = classify.build(
        model, tiny.tokenizer(), rows, validation or [], args, report, several=several, weight=weight
    )
    silence(trainer)
    return trainer


def written(folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl."""
    return list(read_lines(folder / "metrics.jsonl"))
