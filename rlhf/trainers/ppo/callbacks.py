"""What can be attached to a PPO run: reporting, checkpoints, anything that should happen after a step."""

from __future__ import annotations

from typing import Any

from rlhf.rollout.types import Experience
from rlhf.trainers.ppo.stats import StepStats


class PPOCallback:
    """Methods that `PPOTrainer` calls on every process; each does nothing by default. Override what you need.

    `trainer` is the `PPOTrainer`: its `state` says how far the run is, its `models` hold the weights.
    """

    def on_step_end(self, trainer: Any, experience: Experience, stats: StepStats) -> None:
        """Called after every step, with the rollout that was learnt from and the step's numbers."""

    def on_checkpoint(self, trainer: Any) -> None:
        """Called where the run could be saved between two steps; before the first one if it may roll back."""

    def on_rollback(self, trainer: Any) -> bool:
        """Take the trainer back to its last checkpoint. Return False if there is none."""
        return False

    def on_safe_point(self, trainer: Any) -> None:
        """Called where the run can end and continue exactly: after a rollout, a minibatch and a step."""
