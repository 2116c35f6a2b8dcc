"""Training run that all stages on a transformers Trainer share: train with checkpoints, then write `model/`."""

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
from rlhf.runs.memory_phase import phase
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
from rlhf.trainers.supervised.checkpoint_callback import CheckpointCallback, last_checkpoint, save_by_parameter_name
from rlhf.trainers.supervised.forgetting import ForgettingCallback, ProbeData
from rlhf.trainers.supervised.phase_callback import attach_phases


def run_training(
    stage: str,
    directory: RunDir,
    optim: Optim,
    seed: int,
    console: Console,
    *,
    schedule: PhaseSchedule,
    saving: Saving,
    evaluate: bool,
    build: Callable[[dict[str, Any], MetricsCallback], Any],
    save: Callable[[Any, Path], dict[str, Any]],
    resume: bool,
    unit: str = "sequences",
    shown: tuple[str, ...] = ("loss", "eval_loss"),
    evaluations: int = 5,
    probe_data: ProbeData | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Train from the start or from the newest checkpoint, and write the model.

    Args:
        stage: name of the stage, for the progress bar.
        directory: run directory.
        optim: optimizer and batch settings.
        seed: seed of the run.
        console: where notes and progress are printed.
        schedule: the phases of the run.
        saving: how many checkpoints are kept, and how long saving after a stop request may take.
        evaluate: whether there are held-out records.
        build: function from training arguments and the metrics callback to the trainer.
        save: function that writes the trainer's model into a folder and returns entries for the summary.
        resume: whether to continue from the newest checkpoint.
        unit: what a batch consists of: sequences, pairs or records.
        shown: metrics on the progress bar.
        evaluations: number of evaluations, and of regular checkpoints, in the run.
        probe_data: data of the forgetting probe, which is measured at each evaluation; None = no probe.
    Returns: the run's summary so far (updates, what `save` returned, and the last probe), and the numbers of the last
        evaluation.
    """
    world = world_size()
    updates = schedule.updates
    console.note(f"{SupervisedPlan(optim, world, 0).describe(unit)}; {updates} updates")
    checkpoint = last_checkpoint(directory, console.note) if resume else None
    check_same_checkpoint(checkpoint.path.name if checkpoint else None, directory)
    lines, step = (checkpoint.about["lines"], checkpoint.about["step"]) if checkpoint else (0, 0)
    if checkpoint:
        console.note(f"continuing from {checkpoint.path} (update {step})")
    path = directory.path / "metrics.jsonl"
    before, losses = tokens_until(path, step), losses_since(path, lines)
    writer = MetricsWriter(path, main=is_main_process(), keep_until=step, keep_lines=lines)
    args = training_arguments(
        optim, directory, seed=seed, processes=world, schedule=schedule, evaluate=evaluate, evaluations=evaluations
    )
    with directory.guard(), console.progress(stage, updates, "update") as bar:
        with phase("loading"):
            trainer = build(args, MetricsCallback(writer, bar, shown, tokens=before, losses=losses))
        attach_phases(trainer, schedule)
        remove_printer(trainer)
        check_accelerator(trainer.accelerator)
        probe = ForgettingCallback(trainer, probe_data, console.note) if probe_data is not None else None
        if probe is not None:
            trainer.add_callback(probe)
        CheckpointCallback(directory, saving, writer).attach(trainer)
        stopping, by_name = preemption.delay_sigterm(saving.grace_seconds), save_by_parameter_name(trainer, schedule)
        with stopping, by_name, phase("updating"):
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        updates = trainer.state.global_step  # fewer than planned if patience ended the run
        final = trainer.evaluate() if evaluate else {}
        probe_results = {name: round(value, 6) for name, value in probe.last.items()} if probe is not None else {}
        with directory.new_model() as folder:
            saved = save(trainer, folder)
    writer.close()
    return {"updates": updates, **saved, **probe_results}, final


def save_trained(trainer: Any, folder: Path, stage: str, renderer: Renderer, tokenizer: Any, **record: Any) -> None:
    """Write weights, tokenizer and hand-over record into a folder. Collective.

    Args:
        record: further entries of the hand-over record.
    """
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
    schedule: PhaseSchedule,
    saving: Saving,
    records: int,
    evaluate: bool,
    build: Callable[[dict[str, Any], MetricsCallback], Any],
    resume: bool,
    evaluations: int = 5,
    probe_data: ProbeData | None = None,
    reply_tokens: float | None = None,
) -> dict[str, Any]:
    """Train a language model with `run_training`, finish the run directory, and return the run's summary.

    Args:
        records: number of training records, for the summary.
        reply_tokens: mean length of the replies in the training data, in tokens, for the hand-over record.
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
        schedule=schedule,
        saving=saving,
        evaluate=evaluate,
        build=build,
        save=save,
        resume=resume,
        shown=("loss", "eval_loss", "gap", "token_accuracy"),
        evaluations=evaluations,
        probe_data=probe_data,
    )
    if final:
        summary["eval_loss"] = round(final["eval_loss"], 6)
        console.note(f"{stage}: validation loss {final['eval_loss']:.4f} nats per token")
    directory.note(summary=summary)
    directory.finish()
    return summary
