"""Pre-emption: SIGTERM asks a run to save a checkpoint at its next safe point and to end.

Where there is nothing to save, it ends at once. Either way it ends with a code of its own, so that a scheduler can tell
"start me again" from a failure. Ctrl-C is not changed by this.
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
"""Exit code after Ctrl-C, as shells and typer use it."""

STOPPED_EXIT_CODE = 75
"""Exit code after SIGTERM (sysexits.h: a temporary failure, try again)."""


DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the operating system says of a disk that takes no more."""


class RunStopped(SystemExit):
    """The run was told to end. No error: nothing catches it but what records how the run ended."""

    def __init__(self, saved: str = "") -> None:
        """`saved` says what was saved, for the last line of the run."""
        super().__init__(STOPPED_EXIT_CODE)
        self.saved = saved


class _Request:
    """Whether this process was told to end, and since when."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.grace: float | None = None  # None: no safe point is to come
        self.timer: threading.Timer | None = None

    def receive(self, *_: Any) -> None:
        now = time.monotonic()
        if self.grace is None or (self.since is not None and now - self.since >= 0.95 * self.grace):
            raise RunStopped
        if self.since is None:  # launchers send it more than once
            self.since = now
            self.timer = threading.Timer(self.grace, os.kill, (os.getpid(), signal.SIGTERM))
            self.timer.daemon = True
            self.timer.start()

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.since = self.grace = self.timer = None


_request = _Request()


def handle_sigterm() -> None:
    """Handle SIGTERM from now on; in the main thread."""
    signal.signal(signal.SIGTERM, _request.receive)


@contextmanager
def delay_sigterm(grace: float) -> Iterator[None]:
    """Meanwhile SIGTERM waits for the next safe point, `grace` seconds at most."""
    _request.grace = grace
    try:
        yield
        if stop_requested():  # after the last safe point
            raise RunStopped
    finally:
        _request.close()


def stop_requested() -> bool:
    """Whether the run should save and end at this safe point."""
    return _request.since is not None


def stop_is_urgent() -> bool:
    """Whether half of the grace time is over: a better safe point should not be waited for."""
    since, grace = _request.since, _request.grace
    return since is not None and grace is not None and time.monotonic() - since > grace / 2
