"""Launch a module as users do: `accelerate launch` with one of the shipped files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.project.code import ROOT

ACCELERATE = ROOT / "configs" / "accelerate"
DEADLINE = 500.0  # seconds, for a machine that is very busy


def launched(
    launcher: str | Path, arguments: Sequence[str], *, module: str = "rlhf", **environment: str
) -> subprocess.Popen[str]:
    """Start a module under a launcher, by default the command line.

    Args:
        launcher: name of a file in configs/accelerate, or a path without its ending.
    """
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ACCELERATE / f"{launcher}.yaml"),
        "--main_process_port",
        "0",
        "-m",
        module,
        *arguments,
    ]
    cpu = (
        {} if Path(launcher).name.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    )  # it would turn DeepSpeed off
    return subprocess.Popen(
        command, env=clean() | cpu | environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def clean() -> dict[str, str]:
    """Return the environment without variables that an outer launcher has set."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RLHF", "RANK", "WORLD_SIZE"))}


def finished(process: subprocess.Popen[str]) -> str:
    """Return the output of a process, which must end with exit code 0."""
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out[-3000:]
    return out
