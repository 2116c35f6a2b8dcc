"""Signs of life of the processes of a job. Each says in a file of its own that it has started, which step it has
finished and how it ended; the one that started them reads them when something went wrong. Imports no torch.

A process that finishes no step for too long ends itself: a cut link or a rank that hangs would otherwise keep the
others waiting, since not every group of processes has our timeout.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.config.env_vars import HEARTBEAT_FOLDER, timeout_seconds

STUCK_EXIT_CODE = 70  # exit code (sysexits.h: an internal error) of a process that ended itself
MIN_SECONDS_BETWEEN = 1.0  # seconds between two signs of life at least


@dataclass(frozen=True)
class Heartbeat:
    """What one process said last."""

    rank: int
    pid: int
    host: str
    at: float  # seconds since the epoch
    what: str  # running, finished, failed, interrupted or stuck
    step: int = 0  # last finished step or update
    words: str = ""


_step = 0  # the last that this process has finished


def write_heartbeat(what: str, *, step: int | None = None, words: str = "") -> None:
    """Leave a sign, if somebody reads it.

    Args:
        step: by default the last one that was said.
    """
    global _step
    _step = _step if step is None else step
    folder = os.environ.get(HEARTBEAT_FOLDER)
    if not folder or not Path(folder).is_dir():
        return
    sign = Heartbeat(
        int(os.environ.get("RANK", "0")), os.getpid(), socket.gethostname(), time.time(), what, _step, words[:2000]
    )
    path = Path(folder) / f"{sign.rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(sign)), encoding="utf-8")
    temporary.replace(path)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """What every process said last, by rank."""
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(Heartbeat(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda sign: sign.rank)


class Watchdog:
    """Ends this process if `beat` is not called for too long."""

    def __init__(self, seconds: float, end: Any = os._exit) -> None:
        self.seconds, self.end = seconds, end
        self.step, self.last, self.said = 0, time.monotonic(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watchdog")

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()

    def beat(self, step: int | None = None) -> None:
        """Some work was finished; `step` if it was a whole step or update."""
        self.last = time.monotonic()
        self.step = self.step if step is None else step
        if step is not None and self.last - self.said >= MIN_SECONDS_BETWEEN:
            self.said = self.last
            write_heartbeat("running", step=step)

    def _look(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last > self.seconds:
                words = f"no step was finished for {self.seconds:g} s (the last was {self.step})"
                write_heartbeat("stuck", step=self.step, words=words)
                sys.stderr.write(f"rank {os.environ.get('RANK', '0')}: {words}; ending this process\n")
                sys.stderr.flush()
                self.end(STUCK_EXIT_CODE)
                return


_watchdog: Watchdog | None = None


def start_watchdog() -> None:
    """Watch this process if it is one of several. Once; later calls count as work."""
    global _watchdog
    if _watchdog is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _watchdog = Watchdog(timeout_seconds())
        _watchdog.start()
    report_progress(0)


def report_progress(step: int | None = None) -> None:
    """Some work was finished; `step` if it was a whole step or update."""
    global _step
    _step = _step if step is None else step
    if _watchdog is not None:
        _watchdog.beat(step)
    elif step is not None and HEARTBEAT_FOLDER in os.environ:
        write_heartbeat("running", step=step)
