"""The part that the stages on a transformers Trainer share: train with checkpoints, write `model/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.config.run_plan import SupervisedPlan
from rlhf.config.sections import Optim, Saving
from rlhf.console import Console
from rlhf.data.render import Renderer
from rlhf.distributed.engine import check_accelerator, save_model
from rlhf.distributed.launch_env import is_main_process, world_size
from rlhf.launch.rank_consistency import check_same_checkpoint
from rlhf.models.load import set_stop_tokens
from rlhf.models.model_metadata import save_tokenizer_and_handover
from rlhf.runs import preemption
from rlhf.runs.metrics import MetricsWriter
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule
from rlhf.trainers.supervised.base import (
    MetricsCallback,
    losses_since,
    remove_printer,
    tokens_until,
    training_arguments,
)
from rlhf.trainers.supervised.checkpoint_callback import CheckpointCallback, by_name, last_checkpoint
from rlhf.trainers.supervised.forgetting import ForgettingCallback, ProbeData
from rlhf.trainers.supervised.phase_callback import attach_phases


def run_training(
    stage: str,
    directory: RunDir,
    optim: Optim,
    seed: int,
    console: Console,
    *,
    program: PhaseSchedule,
    saving: Saving,
    evaluate: bool,
    build: Callable[[dict[str, Any], MetricsCallback], Any],
    save: Callable[[Any, Path], dict[str, Any]],
    resume: bool,
    what: str = "sequences",
    shown: tuple[str, ...] = ("loss", "eval_loss"),
    evaluations: int = 5,
    probed: ProbeData | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Train, or go on from the newest checkpoint, and write the model.

    Args:
        program: what is trained when.
        saving: how many checkpoints stay, and how long a stop may take.
        evaluate: whether there are held-out records.
        what: sequences, pairs or records.
        build: from training arguments and the report to the trainer.
        save: writes the model of the trainer into a folder; what it returns joins the summary.
        shown: metrics on the progress bar.
        evaluations: how often held-out records are read, and checkpoints written.
        probed: what else is read then.
    Returns: the run's summary so far (updates and what `save` returned), and the numbers of the last evaluation.
    """
    world = world_size()
    updates = program.updates
    console.note(f"{SupervisedPlan(optim, world, 0).describe(what)}; {updates} updates")
    checkpoint = last_checkpoint(directory, console.note) if resume else None
    check_same_checkpoint(checkpoint.path.name if checkpoint else None, directory)
    lines, step = (checkpoint.about["lines"], checkpoint.about["step"]) if checkpoint else (0, 0)
    if checkpoint:
        console.note(f"continuing from {checkpoint.path} (update {step})")
    path = directory.path / "metrics.jsonl"
    before, losses = tokens_until(path, step), losses_since(path, lines)
    writer = MetricsWriter(path, main=is_main_process(), keep_until=step, keep_lines=lines)
    args = training_arguments(
        optim, directory, seed=seed, processes=world, program=program, evaluate=evaluate, evaluations=evaluations
    )
    with directory.guard(), console.progress(stage, updates, "update") as bar:
        trainer = build(args, MetricsCallback(writer, bar, shown, tokens=before, losses=losses))
        attach_phases(trainer, program)
        remove_printer(trainer)
        check_accelerator(trainer.accelerator)
        probe = ForgettingCallback(trainer, probed, console.note) if probed is not None else None
        if probe is not None:
            trainer.add_callback(probe)
        CheckpointCallback(directory, saving, writer).attach(trainer)
        with preemption.delay_sigterm(saving.grace_seconds), by_name(trainer, program):
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        updates = trainer.state.global_step  # patience may have ended it early
        final = trainer.evaluate() if evaluate else {}
        elsewhere = {name: round(value, 6) for name, value in probe.last.items()} if probe is not None else {}
        with directory.new_model() as folder:
            more = save(trainer, folder)
    writer.close()
    return {"updates": updates, **more, **elsewhere}, final


def save_trained(trainer: Any, folder: Path, stage: str, renderer: Renderer, tokenizer: Any, **record: Any) -> None:
    """Weights, tokenizer and hand-over record; `record` adds to the last. Collective."""
    save_model(trainer.model_wrapped, str(folder), accelerator=trainer.accelerator)
    if is_main_process():
        save_tokenizer_and_handover(folder, stage, renderer, tokenizer, **record)


def train_language_model(
    stage: str,
    model: Any,
    tokenizer: Any,
    renderer: Renderer,
    directory: RunDir,
    optim: Optim,
    seed: int,
    console: Console,
    *,
    program: PhaseSchedule,
    saving: Saving,
    records: int,
    evaluate: bool,
    build: Callable[[dict[str, Any], MetricsCallback], Any],
    resume: bool,
    evaluations: int = 5,
    probed: ProbeData | None = None,
    reply_tokens: float | None = None,
) -> dict[str, Any]:
    """`fit` for a language model, to the end of the run. Returns: the summary.

    Args:
        reply_tokens: mean length of what it learns to say, for the hand-over record.
    """

    def save(trainer: Any, folder: Path) -> dict[str, Any]:
        set_stop_tokens(model, renderer)
        save_trained(trainer, folder, stage, renderer, tokenizer, reply_tokens=reply_tokens)
        return {"records": records}

    summary, final = run_training(
        stage,
        directory,
        optim,
        seed,
        console,
        program=program,
        saving=saving,
        evaluate=evaluate,
        build=build,
        save=save,
        resume=resume,
        shown=("loss", "eval_loss", "gap", "token_accuracy"),
        evaluations=evaluations,
        probed=probed,
    )
    if final:
        summary["eval_loss"] = round(final["eval_loss"], 6)
        console.note(f"{stage}: validation loss {final['eval_loss']:.4f} nats per token")
    directory.note(summary=summary)
    directory.finish()
    return summary
