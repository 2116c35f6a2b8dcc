"""Preemption: after SIGTERM a run saves a checkpoint at its next safe point and ends.

If there is nothing to save, it ends immediately. In both cases its exit code is `STOPPED_EXIT_CODE`, so a scheduler can
distinguish a run to be restarted from a failure. The handling of Ctrl-C is unchanged.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C; shells and typer use the same."""

STOPPED_EXIT_CODE = 75
"""Exit code after SIGTERM (sysexits.h: a temporary failure, try again)."""


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the operating system when a disk is full or read-only."""


class RunStopped(SystemExit):
    """Exception that ends a run after SIGTERM. It is not an error; only code that records how runs end catches it."""

    def __init__(self, saved: str = "") -> None:
        """Store the exit code, and `saved`: a description of what was saved, for the last message of the run."""
        super().__init__(STOPPED_EXIT_CODE)
        self.saved = saved


class _Request:
    """State of a request to end: whether and when SIGTERM arrived, and how long to wait for a safe point."""

    def __init__(self) -> None:
        self.received_at: float | None = None  # time.monotonic()
        self.grace_seconds: float | None = None  # None: no safe point will follow, so SIGTERM ends the run immediately
        self.timer: threading.Timer | None = None

    def receive(self, *_: Any) -> None:
        now = time.monotonic()
        if self.grace_seconds is None:
            raise RunStopped
        if self.received_at is not None and now - self.received_at >= 0.95 * self.grace_seconds:
            raise RunStopped
        if self.received_at is None:  # launchers may send SIGTERM more than once
            self.received_at = now
            self.timer = threading.Timer(self.grace_seconds, os.kill, (os.getpid(), signal.SIGTERM))
            self.timer.daemon = True
            self.timer.start()

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.received_at = self.grace_seconds = self.timer = None


_request = _Request()


def handle_sigterm() -> None:
    """Install the SIGTERM handler of this module. Call from the main thread."""
    signal.signal(signal.SIGTERM, _request.receive)


@contextmanager
def delay_sigterm(grace_seconds: float) -> Iterator[None]:
    """Delay the effect of SIGTERM inside the context until the next safe point, by at most `grace_seconds`.

    A safe point is a place in a training loop that calls `stop_requested` and can save a checkpoint.
    Raises: RunStopped when `grace_seconds` are over, or at the end of the context if no safe point followed SIGTERM.
    """
    _request.grace_seconds = grace_seconds
    try:
        yield
        if stop_requested():  # SIGTERM arrived after the last safe point
            raise RunStopped
    finally:
        _request.close()


def stop_requested() -> bool:
    """Return whether the run should save and end at this safe point."""
    return _request.received_at is not None


def stop_is_urgent() -> bool:
    """Return whether half of the grace time is over, so that the run should not continue to a better safe point."""
    received_at, grace_seconds = _request.received_at, _request.grace_seconds
    if received_at is None or grace_seconds is None:
        return False
    return time.monotonic() - received_at > grace_seconds / 2
