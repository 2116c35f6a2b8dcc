"""Run a stage under `accelerate launch`. Imports no torch, so that a wrong launcher is refused at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.config.load import read_yaml
from rlhf.errors import ConfigError
from rlhf.runs.stop import Stopped

LONGEST_END = 60.0
"""Seconds that processes of a launcher that has ended may take to end, too."""


def accelerate_config(name: str) -> Path:
    """The accelerate file that a launcher name means.

    Raises: ConfigError listing the known ones.
    """
    here = Path("configs/accelerate")
    package = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
    for candidate in (Path(name), here / f"{name}.yaml", package / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted({p.stem for folder in (here, package) for p in folder.glob("*.yaml")})
    raise ConfigError("no such launcher", found=name, where="--launcher", do=f"one of {', '.join(known)}, or a path")


def launch(launcher: str, arguments: list[str]) -> int:
    """Run ourselves under `accelerate launch`; returns its exit code.

    Raises: ConfigError if there is no such accelerate file or it is no YAML mapping.
    """
    path = accelerate_config(launcher)
    settings, _ = read_yaml(path)
    processes = int(settings.get("num_processes", 1))
    environment = dict(os.environ, RLHF_EXPECTED_PROCESSES=str(processes))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    port = ["--main_process_port", "0"] if int(settings.get("num_machines", 1)) == 1 else []
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *port, "-m", "rlhf", *arguments,
    ]  # fmt: skip
    return supervise(command, environment)


def supervise(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a launcher in a process group of its own, and pass SIGTERM and Ctrl-C on to all of it.

    Some launchers die of SIGTERM and leave their processes behind, and none hands on how those ended: after SIGTERM the
    exit code is that of a stage that was told to end.
    """
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    told: list[int] = []

    def tell(number: int, *_: Any) -> None:
        told.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
        _wait_for_group(process.pid, told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGTERM in told and code:
        raise Stopped
    if signal.SIGINT in told and code:
        raise KeyboardInterrupt
    return code


def _wait_for_group(group: int, told: list[int]) -> None:
    """After a signal the launcher may end before the stage has saved."""
    end = time.monotonic() + LONGEST_END
    while told and time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
