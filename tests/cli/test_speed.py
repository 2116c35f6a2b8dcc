"""Help and configuration errors come at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run

LIMIT = 0.5  # seconds of processor time, user and system
HEAVY = ("torch", "numpy", "transformers", "datasets", "trl", "accelerate", "matplotlib", "sklearn")


def processor_seconds(arguments: list[str], cwd: Path) -> tuple[float, int]:
    """What a command used, which is less noisy than the clock on a busy machine, and its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code"), [("--help", 0), ("ppo --help", 0), ("sft sft.yaml optim.epoch=1", 2)])
def test_help_and_configuration_errors_are_instant(command: str, code: int, place: Path) -> None:
    runs = [processor_seconds(command.split(), place) for _ in range(3)]
    assert [c for _, c in runs] == [code] * 3
    assert statistics.median(seconds for seconds, _ in runs) < LIMIT


def imported(code: str) -> set[str]:
    """The heavy packages that are loaded after some code ran in a process of its own."""
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(HEAVY) & set(done.stdout.split())


@pytest.mark.slow
def test_command_line_and_configuration_import_nothing_heavy() -> None:
    assert imported("import rlhf.cli.main, rlhf.config.load, rlhf.config.show, rlhf.launch.launcher") == set()
    assert "numpy" in imported("import rlhf.evaluation.stats")  # the probe sees what is there


@pytest.mark.parametrize(
    "command",
    "pretrain sft reward ppo evaluate run show chat generate data".split(),  # noqa: SIM905
)
def test_every_command_has_help(command: str, call_cli: Run) -> None:
    code, out, err = call_cli([command, "--help"])
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: rlhf {command} ")
    assert len(out.splitlines()) > 5


def test_without_arguments_the_help_is_shown(call_cli: Run) -> None:
    code, out, err = call_cli([])
    assert code == 2
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        assert stage in out + err
