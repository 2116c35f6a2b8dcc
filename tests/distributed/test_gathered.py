"""ZeRO-3 puts together what samples, once a rollout, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.distributed.test_launch import ACCELERATE, finished
from tests.project.code import ROOT

pytestmark = pytest.mark.slow


def test_only_the_policy_is_whole_while_it_samples_and_is_gathered_once(reward_folder: str) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / "zero3.yaml"),
        "--main_process_port", "0", "-m", "tests.distributed.gathered", reward_folder,
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RLHF", "RANK", "WORLD_SIZE"))}
    out = finished(subprocess.Popen(
        command, cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT), "RLHF_TIMEOUT": "120"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ))  # fmt: skip
    told = [json.loads(line) for line in out.splitlines() if line.startswith('{"rank"')]
    assert sorted(one["rank"] for one in told) == [0, 1]
    for one in told:
        assert one["before"] == {"policy": ["NOT_AVAILABLE"], "value": ["NOT_AVAILABLE"]}
        assert len(one["steps"]) == 2
        for step in one["steps"]:
            assert step["policy"] == ["AVAILABLE"]
            assert step["value"] == step["after"] == ["NOT_AVAILABLE"]
            assert step["tokens"] > 1
            assert (step["inside"], step["all"]) == (0, one["weights"])  # each weight once, before the first token
        assert one["losses"] == told[0]["losses"]
        assert len({round(loss, 9) for loss in one["losses"]}) == 2
