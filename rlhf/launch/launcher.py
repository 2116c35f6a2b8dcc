"""Run a stage under `accelerate launch`. This module imports no torch, so invalid launches are rejected quickly."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config.env_vars import (
    DEFAULT_TIMEOUT,
    EXPECTED_PROCESSES,
    LAUNCH_OPTIONS,
    RENDEZVOUS_SECONDS,
    TIMEOUT_VARIABLE,
    timeout_seconds,
)
from rlhf.config.load import read_yaml
from rlhf.errors import ConfigError, combine_errors
from rlhf.launch.network import interface_towards
from rlhf.launch.supervisor import JobResult, report_job, supervise

MULTI_PROCESS_TYPES = ("MULTI_GPU", "DEEPSPEED", "FSDP")  # values of distributed_type that start several processes
MACHINES, RANK, ADDRESS, PORT = "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class LaunchOptions:
    """Options of the command line about processes; None means the value of the accelerate file."""

    launcher: str | None = None
    processes: int | None = None  # over all machines
    machines: int | None = None
    machine_rank: int | None = None
    ip: str | None = None  # of machine 0
    port: int | None = None
    max_restarts: int = 0
    timeout: int | None = None  # seconds

    @property
    def given(self) -> bool:
        """Whether any option other than the launcher was given."""
        return self != LaunchOptions(launcher=self.launcher)

    def flags(self) -> list[str]:
        """Return the options as words of a command line, for the command that resumes the run."""
        named = {
            "launcher": self.launcher,
            "num-processes": self.processes,
            "num-machines": self.machines,
            "machine-rank": self.machine_rank,
            "main-process-ip": self.ip,
            "main-process-port": self.port,
            "max-restarts": self.max_restarts or None,
            "timeout": self.timeout,
        }
        return [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class LaunchPlan:
    """Resolved and checked settings of a launch."""

    path: Path
    settings: Mapping[str, Any]
    processes: int
    machines: int
    machine_rank: int
    ip: str | None
    port: int | None

    @property
    def kind(self) -> str:
        """The `distributed_type` of accelerate."""
        return str(self.settings.get("distributed_type", "NO"))

    def command(self, arguments: list[str], attempt: int = 0, timeout: int = DEFAULT_TIMEOUT) -> list[str]:
        """Return the command that starts the processes of this machine.

        Args:
            arguments: the command line after `rlhf`.
            attempt: number of restarts so far; it is added to the port, because the store behind the previous port may
                still hold the addresses of ended processes.
            timeout: seconds that machines wait for each other.
        """
        port = 0 if self.port is None else self.port + attempt
        multi_machine_flags = [
            "--num_machines",
            str(self.machines),
            "--machine_rank",
            str(self.machine_rank),
            "--main_process_ip",
            str(self.ip),
            "--rdzv_conf",
            f"timeout={max(timeout, RENDEZVOUS_SECONDS)}",
        ]
        if self.kind == "DEEPSPEED":  # DeepSpeed's other launchers write the environment to a file
            multi_machine_flags += ["--deepspeed_multinode_launcher", "standard"]
        return [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(self.path),
            "--num_processes",
            str(self.processes),
            *(multi_machine_flags if self.machines > 1 else []),
            "--main_process_port",
            str(port),
            "-m",
            "rlhf",
            *arguments,
        ]


def accelerate_config(name: str) -> Path:
    """Return the path of the accelerate file for a launcher name, or the path itself.

    Raises: ConfigError listing the known launchers.
    """
    local = Path("configs/accelerate")
    package = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
    for candidate in (Path(name), local / f"{name}.yaml", package / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted({p.stem for folder in (local, package) for p in folder.glob("*.yaml")})
    raise ConfigError(
        "no such launcher", found=name, where="--launcher", do=f"choose one of {', '.join(known)}, or give a path"
    )


def resolve_launch(options: LaunchOptions, environment: Mapping[str, str] = os.environ) -> LaunchPlan:
    """Resolve and check the settings of a launch.

    For a launch on several machines, settings that no flag gives are read from the environment: NNODES or
    SLURM_NNODES, NODE_RANK or SLURM_NODEID, MASTER_ADDR, MASTER_PORT.
    Raises: ConfigError listing every problem, among them a launch that would start fewer processes than requested.
    """
    assert options.launcher is not None
    path = accelerate_config(options.launcher)
    settings, _ = read_yaml(path)
    problems: list[str] = []

    def number(flag: str, given: int | None, default: Any, *variables: str) -> int:
        texts = [(flag, given), *((name, environment.get(name)) for name in variables), (str(path), default)]
        where, value = next((name, value) for name, value in texts if value is not None)
        try:
            return int(value)
        except (TypeError, ValueError):
            problems.append(str(ConfigError("expected a whole number", found=repr(value), where=where)))
            return 1

    multi_machine = options.machines is not None or int(settings.get("num_machines", 1) or 1) > 1
    variables = (MACHINES, "SLURM_NNODES") if multi_machine else ()
    machines = number("--num-machines", options.machines, settings.get("num_machines", 1), *variables)
    variables = (RANK, "SLURM_NODEID") if machines > 1 else ()
    rank = number("--machine-rank", options.machine_rank, settings.get("machine_rank") or 0, *variables)
    processes = number("--num-processes", options.processes, settings.get("num_processes", 1))
    ip, port = options.ip, options.port
    if machines > 1:
        ip = ip or environment.get(ADDRESS) or settings.get("main_process_ip")
        port = number("--main-process-port", port, settings.get("main_process_port") or 29500, PORT)
    plan = LaunchPlan(path, settings, processes, machines, rank, ip, port)
    error = combine_errors(ConfigError, [*problems, *(str(problem) for problem in _find_problems(plan))])
    if error is not None:
        raise error
    return plan


def _find_problems(plan: LaunchPlan) -> Iterator[ConfigError]:
    """Yield an error for each reason why a launch is impossible or would go wrong."""
    kind, processes, machines = plan.kind, plan.processes, plan.machines
    if processes < 1 or machines < 1:
        yield ConfigError(
            "expected at least one process and one machine",
            found=f"{processes} and {machines}",
            where="--num-processes, --num-machines",
        )
    elif processes % machines:
        yield ConfigError(
            "every machine runs the same number of processes, and --num-processes counts over all of them",
            found=f"{processes} processes on {machines} machines",
            where="--num-processes",
            do=f"give a multiple of {machines}",
        )
    if machines >= 1 and not 0 <= plan.machine_rank < machines:
        yield ConfigError(
            f"machines are numbered from 0 to {machines - 1}",
            found=str(plan.machine_rank),
            where="--machine-rank",
            do="give each machine a different number in this range, or raise --num-machines",
        )
    if machines > 1 and not plan.ip:
        yield ConfigError(
            f"a launch on {machines} machines needs the address of machine 0",
            found="no address",
            where="--main-process-ip",
            do=f"give this address (or set {ADDRESS}), the same on every machine",
        )
    if processes > 1 and kind not in MULTI_PROCESS_TYPES:
        yield ConfigError(
            f"distributed_type {kind} starts only one process, without a warning",
            found=f"{processes} processes",
            where=str(plan.path),
            do="use --launcher ddp (also for several processes on a CPU), or zero2",
        )
    if processes == 1 and kind == "MULTI_GPU":
        yield ConfigError(
            "data-parallel training needs at least two processes",
            found="1",
            where="--num-processes",
            do="use --launcher single or cpu for one process",
        )
    deepspeed_launcher = (plan.settings.get("deepspeed_config") or {}).get("deepspeed_multinode_launcher", "standard")
    if kind == "DEEPSPEED" and machines > 1 and deepspeed_launcher != "standard":
        yield ConfigError(
            "this DeepSpeed launcher writes the whole environment, including access tokens, to .deepspeed_env",
            found=f"deepspeed_multinode_launcher: {deepspeed_launcher}",
            where=str(plan.path),
            do="set it to standard, and start the command on every machine (configs/launch has scripts)",
        )


def check_stage_launch(stage: str, config: Any, plan: LaunchPlan) -> None:
    """Check that a stage can run under a launch.

    Raises: ConfigError if the processes cannot share the batch equally, or the stage does not support the engine.
    """
    check_batch_shared(config, plan.processes)
    if plan.kind == "FSDP":
        from rlhf.distributed.launch_env import check_fsdp

        check_fsdp(stage)


def check_batch_shared(config: Any, processes: int) -> None:
    """Check that the processes can share the batch equally. Raises: ConfigError if they cannot."""
    if hasattr(config, "ppo"):
        config.ppo.check_shared(processes)
    elif hasattr(config, "optim"):
        config.optim.accumulation(processes)


def launch_stage(options: LaunchOptions, stage: str, arguments: list[str], *, output: str | None = None) -> int:
    """Run a stage under `accelerate launch`; after a failure restart it up to `max_restarts` times.

    Args:
        options: launch options; the launcher must be set.
        stage: name of the stage's command.
        arguments: the command line after `rlhf STAGE`.
        output: the stage's run directory, which contains its checkpoints.
    Returns: the exit code of the last attempt; a message about its failure has been printed.
    Raises: ConfigError as `resolve_launch`.
    """
    plan = resolve_launch(options)
    environment = dict(os.environ)
    if options.timeout is not None:
        environment[TIMEOUT_VARIABLE] = str(options.timeout)
    timeout = timeout_seconds(environment)
    environment[EXPECTED_PROCESSES] = str(plan.processes)
    if plan.machines > 1 and INTERFACE not in environment and (found := interface_towards(str(plan.ip))):
        environment[INTERFACE] = found
    local = plan.processes // plan.machines
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    multi_machine = plan.machines > 1
    if multi_machine:  # the command to resume must also work in a shell without these environment variables
        options = replace(
            options,
            processes=plan.processes,
            machines=plan.machines,
            machine_rank=plan.machine_rank,
            ip=plan.ip,
            port=plan.port,
        )
    environment[LAUNCH_OPTIONS] = json.dumps(asdict(options))
    resume_command = "rlhf " + shlex.join([stage, *arguments, *options.flags()])
    join_timeout = max(timeout, RENDEZVOUS_SECONDS) + RENDEZVOUS_SECONDS / 2
    result = JobResult(0)
    for attempt in range(options.max_restarts + 1):
        command = plan.command([stage, *arguments], attempt, timeout)
        result = supervise(command, environment, timeout, join_timeout if multi_machine else None)
        if result.exit_code == 0:
            return 0
        restarts_left = options.max_restarts - attempt
        restart = restarts_left > 0 and result.may_restart
        report_job(
            result,
            Path(output) if output else None,
            resume_command,
            restarts_left=restarts_left if restart else 0,
            rendezvous=f"{plan.ip}:{plan.port}" if multi_machine else "",
            writes_checkpoints=plan.machine_rank == 0,
        )
        if not restart:
            break
    return result.exit_code
