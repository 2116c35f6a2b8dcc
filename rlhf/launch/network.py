"""Find the network interface that reaches the other machines. This module imports no torch.

Gloo resolves this machine's host name to find the address under which the other processes can reach it. The name is
often unknown or resolves to the loopback address (Debian writes that into /etc/hosts), and the other processes would
then connect to themselves.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

SIOCGIFADDR = 0x8915  # Linux ioctl request that returns the IPv4 address of an interface
UNASSIGNED_ADDRESS = "192.0.2.1"  # belongs to no machine (RFC 5737), so it is routed by the default route


def interface_towards(address: str) -> str | None:
    """Return the name of the interface that routes to `address`, or that has this address if it is this machine's.

    No packet is sent. Returns: None if the interface cannot be found, or is the loopback.
    """
    for target in (address, UNASSIGNED_ADDRESS):
        with suppress(OSError):
            family, kind, protocol, _, socket_address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(socket_address)
                own_address = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
            if not own_address.is_loopback:  # on machine 0 its own name may resolve to the loopback
                return next(
                    (name for name, interface_address in _interface_addresses() if interface_address == own_address),
                    None,
                )
    return None


def _interface_addresses() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Return (name, address) of every network interface of this machine that has an address."""
    found: list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # the interface has no address, or the system is not Linux
                reply = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, ipaddress.IPv4Address(reply[20:24])))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            words = line.split()
            found.append((words[-1], ipaddress.IPv6Address(int(words[0], 16))))
    return found
