"""The generators of all demo files: one seed gives the same bytes whatever Python's hash seed, another gives others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rlhf.demo.annotators import generate_annotators
from rlhf.demo.features import generate_features
from rlhf.demo.generate import generate
from rlhf.demo.rules import generate_rules

GENERATORS = {
    "demo": (generate, 0.02),
    "rules": (generate_rules, 0.01),
    "features": (generate_features, 0.01),
    "annotators": (generate_annotators, 0.01),
}
"""Name -> generator and the scale at which it is quick."""


def write_all(folder: Path, seed: int) -> None:
    """Every generator's files, each in a folder of its name."""
    for name, (generator, scale) in GENERATORS.items():
        generator(folder / name, seed, scale)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_same_seed_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    code = "import sys, pathlib; from tests.demo.test_seeds import write_all; write_all(pathlib.Path(sys.argv[1]), 3)"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / hash_seed)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for hash_seed in ("1", "2")
    ]
    write_all(tmp_path / "other", seed=4)
    assert [process.wait() for process in running] == [0, 0]
    first, second, other = (contents(tmp_path / name) for name in ("1", "2", "other"))
    assert {path.partition("/")[0] for path in first} == set(GENERATORS)
    assert first == second
    assert set(other) == set(first)
    assert {name for name in first if first[name] == other[name]} == {"demo/README.md"}
