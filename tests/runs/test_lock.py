"""Only one process writes to a run directory: a second one gets an error naming the first; a dead one blocks nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.schema import SFTConfig
from rlhf.errors import ConfigError
from rlhf.runs.lock import LOCK_FILE, Lock, refuse_if_held
from rlhf.runs.run_dir import RunDir
from tests.runs.test_run_dir import config, interrupted_run

HOLD = "import sys; from pathlib import Path; from rlhf.runs.lock import Lock; lock = Lock(Path(sys.argv[1]))\n"
HOLD += "lock.take(); print('held', flush=True); sys.stdin.read()"


def start(run: RunDir, made: SFTConfig) -> None:
    run.start("sft", made, seed=1, processes=1, versions={}, inputs={})


def test_a_second_process_is_refused_with_an_error_naming_the_first(tmp_path: Path) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    assert first.take()
    holder = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    for attempt in (second.take, lambda: refuse_if_held(tmp_path)):
        with pytest.raises(ConfigError, match="another process is writing into the output folder") as error:
            attempt()
        assert holder in str(error.value)
    first.release()
    refuse_if_held(tmp_path)
    assert second.take()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_sigkill_releases_the_lock(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} on"):
            Lock(tmp_path).take()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    refuse_if_held(tmp_path)
    assert Lock(tmp_path).take()


def test_a_lock_file_removed_before_it_was_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened before its holder removes it and locked after that; a third process could lock a new one."""
    import fcntl

    first, second, real = Lock(tmp_path), Lock(tmp_path), fcntl.flock
    first.take()

    def late(*args: int) -> None:
        first.release()
        real(*args)

    monkeypatch.setattr("fcntl.flock", late)
    assert second.take()
    monkeypatch.undo()
    with pytest.raises(ConfigError):
        Lock(tmp_path).take()


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    assert not Lock(tmp_path).take()
    refuse_if_held(tmp_path)


def test_a_run_holds_its_folder_from_start_to_end(tmp_path: Path) -> None:
    run, made = RunDir(tmp_path), config(tmp_path)
    start(run, made)
    with pytest.raises(ConfigError, match="another process is writing"):
        RunDir(tmp_path).check("sft", made, {})
    run.finish()
    assert RunDir(tmp_path).check("sft", made, {}) == "finished"


def fail() -> None:
    raise ValueError


def test_a_run_that_fails_releases_the_lock(tmp_path: Path) -> None:
    run, made = RunDir(tmp_path), config(tmp_path)
    start(run, made)
    with pytest.raises(ValueError), run.guard():
        fail()
    assert RunDir(tmp_path).check("sft", made, {}) == "interrupted"


def test_a_run_started_by_another_process_since_the_check_is_not_overwritten(tmp_path: Path) -> None:
    """Two processes start at the same time; the first is killed before the second takes the lock."""
    late = RunDir(tmp_path)
    assert late.check("sft", config(tmp_path), {}) == "new"
    interrupted_run(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError, match="another process has started to write"):
        start(late, config(tmp_path))
    assert (tmp_path / "run.json").read_bytes() == before
