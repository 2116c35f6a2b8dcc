"""The arithmetic of a run: batches, updates, steps. `rlhf check` and the stages read one and the same plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config.ppo import PPO
from rlhf.config.sections import Optim
from rlhf.config.tuning import TrainingPhase


@dataclass(frozen=True)
class SupervisedPlan:
    """How a stage on records shares its batches among processes, and how many updates it makes."""

    optim: Optim
    processes: int
    rows: int  # of an epoch: sequences, pairs or records; 0 = not known yet

    @property
    def accumulation(self) -> int:
        """Backward passes per update on each process.

        Raises: ConfigError if the processes cannot share the batch equally.
        """
        return self.optim.accumulation(self.processes)

    @property
    def microbatch(self) -> int:
        """Rows of one backward pass on one process."""
        return self.optim.batch_size // self.processes // self.accumulation

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a pass over all rows; the last batch is filled up."""
        return math.ceil(self.rows / self.optim.batch_size)

    @property
    def filled_rows(self) -> int:
        """Rows that are drawn a second time in an epoch to fill up its last batch."""
        return self.updates_per_epoch * self.optim.batch_size - self.rows

    def phase_updates(self, phase: TrainingPhase) -> int:
        """Return the updates of a phase that counts updates or epochs."""
        return phase.updates or max(1, round(self.updates_per_epoch * (phase.epochs or 0.0)))

    def updates(self, phases: Sequence[TrainingPhase] = ()) -> int:
        """Return the updates of the run, at most (patience may end it early).

        Args:
            phases: of the run; none of them unfreezes block by block, which repeats its length for each block.
        """
        if phases:
            return sum(self.phase_updates(phase) for phase in phases)
        length = max(1, round(self.updates_per_epoch * self.optim.epochs))
        return min(length, self.optim.max_updates) if self.optim.max_updates else length

    def describe(self, what: str = "rows") -> str:
        """Return the batch arithmetic in words."""
        size = self.optim.batch_size
        return (
            f"batch: {count_processes(self.processes)} x {self.microbatch} {what} x {self.accumulation} accumulation = "
            f"{size} {what} per update"
        )


@dataclass(frozen=True)
class PPOPlan:
    """How a PPO run shares its rollouts among processes, and how many updates it makes."""

    settings: PPO
    processes: int

    @property
    def episodes(self) -> int:
        """Prompt-response pairs of the whole run."""
        return self.settings.steps * self.settings.rollout_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates after each rollout."""
        return self.settings.epochs * self.settings.minibatches

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.settings.steps * self.updates_per_step

    def describe(self) -> str:
        """Return the arithmetic of a step in words."""
        p = self.settings
        return (
            f"batch: {p.rollout_size} episodes a step = {count_processes(self.processes)} x "
            f"{p.rollout_size // self.processes}; {p.epochs} epochs x {p.minibatches} minibatches of "
            f"{p.rollout_size // p.minibatches} = {self.updates_per_step} updates a step"
        )


def count_processes(number: int) -> str:
    """Return "1 process" or "2 processes"."""
    return f"{number} process{'es' if number > 1 else ''}"
