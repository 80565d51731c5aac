"""The UCX settings of a link's context: ours, then the configuration's, then what the user set in the environment.

| setting              | value | why                                                                                   |
|----------------------|-------|---------------------------------------------------------------------------------------|
| TCP_TX_SEG_SIZE      | 256K  | 1.7 -> 7.9 GB/s at 16 MiB over TCP; touches TCP alone                                 |
| TCP_RX_SEG_SIZE      | 512K  | must not be smaller than the above                                                    |
| TCP_CM_REUSEADDR     | y     | the port of a killed server can be listened on again at once                          |
| TCP_CONN_NB          | y     | a port connects back to each client: one that drops packets must not stop the others  |
| MEMTYPE_CACHE        | n     | what ucxx itself sets: with the cache, UCX may take GPU memory for host memory        |
| LOG_LEVEL            | fatal | UCX logs to stdout; what it would say comes as an exception here                      |
| WARN_UNUSED_ENV_VARS | n     | a `UCX_IB_*` of the cluster is no news on a host without that fabric                  |
| RNDV_THRESH          | 512K  | without RDMA only: a rendezvous costs a round trip, 20 % of a read of 64 to 256 KiB   |
| *_ERROR_HANDLING     | y     | `shm_lanes` only: without it UCX puts no shared memory under a connection by address  |

Over RDMA the rendezvous is the point, so where a host has a device for it the threshold stays UCX's own. It is not
raised beyond what a segment carries: with `inf` a receive that its endpoint's close cuts off never ends, and its buffer
would be leaked for good.

Precedence: `UCX_*` environment variables, then the configuration's `ucx`, then the table.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from ucxx_transport.errors import BusyError, ConfigError

RDMA_FOLDER: Final = Path("/sys/class/infiniband")
"""One entry a device, InfiniBand or not (RoCE, iWARP, EFA): Linux, Documentation/ABI/stable/sysfs-class-infiniband."""

TUNED: Final[Mapping[str, str]] = {
    "TCP_TX_SEG_SIZE": "256K",
    "TCP_RX_SEG_SIZE": "512K",
    "TCP_CM_REUSEADDR": "y",
    "TCP_CONN_NB": "y",
    "MEMTYPE_CACHE": "n",
    "LOG_LEVEL": "fatal",
    "WARN_UNUSED_ENV_VARS": "n",
}
WITHOUT_RDMA: Final[Mapping[str, str]] = {"RNDV_THRESH": "512K"}
SHM_LANES: Final[Mapping[str, str]] = {"POSIX_ERROR_HANDLING": "y", "SYSV_ERROR_HANDLING": "y"}

_INHERITED_FROM = {
    "POSIX_ERROR_HANDLING": "MM_ERROR_HANDLING",
    "SYSV_ERROR_HANDLING": "MM_ERROR_HANDLING",
    "TCP_CM_REUSEADDR": "CM_REUSEADDR",
}
"""The wider setting that UCX takes a default from: the user may have set that one."""


def rdma_devices(sysfs: Path = RDMA_FOLDER) -> list[str]:
    """RDMA devices of this host, such as `mlx5_0`; none where the kernel has no RDMA at all."""
    return sorted(device.name for device in sysfs.glob("*"))


def context_settings(
    *, shm_lanes: bool, rdma: bool, ucx: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, str]:
    """What to give to the context: names without their `UCX_`, and none that UCX finds in the environment itself."""
    merged = {**TUNED, **({} if rdma else WITHOUT_RDMA), **(SHM_LANES if shm_lanes else {}), **ucx}
    users_rx = "UCX_TCP_RX_SEG_SIZE" in environment or merged["TCP_RX_SEG_SIZE"] != TUNED["TCP_RX_SEG_SIZE"]
    if users_rx and merged["TCP_TX_SEG_SIZE"] == TUNED["TCP_TX_SEG_SIZE"]:
        del merged["TCP_TX_SEG_SIZE"]  # UCX refuses one larger than the receive segment, as ours may be now
    for name in tuple(merged):
        if f"UCX_{name}" in environment or f"UCX_{_INHERITED_FROM.get(name, name)}" in environment:
            del merged[name]
    return merged


def may_share_ports(ucx: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    """Whether UCX listens with SO_REUSEADDR, as a context is told by these and no one else."""
    settings = context_settings(shm_lanes=False, rdma=False, ucx=ucx, environment=environment)
    return settings.get("TCP_CM_REUSEADDR") == "y"


_RESOURCE: Final = re.compile(r"resource\s+\d+\s*:\s*md\s+\d+\s+dev\s+\d+\s+flags\s+\S+\s+(\S+)/(\S+)")
_WITHIN_A_HOST: Final = ("self", "posix", "sysv", "cma", "knem", "xpmem", "cuda", "gdr_copy", "rocm", "ze_")
"""How the names of transports begin that reach no other host; every other one is a network's."""


def resources_of(context_info: str) -> list[tuple[str, str]]:
    """(transport, device) of each resource of a context by its `ucp_context_print_info`, such as `("tcp", "eth0")`."""
    return _RESOURCE.findall(context_info)


def networks_of(resources: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that reach another process without shared memory."""
    return [(transport, device) for transport, device in resources if not transport.startswith(_WITHIN_A_HOST)]


def limits_in_words(given: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """What limits the transports, such as `UCX_TLS=self,sm (environment)`; "" when nothing does."""
    names = ("TLS", "NET_DEVICES")
    found = [f"UCX_{name}={environment[f'UCX_{name}']} (environment)" for name in names if f"UCX_{name}" in environment]
    return ", ".join(found + [f"{name}={given[name]} (ucx=)" for name in names if name in given])


def require_network(context_info: str, given: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Refuse a context without a network transport, with a ConfigError that names what limits the transports."""
    resources = resources_of(context_info)
    if not resources or networks_of(resources):  # without resources UCX's words have changed, and prove nothing
        return
    limits = limits_in_words(given, environment)
    raise ConfigError(
        f"{limits or 'this host'} leaves UCX no network transport; remove it, or add tcp and an interface of this host",
        transports=", ".join(sorted({transport for transport, _ in resources})),
    )


def no_way_to(
    host: str, context_info: str, given: Mapping[str, str], environment: Mapping[str, str]
) -> ConfigError | None:
    """Why a host cannot be reached, where limits leave every network transport of a context on `lo`."""
    limits = limits_in_words(given, environment)
    devices = {device for _, device in networks_of(resources_of(context_info))}
    if not limits or devices != {"lo"} or ipaddress.ip_address(host).is_loopback:
        return None
    return ConfigError(f"{limits} leaves UCX nothing but loopback; add an interface of this host", host=host)


def require_free_port(port_range: str, addresses: Iterable[str]) -> None:
    """A BusyError where every port of a TCP_PORT_RANGE is in use at an address: UCX would look for one for ever."""
    found = re.fullmatch(r"(\d+)-(\d+)", port_range)
    if found is None:
        return
    for address in addresses:
        if not any(_is_free(address, port) for port in range(int(found[1]), int(found[2]) + 1)):
            raise BusyError(
                "every one of data_ports is in use; each listening port and each client of this host takes one, and a "
                "connection that has ended keeps its own for a minute: choose more",
                data_ports=port_range,
                address=address,
            )


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True
