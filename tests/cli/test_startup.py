"""`import rlhf`, help and configuration errors load none of the heavy libraries, so that they are instant.

`python -m tests.bench.startup` measures their time: under half a second each.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import app
from tests.bench.startup import COMMANDS
from tests.conftest import Run

HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "datasets",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "matplotlib",
    "sklearn",
}


def imported_modules(arguments: list[str], cwd: Path) -> tuple[int, set[str]]:
    """Return the exit code of a Python process, and the names of all modules that it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=cwd, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, {line.split("|")[-1].strip() for line in lines}


@pytest.mark.parametrize(("arguments", "code"), COMMANDS)
def test_import_help_and_configuration_errors_load_nothing_heavy(arguments: list[str], code: int, place: Path) -> None:
    found, modules = imported_modules(arguments, place)
    assert found == code
    assert "rlhf" in modules
    assert HEAVY & modules == set()


def test_the_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    code, modules = imported_modules(["-c", "import rlhf.evaluation.stats"], tmp_path)
    assert code == 0
    assert HEAVY & modules == {"numpy"}


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
