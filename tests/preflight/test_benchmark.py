"""`rlhf bench` prints a table of the phases and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.stages.setup import write

pytestmark = pytest.mark.slow


def test_every_phase_has_a_time_and_a_limit(trained: Any, call_cli: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "ppo", trained.configs["ppo"] | {"output_dir": str(tmp_path / "run")})
    code, out, err = call_cli(["bench", path, "--steps", "2", "--json"])
    assert code == 0, err
    tables = [line for line in map(json.loads, out.splitlines()) if "table" in line]
    assert [row["phase"] for row in tables[0]["rows"]] == ["sample", "score", "update", "step"]
    for row in tables[0]["rows"]:
        taken, limit = (float(row[name].removesuffix(" s")) for name in ("time", "limit"))
        assert taken > 0
        assert 0 <= limit < taken  # the model has 30 000 weights, so nearly all of the time is overhead
        assert 0.1 < float(row["memory"].removesuffix(" GiB")) < 16
    assert not (tmp_path / "run").exists()
