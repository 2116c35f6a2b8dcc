"""Two hosts on one machine: Linux network namespaces with their own host names, joined by a link that can be cut.

Both see the same file system, as machines with a common disk do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
INHERITED = ("ACCELERATE", "RLHF", "RANK", "WORLD_SIZE", "MASTER", "NODE", "SLURM", "GLOO")


class NoHosts(RuntimeError):
    """Error for a machine on which network namespaces cannot be created; the message gives the reason."""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHosts(f"ip {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One of the two hosts, at one end of the link."""

    name: str
    cable: str
    address: str

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command on this host, with its output in a file and without the variables of an outer launcher."""
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(INHERITED)}
        with log.open("w", encoding="utf-8") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *inside], env=clean, stdout=file, stderr=subprocess.STDOUT
            )

    def cable_is(self, state: str) -> None:
        """Cut the link at this end ('down') or restore it ('up')."""
        _ip("-n", self.name, "link", "set", self.cable, state)

    def end_all(self) -> None:
        """End all processes that still run on this host."""
        for pid in _ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Context manager that yields two hosts that can reach only each other; at the end all their processes are ended.

    Raises: NoHosts.
    """
    for command in ("ip", "unshare"):
        if shutil.which(command) is None:
            raise NoHosts(f"there is no command '{command}'")
    if os.geteuid() != 0:
        raise NoHosts("only root makes network namespaces")
    mark = secrets.token_hex(3)
    hosts = [Host(f"rlhf{mark}{end}", f"v{mark}{end}", f"{NETWORK}.{i + 1}") for i, end in enumerate("ab")]
    a, b = hosts
    with contextlib.ExitStack() as after:
        for host in hosts:
            _ip("netns", "add", host.name)
            after.callback(_ip, "netns", "del", host.name)
        _ip("-n", a.name, "link", "add", a.cable, "type", "veth", "peer", "name", b.cable, "netns", b.name)
        for host in hosts:
            after.callback(host.end_all)
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable)
            host.cable_is("up")
        yield a, b
