"""Several machines: the network interface that reaches the others, and messages that are correct on each machine."""

from __future__ import annotations

import ipaddress
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.distributed.heartbeat import Heartbeat
from rlhf.launch import launcher, network
from rlhf.launch.launcher import INTERFACE, LaunchOptions
from rlhf.launch.supervisor import JobResult, report_job, supervise

INTERFACES = [("lo", "127.0.0.1"), ("eth0", "10.0.0.1"), ("eth1", "192.168.0.1"), ("eth1", "fe80::1")]
SOURCE_ADDRESSES = {
    "10.0.0.2": "10.0.0.1",
    "10.0.0.1": "10.0.0.1",
    "127.0.0.1": "127.0.0.1",
    network.UNASSIGNED_ADDRESS: "192.168.0.1",
}


class Probe:
    """A stand-in for a UDP socket: `getsockname` returns the source address of the route to the connected address."""

    def __init__(self, *_: Any) -> None:
        self.own_address = ""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self, to: tuple[str, int]) -> None:
        if to[0] not in SOURCE_ADDRESSES:
            raise OSError("Network is unreachable")
        self.own_address = SOURCE_ADDRESSES[to[0]]

    def getsockname(self) -> tuple[str, int]:
        return self.own_address, 40000


@pytest.mark.parametrize(
    ("address", "name"),
    [("10.0.0.2", "eth0"), ("10.0.0.1", "eth0"), ("127.0.0.1", "eth1"), ("10.9.9.9", "eth1")],
    ids=["another machine", "this machine", "its name resolves to the loopback", "no route"],
)
def test_the_interface_is_the_one_that_routes_to_the_address(
    address: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network.socket, "socket", Probe)
    monkeypatch.setattr(network, "_interface_addresses", lambda: [(n, ipaddress.ip_address(a)) for n, a in INTERFACES])
    assert network.interface_towards(address) == name
    monkeypatch.setattr(network, "_interface_addresses", list)
    assert network.interface_towards(address) is None


def test_this_machines_interfaces_are_listed_with_their_addresses() -> None:
    found = {str(address): name for name, address in network._interface_addresses()}
    assert found["127.0.0.1"] in found.values()
    assert found.get("::1", found["127.0.0.1"]) == found["127.0.0.1"]


def started(
    options: LaunchOptions, monkeypatch: pytest.MonkeyPatch, capsys: Any, result: JobResult, run: Path | None = None
) -> tuple[list[str], Mapping[str, str], str]:
    """Return the command of a launch whose job ended with `result`, its environment, and the message on stderr."""
    seen: list[Any] = []
    monkeypatch.setattr(launcher, "interface_towards", lambda address: f"way-to-{address}")
    monkeypatch.setattr(
        launcher, "supervise", lambda command, environment, *_: seen.append((command, environment)) or result
    )
    assert launcher.launch_stage(options, "ppo", ["c.yaml"], output=str(run)) == result.exit_code
    return *seen[0], capsys.readouterr().err


def test_the_command_to_resume_includes_machine_settings_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(INTERFACE, raising=False)
    stuck = JobResult(1, Heartbeat(3, 99, "b", 0.0, "stuck", 5, "no step was finished for 20 s"))
    options = LaunchOptions("zero3", processes=4, machines=2, timeout=20)
    command, environment, message = started(options, monkeypatch, capsys, stuck, tmp_path)
    assert environment[INTERFACE] == "way-to-10.0.0.1"
    assert command[command.index("--rdzv_conf") + 1] == "timeout=60"
    assert "rank 3 (process 99 on b) stuck: no step was finished for 20 s" in message
    assert "timed out waiting for another rank, which has hung or died, or its machine or the link to it" in message
    assert "last good checkpoint: none on this machine's disk; machine 0 writes them" in message
    resume = "rlhf ppo c.yaml --launcher zero3 --num-processes 4 --num-machines 2 --machine-rank 1"
    assert f"to resume: {resume} --main-process-ip 10.0.0.1 --main-process-port 7 --timeout 20\n" in message


def test_an_interface_set_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv(INTERFACE, "ib0")
    options = LaunchOptions("zero3", machines=2, machine_rank=0, ip="10.0.0.1")
    assert started(options, monkeypatch, capsys, JobResult(130))[1][INTERFACE] == "ib0"
    monkeypatch.delenv(INTERFACE)
    assert INTERFACE not in started(LaunchOptions("zero3"), monkeypatch, capsys, JobResult(130))[1]


def test_a_job_without_any_heartbeat_hints_at_machines_that_did_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    options = LaunchOptions("zero3", machines=2, machine_rank=0, ip="10.0.0.1", port=7)
    _, _, message = started(options, monkeypatch, capsys, JobResult(1), tmp_path)
    assert "were all machines started, and do they reach machine 0 at 10.0.0.1:7?" in message
    assert "last good checkpoint: none yet; the run starts over" in message
    assert "all machines" not in started(LaunchOptions("zero3"), monkeypatch, capsys, JobResult(1), tmp_path)[2]


def test_a_launcher_whose_processes_never_start_is_ended_after_the_join_timeout() -> None:
    started_at = time.monotonic()
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert supervise(waits, {}, 60.0, 0.5) == JobResult(1)
    assert time.monotonic() - started_at < 20


@pytest.mark.parametrize(
    "words",
    [
        "RuntimeError: [...unbound_buffer.cc:129] Timed out waiting 20000ms for send operation to complete",
        "RuntimeError: Application timeout caused pair closure",
        "RuntimeError: Gloo connectFullMesh failed with [...] timed out connecting: SO_ERROR: Connection refused",
        "RuntimeError: [...pair.cc:547] Connection closed by peer [10.0.0.2]:5345",
        "DistBackendError: NCCL error: remote process exited or there was a network error",
        "DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)",
    ],
)
def test_library_messages_about_a_lost_connection_are_explained(words: str, capsys: Any) -> None:
    report_job(JobResult(1, Heartbeat(0, 1, "a", 0.0, "failed", 5, words)), None, "rlhf", restarts_left=0)
    assert "timed out waiting for another rank, which has hung or died\n" in capsys.readouterr().err
    report_job(JobResult(1, Heartbeat(0, 1, "a", 0.0, "failed", 5, "ValueError: 3")), None, "rlhf", restarts_left=0)
    assert "timed out" not in capsys.readouterr().err
