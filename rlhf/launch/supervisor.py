"""One job of several processes on this machine: start it, see which process dies first, end the rest in time, and say
once what happened. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.checkpointing.files import MANIFEST
from rlhf.config.env_vars import HEARTBEAT_FOLDER
from rlhf.distributed.heartbeat import Heartbeat, read_heartbeats
from rlhf.runs.preemption import INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE

POLL_SECONDS = 0.1  # seconds
GRACE_SECONDS = 60.0  # for the others to end by themselves after one has died; less if the timeout is shorter
# What gloo, NCCL and the operating system say of a process at the other end that is gone or out of reach.
CONNECTION_LOST = re.compile(
    "Timed out waiting|timed out connecting|connectFullMesh|Connection (closed|reset|refused)|operation timeout"
    "|remote process exited|No route to host|Network is unreachable|Broken pipe|pair closure"
)


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    code: int
    culprit: Heartbeat | None = None  # the process that was first
    at: float = 0.0  # seconds since the epoch
    silent: bool = False  # it left without a word, as one does that is killed

    @property
    def may_restart(self) -> bool:
        """Whether another attempt can help: not if the user stopped it, nor after an error that would come again."""
        refused = self.culprit is not None and self.culprit.what == "refused"
        return self.code not in (0, INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE) and not refused


def supervise(
    command: list[str], environment: Mapping[str, str], seconds: float, meeting: float | None = None
) -> JobResult:
    """Run a job to its end.

    Args:
        seconds: how long processes may wait for each other; when one has died, the rest have no longer than this (and
            no longer than a minute) to end by themselves.
        meeting: how long it may take until a process says that it lives; the launcher's own limit may be doubled by
            its attempts to reach another machine.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-") as name, _told() as told:
        folder = Path(name)
        # A group of its own: some launchers die of SIGTERM and leave their processes behind, which must have it too.
        process = subprocess.Popen(command, env={**environment, HEARTBEAT_FOLDER: name}, start_new_session=True)
        first: tuple[Heartbeat, float] | None = None
        passed, begun = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            for number in told[passed:]:
                passed += 1
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            first = first or (None if told else _first_gone(folder))
            if first is not None and time.time() - first[1] > min(GRACE_SECONDS, seconds):
                _end_all(process, folder)
            if meeting is not None and time.monotonic() - begun > meeting and not read_heartbeats(folder):
                _end_all(process, folder)
        if told:
            _wait_for_group(process.pid)
            if process.returncode:
                return JobResult(STOPPED_EXIT_CODE if signal.SIGTERM in told else INTERRUPTED_EXIT_CODE)
        return _ended(process.returncode, folder, first)


@contextlib.contextmanager
def _told() -> Iterator[list[int]]:
    """The signals to end that come meanwhile."""
    told: list[int] = []
    before = {n: signal.signal(n, lambda number, _: told.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_group(group: int) -> None:
    """After a signal the launcher may end before the stage has saved."""
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def _first_gone(folder: Path) -> tuple[Heartbeat, float] | None:
    """A process of this machine that is gone or has failed, and when."""
    found = read_heartbeats(folder)
    silent = [sign for sign in found if sign.what == "running" and _gone(sign.pid)]
    if silent:  # before those that said why they ended: as a rule because this one was gone
        return silent[0], time.time()
    spoken = [sign for sign in found if sign.what in ("failed", "refused", "stuck")]
    first = min(spoken, key=lambda sign: sign.at, default=None)
    return (first, first.at) if first is not None else None


def _gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        try:
            return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _end_all(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End what this job has started and nothing else."""
    for pid in [*(sign.pid for sign in read_heartbeats(folder) if not _gone(sign.pid)), process.pid]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _ended(code: int, folder: Path, first: tuple[Heartbeat, float] | None) -> JobResult:
    if code == 0:
        return JobResult(0)
    if first is None:
        first = _first_gone(folder)
    if first is None:
        stopped = any(sign.what == "interrupted" for sign in read_heartbeats(folder))
        return JobResult(INTERRUPTED_EXIT_CODE if stopped else code if code > 0 else 1)
    sign, at = first
    # Its own last words, if it had time for some.
    spoken = next((s for s in read_heartbeats(folder) if s.rank == sign.rank and s.what != "running"), None)
    return JobResult(code if code > 0 else 1, spoken or sign, at, silent=spoken is None)


def newest_checkpoint_path(run: Path) -> str | None:
    """The last complete checkpoint in a run directory."""
    found = [p.parent for p in (run / "checkpoints").glob(f"*/{MANIFEST}")]
    return str(max(found, key=lambda p: p.stat().st_mtime)) if found else None


def report_job(
    ended: JobResult, run: Path | None, resume: str, *, restarts_left: int, meeting: str = "", writes: bool = True
) -> None:
    """One message: who, when, the last good checkpoint, and how it goes on.

    Args:
        meeting: where several machines meet.
        writes: whether this machine writes the run directory; the others may have disks of their own.
    """
    if ended.code in (INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE):
        return  # said by whoever was told to end
    who = ended.culprit
    when = time.strftime("%H:%M:%S", time.localtime(ended.at or time.time()))
    if who is None:
        lines = [f"the job ended with exit code {ended.code} at {when}; no process said why"]
        lines += [f"were all machines started, and do they reach machine 0 at {meeting}?"] if meeting else []
    else:
        how = "died without a message (killed, or out of memory)" if ended.silent else f"{who.what}: {who.words}"
        lines = [f"rank {who.rank} (process {who.pid} on {who.host}) {how}, at {when}, after step {who.step}"]
        if who.what == "stuck" or CONNECTION_LOST.search(who.words):
            or_link = ", or its machine or the link to it is down" if meeting else ""
            lines.append(f"it timed out waiting for another rank, which has hung or died{or_link}")
    checkpoint = newest_checkpoint_path(run) if run is not None else None
    none = "none yet; it starts over" if writes else "none on this machine's disk; machine 0 writes them"
    lines.append(f"last good checkpoint: {checkpoint or none}")
    if restarts_left:
        lines.append(f"restarting from there ({restarts_left} restart{'s' if restarts_left > 1 else ''} left)")
    elif who is None or who.what != "refused":
        lines.append(f"to resume: {resume}")
    sys.stderr.write("TrainingError: " + "\n  ".join(lines) + "\n")
    sys.stderr.flush()
