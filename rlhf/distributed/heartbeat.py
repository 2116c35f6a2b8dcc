"""Heartbeats of the processes of a job, and the watchdog that ends a process that makes no progress.

Each process writes a file with its status (running, failed, ...) and the last step that it finished. The supervisor
reads these files if the job fails. This module imports no torch.

A process that finishes no step for too long ends itself. Otherwise a cut network link or a rank that hangs could block
the other ranks indefinitely, since not every process group has the configured timeout.
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

STUCK_EXIT_CODE = 70  # exit code of a process that its watchdog ended (sysexits.h: an internal software error)
MIN_SECONDS_BETWEEN = 1.0  # the least number of seconds between two heartbeats with status "running"


@dataclass(frozen=True)
class Heartbeat:
    """Heartbeat of one process: what it last reported. The fields are the keys of its JSON file."""

    rank: int
    pid: int
    host: str
    at: float  # time of the report, seconds since the epoch
    what: str  # status: running, finished, failed, refused, interrupted or stuck
    step: int = 0  # last finished step or update
    words: str = ""  # message of the error, if there was one


_step = 0  # last step or update that this process has finished


def write_heartbeat(what: str, *, step: int | None = None, words: str = "") -> None:
    """Write a heartbeat for the supervisor; without a supervisor, only record the step.

    Args:
        what: the process's status, one of those of `Heartbeat.what`.
        step: last finished step or update; None = the one reported before.
        words: a message, of which the first 2000 characters are kept.
    """
    global _step
    _step = _step if step is None else step
    folder = os.environ.get(HEARTBEAT_FOLDER)
    if not folder or not Path(folder).is_dir():
        return
    heartbeat = Heartbeat(
        int(os.environ.get("RANK", "0")), os.getpid(), socket.gethostname(), time.time(), what, _step, words[:2000]
    )
    path = Path(folder) / f"{heartbeat.rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(heartbeat)), encoding="utf-8")
    temporary.replace(path)


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the last heartbeat of every process, ordered by rank; files that cannot be read are skipped."""
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(Heartbeat(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda heartbeat: heartbeat.rank)


class Watchdog:
    """Thread that ends this process if `beat` is not called for a given number of seconds."""

    def __init__(self, seconds: float, end: Any = os._exit) -> None:
        self.seconds, self.end = seconds, end
        self.step, self.last_beat, self.last_written = 0, time.monotonic(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watchdog")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def beat(self, step: int | None = None) -> None:
        """Record that the process made progress.

        Args:
            step: number of the step or update, if a whole one was finished.
        """
        self.last_beat = time.monotonic()
        self.step = self.step if step is None else step
        if step is not None and self.last_beat - self.last_written >= MIN_SECONDS_BETWEEN:
            self.last_written = self.last_beat
            write_heartbeat("running", step=step)

    def _look(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last_beat > self.seconds:
                message = f"no step was finished for {self.seconds:g} s (the last was {self.step})"
                write_heartbeat("stuck", step=self.step, words=message)
                sys.stderr.write(f"rank {os.environ.get('RANK', '0')}: {message}; ending this process\n")
                sys.stderr.flush()
                self.end(STUCK_EXIT_CODE)
                return


_watchdog: Watchdog | None = None


def start_watchdog() -> None:
    """Start the watchdog if this process is one of several. Later calls only report progress."""
    global _watchdog
    if _watchdog is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _watchdog = Watchdog(timeout_seconds())
        _watchdog.start()
    report_progress(0)


def report_progress(step: int | None = None) -> None:
    """Report to the watchdog, and in the heartbeat, that this process made progress.

    Args:
        step: number of the step or update, if a whole one was finished.
    """
    global _step
    _step = _step if step is None else step
    if _watchdog is not None:
        _watchdog.beat(step)
    elif step is not None and HEARTBEAT_FOLDER in os.environ:
        write_heartbeat("running", step=step)
