"""Run a stage under `accelerate launch`. Imports no torch, so that a wrong launcher is refused at once."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config.env_vars import (
    DEFAULT_TIMEOUT,
    EXPECTED_PROCESSES,
    RENDEZVOUS_SECONDS,
    TIMEOUT_VARIABLE,
    timeout_seconds,
)
from rlhf.config.load import read_yaml
from rlhf.errors import ConfigError, combine_errors
from rlhf.launch.network import interface_towards
from rlhf.launch.supervisor import JobResult, report_job, supervise

MULTI_PROCESS_TYPES = ("MULTI_GPU", "DEEPSPEED", "FSDP")  # types that start one process each for a number of them
MACHINES, RANK, ADDRESS, PORT = "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says about processes; None = as the accelerate file says."""

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
        """Whether anything but a launcher was given."""
        return self != LaunchOptions(launcher=self.launcher)

    def flags(self) -> list[str]:
        """As they are typed, for the command that resumes."""
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
    """A launch, resolved and found possible."""

    path: Path
    settings: Mapping[str, Any]
    processes: int
    machines: int
    machine_rank: int
    ip: str | None
    port: int | None

    @property
    def kind(self) -> str:
        """accelerate's distributed_type."""
        return str(self.settings.get("distributed_type", "NO"))

    def command(self, arguments: list[str], attempt: int = 0, seconds: int = DEFAULT_TIMEOUT) -> list[str]:
        """The command; another attempt meets on another port, since the old one may still hold dead addresses.

        Args:
            seconds: how long machines wait for each other.
        """
        port = 0 if self.port is None else self.port + attempt
        several = [
            "--num_machines",
            str(self.machines),
            "--machine_rank",
            str(self.machine_rank),
            "--main_process_ip",
            str(self.ip),
            "--rdzv_conf",
            f"timeout={max(seconds, RENDEZVOUS_SECONDS)}",
        ]
        if self.kind == "DEEPSPEED":
            several += ["--deepspeed_multinode_launcher", "standard"]  # the others write the environment to a file
        return [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(self.path),
            "--num_processes",
            str(self.processes),
            *(several if self.machines > 1 else []),
            "--main_process_port",
            str(port),
            "-m",
            "rlhf",
            *arguments,
        ]


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


