"""The tests on a GPU: why they are skipped, and that their own code works, shown on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gpu.conftest import reason_to_skip
from tests.project.code import ROOT

QUICK = ("test_parity.py", "test_bfloat16.py", "test_offload.py")


@pytest.mark.parametrize(
    ("on_cpu", "visible", "gpu", "says"),
    [
        (True, False, False, ""),
        (False, True, True, ""),
        (False, True, False, "no CUDA device"),
        (False, False, False, "make test-gpu"),
    ],
)
def test_the_reason_to_skip_says_what_to_do(on_cpu: bool, visible: bool, gpu: bool, says: str) -> None:
    reason = reason_to_skip(on_cpu=on_cpu, visible=visible, gpu=gpu)
    assert bool(reason) == bool(says)
    assert says in reason


@pytest.mark.slow
def test_the_quick_ones_pass_on_a_cpu() -> None:
    """The others start commands of their own, which takes minutes: `pytest tests/gpu --on-cpu` runs all."""
    files = [f"tests/gpu/{name}" for name in QUICK]
    command = [sys.executable, "-m", "pytest", *files, "--on-cpu", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
