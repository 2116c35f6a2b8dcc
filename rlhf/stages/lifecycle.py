"""Functions that stages share: check and start a run, open a tokenizer, load data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema import StageConfig
from rlhf.config.sections import Data, ModelSource, Optim
from rlhf.console import Console
from rlhf.data.render import CHATML, Renderer, prepare_tokenizer
from rlhf.data.sources import RecordSet, load_records
from rlhf.data.splits import split_records
from rlhf.distributed.engine import (
    library_versions,
    quiet_libraries,
    reset_accelerator_state,
    set_process_group_timeout,
)
from rlhf.distributed.heartbeat import report_progress, start_watchdog
from rlhf.distributed.launch_env import check_launch, is_main_process, weight_sharding, world_size
from rlhf.errors import ConfigError, DataError, RLHFError
from rlhf.launch.rank_consistency import check_same_run
from rlhf.models import model_metadata
from rlhf.models.load import load_tokenizer, resolve_model
from rlhf.models.quantization import check_quantization
from rlhf.runs.memory_phase import begin_stage
from rlhf.runs.run_dir import RunDir, config_to_dict, fingerprint_path


@dataclass(frozen=True)
class RunResult:
    """Result of a stage."""

    path: Path  # run directory
    summary: dict[str, Any]
    skipped: bool = False  # whether the run was already finished


def begin_run(stage: str, config: StageConfig, console: Console) -> tuple[RunDir, str]:
    """Check the output folder, seed random numbers and set up libraries. Nothing is written yet.

    Returns: the run directory, and its state 'new', 'interrupted' or 'finished', which is the same on every process.
    Raises: ConfigError or another RLHFError if the run cannot start; on every process if one process finds it.
    """
    console.title(f"{stage} -> {config.output_dir}")
    run = RunDir(config.output_dir, main=is_main_process())
    begin_stage(stage, run.path)
    state, inputs, failure = "", {}, None
    try:
        inputs = inputs_of(config)
        state = run.check(stage, config, inputs)
        if state != "finished":
            check_launch(stage)
            check_quantization(config, weight_sharding())
    except RLHFError as error:
        failure = error
    check_same_run(run, state, config, inputs, failure)
    if state == "finished":
        console.note("already finished with this configuration: skipped")
        return run, state
    quiet_libraries(telemetry=config.telemetry)
    reset_accelerator_state()
    if world_size() > 1:
        set_process_group_timeout()
    optim = getattr(config, "optim", None)
    if isinstance(optim, Optim):
        optim.accumulation(world_size())  # raises if the batch cannot be divided, before anything is read or written
    seed_everything(config.seed, deterministic=config.deterministic)
    start_watchdog()
    return run, state


def inputs_of(config: Any) -> dict[str, str]:
    """Return the fingerprint of every local file and folder that a configuration names under a `path` key."""
    fingerprints: dict[str, str] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and Path(path).exists():
                fingerprints[path] = fingerprint_path(Path(path))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)

    walk(config_to_dict(config))
    return fingerprints


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python, numpy and torch, and with `deterministic` use deterministic kernels where torch has them."""
    from transformers import set_seed

    set_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # This option only helps to debug reads of uninitialised memory, and slows small models down six times on a CPU.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_run(run: RunDir, stage: str, config: StageConfig) -> None:
    """Create the run directory. Call it after all inputs have been read and checked."""
    report_progress()
    run.start(
        stage, config, seed=config.seed, processes=world_size(), versions=library_versions(), inputs=inputs_of(config)
    )


def read_template(name: str | None) -> str | None:
    """Return the chat template that a configuration names, or None for the tokenizer's own.

    Raises: ConfigError if the file cannot be read.
    """
    if name is None:
        return None
    if name == "chatml":
        return CHATML
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the chat template cannot be read", found=str(error), where="chat_template", do="give a file, or 'chatml'"
        ) from None


def open_tokenizer(source: ModelSource, console: Console, *, template: str | None = None) -> tuple[Any, Renderer]:
    """Load the tokenizer of a model and make its renderer; print a note for everything that was added to it.

    Args:
        source: the model.
        console: where notes are printed.
        template: replaces the tokenizer's chat template; the model's hand-over record is then not compared.
    Raises: CheckpointError if the tokenizer cannot be loaded or differs from the model's hand-over record; ConfigError
        if it has no usable chat template.
    """
    tokenizer = load_tokenizer(source)
    for note in prepare_tokenizer(tokenizer, template):
        console.note(f"tokenizer: {note}")
    renderer = Renderer(tokenizer)
    for note in renderer.notes:
        console.note(f"template: {note}")
    if template is None:
        record = model_metadata.read_handover(resolve_model(source))
        model_metadata.verify_handover(renderer.identity(), record, where=source.path, role="this model")
    return tokenizer, renderer


def load_data(
    kind: Any, data: Data, seed: int, console: Console
) -> tuple[Sequence[Any], Sequence[Any], dict[str, str]]:
    """Load training and validation records.

    Returns: training records, validation records, and the fingerprint of each set of files.
    Raises: DataError for malformed records, or if no training record is left.
    """
    options: dict[str, Any] = {"seed": seed, "on_bad_row": data.on_bad_row, "deduplicate": data.deduplicate}
    train_set: RecordSet = load_records(kind, data.train, **options)
    _print_notes(train_set, console)
    fingerprints = {"train": train_set.fingerprint}
    train: Sequence[Any] = train_set.records
    validation: Sequence[Any] = ()
    if data.validation:
        held_out = load_records(kind, data.validation, **options)
        _print_notes(held_out, console)
        validation, fingerprints["validation"] = held_out.records, held_out.fingerprint
    elif data.validation_fraction:
        train, validation = split_records(train, data.validation_fraction, seed)
        console.note(f"validation: {len(validation)} of {len(train_set.records)} records split off by prompt")
    if not train:
        raise DataError("no training record is left", where=", ".join(s.path for s in data.train))
    return train, validation, fingerprints


def _print_notes(records: RecordSet, console: Console) -> None:
    for note in records.notes:
        console.note(note)
