"""Launches are resolved or rejected with an explanation before any process starts; failed jobs end in time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.checkpointing.files import MANIFEST
from rlhf.config.env_vars import HEARTBEAT_FOLDER, secret_names, timeout_seconds
from rlhf.distributed.heartbeat import STUCK_EXIT_CODE, Watchdog, read_heartbeats, write_heartbeat
from rlhf.distributed.launch_env import check_fsdp, check_launch, check_no_secrets
from rlhf.errors import ConfigError
from rlhf.launch.launcher import LaunchOptions, resolve_launch
from rlhf.launch.supervisor import JobResult, newest_checkpoint_path, report_job, supervise
from tests.conftest import Run
from tests.project.code import ROOT

NAMES = ("cpu", "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "multinode")


def refused(options: LaunchOptions, environment: dict[str, str] | None = None) -> str:
    """Return the error message of a launch that is rejected."""
    with pytest.raises(ConfigError) as caught:
        resolve_launch(options, environment or {})
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_launcher_resolves(name: str) -> None:
    plan = resolve_launch(LaunchOptions(name, ip="10.0.0.1" if name == "multinode" else None), {})
    assert plan.path.resolve() == ROOT / "configs" / "accelerate" / f"{name}.yaml"
    assert plan.processes == {"cpu": 1, "single": 1, "multinode": 16}.get(name, 2)
    command = plan.command(["sft", "x.yaml"])
    assert command[command.index("--num_processes") + 1] == str(plan.processes)
    assert ("--machine_rank" in command) is (name == "multinode")


def test_every_accelerate_file_is_tested() -> None:
    assert {p.stem for p in (ROOT / "configs" / "accelerate").glob("*.yaml")} == set(NAMES)


def test_flags_go_to_accelerate() -> None:
    options = LaunchOptions("zero3", processes=8, machines=2, machine_rank=1, ip="10.0.0.1", port=1234)
    command = resolve_launch(options, {}).command(["ppo", "c.yaml", "seed=2"], timeout=600)
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    words = dict(zip(command[3::2], command[4::2], strict=False))
    assert (words["--num_processes"], words["--num_machines"], words["--machine_rank"]) == ("8", "2", "1")
    assert (words["--main_process_ip"], words["--main_process_port"]) == ("10.0.0.1", "1234")
    assert (words["--deepspeed_multinode_launcher"], words["--rdzv_conf"]) == ("standard", "timeout=600")
    assert command[-5:] == ["-m", "rlhf", "ppo", "c.yaml", "seed=2"]
    again = resolve_launch(options, {}).command(["ppo"], attempt=2)
    assert again[again.index("--main_process_port") + 1] == "1236"


@pytest.mark.parametrize(
    "environment",
    [
        {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
        {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
    ],
)
def test_ranks_come_from_the_environment(environment: dict[str, str]) -> None:
    plan = resolve_launch(LaunchOptions("multinode"), environment)
    assert (plan.machines, plan.machine_rank, plan.ip, plan.port) == (4, 3, "a", 7)
    assert (
        resolve_launch(LaunchOptions("multinode", machine_rank=0, ip="b"), environment).machine_rank == 0
    )  # a flag takes precedence
    assert (
        resolve_launch(LaunchOptions("ddp"), environment).machines == 1
    )  # the variables are not read for a launch on one machine


@pytest.mark.parametrize(
    ("options", "expected_text"),
    [
        (LaunchOptions("multinode", machine_rank=2, ip="a"), "numbered from 0 to 1"),
        (LaunchOptions("multinode", machine_rank=-1, ip="a"), "numbered from 0 to 1"),
        (LaunchOptions("multinode"), "needs the address of machine 0"),
        (LaunchOptions("multinode", processes=3, ip="a"), "give a multiple of 2"),
        (LaunchOptions("single", processes=2), "starts only one process, without a warning"),
        (LaunchOptions("cpu", processes=2), "use --launcher ddp"),
        (LaunchOptions("ddp", processes=1), "data-parallel training needs at least two processes"),
        (LaunchOptions("ddp", processes=0), "at least one process and one machine"),
        (LaunchOptions("dpp"), "no such launcher"),
    ],
)
def test_a_wrong_launch_is_refused(options: LaunchOptions, expected_text: str) -> None:
    assert expected_text in refused(options)


def test_all_problems_are_reported_at_once() -> None:
    message = refused(LaunchOptions("multinode", processes=3), {"NODE_RANK": "five", "MASTER_PORT": "x"})
    assert "4 problems" in message
    for expected_text in ("'five'", "'x'", "multiple of 2", "address of machine 0"):
        assert expected_text in message


@pytest.mark.parametrize("how", ["pdsh", "nossh"])
def test_a_deepspeed_launcher_that_writes_the_environment_to_a_file_is_refused(how: str, tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "configs/accelerate/multinode.yaml").read_text(encoding="utf-8"))
    settings["deepspeed_config"]["deepspeed_multinode_launcher"] = how
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "including access tokens" in refused(LaunchOptions(str(path), ip="a"))


def test_several_processes_of_a_type_that_starts_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n", encoding="utf-8")
    assert "MULTI_CPU starts only one process, without a warning" in refused(LaunchOptions(str(path)))


def test_a_file_of_credentials_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("PATH=/bin\nHF_TOKEN=hf_secret\nTOKENIZERS_PARALLELISM=false\n")
    with pytest.raises(ConfigError) as caught:
        check_no_secrets(tmp_path)
    assert "HF_TOKEN" in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert "TOKENIZERS" not in str(caught.value)
    (tmp_path / ".deepspeed_env").write_text("PATH=/bin\n")
    check_no_secrets(tmp_path)


def test_names_of_variables_that_look_like_credentials() -> None:
    names = [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "MY_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "PATH",
        "TOKENIZERS_PARALLELISM",
        "KEYS",
    ]
    assert secret_names(names) == ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_PASSWORD", "WANDB_API_KEY"]


def test_fsdp_is_refused_on_a_cpu_and_for_ppo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="silently become plain data parallel"):
        check_fsdp("sft")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="zero3"):
        check_launch("sft")
    monkeypatch.setattr("rlhf.distributed.launch_env.use_cpu", lambda: False)
    check_fsdp("sft")
    with pytest.raises(ConfigError, match="PPO cannot sample"):
        check_fsdp("ppo")


@pytest.mark.parametrize(
    ("words", "expected_text"),
    [
        ("--launcher fsdp2", "use --launcher zero3"),
        ("--launcher ddp --num-processes 3", "nearest: 6, 9"),
        ("--num-processes 2", "add --launcher"),
        ("--launcher multinode --machine-rank 5 --main-process-ip a", "numbered from 0 to 1"),
    ],
)
def test_the_command_line_starts_nothing_wrong(
    words: str, expected_text: str, call_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("rlhf.launch.launcher.supervise", lambda *_: pytest.fail("it started"))
    path = tmp_path / "sft.yaml"
    path.write_text(
        "output_dir: out\nmodel: {path: m}\ndata: {train: [{path: d}]}\noptim: {batch_size: 8}\n", encoding="utf-8"
    )
    code, _, err = call_cli(["sft", str(path), *words.split()], cwd=tmp_path)
    assert code == 2
    assert expected_text in err


def test_the_timeout_is_a_number_of_seconds() -> None:
    assert timeout_seconds({}) == 1800
    assert timeout_seconds({"RLHF_TIMEOUT": "20"}) == 20
    for wrong in ("soon", "0", "-3"):
        with pytest.raises(ConfigError, match="whole seconds"):
            timeout_seconds({"RLHF_TIMEOUT": wrong})


# --- jobs that end early; their processes do nothing but write heartbeats ------------------------------------------

JOB = """
import os, signal, subprocess, sys, time
from rlhf.distributed.heartbeat import write_heartbeat
kind = sys.argv[1]
if len(sys.argv) == 2:  # the launcher: two ranks; fails as soon as one does, but does not end the other
    command = [sys.executable, __file__, kind]
    ranks = [subprocess.Popen([*command, r], env=os.environ | {"RANK": r}) for r in "01"]
    codes = [r.wait() for r in ranks]
    sys.exit(int(any(codes)))
