"""How often a run saves: as often as is cheap. What a kill costs is then bounded by what a checkpoint costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CheckpointInterval:
    """Keeps the time spent on checkpoints below a share of the run's: after one that took c seconds, c / share pass.

    When one is due depends on the clock, so nothing that a run computes may depend on it.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`share` of the time, in [0, 1); with 0 nothing is ever due. The first is due at once: its cost is unknown."""
        self.share, self.clock = share, clock
        self.cost, self.last = 0.0, clock()

    def due(self) -> bool:
        """Whether the next one is paid for."""
        return self.share > 0.0 and (self.clock() - self.last) * self.share >= self.cost

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around writing one."""
        begun = self.clock()
        yield
        self.last = self.clock()
        self.cost = self.last - begun
