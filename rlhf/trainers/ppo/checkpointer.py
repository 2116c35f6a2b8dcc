"""Checkpoints of a PPO run: one folder each, `step-000012`, or `step-000012-003` after three minibatches of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rlhf.checkpointing.files import find_newest_checkpoint, new_checkpoint_folder, refuse_format_without_manifest
from rlhf.checkpointing.interval import CheckpointInterval
from rlhf.config.schema import PPOConfig
from rlhf.console import Console
from rlhf.distributed.engine import any_process
from rlhf.launch.rank_consistency import check_same_checkpoint
from rlhf.runs import preemption
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.ppo.state import state_size
from rlhf.trainers.ppo.trainer import PPOTrainer

STEP_PREFIX = "step"


class PPOCheckpointer:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, config: PPOConfig, directory: RunDir, console: Console) -> None:
        self.config, self.directory, self.console = config, directory, console
        # A rollback returns to a checkpoint: which ones there are must not depend on the clock then.
        self.pace = CheckpointInterval(0.0 if config.watch.unhealthy == "rollback" else config.saving.share)

    def after_step(self, trainer: PPOTrainer) -> None:
        """Every so many steps, and in between if it is cheap."""
        if trainer.step % self.config.checkpoint_every == 0 or any_process(self.pace.due(), trainer.accelerator):
            self.save(trainer)

    def pause(self, trainer: PPOTrainer) -> None:
        """A place where a run can end: it does if it was told to.

        Raises: Stopped.
        """
        if any_process(preemption.stop_requested(), trainer.accelerator):
            self.save(trainer)
            raise preemption.RunStopped(f"in {checkpoint_name(trainer)}")

    def save(self, trainer: PPOTrainer) -> None:
        """Everything a run continues from. Collective; the main process writes.

        Raises: CheckpointError if the disk is full.
        """
        with self.pace.saving():
            with self._place(trainer) as folder:
                trainer.save(folder)
            trainer.accelerator.wait_for_everyone()

    def _place(self, trainer: PPOTrainer) -> AbstractContextManager[Path | None]:
        if not self.directory.main:
            return nullcontext()
        return new_checkpoint_folder(
            self.directory.checkpoints,
            checkpoint_name(trainer),
            needed=state_size(trainer),
            keep=self.config.saving.keep,
            about={"step": trainer.step},
        )

    def load(self, trainer: PPOTrainer) -> bool:
        """Continue from the newest whole checkpoint, if there is one. Collective.

        Raises: CheckpointError for one that another version wrote, of other weights, or that other processes lack.
        """
        refuse_format_without_manifest(self.directory.checkpoints / "ppo.pt")
        found = find_newest_checkpoint(self.directory.checkpoints, STEP_PREFIX, self.console.note)
        check_same_checkpoint(found.path.name if found else None, self.directory)
        if found is not None:
            trainer.load(found.path)
        return found is not None


def checkpoint_name(trainer: PPOTrainer) -> str:
    """Of the checkpoint of this moment: steps done, and of the step in hand the minibatches done."""
    return f"{STEP_PREFIX}-{trainer.step:06}" + (f"-{trainer.work.done:03}" if trainer.work is not None else "")
