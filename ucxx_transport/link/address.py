"""The address that a server publishes.

| order | rule                                                                                                  |
|-------|-------------------------------------------------------------------------------------------------------|
| 1     | the host that was asked for: an address, a name, or an interface (`eth0`); never a wildcard             |
| 2     | only the interfaces of `UCX_NET_DEVICES`, where the user has set it                                   |
| 3     | an RDMA interface that is up: UCX takes the fabric of the address it connects to                        |
| 4     | the source address of the default route                                                               |
| 5     | any other interface that is up, a container bridge last                                               |
| 6     | loopback, when there is nothing else                                                                  |

IPv4 only: UCX's listener binds 0.0.0.0.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ucxx_transport.errors import ConfigError
from ucxx_transport.link.settings import RDMA_FOLDER

_BRIDGES = ("br-", "cni", "docker", "flannel", "lxc", "veth", "virbr")
_ROUTE_PROBE = ("198.51.100.1", 9)  # TEST-NET-2 (RFC 5737): routed by default, and assigned to no host

_UP = 0x1 | 0x40  # IFF_UP and IFF_RUNNING, netdevice(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One network interface with an IPv4 address.

    Attributes:
        name: such as `eth0`.
        address: dotted IPv4.
        up: whether it is up.
        rdma_device: the RDMA device behind it, such as `mlx5_0`, or None.
    """

    name: str
    address: str
    up: bool = True
    rdma_device: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether the address is of 127.0.0.0/8."""
        return ipaddress.ip_address(self.address).is_loopback

    @property
    def bridge(self) -> bool:
        """Whether the name is of a bridge that containers sit on, which other hosts don't reach."""
        return self.name.startswith(_BRIDGES)


def choose_address(host: str | None = None, *, interfaces: Sequence[Interface] | None = None) -> str:
    """The address to publish, by the rules above.

    Args:
        host: what was configured, or None.
        interfaces: to choose from; those of this machine by default.

    Raises:
        ConfigError: the host is a wildcard or empty, or this machine has no IPv4 address at all.
    """
    return decide_address(
        host,
        interfaces=list_interfaces() if interfaces is None else interfaces,
        route_source=default_route_source(),
        net_devices=os.environ.get("UCX_NET_DEVICES"),
    )


def decide_address(
    host: str | None,
    *,
    interfaces: Sequence[Interface],
    route_source: str | None,
    net_devices: str | None = None,
) -> str:
    """The decision alone; see `choose_address`.

    Args:
        host: what was configured, or None.
        interfaces: to choose from.
        route_source: source address of the default route, or None.
        net_devices: value of `UCX_NET_DEVICES`, or None.

    Raises:
        ConfigError: as `choose_address`.
    """
    if host is not None:
        return _asked_for(host, interfaces)
    usable = [interface for interface in interfaces if interface.up]
    usable = _allowed(usable, net_devices) or usable
    outward = sorted((interface for interface in usable if not interface.loopback), key=lambda one: one.bridge)
    rdma = [interface for interface in outward if interface.rdma_device is not None]
    routed = [interface for interface in outward if interface.address == route_source]
    for candidates in (rdma, routed, outward, usable):
        if candidates:
            return candidates[0].address
    raise ConfigError("this machine has no IPv4 address to publish; give one as the server's host")


def list_interfaces() -> list[Interface]:
    """The IPv4 addresses of this machine, RDMA devices found through sysfs."""
    rdma = _rdma_interfaces()
    return sorted(
        (
            Interface(name=name, address=address, up=flags & _UP == _UP, rdma_device=rdma.get(name))
            for name, address, flags in _ipv4_addresses()
        ),
        key=lambda one: one.name,
    )


def default_route_source() -> str | None:
    """The address this machine would send from by default; no packet is sent. None without a default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ROUTE_PROBE)
        except OSError:
            return None
        return str(probe.getsockname()[0])


class _IfAddrs(ctypes.Structure):
    """The head of `struct ifaddrs`, getifaddrs(3)."""

    _fields_ = (
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("sockaddr", ctypes.c_void_p),
    )


def _ipv4_addresses() -> Iterator[tuple[str, str, int]]:
    """Name, address and flags of every interface, once for each of its IPv4 addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.c_void_p()
    if libc.getifaddrs(ctypes.byref(first)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        following = first.value
        while following:
            entry = _IfAddrs.from_address(following)
            # `sockaddr_in` begins with two bytes of family, two of port and four of address, ip(7)
            if entry.sockaddr and ctypes.c_ushort.from_address(entry.sockaddr).value == socket.AF_INET:
                yield os.fsdecode(entry.name), socket.inet_ntoa(ctypes.string_at(entry.sockaddr + 4, 4)), entry.flags
            following = entry.next
    finally:
        libc.freeifaddrs(first)


def _asked_for(host: str, interfaces: Sequence[Interface]) -> str:
    for interface in interfaces:
        if interface.name == host:
            return interface.address
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        wildcard = not host.strip()
    if wildcard:
        raise ConfigError("host is what clients connect to; give an address, a name or an interface", host=host)
    return host


def _allowed(interfaces: Sequence[Interface], net_devices: str | None) -> list[Interface]:
    # UCX names a device `mlx5_0:1` (device and port) or by the interface's own name.
    names = {name.strip().partition(":")[0] for name in (net_devices or "").split(",")}
    return [interface for interface in interfaces if interface.name in names or interface.rdma_device in names]


def _rdma_interfaces(sysfs: Path = RDMA_FOLDER) -> dict[str, str]:
    return {
        interface.name: device.name
        for device in sorted(sysfs.glob("*"))
        for interface in sorted((device / "device" / "net").glob("*"))
    }
