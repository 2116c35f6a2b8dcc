"""The part that pretraining and SFT share: train on rendered rows, save the model with its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config.sections import Optim
from rlhf.data.render import Rendered, Renderer
from rlhf.models.distributed import check_world, is_main, save_model
from rlhf.runs.console import Console
from rlhf.runs.metrics import MetricsWriter
from rlhf.runs.run_dir import RunDir
from rlhf.stages.common import processes, say_batch, seal, stop_at
from rlhf.trainers.hf import Report, arguments, last_checkpoint, silence, tokens_until, updates_of


def fit(
    stage: str, model: Any, tokenizer: Any, renderer: Renderer, train: Sequence[Rendered],
    validation: Sequence[Rendered], optim: Optim, directory: RunDir, seed: int, console: Console, *,
    build: Callable[..., Any], rows: int | None = None, resume: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train and write `model/`.

    Args:
        build: makes the trainer; see rlhf.trainers.sft.
        rows: sequences that packing leaves of `train`; None = not packed.
    Returns: the run's summary (updates, last losses).
    """
    world = processes()
    updates = updates_of(optim, rows or len(train))
    accumulation = optim.accumulation(world)
    say_batch(world, optim.batch_size // world // accumulation, accumulation, updates, "sequences", console)
    checkpoint = last_checkpoint(directory) if resume else None
    if checkpoint:
        console.note(f"continuing from {checkpoint}")
    before = tokens_until(directory.path / "metrics.jsonl", checkpoint.step) if checkpoint else 0.0
    writer = MetricsWriter(
        directory.path / "metrics.jsonl", main=is_main(), keep_until=checkpoint.step if checkpoint else None
    )
    args = arguments(optim, directory, seed=seed, processes=world, updates=updates, evaluate=bool(validation))
    with directory.guard(), console.progress(stage, updates, "update") as bar:
        report = Report(writer, bar, ("loss", "eval_loss", "token_accuracy"), tokens=before)
        trainer = build(model, tokenizer, train, validation, args, report)
        silence(trainer)
        check_world(trainer.accelerator.num_processes)
        trainer.train(resume_from_checkpoint=checkpoint.path if checkpoint else None)
        final = trainer.evaluate() if validation else {}
        with directory.new_model() as folder:
            stop_at(model, renderer)
            save_model(trainer.model_wrapped, str(folder), accelerator=trainer.accelerator)
            if is_main():
                seal(folder, stage, renderer, tokenizer)
    writer.close()
    summary = {"updates": updates, "records": len(train)}
    if final:
        summary["eval_loss"] = round(final["eval_loss"], 6)
        console.note(f"{stage}: validation loss {final['eval_loss']:.4f} nats per token")
    directory.note(summary=summary)
    directory.finish()
    return summary
