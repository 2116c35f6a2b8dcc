"""Ctrl-C: the run says how to continue, and the same command does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.runs.preemption import STOPPED_EXIT_CODE
from tests.conftest import Run
from tests.faults.setup import differences

UPDATES = 500  # so many that a busy machine has time to send the signal
FIRST = UPDATES // 5  # checkpoints fall five times into a run
DEADLINE = 90.0  # seconds, for a machine that is very busy
COMMAND = ["sft", "sft.yaml", f"optim.max_updates={UPDATES}", "optim.epochs=1000", "--quiet"]


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look until something has happened; fail if the process ends first or the deadline passes."""
    end = time.monotonic() + DEADLINE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the deadline has passed"
        time.sleep(0.005)


def interrupted(place: Path, happened: Callable[[], bool], sent: signal.Signals) -> tuple[int, str]:
    """Start the command, signal it as soon as something has happened; its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *COMMAND],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        wait_for(happened, process)
        process.send_signal(sent)
        _, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, err


def status(run: Path) -> dict[str, object]:
    """run.json."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def steps(run: Path) -> list[int]:
    """The steps of the training lines in metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(place: Path, call_cli: Run) -> None:
    run, metrics = place / "out", place / "out" / "metrics.jsonl"

    def past_the_first_checkpoint() -> bool:
        return metrics.is_file() and f'"step": {FIRST + 5},' in metrics.read_text(encoding="utf-8")

    code, err = interrupted(place, past_the_first_checkpoint, signal.SIGINT)
    assert code == 130
    assert err.strip() == f"interrupted; the same command continues: rlhf {' '.join(COMMAND)}"
    assert status(run)["status"] == "interrupted"
    assert not (run / "model").exists()

    assert call_cli(COMMAND, cwd=place).code == 0
    finished = status(run)
    assert (finished["status"], finished["attempts"]) == ("finished", 2)
    assert (run / "model" / "config.json").is_file()
    seen = steps(run)
    assert seen == sorted(set(seen))
    assert (seen[0], seen[-1]) == (1, UPDATES)

    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert call_cli(COMMAND, cwd=place).code == 0  # finished: nothing is done again
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.slow
def test_a_stop_by_the_scheduler_is_told_apart(place: Path, call_cli: Run) -> None:
    """SIGTERM saves at an update that is logged anyway (every fifth), so that the run ends as an uninterrupted one."""
    run, metrics = place / "out", place / "out" / "metrics.jsonl"
    code, err = interrupted(place, lambda: metrics.is_file() and metrics.stat().st_size > 2000, signal.SIGTERM)
    assert code == STOPPED_EXIT_CODE
    assert err.strip().startswith("stopped by SIGTERM, saved after update ")
    assert err.strip().endswith(f"; the same command continues: rlhf {' '.join(COMMAND)}")
    assert status(run)["status"] == "interrupted"
    at = int(err.split("after update ")[1].split(";")[0])
    assert at % (UPDATES // 100) == 0
    assert (run / "checkpoints" / f"checkpoint-{at}" / "manifest.json").is_file()
    assert call_cli(COMMAND, cwd=place).code == 0
    assert call_cli([*COMMAND, "output_dir=plain"], cwd=place).code == 0
    assert differences(run, place / "plain") == []
