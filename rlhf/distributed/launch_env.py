"""What the launcher said, read from the environment, and the launches that are refused: those that would run as
something else than was asked for, with exit code 0."""

from __future__ import annotations

import atexit
import os
from pathlib import Path

import torch

from rlhf.config.env_vars import EXPECTED_PROCESSES, secret_names
from rlhf.errors import ConfigError, TrainingError

SECRETS_FILE = ".deepspeed_env"  # where DeepSpeed keeps the environment of other machines


def use_cpu() -> bool:
    """Whether to train on the CPU: no accelerator is there, or ACCELERATE_USE_CPU asks for it."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def under_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def check_launch(stage: str) -> None:
    """Refuse what a launcher set up and what would run as something else, or run and not save.

    Raises: ConfigError; TrainingError, as `check_world`.
    """
    check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    # accelerate says where to meet if several were asked for, also where it then starts one process without a word.
    launched, meeting = "ACCELERATE_MIXED_PRECISION" in os.environ, "MASTER_ADDR" in os.environ
    if launched and meeting and "WORLD_SIZE" not in os.environ:
        raise TrainingError(
            "accelerate was asked for several processes and started one",
            where="accelerate launch",
            do="use configs/accelerate/ddp.yaml (for a CPU too); for one process, unset MASTER_ADDR",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        check_fsdp(stage)
    if under_deepspeed():
        check_no_secrets(Path.cwd(), Path.home())


def check_fsdp(stage: str) -> None:
    """Refuse FSDP where it would not run, or not as asked for.

    Raises: ConfigError.
    """
    if use_cpu():
        raise ConfigError(
            "FSDP on a CPU would silently become plain data parallel, or train each process apart",
            where="--launcher fsdp2",
            do="use --launcher zero3 (which shards on a CPU too), or a machine with GPUs",
        )
    if stage == "ppo":
        raise ConfigError(
            "PPO does not sample from weights that FSDP has sharded",
            where="--launcher fsdp2",
            do="use --launcher zero3",
        )


def check_no_secrets(*folders: Path) -> None:
    """Refuse to run beside a `.deepspeed_env` that holds credentials: DeepSpeed would send them to other machines.

    Raises: ConfigError naming the variables (not their values).
    """
    for path in (folder / SECRETS_FILE for folder in folders):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found = secret_names(line.partition("=")[0].strip() for line in lines)
            if found:
                raise ConfigError(
                    "a file of DeepSpeed holds what looks like credentials",
                    found=", ".join(found),
                    where=str(path),
                    do="delete it: the launchers here do not need it",
                )


def check_world_size(processes: int) -> None:
    """Compare the processes that run with those that were asked for.

    Raises: TrainingError (some launch forms silently start one process).
    """
    for variable in ("WORLD_SIZE", EXPECTED_PROCESSES):
        wanted = os.environ.get(variable)
        if wanted is not None and int(wanted) != processes:
            raise TrainingError(
                "the launcher did not start the processes it was asked for",
                found=f"{processes} instead of {wanted}",
                where=variable,
                do="use a file of configs/accelerate with 'accelerate launch --config_file'",
            )


def get_rank() -> int:
    """This process's index, also before an Accelerator exists."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process writes files and prints."""
    return get_rank() == 0


def leave_process_groups_at_exit() -> None:
    """Have this process leave its groups of processes before the interpreter is taken down.

    For one that ends well, together with the others. gloo's threads may still hold tensors of the last message; freeing
    those after Python has gone aborts the process (pytorch/pytorch#190489), and a run that had finished would count as
    failed. One that fails does not wait for messages that may never come.
    """
    atexit.register(leave_process_groups)


def leave_process_groups() -> None:
    """Leave every group of processes, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def world_size() -> int:
    """World size as the launcher set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
