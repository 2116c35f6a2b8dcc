"""Checkpoints of a PPO run: one folder each, `step-000012`, or `step-000012-003` after three minibatches of a step."""

from __future__ import annotations

import torch

from rlhf.config.schema import PPOConfig
from rlhf.errors import CheckpointError
from rlhf.models.distributed import any_process, under_deepspeed
from rlhf.runs import stop
from rlhf.runs.checkpoints import newest, refuse_old, writing
from rlhf.runs.console import Console
from rlhf.runs.run_dir import RunDir
from rlhf.trainers.ppo import PPOTrainer
from rlhf.trainers.ppo_state import size_of_state

PREFIX, STATE = "step", "state.pt"


class Keeper:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, config: PPOConfig, directory: RunDir, console: Console) -> None:
        self.config, self.directory, self.console = config, directory, console

    def after_step(self, trainer: PPOTrainer) -> None:
        """Every so many steps."""
        if trainer.step % self.config.checkpoint_every == 0:
            self.save(trainer)

    def pause(self, trainer: PPOTrainer) -> None:
        """A place where a run can end: it does if it was told to.

        Raises: Stopped.
        """
        if any_process(stop.asked(), trainer.accelerator):
            self.save(trainer)
            raise stop.Stopped(f"in {name_of(trainer)}")

    def save(self, trainer: PPOTrainer) -> None:
        """Everything a run continues from. Collective; the main process writes.

        Raises: CheckpointError if the disk is full.
        """
        state = trainer.state_dict()
        if self.directory.main:
            about, needed = {"step": trainer.step}, size_of_state(trainer)
            keep, name = self.config.saving.keep, name_of(trainer)
            with writing(self.directory.checkpoints, name, needed=needed, keep=keep, about=about) as folder:
                torch.save(state, folder / STATE)
        trainer.accelerator.wait_for_everyone()

    def load(self, trainer: PPOTrainer) -> bool:
        """Continue from the newest whole checkpoint, if there is one.

        Raises: CheckpointError for one that another version wrote, and under DeepSpeed.
        """
        refuse_old(self.directory.checkpoints / "ppo.pt")
        found = newest(self.directory.checkpoints, PREFIX, self.console.note)
        if found is None:
            return False
        if under_deepspeed():  # each process holds a part of the optimizer's state, and this one file has one part
            raise CheckpointError(
                "a PPO run under DeepSpeed cannot be continued yet", where=str(found.path),
                do="choose another output_dir to start over, or use a launcher without DeepSpeed (ddp)",
            )  # fmt: skip
        trainer.load_state_dict(torch.load(found.path / STATE, map_location="cpu", weights_only=True))
        return True


def name_of(trainer: PPOTrainer) -> str:
    """Of the checkpoint of this moment: steps done, and of the step in hand the minibatches done."""
    return f"{PREFIX}-{trainer.step:06}" + (f"-{trainer.work.done:03}" if trainer.work is not None else "")
