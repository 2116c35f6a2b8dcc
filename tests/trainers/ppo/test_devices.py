"""Test that PPO does not mix devices, on a simulated accelerator that rejects what a GPU rejects."""

from __future__ import annotations

import subprocess
import sys

from tests.project.code import ROOT


def on_pretend_device(part: str) -> subprocess.CompletedProcess[str]:
    """Run a part of `tests.on_pretend_device` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.on_pretend_device", part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_two_steps_of_ppo_mix_no_devices() -> None:
    done = on_pretend_device("ppo")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    done = on_pretend_device("crossing")
    assert done.returncode != 0
    assert "tensors on two devices" in done.stderr
