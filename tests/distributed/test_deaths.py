"""If one process dies, the job ends on all processes with one message; with restarts the job resumes by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.stages import setup
from tests.stages.setup import info, metrics

pytestmark = pytest.mark.slow
UPDATES = 400
DEADLINE = 240.0  # seconds, for a machine that is very busy
BOUND = 60.0  # seconds in which the job must be over


def started(config: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start the command, with its heartbeats below a folder."""
    folder.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RLHF", "RANK", "WORLD_SIZE"))}
    command = [sys.executable, "-m", "rlhf", "sft", config, "--launcher", "ddp", "--timeout", "30", "--quiet", *words]
    environment = clean | {"TMPDIR": str(folder), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_rank_1(process: subprocess.Popen[str], folder: Path, checkpoints: Path) -> None:
    """Kill rank 1 as soon as training has written a checkpoint."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        done = list(checkpoints.glob("checkpoint-*/trainer_state.json"))
        signs = list(folder.glob("rlhf-*/1.json"))
        if done and signs:
            sign = json.loads(signs[0].read_text(encoding="utf-8"))
            if sign["step"] > min(int(p.parent.name.rsplit("-", 1)[1]) for p in done):
                os.kill(sign["pid"], signal.SIGKILL)
                return
        time.sleep(0.02)
    process.kill()
    pytest.fail("no checkpoint in time")


def test_a_killed_rank_ends_the_job_and_a_restart_goes_on(tiny_model_dir: Path, files: Any, tmp_path: Path) -> None:
    config = setup.configs(tmp_path, str(tiny_model_dir), files)["sft"]
    config["optim"] = setup.optim(max_updates=UPDATES, epochs=1000, precision="float32")
    path, run = setup.write(tmp_path, "sft", config), tmp_path / "sft"

    process = started(path, tmp_path / "first")
    kill_rank_1(process, tmp_path / "first", run / "checkpoints")
    begun = time.monotonic()
    _, err = process.communicate(timeout=DEADLINE)
    assert time.monotonic() - begun < BOUND
    assert process.returncode not in (0, 130)
    (at,) = [i for i, line in enumerate(err.splitlines()) if line.startswith("TrainingError: rank 1 ")]
    message = "\n".join(err.splitlines()[at : at + 3])
    assert "died without a message" in message
    assert f"last good checkpoint: {run / 'checkpoints'}/checkpoint-" in message
    assert f"to resume: rlhf sft {path} --quiet --launcher ddp --timeout 30" in message
    assert info(run)["status"] != "finished"

    process = started(path, tmp_path / "second", "--max-restarts", "1")
    resumed = time.monotonic() + DEADLINE
    while info(run)["attempts"] < 2 and time.monotonic() < resumed:  # it goes on from the checkpoint
        time.sleep(0.05)
    kill_rank_1(process, tmp_path / "second", run / "checkpoints")
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err[-3000:]
    assert err.count("TrainingError: rank 1 ") == 1
    assert "restarting from there (1 restart left)" in err
    assert (info(run)["status"], info(run)["processes"], info(run)["attempts"]) == ("finished", 2, 3)
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == UPDATES
