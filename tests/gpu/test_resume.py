"""A PPO run that was killed or stopped goes on from its last checkpoint and ends where an uninterrupted one ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.parity import compare
from tests.faults.setup import differences
from tests.stages import setup
from tests.tolerances import DEVICES

STEPS = 12
DEADLINE = 240.0  # seconds until the first checkpoints


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, files: setup.Files, run_stage: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """Configuration of a PPO run in float32 that saves every step; the run itself has ended."""
    made = setup.configs(tmp_path_factory.mktemp("resume"), str(tiny_model_dir), files)
    run_stage("sft", made["sft"])
    run_stage("reward", made["reward"])
    ppo = made["ppo"] | {"checkpoint_every": 1, "saving": {"share": 0.0, "keep": 2}}
    ppo |= {"ppo": ppo["ppo"] | {"steps": STEPS}, "optim": ppo["optim"] | {"precision": "float32"}}
    run_stage("ppo", ppo)
    return ppo


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    number: signal.Signals, config: dict[str, Any], device: torch.device, run_cli: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = setup.write(tmp_path, "ppo", config | {"output_dir": str(run)})
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "rlhf", "ppo", path, "--quiet"], stdout=log, stderr=log)
        until = time.monotonic() + DEADLINE
        # Once a second checkpoint has begun, the first one is complete.
        while len(list(run.glob("checkpoints/*-[0-9]*"))) < 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(number)
        process.wait(timeout=60)
    assert process.returncode != 0, "the run had ended before it was interrupted"
    assert setup.info(run)["status"] != "finished"
    code, out, err = run_cli(["ppo", path], timeout=DEADLINE)
    assert code == 0, err
    assert "continuing after step" in out + err
    whole = Path(config["output_dir"])
    assert [line["step"] for line in setup.metrics(run)] == list(range(1, STEPS + 1))
    assert {name: x for name, x in compare(run, whole, "ppo").items() if not x < DEVICES} == {}
    if device.type == "cpu":  # whether it also holds on a GPU has not been measured
        assert differences(run, whole) == []
