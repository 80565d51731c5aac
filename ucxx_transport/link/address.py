"""The address that a server publishes.

| order | rule                                                                                                  |
|-------|-------------------------------------------------------------------------------------------------------|
| 1     | the host that was asked for: an address, a name, or an interface (`eth0`); never a wildcard             |
| 2     | only the interfaces of `UCX_NET_DEVICES`, where the user has set it                                   |
| 3     | an RDMA interface that is up: UCX takes the fabric of the address it connects to                        |
| 4     | the source address of the default route                                                               |
| 5     | any other interface that is up, a container bridge last                                               |
| 6     | an IPv6 address, where there is no IPv4 one besides loopback's                                         |
| 7     | loopback, when there is nothing else                                                                  |

What clients could not reach is refused: a name without an address, IPv6's loopback where UCX prefers IPv4, and another
host's address where nothing answers.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ucxx_transport.errors import ConfigError
from ucxx_transport.link.settings import RDMA_FOLDER

_BRIDGES = ("br-", "cni", "docker", "flannel", "lxc", "veth", "virbr")
_ROUTE_PROBE = ("198.51.100.1", 9)  # TEST-NET-2 (RFC 5737): routed by default, and assigned to no host

_SOCKADDR_BYTES: dict[int, int] = {socket.AF_INET: 8, socket.AF_INET6: 24}

REACH_LIMIT_S = 3.0
"""How long an address of another host may take to answer."""

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
        ConfigError: the host is a wildcard, empty or unknown, or this machine has no address to publish.
    """
    address = decide_address(
        host,
        interfaces=list_interfaces() if interfaces is None else interfaces,
        route_source=default_route_source(),
        net_devices=os.environ.get("UCX_NET_DEVICES"),
        ipv6=ipv6_addresses(),
    )
    numeric = _resolve(address)
    if ":" not in numeric:
        return address  # a name leads clients to IPv4 first
    if numeric not in _own_addresses():
        raise ConfigError(f"host = {address!r} is not an address of this machine", host=address)
    if ipaddress.ip_address(numeric).is_loopback and (error := other_family(numeric, {}, os.environ)) is not None:
        raise error  # its clients are on this host, and would meet this
    return numeric


def require_reachable(address: str, port: int) -> None:
    """Refuse an address of another host than this one where our own listener does not answer.

    Args:
        address: as `choose_address` returned it.
        port: of a server of this host, which listens on all of its addresses.

    Raises:
        ConfigError: with the reason.
    """
    numeric = _resolve(address)
    if ipaddress.ip_address(numeric).is_loopback or numeric in _own_addresses():
        return
    try:
        with socket.create_connection((numeric, port), timeout=REACH_LIMIT_S):
            pass
    except OSError as error:
        raise ConfigError(
            f"host = {address!r} is not an address of this machine, and the server does not answer there: {error}",
            host=address,
            port=port,
        ) from None


def other_family(address: str, given: Mapping[str, str], environment: Mapping[str, str]) -> ConfigError | None:
    """Why UCX cannot connect to an address of this family from this host; None where it can.

    Over TCP, UCX tells its peer one address of each interface to connect back to, of the family that comes first in
    `TCP_AF_PRIO`. Where that is not the family of the listener's address the peer may not reach it; its UCX (1.19)
    refuses, or corrupts its heap and aborts.

    Args:
        address: numeric, to connect to.
        given: the context's settings, without prefix.
        environment: the process's.
    """
    wanted = "inet6" if ipaddress.ip_address(address).version == 6 else "inet"
    setting = environment.get("UCX_TCP_AF_PRIO", given.get("TCP_AF_PRIO", "inet,inet6"))
    first = setting.partition(",")[0].strip()
    if first == wanted:
        return None
    if ipaddress.ip_address(address).is_loopback:
        others = True  # lo has both
    elif wanted == "inet6":
        others = any(one.up and not one.loopback for one in list_interfaces())
    else:
        others = bool(ipv6_addresses())
    if not others:
        return None
    prefers = {"inet": "inet,inet6", "inet6": "inet6,inet"}[wanted]
    return ConfigError(
        f"{address} is {'IPv6' if wanted == 'inet6' else 'IPv4'}, and UCX takes this host's other addresses first; set "
        f"UCX_TCP_AF_PRIO={prefers} for this process",
        host=address,
    )


def _own_addresses() -> set[str]:
    return {*(str(address) for _, address in _ipv6()), *(one.address for one in list_interfaces())}


