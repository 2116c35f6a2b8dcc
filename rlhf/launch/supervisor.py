"""Supervise one job of several processes on this machine: start it, detect the first process that fails, end the others
in time, and report the failure once. This module imports no torch."""

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
GRACE_SECONDS = 60.0  # time for the other processes to end by themselves after a failure; at most the timeout
# Error messages of Gloo, NCCL and the operating system for a remote process that has ended or cannot be reached.
CONNECTION_LOST = re.compile(
    "Timed out waiting|timed out connecting|connectFullMesh|Connection (closed|reset|refused)|operation timeout"
    "|remote process exited|No route to host|Network is unreachable|Broken pipe|pair closure"
)


@dataclass(frozen=True)
class JobResult:
    """Exit code of a job, and the process that failed first."""

    exit_code: int
    failed_process: Heartbeat | None = None  # last heartbeat of the process that failed first
    failed_at: float = 0.0  # seconds since the epoch
    without_message: bool = False  # the process ended without reporting a reason, for example because it was killed

    @property
    def may_restart(self) -> bool:
        """Whether a restart may succeed: not if the user stopped the job, nor after an error that would recur."""
        refused = self.failed_process is not None and self.failed_process.what == "refused"
        return self.exit_code not in (0, INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE) and not refused


def supervise(
    command: list[str], environment: Mapping[str, str], timeout: float, join_timeout: float | None = None
) -> JobResult:
    """Run a job until it ends, and return how it ended.

    SIGTERM and SIGINT that arrive meanwhile are forwarded to all processes of the job.

    Args:
        timeout: seconds that processes may wait for each other; after a failure the other processes have at most this
            time, and at most a minute, to end by themselves.
        join_timeout: seconds until the first process must have reported that it runs; None = no limit. The launcher's
            own limit may double when it retries to reach another machine.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-") as name, _collect_signals() as signals:
        folder = Path(name)
        # A process group of its own: some launchers end on SIGTERM without forwarding it to their processes.
        process = subprocess.Popen(command, env={**environment, HEARTBEAT_FOLDER: name}, start_new_session=True)
        failure: tuple[Heartbeat, float] | None = None
        forwarded, started_at = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            for number in signals[forwarded:]:
                forwarded += 1
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            failure = failure or (None if signals else _first_failure(folder))
            if failure is not None and time.time() - failure[1] > min(GRACE_SECONDS, timeout):
                _kill_all(process, folder)
            late = join_timeout is not None and time.monotonic() - started_at > join_timeout
            if late and not read_heartbeats(folder):
                _kill_all(process, folder)
        if signals:
            _wait_for_group(process.pid)
            if process.returncode:
                return JobResult(STOPPED_EXIT_CODE if signal.SIGTERM in signals else INTERRUPTED_EXIT_CODE)
        return _job_result(process.returncode, folder, failure)


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of handling them, inside the context."""
    signals: list[int] = []
    before = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for_group(group: int) -> None:
    """Wait until all processes of the group have ended: after a signal the launcher may end before the stage saved."""
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def _first_failure(folder: Path) -> tuple[Heartbeat, float] | None:
    """Return a process of this machine that has died or failed, and the time; None if there is none."""
    heartbeats = read_heartbeats(folder)
    dead = [heartbeat for heartbeat in heartbeats if heartbeat.what == "running" and _has_ended(heartbeat.pid)]
    if dead:  # takes precedence over processes that reported a failure: usually they failed because this one had died
        return dead[0], time.time()
    reported = [heartbeat for heartbeat in heartbeats if heartbeat.what in ("failed", "refused", "stuck")]
    first = min(reported, key=lambda heartbeat: heartbeat.at, default=None)
    return (first, first.at) if first is not None else None


def _has_ended(pid: int) -> bool:
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


def _kill_all(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the processes that this job has started, and no others."""
    for pid in [
        *(heartbeat.pid for heartbeat in read_heartbeats(folder) if not _has_ended(heartbeat.pid)),
        process.pid,
    ]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _job_result(exit_code: int, folder: Path, failure: tuple[Heartbeat, float] | None) -> JobResult:
    if exit_code == 0:
        return JobResult(0)
    if failure is None:
        failure = _first_failure(folder)
    if failure is None:
        stopped = any(heartbeat.what == "interrupted" for heartbeat in read_heartbeats(folder))
        return JobResult(INTERRUPTED_EXIT_CODE if stopped else exit_code if exit_code > 0 else 1)
    heartbeat, failed_at = failure
    # The process may have reported a reason since it was found to have failed.
    reported = next((h for h in read_heartbeats(folder) if h.rank == heartbeat.rank and h.what != "running"), None)
    return JobResult(
        exit_code if exit_code > 0 else 1, reported or heartbeat, failed_at, without_message=reported is None
    )


def newest_checkpoint_path(run: Path) -> str | None:
    """Return the path of the newest complete checkpoint in a run directory; None if there is none."""
    found = [p.parent for p in (run / "checkpoints").glob(f"*/{MANIFEST}")]
    return str(max(found, key=lambda p: p.stat().st_mtime)) if found else None


def report_job(
    result: JobResult,
    run: Path | None,
    resume_command: str,
    *,
    restarts_left: int,
    rendezvous: str = "",
    writes_checkpoints: bool = True,
) -> None:
    """Print one message about a failed job: which process failed, when, the last checkpoint and how to resume.

    A job that was interrupted or stopped by a signal is not reported: the process that handled the signal did so.

    Args:
        run: the run directory.
        rendezvous: ADDRESS:PORT of machine 0, for a job on several machines.
        writes_checkpoints: whether this machine writes the run directory; the others may have disks of their own.
    """
    if result.exit_code in (INTERRUPTED_EXIT_CODE, STOPPED_EXIT_CODE):
        return
    failed = result.failed_process
    time_text = time.strftime("%H:%M:%S", time.localtime(result.failed_at or time.time()))
    if failed is None:
        lines = [f"the job ended with exit code {result.exit_code} at {time_text}; no process reported a reason"]
        lines += [f"were all machines started, and do they reach machine 0 at {rendezvous}?"] if rendezvous else []
    else:
        reason = f"{failed.what}: {failed.words}"
        if result.without_message:
            reason = "died without a message (killed, or out of memory)"
        process = f"rank {failed.rank} (process {failed.pid} on {failed.host})"
        lines = [f"{process} {reason}, at {time_text}, after step {failed.step}"]
        if failed.what == "stuck" or CONNECTION_LOST.search(failed.words):
            or_link = ", or its machine or the link to it is down" if rendezvous else ""
            lines.append(f"it timed out waiting for another rank, which has hung or died{or_link}")
    checkpoint = newest_checkpoint_path(run) if run is not None else None
    none = "none yet; the run starts over"
    if not writes_checkpoints:
        none = "none on this machine's disk; machine 0 writes them"
    lines.append(f"last good checkpoint: {checkpoint or none}")
    if restarts_left:
        lines.append(f"restarting from there ({restarts_left} restart{'s' if restarts_left > 1 else ''} left)")
    elif failed is None or failed.what != "refused":
        lines.append(f"to resume: {resume_command}")
    sys.stderr.write("TrainingError: " + "\n  ".join(lines) + "\n")
    sys.stderr.flush()
