"""Run a stage under `accelerate launch`. Imports no torch, so that a wrong launcher is refused at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rlhf.config.load import read_yaml
from rlhf.errors import ConfigError


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
    return subprocess.run(command, env=environment, check=False).returncode
