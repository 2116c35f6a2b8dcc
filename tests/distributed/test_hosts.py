"""Two hosts train one model with PPO under ZeRO-3; the link between them is cut and restored."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.policy import load_causal
from tests.distributed.hosts import Host, NoHosts, two_hosts
from tests.faults.setup import checkpoints, differences
from tests.models import tiny
from tests.stages import setup
from tests.stages.setup import info, metrics
from tests.tolerances import PROCESSES_PPO, distance

pytestmark = pytest.mark.slow
ZERO3 = ["--launcher", "tests/distributed/zero3.yaml", "--num-processes", "2"]
TIMEOUT = 20  # seconds without an answer from the other host, given to the command
BOUND = 3 * TIMEOUT  # until the job must be over on both
DEADLINE = 240.0  # for everything else, on a machine that is very busy
STEPS, EVERY, CUT = 6, 2, 3


@dataclass(frozen=True)
class Story:
    """What happened, in order."""

    one: Path  # run directories: of one process on one machine,
    machine: Path  # of two processes on it,
    hosts: Path  # of two hosts
    config: str
    names: list[str]  # of the hosts
    address: str  # of the first
    seen: list[dict[str, float]]  # metrics when the link was cut
    kept: list[str]  # checkpoints after that
    seconds: float  # from the cut until both had ended
    cut: list[tuple[int, str]]  # exit code and output on each host
    status: str
    resumed: list[tuple[int, str]]


def started(hosts: tuple[Host, Host], config: str, folder: Path) -> list[tuple[subprocess.Popen[bytes], Path]]:
    """Start the same command on both hosts, with different ranks."""
    folder.mkdir()
    several = ["--num-machines", "2", "--main-process-ip", hosts[0].address, "--timeout", str(TIMEOUT)]
    command = [sys.executable, "-m", "rlhf", "ppo", config, *ZERO3, *several]
    logs = [folder / f"{rank}.log" for rank in (0, 1)]
    return [
        (host.start([*command, "--machine-rank", str(rank)], log), log)
        for rank, (host, log) in enumerate(zip(hosts, logs, strict=True))
    ]


def ended(processes: list[tuple[subprocess.Popen[bytes], Path]], seconds: float) -> list[tuple[int, str]]:
    """Return exit codes and outputs."""
    end = time.monotonic() + seconds
    return [
        (process.wait(timeout=max(0.0, end - time.monotonic())), log.read_text(encoding="utf-8"))
        for process, log in processes
    ]


def cut_after(step: int, run: Path, host: Host, processes: list[tuple[subprocess.Popen[bytes], Path]]) -> float:
    """Cut the link as soon as a step has been written, and return the time."""
    end, path = time.monotonic() + DEADLINE, run / "metrics.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < end, "the deadline has passed"
        assert all(process.poll() is None for process, _ in processes), ended(processes, DEADLINE)
        time.sleep(0.01)
    host.cable_is("down")
    return time.monotonic()


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts, or skip the tests with the reason why they cannot be created."""
    with ExitStack() as stack:
        try:
            pair = stack.enter_context(two_hosts())
        except NoHosts as why:
            pytest.skip(f"two hosts need network namespaces: {why}")
        yield pair


@pytest.fixture(scope="module")
def story(hosts: Any, tiny_model_dir: Path, files: Any, run_stage: Any, tmp_path_factory: Any) -> Story:
    """Run all scenarios, with as few launches as possible."""
    top = tmp_path_factory.mktemp("hosts")
    configs = setup.configs(top, str(tiny_model_dir), files)
    for stage in ("sft", "reward"):
        run_stage(stage, configs[stage])
    ppo = configs["ppo"] | {"ppo": configs["ppo"]["ppo"] | {"steps": STEPS}, "checkpoint_every": EVERY}
    runs = {name: top / "runs" / name for name in ("one", "machine", "hosts")}
    path = {name: setup.write(top, name, ppo | {"output_dir": str(run)}) for name, run in runs.items()}
    alone = subprocess.Popen([sys.executable, "-m", "rlhf", "ppo", path["machine"], *ZERO3, "--quiet"])
    assert alone.wait(timeout=DEADLINE) == 0

    processes = started(hosts, path["hosts"], top / "cut")
    at = cut_after(CUT, runs["hosts"], hosts[0], processes)
    seen = metrics(runs["hosts"])
    run_stage("ppo", ppo | {"output_dir": str(runs["one"])})  # while the hosts wait for each other
    cut = ended(processes, BOUND)
    seconds, kept, status = time.monotonic() - at, checkpoints(runs["hosts"]), info(runs["hosts"])["status"]
    hosts[0].cable_is("up")
    resumed = ended(started(hosts, path["hosts"], top / "resumed"), DEADLINE)
    return Story(
        one=runs["one"],
        machine=runs["machine"],
        hosts=runs["hosts"],
        config=path["hosts"],
        names=[host.name for host in hosts],
        address=hosts[0].address,
        seen=seen,
        kept=kept,
        seconds=seconds,
        cut=cut,
        status=status,
        resumed=resumed,
    )


def test_a_link_that_is_cut_ends_the_job_on_both_hosts_in_time(story: Story) -> None:
    assert len(story.seen) >= CUT
    assert story.seconds < BOUND
    for code, said in story.cut:
        assert code not in (0, 2, 75, 130), said[-3000:]
    assert story.status != "finished"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_host_says_once_who_and_when_and_how_to_go_on(rank: int, story: Story) -> None:
    said = story.cut[rank][1].splitlines()
    (at,) = [i for i, line in enumerate(said) if line.startswith("TrainingError: ")]
    who, why, checkpoint, resume = said[at : at + 4]
    assert who.startswith(f"TrainingError: rank {rank} (process ")
    assert f" on {story.names[rank]}) " in who
    assert who.endswith(f", after step {CUT}")
    assert "timed out waiting for another rank" in why
    assert "the link to it is down" in why
    assert checkpoint == f"  last good checkpoint: {story.hosts / 'checkpoints' / story.kept[-1]}"
    assert story.kept[-1] == f"step-{CUT - CUT % EVERY:06}"
    several = f"--num-machines 2 --machine-rank {rank} --main-process-ip {story.address}"
    assert resume.startswith(f"  to resume: rlhf ppo {story.config} {' '.join(ZERO3)} {several} ")
    assert resume.endswith(f" --timeout {TIMEOUT}")


def test_the_same_commands_go_on_and_nothing_is_lost(story: Story) -> None:
    assert [code for code, _ in story.resumed] == [0, 0], story.resumed[0][1][-3000:] + story.resumed[1][1][-3000:]
    assert f"continuing after step {CUT - CUT % EVERY}" in story.resumed[0][1]
    assert (info(story.hosts)["attempts"], info(story.hosts)["processes"]) == (2, 2)
    assert differences(story.hosts, story.machine) == []  # of a run that nothing interrupted


def test_two_hosts_do_the_ppo_of_one_process(story: Story) -> None:
    ours, theirs = metrics(story.hosts), metrics(story.one)
    assert len(ours) == len(theirs) == STEPS
    assert ours[: len(story.seen)] == story.seen  # those before the cut, and the ones that were done again
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if name != "first_ratio_error":
                assert mine[name] == pytest.approx(value, rel=PROCESSES_PPO, abs=PROCESSES_PPO), (other["step"], name)
        assert mine["first_ratio_error"] < PROCESSES_PPO
    two, one = (
        torch.cat([p.detach().flatten() for p in load_causal(tiny.source(run)).parameters()])
        for run in (story.hosts, story.one)
    )
    assert distance(two, one) < PROCESSES_PPO
