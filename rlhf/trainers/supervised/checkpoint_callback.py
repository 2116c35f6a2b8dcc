"""Checkpoints of a transformers Trainer: verified before use, sealed when whole, one more when it is told to end."""

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
from rlhf.runs.metrics import MetricsWriter
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.phase_schedule import PhaseSchedule

UPDATE_PREFIX = "checkpoint"


def last_checkpoint(run: RunDir, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint of an interrupted run, whose best one so far is whole too.

    Raises: CheckpointError for one that another version wrote.
    """
    return find_newest_checkpoint(run.checkpoints, UPDATE_PREFIX, say)


class CheckpointCallback(TrainerCallback):
    """Seals each checkpoint, removes the oldest, and ends a run that was told to end."""

    def __init__(self, run: RunDir, saving: Saving, writer: MetricsWriter) -> None:
        self.run, self.saving, self.writer = run, saving, writer
        self.trainer: Any = None
        self.ending = False
        self.pace = CheckpointInterval(saving.share)

    def attach(self, trainer: Any) -> None:
        """Follow a Trainer; what it writes as a checkpoint is watched for a full disk."""
        self.trainer = trainer
        trainer.checkpoints = self
        trainer.add_callback(self)

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Wrap the writing of the checkpoint of an update: if it fails, nothing of it stays.

        Raises: CheckpointError if the disk has no room for it.
        """
        folder = self.run.checkpoints / f"{UPDATE_PREFIX}-{step}"
        with self.pace.saving(), reserve_disk_space(self.run.checkpoints, self._needed(), UPDATE_PREFIX):
            try:
                if self.run.main:
                    (folder / MANIFEST).unlink(missing_ok=True)
                yield
            except BaseException:
                if self.run.main:
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def _needed(self) -> int:
        """Bytes of the next checkpoint: those of the last, or weights and optimizer state."""
        written = [folder_size(path) for path in self.run.checkpoints.glob(f"{UPDATE_PREFIX}-*")]
        if written:
            return max(written)
        adapter = hasattr(self.trainer.model, "peft_config")
        parameters = list(self.trainer.model.parameters())
        saved = sum(full_numel(p) * p.element_size() for p in parameters if p.requires_grad or not adapter)
        return saved + parameters_and_adam_size({str(i): p for i, p in enumerate(parameters) if p.requires_grad})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save in between if it is cheap, and if told to end: after an update that is logged anyway, so that no number
        of the run changes. Or after any, if there is no time to wait for that."""
        logged = state.global_step % args.logging_steps == 0 or control.should_save
        if logged and any_process(self.pace.due(), self.trainer.accelerator):
            control.should_save = True
        if any_process(
            preemption.stop_requested() and (logged or preemption.stop_is_urgent()), self.trainer.accelerator
        ):
            self.ending = control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All processes have written their part: the manifest makes it a checkpoint."""
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
        if self.ending:
            raise preemption.RunStopped(f"after update {state.global_step}")


@contextmanager
def by_name(trainer: Any, plan: PhaseSchedule) -> Iterator[None]:
    """Have a Trainer keep what it has trained, and the optimizer's state, in files that any engine reads.

    Its own ones hold one process's part each under DeepSpeed, and are of no use to another number of processes. (FSDP,
    which runs on GPUs only, keeps its own.)
    """
    if trainer.is_fsdp_enabled:
        yield
        return

    trainer.saved_names = plan.names
    with override_deepspeed_loading(trainer.load_saved_parameters):
        yield