write_heartbeat("running", step=7)
time.sleep(0.5)
if sys.argv[2] == "1":
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "refused":
        write_heartbeat("refused", words="ConfigError: no such thing")
        sys.exit(2)
    if kind == "broken":
        write_heartbeat("failed", words="ValueError: planted")
        sys.exit(1)
elif kind in ("killed", "refused", "broken"):
    time.sleep(600)  # waits for the other, as in a reduction
write_heartbeat("finished")
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str, float], JobResult]:
    """job(kind, timeout) -> result of a job of two processes of which rank 1 fails in the given way."""
    path = tmp_path / "job.py"
    path.write_text(JOB, encoding="utf-8")
    return lambda kind, timeout: supervise(
        [sys.executable, str(path), kind], {"PYTHONPATH": str(ROOT), "PATH": ""}, timeout
    )


def test_a_job_that_ends_well(job: Any) -> None:
    assert job("well", 5) == JobResult(0)


@pytest.mark.parametrize(
    ("kind", "without_message", "again"), [("killed", True, True), ("broken", False, True), ("refused", False, False)]
)
def test_a_dead_rank_ends_the_job_in_time(kind: str, without_message: bool, again: bool, job: Any) -> None:
    started_at = time.monotonic()
    result = job(kind, 2)
    assert time.monotonic() - started_at < 20
    assert result.exit_code != 0
    assert result.failed_process is not None
    assert (result.failed_process.rank, result.without_message, result.may_restart) == (1, without_message, again)
    assert result.failed_process.step == 7


