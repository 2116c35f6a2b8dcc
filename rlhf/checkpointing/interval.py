"""The interval between checkpoints, chosen so that saving takes at most a given share of a run's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CheckpointInterval:
    """Timer that is due c / share seconds after a checkpoint that took c seconds.

    Because this depends on the clock, nothing that a run computes may depend on when a checkpoint is due.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the timer. The first checkpoint is due at once, because its cost is not known yet.

        Args:
            share: largest share of the time to spend on checkpoints, in [0, 1); with 0 no checkpoint is ever due.
            clock: returns the time in seconds.
        """
        self.share, self.clock = share, clock
        self.cost, self.last = 0.0, clock()

    def due(self) -> bool:
        """Return whether the next checkpoint is due."""
        return self.share > 0.0 and (self.clock() - self.last) * self.share >= self.cost

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context manager for writing a checkpoint: measure how long it takes, and restart the timer."""
        started = self.clock()
        yield
        self.last = self.clock()
        self.cost = self.last - started
