"""The script of the demo's experiments gives commands that exist, on configurations that load."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.project.code import ROOT
from tests.project.commands import problems

SCRIPT = ROOT / "configs/demo/experiments/run.sh"


def commands(place: Path, what: str) -> list[str]:
    """What the script would run for seeds 1 and 2: a stand-in for `rlhf` writes its arguments down."""
    place.mkdir()
    (place / "configs").symlink_to(ROOT / "configs")
    fake = place / "bin" / "rlhf"
    fake.parent.mkdir()
    fake.write_text(f'#!/usr/bin/env bash\nprintf "%q " rlhf "$@" >> {place}/said\nprintf "\\n" >> {place}/said\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    path = f"{fake.parent}:{os.environ['PATH']}"
    subprocess.run(["bash", str(SCRIPT), what, "1", "2"], cwd=place, check=True, env=os.environ | {"PATH": path})
    return (place / "said").read_text().splitlines()


STAGES = {"on-policy": 5, "tax": 6, "sharing": 9, "rules": 5, "features": 4, "adapters": 5, "frozen": 2, "weak": 6}
ONCE = ("rlhf data rules", "rlhf data features", "rlhf classify configs/demo/experiments/classify-traits.yaml")
"""For all seeds together."""


@pytest.mark.parametrize(("what", "stages"), STAGES.items())
def test_its_commands_are_valid_and_its_seeds_kept_apart(
    what: str, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    said = [line for line in commands(tmp_path / "place", what) if not line.startswith(ONCE)]
    assert [p for line in said for p in problems(line)] == []
    assert len(said) == 2 * stages
    for seed, lines in (("1", said[:stages]), ("2", said[stages:])):
        drawn = [line for line in lines if not line.startswith("rlhf data weak")]  # which draws nothing
        assert all(f"seed={seed}" in line or f"--seed {seed}" in line for line in drawn)
        assert all(f"runs/experiments/seed{seed}/" in line for line in lines)
        assert not any(f"runs/experiments/seed{3 - int(seed)}/" in line for line in lines)


def test_an_unknown_experiment_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT), "nothing", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no experiment called nothing" in done.stderr