def test_the_message_names_the_failed_rank_the_checkpoint_and_how_to_resume(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    assert newest_checkpoint_path(run) is None  # incomplete
    (run / "checkpoints" / "checkpoint-12" / MANIFEST).write_text("{}")
    report_job(job("killed", 1), run, "rlhf sft x.yaml --launcher ddp", restarts_left=0)
    message = capsys.readouterr().err
    assert "rank 1" in message
    assert "died without a message" in message
    assert "after step 7" in message
    assert "checkpoint-12" in message
    assert "to resume: rlhf sft x.yaml --launcher ddp" in message
    report_job(JobResult(1), None, "rlhf", restarts_left=2)
    assert "restarting from there (2 restarts left)" in capsys.readouterr().err


def test_the_watchdog_ends_a_process_that_finishes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEAT_FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    codes: list[int] = []
    watchdog = Watchdog(0.4, codes.append)
    watchdog.start()
    for step in range(6):
        time.sleep(0.1)
        watchdog.beat(step)
    assert codes == []
    time.sleep(1.0)
    assert codes == [STUCK_EXIT_CODE]
    (heartbeat,) = read_heartbeats(tmp_path)
    assert (heartbeat.rank, heartbeat.what, heartbeat.step) == (3, "stuck", 5)
    assert "no step was finished for 0.4 s" in heartbeat.words


def test_a_watchdog_that_is_stopped_does_nothing() -> None:
    codes: list[int] = []
    watchdog = Watchdog(0.2, codes.append)
    watchdog.start()
    watchdog.stop()
    time.sleep(0.5)
    assert codes == []


def test_no_heartbeat_is_written_without_a_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEAT_FOLDER, raising=False)
    write_heartbeat("running")
    monkeypatch.setenv(HEARTBEAT_FOLDER, str(tmp_path / "gone"))
    write_heartbeat("running")
    assert list(tmp_path.iterdir()) == []
