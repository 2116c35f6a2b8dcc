"""Callbacks of PPO: reporting, checkpoints, and anything else that should happen after a step."""

from __future__ import annotations

from typing import Any

from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.stats import StepStats


class PPOCallback:
    """Base class of callbacks. `PPOTrainer` calls these methods on every process; by default they do nothing.

    `trainer` is the `PPOTrainer`: its `state` holds the progress of the run, its `models` hold the weights.
    """

    def on_step_end(self, trainer: Any, experience: Experience, stats: StepStats) -> None:
        """Run after every step. `experience` is the rollout it trained on, `stats` are the step's metrics."""

    def on_checkpoint(self, trainer: Any) -> None:
        """Run between two steps, where the run may be saved, and before the first step if it may roll back."""

    def on_rollback(self, trainer: Any) -> bool:
        """Return the trainer to its last checkpoint. Returns: False if there is none."""
        return False

    def on_safe_point(self, trainer: Any) -> None:
        """Run where the run can stop and later resume exactly: after a rollout, a minibatch or a step."""
