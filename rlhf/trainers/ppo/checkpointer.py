"""Checkpoints of a PPO run: one folder each, `step-000012`, or `step-000012-003` after three minibatches of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rlhf.checkpointing.files import find_newest_checkpoint, new_checkpoint_folder, refuse_format_without_manifest
from rlhf.checkpointing.interval import CheckpointInterval
from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.distributed.engine import any_process
from rlhf.launch.rank_consistency import check_same_checkpoint
from rlhf.runs import preemption
from rlhf.runs.memory_phase import phase
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.ppo.callbacks import PPOCallback
from rlhf.trainers.ppo.state import PPOState, state_size
from rlhf.trainers.ppo.trainer import PPOTrainer

STEP_PREFIX = "step"


class PPOCheckpointer(PPOCallback):
    """Writes and reads the checkpoints of one run, and stops the run after a stop request."""

    def __init__(self, config: PPOConfig, directory: RunDir, console: Console) -> None:
        self.config, self.directory, self.console = config, directory, console
        # If the run may roll back to a checkpoint, which ones exist must not depend on the clock.
        self.interval = CheckpointInterval(0.0 if config.watch.unhealthy == "rollback" else config.saving.share)

    def on_checkpoint(self, trainer: Any) -> None:
        """Save every `checkpoint_every` steps, and in between if a checkpoint is due by time."""
        regular = trainer.state.step % self.config.checkpoint_every == 0
        if regular or any_process(self.interval.due(), trainer.accelerator):
            self.save(trainer)

    def on_safe_point(self, trainer: Any) -> None:
        """Stop the run here if it was asked to stop.

        Raises: RunStopped, after writing a checkpoint.
        """
        if any_process(preemption.stop_requested(), trainer.accelerator):
            self.save(trainer)
            raise preemption.RunStopped(f"in {checkpoint_name(trainer.state)}")

    def on_rollback(self, trainer: Any) -> bool:
        """Return the trainer to its last checkpoint. Returns: False if there is none."""
        return self.load(trainer)

    def save(self, trainer: PPOTrainer) -> None:
        """Write a checkpoint. Collective; the main process writes.

        Raises: CheckpointError if the disk is full.
        """
        with self.interval.saving():
            with phase("saving"), self._folder(trainer) as folder:
                trainer.save(folder)
            trainer.accelerator.wait_for_everyone()

    def _folder(self, trainer: PPOTrainer) -> AbstractContextManager[Path | None]:
        if not self.directory.main:
            return nullcontext()
        return new_checkpoint_folder(
            self.directory.checkpoints,
            checkpoint_name(trainer.state),
            needed=state_size(trainer.state, trainer.models),
            keep=self.config.saving.keep,
            about={"step": trainer.state.step},
        )

    def load(self, trainer: PPOTrainer) -> bool:
        """Restore the newest intact checkpoint. Collective. Returns: False if there is none.

        Raises: CheckpointError for a checkpoint that another version wrote, of other parameters, or that other
            processes do not see.
        """
        refuse_format_without_manifest(self.directory.checkpoints / "ppo.pt")
        found = find_newest_checkpoint(self.directory.checkpoints, STEP_PREFIX, self.console.note)
        check_same_checkpoint(found.path.name if found else None, self.directory)
        if found is not None:
            trainer.load(found.path)
        return found is not None


def checkpoint_name(state: PPOState) -> str:
    """Return the name of a checkpoint of this state: steps done and, within a step, minibatches done."""
    return f"{STEP_PREFIX}-{state.step:06}" + (f"-{state.progress.done:03}" if state.progress is not None else "")
