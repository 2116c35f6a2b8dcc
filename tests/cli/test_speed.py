"""`import rlhf`, help and configuration errors take less than half a second: nothing heavy is imported early."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import app
from tests.conftest import Run

LIMIT = 0.5  # seconds of processor time, user and system
HEAVY = ("torch", "numpy", "transformers", "datasets", "trl", "accelerate", "matplotlib", "sklearn")


def processor_seconds(arguments: list[str], cwd: Path) -> tuple[float, int]:
    """Return the processor time of a Python process, which is less noisy than the clock, and its exit code."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-c", "import rlhf"], 0),
        (["-m", "rlhf", "--help"], 0),
        (["-m", "rlhf", "ppo", "--help"], 0),
        (["-m", "rlhf", "sft", "sft.yaml", "optim.epoch=1"], 2),
    ],
)
def test_import_help_and_configuration_errors_are_instant(arguments: list[str], code: int, place: Path) -> None:
    runs = [processor_seconds(arguments, place) for _ in range(3)]
    assert [c for _, c in runs] == [code] * 3
    assert statistics.median(seconds for seconds, _ in runs) < LIMIT


def imported(code: str) -> set[str]:
    """Return the heavy packages that some code loads in a process of its own."""
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(HEAVY) & set(done.stdout.split())


@pytest.mark.slow
def test_command_line_and_configuration_import_nothing_heavy() -> None:
    assert imported("import rlhf") == set()
    assert imported("import rlhf.cli.main, rlhf.config.load, rlhf.config.show, rlhf.launch.launcher") == set()
    assert "numpy" in imported("import rlhf.evaluation.stats")  # the probe sees what is there


def command_names() -> list[str]:
    """Every command, those of `rlhf data` included."""
    from typer.main import get_command

    found: list[str] = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        found += [f"{name} {inner}" for inner in getattr(command, "commands", ())] or [name]
    return found


@pytest.mark.parametrize("command", command_names())
def test_the_help_of_every_command_has_an_example(command: str, call_cli: Run) -> None:
    code, out, err = call_cli([*command.split(), "--help"])
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: rlhf {command} ")
    assert f"\n    rlhf {command} " in out or f"\n    rlhf {command}\n" in out


def test_without_arguments_the_help_is_shown(call_cli: Run) -> None:
    code, out, err = call_cli([])
    assert code == 2
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        assert stage in out + err
