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
host's address. What is in front of this machine, a load balancer or address translation, is `publish_host`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ucxx_transport.errors import ConfigError

_RDMA = Path("/sys/class/infiniband")
"""One entry a device, InfiniBand or not (RoCE, iWARP, EFA): Linux, Documentation/ABI/stable/sysfs-class-infiniband."""

_BRIDGES = ("br-", "cni", "docker", "flannel", "lxc", "veth", "virbr")
"""How names of bridges begin that containers sit on, which other hosts don't reach."""

_ROUTE_PROBE = ("198.51.100.1", 9)  # TEST-NET-2 (RFC 5737): routed by default, and assigned to no host

_ADDRESS, _FLAGS = 0x8915, 0x8913  # SIOCGIFADDR and SIOCGIFFLAGS, netdevice(7)
_UP = 0x1 | 0x40  # IFF_UP and IFF_RUNNING


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One network interface, its first IPv4 address, and the RDMA device behind it, such as `mlx5_0`."""

    name: str
    address: str
    up: bool = True
    rdma_device: str | None = None

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback


def choose_address(host: str | None = None) -> str:
    """The address to publish, by the rules above, where `host` is what was configured; a ConfigError where none is."""
    interfaces = list_interfaces()
    address = decide_address(
        host,
        interfaces=interfaces,
        route_source=default_route_source(),
        net_devices=os.environ.get("UCX_NET_DEVICES"),
        ipv6=ipv6_addresses(),
    )
    numeric = _resolve(address)
    is_loopback = ipaddress.ip_address(numeric).is_loopback
    own = {*(str(one) for _, one in _ipv6()), *(one.address for one in interfaces)}
    if not is_loopback and numeric not in own:
        leads = "" if numeric == address else f" leads to {numeric}, which"
        raise ConfigError(
            f"host = {address!r}{leads} is not an address of this machine; leave it out, or give what trainers connect "
            "to as publish_host",
            host=address,
        )
    if ":" not in numeric:
        return address  # a name leads clients to IPv4 first
    if is_loopback and (error := other_family(numeric, {}, os.environ)) is not None:
        raise error  # its clients are on this host, and would meet this
    return numeric


def other_family(address: str, given: Mapping[str, str], environment: Mapping[str, str]) -> ConfigError | None:
    """Why UCX cannot connect to an address of this family from this host; None where it can.

    Over TCP, UCX tells its peer one address of each interface to connect back to, of the family that comes first in
    `TCP_AF_PRIO`. Where that is not the family of the listener's address the peer may not reach it; its UCX (1.19)
    refuses, or corrupts its heap and aborts. `given` are the context's settings, without prefix.
    """
    numeric = ipaddress.ip_address(address)
    setting = environment.get("UCX_TCP_AF_PRIO", given.get("TCP_AF_PRIO", "inet,inet6"))
    if setting.partition(",")[0].strip() == ("inet6" if numeric.version == 6 else "inet"):
        return None
    if numeric.is_loopback:
        others = True  # lo has both
    elif numeric.version == 6:
        others = any(one.up and not one.loopback for one in list_interfaces())
    else:
        others = bool(ipv6_addresses())
    if not others:
        return None
    prefers = "inet6,inet" if numeric.version == 6 else "inet,inet6"
    return ConfigError(
        f"{address} is IPv{numeric.version}, and UCX takes this host's other addresses first; set "
        f"UCX_TCP_AF_PRIO={prefers} for this process",
        host=address,
    )


def decide_address(
    host: str | None,
    *,
    interfaces: Sequence[Interface],
    route_source: str | None,
    net_devices: str | None = None,
    ipv6: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The decision alone; see `choose_address`. `ipv6` has an address that other hosts may reach, by interface."""
    if host is not None:
        try:
            is_wildcard = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            is_wildcard = not host.strip()
        if is_wildcard:
            raise ConfigError("host is what clients connect to; give an address, a name or an interface", host=host)
        return {**ipv6, **{one.name: one.address for one in interfaces}}.get(host, host)
    # UCX names a device `mlx5_0:1` (device and port) or by the interface's own name.
    allowed = {name.strip().partition(":")[0] for name in (net_devices or "").split(",")}
    usable = [one for one in interfaces if one.up]
    usable = [one for one in usable if one.name in allowed or one.rdma_device in allowed] or usable
    outward = sorted(
        (one for one in usable if not one.loopback),
        key=lambda one: (one.rdma_device is None, one.address != route_source, one.name.startswith(_BRIDGES)),
    )
    beyond_ipv4 = [address for name, address in ipv6.items() if not net_devices or name in allowed]
    for address in (*(one.address for one in outward), *beyond_ipv4, *(one.address for one in usable)):
        return address
    raise ConfigError("this machine has no address to publish; give one as the server's host")


def rdma_devices() -> list[str]:
    """RDMA devices of this host, such as `mlx5_0`; none where the kernel has no RDMA at all."""
    return sorted(device.name for device in _RDMA.glob("*"))


def list_interfaces() -> list[Interface]:
    """The interfaces of this machine that have an IPv4 address, by name; RDMA devices found through sysfs."""
    rdma = {
        interface.name: device
        for device in rdma_devices()
        for interface in sorted((_RDMA / device / "device" / "net").glob("*"))
    }
    found = []
    for _, name in sorted(socket.if_nameindex(), key=lambda one: one[1]):
        with suppress(OSError):  # it has none
            address = socket.inet_ntoa(_ask(_ADDRESS, name)[4:8])
            found.append(Interface(name=name, address=address, up=_is_up(name), rdma_device=rdma.get(name)))
    return found


def ipv6_addresses() -> dict[str, str]:
    """The interfaces that are up and have an IPv6 address beyond this host and its own wire, each with one."""
    return {name: str(address) for name, address in _ipv6() if not (address.is_loopback or address.is_link_local)}


def default_route_source() -> str | None:
    """The address this machine would send from by default; no packet is sent. None without a default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(_ROUTE_PROBE)
        return str(probe.getsockname()[0])
    return None


def _ipv6() -> list[tuple[str, ipaddress.IPv6Address]]:
    """Of the interfaces that are up: address, index, prefix, scope, flags and name in hexadecimal, proc(5)."""
    listed = Path("/proc/net/if_inet6")
    lines = os.fsdecode(listed.read_bytes()).splitlines() if listed.exists() else []  # a kernel without IPv6 has none
    rows = [line.split() for line in lines]
    return [(row[5], ipaddress.IPv6Address(int(row[0], 16))) for row in rows if _is_up(row[5])]


def _is_up(name: str) -> bool:
    with suppress(OSError):  # it has gone meanwhile
        return int.from_bytes(_ask(_FLAGS, name)[:2], "little") & _UP == _UP
    return False


def _ask(what: int, name: str) -> bytes:
    """What the kernel knows of an interface: `struct ifreq`, netdevice(7), behind the name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return bytes(fcntl.ioctl(probe, what, struct.pack("40s", name.encode())))[16:]


def _resolve(address: str) -> str:
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
    except (OSError, UnicodeError):  # UnicodeError: no name that can be looked up, such as "a..b"
        port = "; a port goes into ports or base_port" if ":" in address else ""
        raise ConfigError(
            f"host = {address!r} is no address, interface of this machine or name that resolves: give one{port}",
            host=address,
        ) from None
