"""No stage or tool mixes devices: they run on an accelerator that refuses what a GPU refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.project.code import ROOT


def on_pretend_device(part: str) -> subprocess.CompletedProcess[str]:
    """Run a part of `tests.on_pretend_device` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.on_pretend_device", part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_two_steps_of_ppo_mix_no_devices() -> None:
    done = on_pretend_device("ppo")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["full", "adapters"])
def test_stages_and_tools_mix_no_devices_and_compute_on_the_device(part: str) -> None:
    done = on_pretend_device(part)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    done = on_pretend_device("crossing")
    assert done.returncode != 0
    assert "tensors on two devices" in done.stderr
