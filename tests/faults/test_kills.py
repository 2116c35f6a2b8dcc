"""A bounded share of `make soak`: kill -9 at random moments of a pipeline, and nothing is lost or repeated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import STAGES
from tests.faults.setup import differences

pytestmark = pytest.mark.slow
KILLS = 10
ROOT = Path(__file__).parents[2]


def test_a_pipeline_that_is_killed_again_and_again_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.kills", str(tmp_path / "place")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--kills", str(KILLS), "--seed", "3"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["wrong"]) == (KILLS, [])
    assert len(result["where"]) >= 2
    assert set(result["where"]) <= {*STAGES, "before the first stage"}


def _repeat_a_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("r+", encoding="utf-8") as file:
        last = file.read().splitlines()[-1]
        file.write(last + "\n")


def _lose_a_sample(run: Path) -> None:
    path = run / "samples.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")


def _change_a_bit(run: Path) -> None:
    path = next((run / "model").glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _lose_the_value_model(run: Path) -> None:
    shutil.rmtree(run / "value_model")


@pytest.mark.parametrize("harm", [_repeat_a_line, _lose_a_sample, _change_a_bit, _lose_the_value_model])
def test_the_comparison_sees_a_planted_difference(harm: Any, full: Any, tmp_path: Path) -> None:
    shutil.copytree(full.run("ppo"), tmp_path / "copy")
    assert differences(tmp_path / "copy", full.run("ppo")) == []
    harm(tmp_path / "copy")
    assert len(differences(tmp_path / "copy", full.run("ppo"))) == 1
