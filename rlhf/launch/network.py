"""Which network interface leads to the other machines. Imports no torch.

Gloo looks up this machine's own name to find out where it can be reached. That name is often unknown, or means the
loopback (as Debian writes it into /etc/hosts): the others would then try to reach themselves.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
ANYWHERE = "192.0.2.1"  # an address that nobody has (RFC 5737): the way there is the default route


def interface_towards(address: str) -> str | None:
    """Name of the interface that has the way to a machine, or that has its address if this is the machine.

    Nothing is sent. Returns: None if it cannot be told, or would be the loopback.
    """
    for target in (address, ANYWHERE):
        with suppress(OSError):
            family, kind, protocol, _, to = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(to)
                ours = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
            if not ours.is_loopback:  # machine 0 may know its own name as the loopback
                return next((name for name, has in _addresses() if has == ours), None)
    return None


def _addresses() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Interfaces of this machine with their addresses."""
    found: list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address, or a system that is not Linux
                answer = fcntl.ioctl(any_socket, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                found.append((name, ipaddress.IPv4Address(answer[20:24])))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            words = line.split()
            found.append((words[-1], ipaddress.IPv6Address(int(words[0], 16))))
    return found
