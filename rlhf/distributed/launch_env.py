"""Read the launcher's environment variables, and reject launches that would silently run otherwise than requested."""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path

import torch

from rlhf.config.env_vars import EXPECTED_PROCESSES, secret_names
from rlhf.errors import ConfigError, TrainingError

SECRETS_FILE = ".deepspeed_env"  # environment variables that DeepSpeed's launcher sends to the other machines


def use_cpu() -> bool:
    """Return whether to train on the CPU: no GPU is available, or ACCELERATE_USE_CPU is set."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def under_deepspeed() -> bool:
    """Return whether the launcher requested DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def weight_sharding() -> str | None:
    """Return the engine by which the launcher shards weights over processes, as text; None if each holds them whole."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return "FSDP"
    if not under_deepspeed():
        return None
    file = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if file.is_file():
        stage = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    else:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return "DeepSpeed ZeRO-3" if str(stage) == "3" else None


def local_rank() -> int:
    """Return the number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_launch(stage: str) -> None:
    """Reject a launch that would train otherwise than requested, or train and be unable to save.

    Raises: ConfigError as `check_fsdp` and `check_no_secrets`; TrainingError if the number of processes is wrong.
    """
    check_world_size(int(os.environ.get("WORLD_SIZE", "1")))
    # If several processes are requested, accelerate sets MASTER_ADDR even where it then silently starts only one.
    launched, has_address = "ACCELERATE_MIXED_PRECISION" in os.environ, "MASTER_ADDR" in os.environ
    if launched and has_address and "WORLD_SIZE" not in os.environ:
        raise TrainingError(
            "several processes were requested, but accelerate started one",
            where="accelerate launch",
            do="use configs/accelerate/ddp.yaml (also on a CPU); for one process, unset MASTER_ADDR",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        check_fsdp(stage)
    if under_deepspeed():
        check_no_secrets(Path.cwd(), Path.home())


def check_fsdp(stage: str) -> None:
    """Reject FSDP on a CPU and for PPO.

    Raises: ConfigError.
    """
    if use_cpu():
        raise ConfigError(
            "FSDP on a CPU would silently become plain data parallelism, or train each process separately",
            where="--launcher fsdp2",
            do="use --launcher zero3 (which also shards on a CPU), or a machine with GPUs",
        )
    if stage == "ppo":
        raise ConfigError(
            "PPO cannot sample from weights that FSDP has sharded",
            where="--launcher fsdp2",
            do="use --launcher zero3",
        )


def check_no_secrets(*folders: Path) -> None:
    """Reject a launch if a folder has a `.deepspeed_env` with credentials: DeepSpeed would send them to other machines.

    Raises: ConfigError that names the variables (not their values).
    """
    for path in (folder / SECRETS_FILE for folder in folders):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found = secret_names(line.partition("=")[0].strip() for line in lines)
            if found:
                raise ConfigError(
                    "DeepSpeed would send variables that look like credentials to the other machines",
                    found=", ".join(found),
                    where=str(path),
                    do="delete this file: the launchers in configs/ do not need it",
                )


def check_world_size(processes: int) -> None:
    """Compare the number of running processes with the number that was requested.

    Raises: TrainingError if they differ: some forms of launch silently start one process.
    """
    for variable in ("WORLD_SIZE", EXPECTED_PROCESSES):
        wanted = os.environ.get(variable)
        if wanted is not None and int(wanted) != processes:
            raise TrainingError(
                "the launcher did not start the requested number of processes",
                found=f"{processes} instead of {wanted}",
                where=variable,
                do="pass a file of configs/accelerate to 'accelerate launch --config_file'",
            )


def get_rank() -> int:
    """Return this process's rank from the environment, also before an Accelerator exists."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return whether this process is rank 0, which writes files and prints."""
    return get_rank() == 0


def leave_process_groups_at_exit() -> None:
    """Destroy this process's groups at exit, before the interpreter is finalized.

    Call it in a process that ends successfully, together with the others. Threads of gloo may still hold tensors of the
    last message, and freeing them after the interpreter is gone aborts the process (pytorch/pytorch#190489), so that a
    finished run would count as failed. A process that fails must not call it: it would wait for messages that may
    never arrive.
    """
    atexit.register(leave_process_groups)


def leave_process_groups() -> None:
    """Destroy all process groups, if `torch.distributed` is initialized."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def world_size() -> int:
    """Return the world size that the launcher set."""
    return int(os.environ.get("WORLD_SIZE", "1"))
