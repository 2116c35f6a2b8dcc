"""SIGTERM to the command that launched several processes: all save together, and continue with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.launch.supervisor import JobResult, supervise
from rlhf.runs.preemption import STOPPED_EXIT_CODE
from tests.faults.setup import checkpoints, differences
from tests.stages import setup
from tests.stages.setup import info

pytestmark = pytest.mark.slow
# A launcher that dies of SIGTERM and leaves its process behind; that one takes a while to save.
STAGE = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: None)\nopen('began', 'w').close()\n"
STAGE += "signal.pause()\ntime.sleep(0.5)\nopen('saved', 'w').close()\n"
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, 'stage.py'])"


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, "the deadline has passed"
        time.sleep(0.01)


def test_a_launcher_that_dies_of_sigterm_does_not_leave_a_stage_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage.py").write_text(STAGE, encoding="utf-8")
    teller = subprocess.Popen(
        ["sh", "-c", f"while [ ! -e began ]; do sleep 0.05; done; sleep 0.2; kill -TERM {os.getpid()}"], cwd=tmp_path
    )
    assert supervise([sys.executable, "-c", LAUNCHER], os.environ, 60.0) == JobResult(STOPPED_EXIT_CODE)
    assert (tmp_path / "saved").is_file()
    teller.wait()


def test_a_launcher_that_ends_by_itself_hands_on_its_code() -> None:
    assert supervise([sys.executable, "-c", "raise SystemExit(3)"], os.environ, 60.0).exit_code == 3


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """`rlhf ... --launcher ddp`, as typed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RLHF", "RANK", "WORLD_SIZE"))}
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf", *arguments, "--launcher", "ddp", "--quiet"],
        text=True,
        env=clean | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_two_processes_save_together_and_go_on_as_if_nothing_had_been(stage: str, full: Any, tmp_path: Path) -> None:
    longer = {
        "ppo": {"ppo": {"steps": 8, "rollout_size": 8, "epochs": 4, "minibatches": 2}, "checkpoint_every": 100},
        "sft": {"optim": setup.optim(epochs=30)},
    }
    runs = {name: tmp_path / name for name in ("plain", "broken")}
    files = {
        name: setup.write(tmp_path, name, full.configs[stage] | longer[stage] | {"output_dir": str(run)})
        for name, run in runs.items()
    }
    plain = start([stage, files["plain"]])
    out, _ = plain.communicate(timeout=250)
    assert plain.returncode == 0, out[-3000:]
    process = start([stage, files["broken"]])
    wait_for(lambda: lines(runs["broken"]) >= (2 if stage == "ppo" else 5) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED_EXIT_CODE, out[-3000:]
    assert info(runs["broken"])["status"] == "interrupted"
    last = checkpoints(runs["broken"])[-1]
    assert "step" in json.loads((runs["broken"] / "checkpoints" / last / "manifest.json").read_text())["about"]
    again = start([stage, files["broken"]])
    out, _ = again.communicate(timeout=250)
    assert again.returncode == 0, out[-3000:]
    assert differences(runs["broken"], runs["plain"]) == []
