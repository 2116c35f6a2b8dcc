"""Checkpoints of a transformers Trainer: completed by a manifest, verified before use, written on a stop request."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlhf.checkpointing.files import (
    MANIFEST,
    Checkpoint,
    find_newest_checkpoint,
    folder_size,
    remove_checkpoints_after,
    remove_old_checkpoints,
    reserve_disk_space,
    write_manifest,
)
from rlhf.checkpointing.interval import CheckpointInterval
from rlhf.checkpointing.parameters_and_adam import (
    parameters_and_adam_size,
)
from rlhf.config.sections import Saving
from rlhf.distributed.engine import any_process, override_deepspeed_loading
from rlhf.distributed.zero_gather import full_numel
from rlhf.runs import preemption
from rlhf.runs.memory_phase import phase
from rlhf.runs.metrics import MetricsWriter
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule

UPDATE_PREFIX = "checkpoint"


def last_checkpoint(run: RunDir, log: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint of an interrupted run, or None.

    The best checkpoint so far, which is restored at the end, must be intact too.
    Raises: CheckpointError for a checkpoint that another version wrote.
    """
    return find_newest_checkpoint(run.checkpoints, UPDATE_PREFIX, log)


class CheckpointCallback(TrainerCallback):
    """Writes the manifest of each checkpoint, removes old checkpoints, and saves and stops after a stop request."""

    def __init__(self, run: RunDir, saving: Saving, writer: MetricsWriter) -> None:
        self.run, self.saving, self.writer = run, saving, writer
        self.trainer: Any = None
        self.stopping = False
        self.interval = CheckpointInterval(saving.share)

    def attach(self, trainer: Any) -> None:
        """Register with a Trainer, which then wraps the writing of each checkpoint in `writing`."""
        self.trainer = trainer
        trainer.checkpoints = self
        trainer.add_callback(self)

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Wrap the writing of a checkpoint; if writing fails, the partial checkpoint is removed.

        Args:
            step: update of the checkpoint.
        Raises: CheckpointError if the disk has too little space.
        """
        folder = self.run.checkpoints / f"{UPDATE_PREFIX}-{step}"
        with self.interval.saving(), reserve_disk_space(self.run.checkpoints, self._needed(), UPDATE_PREFIX):
            try:
                if self.run.main:
                    (folder / MANIFEST).unlink(missing_ok=True)
                with phase("saving"):
                    yield
            except BaseException:
                if self.run.main:
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def _needed(self) -> int:
        """Estimate the bytes of the next checkpoint: the largest one so far, or weights and optimizer state."""
        written = [folder_size(path) for path in self.run.checkpoints.glob(f"{UPDATE_PREFIX}-*")]
        if written:
            return max(written)
        adapter = hasattr(self.trainer.model, "peft_config")
        parameters = list(self.trainer.model.parameters())
        saved = sum(full_numel(p) * p.element_size() for p in parameters if p.requires_grad or not adapter)
        return saved + parameters_and_adam_size({str(i): p for i, p in enumerate(parameters) if p.requires_grad})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request a checkpoint if one is due by time, or if the run was asked to stop.

        It is written after an update that is logged anyway, so that the logged numbers are the same with and without
        it. If a stop is urgent, it is written after any update.
        """
        logged = state.global_step % args.logging_steps == 0 or control.should_save
        if logged and any_process(self.interval.due(), self.trainer.accelerator):
            control.should_save = True
        if any_process(
            preemption.stop_requested() and (logged or preemption.stop_is_urgent()), self.trainer.accelerator
        ):
            self.stopping = control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the manifest once all processes have written their files, and remove old checkpoints.

        Raises: RunStopped if the run was asked to stop.
        """
        self.trainer.accelerator.wait_for_everyone()
        if self.run.main:
            name = f"{UPDATE_PREFIX}-{state.global_step}"
            self.writer.sync()
            best = state.best_model_checkpoint  # restored at the end
            write_manifest(
                self.run.checkpoints / name,
                step=state.global_step,
                lines=self.writer.lines,
                needs=Path(best).name if best else None,
            )
            remove_checkpoints_after(self.run.checkpoints, UPDATE_PREFIX, name)
            remove_old_checkpoints(self.run.checkpoints, UPDATE_PREFIX, self.saving.keep)
        self.trainer.accelerator.wait_for_everyone()
        if self.stopping:
            raise preemption.RunStopped(f"after update {state.global_step}")


@contextmanager
def save_by_parameter_name(trainer: Any, schedule: PhaseSchedule) -> Iterator[None]:
    """Make a Trainer's checkpoints hold trained parameters and Adam state by parameter name, readable by any engine.

    Under DeepSpeed the Trainer would write one shard per process, which another number of processes cannot load. Under
    FSDP, which runs on GPUs only, the Trainer's own format is kept.
    """
    if trainer.is_fsdp_enabled:
        yield
        return

    trainer.saved_names = schedule.names
    with override_deepspeed_loading(trainer.load_saved_parameters):
        yield