def _ipv6() -> list[tuple[str, ipaddress.IPv6Address]]:
    return [
        (name, ipaddress.IPv6Address(raw[8:24]))
        for name, family, raw, flags in _addresses()
        if family == socket.AF_INET6 and flags & _UP == _UP
    ]


def _resolve(address: str) -> str:
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError):  # UnicodeError: no name that can be looked up, such as "a..b"
        port = "; a port goes into base_port" if ":" in address else ""
        raise ConfigError(
            f"host = {address!r} is neither an address, nor an interface of this machine, nor a name{port}",
            host=address,
        ) from None


def decide_address(
    host: str | None,
    *,
    interfaces: Sequence[Interface],
    route_source: str | None,
    net_devices: str | None = None,
    ipv6: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The decision alone; see `choose_address`.

    Args:
        host: what was configured, or None.
        interfaces: to choose from.
        route_source: source address of the default route, or None.
        net_devices: value of `UCX_NET_DEVICES`, or None.
        ipv6: interfaces with an IPv6 address that other hosts may reach, and that address.

    Raises:
        ConfigError: as `choose_address`.
    """
    if host is not None:
        return _asked_for(host, interfaces, ipv6)
    usable = [interface for interface in interfaces if interface.up]
    usable = _allowed(usable, net_devices) or usable
    outward = sorted((interface for interface in usable if not interface.loopback), key=lambda one: one.bridge)
    rdma = [interface for interface in outward if interface.rdma_device is not None]
    routed = [interface for interface in outward if interface.address == route_source]
    beyond_ipv4 = [address for name, address in ipv6.items() if not net_devices or name in _named(net_devices)]
    for candidates in (rdma, routed, outward):
        if candidates:
            return candidates[0].address
    for address in (*beyond_ipv4, *(interface.address for interface in usable)):
        return address
    raise ConfigError("this machine has no address to publish; give one as the server's host")


def list_interfaces() -> list[Interface]:
    """The IPv4 addresses of this machine, RDMA devices found through sysfs."""
    rdma = _rdma_interfaces()
    return sorted(
        (
            Interface(name=name, address=socket.inet_ntoa(raw[4:8]), up=flags & _UP == _UP, rdma_device=rdma.get(name))
            for name, family, raw, flags in _addresses()
            if family == socket.AF_INET
        ),
        key=lambda one: one.name,
    )


def ipv6_addresses() -> dict[str, str]:
    """The interfaces that are up and have an IPv6 address beyond this host and its own wire, each with one."""
    return {name: str(address) for name, address in _ipv6() if not (address.is_loopback or address.is_link_local)}


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


def _addresses() -> Iterator[tuple[str, int, bytes, int]]:
    """Name, family, socket address and flags of every interface, once for each of its internet addresses.

    `sockaddr_in` begins with two bytes of family, two of port and four of address, ip(7); `sockaddr_in6` with two of
    family, two of port, four of flow and sixteen of address, ipv6(7).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.c_void_p()
    if libc.getifaddrs(ctypes.byref(first)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        following = first.value
        while following:
            entry = _IfAddrs.from_address(following)
            family = ctypes.c_ushort.from_address(entry.sockaddr).value if entry.sockaddr else socket.AF_UNSPEC
            if nbytes := _SOCKADDR_BYTES.get(family):
                yield os.fsdecode(entry.name), family, ctypes.string_at(entry.sockaddr, nbytes), entry.flags
            following = entry.next
    finally:
        libc.freeifaddrs(first)


def _asked_for(host: str, interfaces: Sequence[Interface], ipv6: Mapping[str, str]) -> str:
    for interface in interfaces:
        if interface.name == host:
            return interface.address
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        literal = None
    if not host.strip() if literal is None else literal.is_unspecified:
        raise ConfigError("host is what clients connect to; give an address, a name or an interface", host=host)
    return ipv6.get(host, host)


def _named(net_devices: str) -> set[str]:
    return {name.strip().partition(":")[0] for name in net_devices.split(",")}


def _allowed(interfaces: Sequence[Interface], net_devices: str | None) -> list[Interface]:
    # UCX names a device `mlx5_0:1` (device and port) or by the interface's own name.
    names = _named(net_devices or "")
    return [interface for interface in interfaces if interface.name in names or interface.rdma_device in names]


def _rdma_interfaces(sysfs: Path = RDMA_FOLDER) -> dict[str, str]:
    return {
        interface.name: device.name
        for device in sorted(sysfs.glob("*"))
        for interface in sorted((device / "device" / "net").glob("*"))
    }
