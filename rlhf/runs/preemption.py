"""Pre-emption: SIGTERM asks a run to save a checkpoint at its next safe point and to end.

Where there is nothing to save, it ends at once. Either way it ends with a code of its own, so that a scheduler can tell
"start me again" from a failure. Ctrl-C is not changed by this.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPED = 75
"""Exit code after SIGTERM (sysexits.h: a temporary failure, try again)."""


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the operating system says of a disk that takes no more."""


class Stopped(SystemExit):
    """The run was told to end. No error: nothing catches it but what records how the run ended."""

    def __init__(self, saved: str = "") -> None:
        """`saved` says what was saved, for the last line of the run."""
        super().__init__(STOPPED)
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
            raise Stopped
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


def listen() -> None:
    """Handle SIGTERM from now on; in the main thread."""
    signal.signal(signal.SIGTERM, _request.receive)


@contextmanager
def at_safe_points(grace: float) -> Iterator[None]:
    """Meanwhile SIGTERM waits for the next safe point, `grace` seconds at most."""
    _request.grace = grace
    try:
        yield
        if asked():  # after the last safe point
            raise Stopped
    finally:
        _request.close()


def asked() -> bool:
    """Whether the run should save and end at this safe point."""
    return _request.since is not None


def urgent() -> bool:
    """Whether half of the grace time is over: a better safe point should not be waited for."""
    since, grace = _request.since, _request.grace
    return since is not None and grace is not None and time.monotonic() - since > grace / 2


def say_end(how: str, code: int) -> int:
    """Print how the command ended, and the command that continues it. Returns: `code`."""
    from rlhf.config.env_vars import LAST_WORDS
    from rlhf.config.schema import STAGES

    if LAST_WORDS in os.environ:  # the process that started us says it, once for all
        return code
    continues = len(sys.argv) > 1 and sys.argv[1] in (*STAGES, "run")
    more = f"; the same command continues: rlhf {shlex.join(sys.argv[1:])}" if continues else ""
    print(f"\n{how}{more}", file=sys.stderr)
    return code