def resolve_launch(options: LaunchOptions, environment: Mapping[str, str] = os.environ) -> LaunchPlan:
    """What would be started.

    Of several machines, what no flag says is read from the environment: NNODES or SLURM_NNODES, NODE_RANK or
    SLURM_NODEID, MASTER_ADDR, MASTER_PORT.
    Raises: ConfigError naming every problem: nothing is started wrong, or with fewer processes than were asked for.
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

    several = options.machines is not None or int(settings.get("num_machines", 1) or 1) > 1
    from_environment = (MACHINES, "SLURM_NNODES") if several else ()
    machines = number("--num-machines", options.machines, settings.get("num_machines", 1), *from_environment)
    from_environment = (RANK, "SLURM_NODEID") if machines > 1 else ()
    rank = number("--machine-rank", options.machine_rank, settings.get("machine_rank") or 0, *from_environment)
    processes = number("--num-processes", options.processes, settings.get("num_processes", 1))
    ip, port = options.ip, options.port
    if machines > 1:
        ip = ip or environment.get(ADDRESS) or settings.get("main_process_ip")
        port = number("--main-process-port", port, settings.get("main_process_port") or 29500, PORT)
    plan = LaunchPlan(path, settings, processes, machines, rank, ip, port)
    raised = combine_errors(ConfigError, [*problems, *(str(error) for error in _impossible(plan))])
    if raised is not None:
        raise raised
    return plan


def _impossible(plan: LaunchPlan) -> Iterator[ConfigError]:
    """What is wrong with a launch, in words."""
    kind, processes, machines = plan.kind, plan.processes, plan.machines
    if processes < 1 or machines < 1:
        yield ConfigError(
            "expected one process and one machine at least",
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
            do="give each machine a number of its own, or raise --num-machines",
        )
    if machines > 1 and not plan.ip:
        yield ConfigError(
            f"{machines} machines have to find each other",
            found="no address",
            where="--main-process-ip",
            do=f"give the address of machine 0 (or set {ADDRESS}), the same on every machine",
        )
    if processes > 1 and kind not in MULTI_PROCESS_TYPES:
        yield ConfigError(
            f"distributed_type {kind} starts one process, in silence",
            found=f"{processes} processes",
            where=str(plan.path),
            do="use --launcher ddp (also for several processes on a CPU), or zero2",
        )
    if processes == 1 and kind == "MULTI_GPU":
        yield ConfigError(
            "data parallel needs two processes",
            found="1",
            where="--num-processes",
            do="use --launcher single or cpu for one",
        )
    how = (plan.settings.get("deepspeed_config") or {}).get("deepspeed_multinode_launcher", "standard")
    if kind == "DEEPSPEED" and machines > 1 and how != "standard":
        yield ConfigError(
            "this way to several machines writes the whole environment, tokens included, to .deepspeed_env",
            found=f"deepspeed_multinode_launcher: {how}",
            where=str(plan.path),
            do="set it to standard, and start the command on every machine (configs/launch has scripts)",
        )


def check_stage_launch(stage: str, config: Any, plan: LaunchPlan) -> None:
    """What a stage and a launch must agree on.

    Raises: ConfigError for a batch that the processes cannot share, and for an engine that would not run.
    """
    check_batch_shared(config, plan.processes)
    if plan.kind == "FSDP":
        from rlhf.distributed.launch_env import check_fsdp

        check_fsdp(stage)


def check_batch_shared(config: Any, processes: int) -> None:
    """Raises: ConfigError for a batch that the processes cannot share."""
    if hasattr(config, "ppo"):
        config.ppo.check_shared(processes)
    elif hasattr(config, "optim"):
        config.optim.accumulation(processes)


def launch_stage(options: LaunchOptions, stage: str, arguments: list[str], *, output: str | None = None) -> int:
    """Run a stage of ours under `accelerate launch`, and again after a failure as often as is allowed.

    Args:
        arguments: what follows `rlhf STAGE`.
        output: the stage's run directory, where its checkpoints lie.
    Returns: the exit code of the last attempt; its failure has been explained.
    Raises: ConfigError as `resolve_launch`.
    """
    plan = resolve_launch(options)
    environment = dict(os.environ)
    if options.timeout is not None:
        environment[TIMEOUT_VARIABLE] = str(options.timeout)
    seconds = timeout_seconds(environment)
    environment[EXPECTED_PROCESSES] = str(plan.processes)
    if plan.machines > 1 and INTERFACE not in environment and (found := interface_towards(str(plan.ip))):
        environment[INTERFACE] = found
    local = plan.processes // plan.machines
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    several = plan.machines > 1
    if several:  # whatever the environment said: the command is to work wherever it is pasted
        options = replace(
            options,
            processes=plan.processes,
            machines=plan.machines,
            machine_rank=plan.machine_rank,
            ip=plan.ip,
            port=plan.port,
        )
    resume = "rlhf " + shlex.join([stage, *arguments, *options.flags()])
    ended = JobResult(0)
    for attempt in range(options.max_restarts + 1):
        command, meeting = (
            plan.command([stage, *arguments], attempt, seconds),
            max(seconds, RENDEZVOUS_SECONDS) + RENDEZVOUS_SECONDS / 2,
        )
        ended = supervise(command, environment, seconds, meeting if several else None)
        if ended.code == 0:
            return 0
        left = options.max_restarts - attempt
        again = left > 0 and ended.may_restart
        report_job(
            ended,
            Path(output) if output else None,
            resume,
            restarts_left=left if again else 0,
            meeting=f"{plan.ip}:{plan.port}" if several else "",
            writes=plan.machine_rank == 0,
        )
        if not again:
            break
    return ended.code
