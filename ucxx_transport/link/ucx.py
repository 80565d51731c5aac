"""UCXXLink: the link over UCX, one context and one worker, and the settings that its context gets.

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
| *_FIFO_SIZE, …       | 16    | without `shm_lanes`: queues in shared memory that no one uses are 4 MB a process      |

Over RDMA the rendezvous is the point, so where a host has a device for it the threshold stays UCX's own. It is not
raised beyond what a segment carries: with `inf` a receive that its endpoint's close cuts off never ends, and its buffer
would be leaked for good.

Precedence: `UCX_*` environment variables, then the configuration's `ucx`, then the table.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeAlias

from ucxx_transport.errors import BusyError, ConfigError, PeerLostError, TransportError
from ucxx_transport.link import base, ucx_api
from ucxx_transport.link.address import list_interfaces, other_family, rdma_devices
from ucxx_transport.link.base import Timers
from ucxx_transport.link.endpoint import Endpoint, Link, OnEndpoint
from ucxx_transport.link.flight import FUNCTIONS, PAUSE_S, native_flight
from ucxx_transport.logs import get_logger

_log = get_logger(__name__)
_pids_that_used_ucx: Final[set[int]] = set()

ACCEPTED_S: Final = 1.0
"""How long a listener that goes waits for UCX's thread to read what clients have said: it takes microseconds."""

QUIET_S: Final = 60.0
"""After one event about connections that fail while they are accepted, further ones are only counted for so long."""

Settings: TypeAlias = Mapping[str, str]

TUNED: Final[Settings] = {
    "TCP_TX_SEG_SIZE": "256K",
    "TCP_RX_SEG_SIZE": "512K",
    "TCP_CM_REUSEADDR": "y",
    "TCP_CONN_NB": "y",
    "MEMTYPE_CACHE": "n",
    "LOG_LEVEL": "fatal",
    "WARN_UNUSED_ENV_VARS": "n",
}
WITHOUT_RDMA: Final[Settings] = {"RNDV_THRESH": "512K"}
SHM_LANES: Final[Settings] = {"POSIX_ERROR_HANDLING": "y", "SYSV_ERROR_HANDLING": "y"}
WITHOUT_LANES: Final[Settings] = {
    f"{of}_{name}": "16" for of in ("POSIX", "SYSV") for name in ("FIFO_SIZE", "RX_BUFS_GROW")
}

_INHERITED_FROM = {
    **{name: f"MM_{name.partition('_')[2]}" for name in (*SHM_LANES, *WITHOUT_LANES)},
    "TCP_CM_REUSEADDR": "CM_REUSEADDR",
}
"""The wider setting that UCX takes a default from: the user may have set that one."""


def context_settings(*, shm_lanes: bool, rdma: bool, ucx: Settings, environment: Settings) -> dict[str, str]:
    """What to give to the context: names without their `UCX_`, and none that UCX finds in the environment itself."""
    merged = {**TUNED, **({} if rdma else WITHOUT_RDMA), **(SHM_LANES if shm_lanes else WITHOUT_LANES), **ucx}
    users_rx = "UCX_TCP_RX_SEG_SIZE" in environment or merged["TCP_RX_SEG_SIZE"] != TUNED["TCP_RX_SEG_SIZE"]
    if users_rx and merged["TCP_TX_SEG_SIZE"] == TUNED["TCP_TX_SEG_SIZE"]:
        del merged["TCP_TX_SEG_SIZE"]  # UCX refuses one larger than the receive segment, as ours may be now
    for name in tuple(merged):
        if f"UCX_{name}" in environment or f"UCX_{_INHERITED_FROM.get(name, name)}" in environment:
            del merged[name]
    return merged


def may_share_ports(ucx: Settings, environment: Settings) -> bool:
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


def limits_in_words(given: Settings, environment: Settings) -> str:
    """What limits the transports, such as `UCX_TLS=self,sm (environment)`; "" when nothing does."""
    names = ("TLS", "NET_DEVICES")
    found = [f"UCX_{name}={environment[f'UCX_{name}']} (environment)" for name in names if f"UCX_{name}" in environment]
    return ", ".join(found + [f"{name}={given[name]} (ucx=)" for name in names if name in given])


def require_network(context_info: str, given: Settings, environment: Settings) -> None:
    """Refuse a context without a network transport, with a ConfigError that names what limits the transports."""
    resources = resources_of(context_info)
    if not resources or networks_of(resources):  # without resources UCX's words have changed, and prove nothing
        return
    limits = limits_in_words(given, environment)
    raise ConfigError(
        f"{limits or 'this host'} leaves UCX no network transport; remove it, or add tcp and an interface of this host",
        transports=", ".join(sorted({transport for transport, _ in resources})),
    )


def no_way_to(host: str, context_info: str, given: Settings, environment: Settings) -> ConfigError | None:
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
    with socket.socket() as probe, suppress(OSError):
        probe.bind((address, port))
        return True
    return False


class UCXXLink(Link):
    """See `Link`.

    Args:
        shm_lanes: let same-host connections use shared memory instead of TCP; both sides must.
        ucx: further UCX settings, such as `{"TLS": "tcp"}`.
        ipv6: an IPv6 address of this host that listeners listen on, too.

    Raises:
        ConfigError: ucxx is missing, UCX refuses a setting, or this is a fork of a process that used UCX.
    """

    def __init__(
        self, timers: Timers, *, shm_lanes: bool = False, ucx: Settings | None = None, ipv6: str | None = None
    ) -> None:
        if _pids_that_used_ucx - {os.getpid()}:
            raise ConfigError(base.FORKED)
        self.binding = binding = ucx_api.load_binding()
        lib, self.root = binding.lib, binding.lib.UCXError
        self.ipv6 = ipv6
        self.rdma = bool(rdma_devices())
        settings = context_settings(shm_lanes=shm_lanes, rdma=self.rdma, ucx=ucx or {}, environment=os.environ)
        if ipv6 is not None:
            settings.setdefault("TCP_AF_PRIO", "inet6,inet")
        port_range = os.environ.get("UCX_TCP_PORT_RANGE", settings.get("TCP_PORT_RANGE"))
        if port_range is not None:
            require_free_port(port_range, [one.address for one in list_interfaces() if one.up])
        self.settings = settings
        try:
            self.context = lib.UCXContext(settings, (lib.Feature.TAG, lib.Feature.STREAM, lib.Feature.WAKEUP))
            require_network(self.context.info, settings, os.environ)
            self.worker = lib.UCXWorker(self.context, enable_delayed_submission=False, enable_python_future=False)
            self.worker.init_blocking_progress_mode()
        except self.root as exc:
            raise ConfigError(
                "UCX does not start with these settings",
                ucx=f"{type(exc).__name__}: {exc}",
                environment={name: value for name, value in os.environ.items() if name.startswith("UCX_")},
                settings=settings,
            ) from exc
        flight = native_flight(self.worker.handle, ucx_api.ucp_functions(*FUNCTIONS))
        super().__init__(timers, flight, binding.make_array, self.worker.epoll_file_descriptor)
        _pids_that_used_ucx.add(os.getpid())
        base.open_links.add(self)

    def connect(self, host: str, port: int, events: base.EndpointEvents) -> Endpoint:
        self.check_usable()
        peer = f"{host}:{port}"
        ucx: ucx_api.UcxEndpoint | None = None
        error: TransportError | None = base.shortage(sum(not endpoint.handle for endpoint in self.endpoints.values()))
        if error is None and not self.rdma:
            error = other_family(host, self.settings, os.environ)
        try:
            if error is None:
                ucx = self.binding.lib.UCXEndpoint.create(self.worker, host, port, endpoint_error_handling=True)
        except self.root as exc:
            error = self.why_failed(exc, peer, (host, port), connected=False)
        return Endpoint(self, ucx, peer, events=events, address=(host, port), error=error)

    def listen(self, port: int, on_endpoint: OnEndpoint) -> UCXXListener:
        self.check_usable()
        try:
            listener = UCXXListener(self, port, on_endpoint)
        except self.binding.lib.UCXBusyError as exc:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=port) from exc
        except (self.root, OSError) as exc:
            raise ConfigError("UCX cannot listen on this port", port=port, ucx=f"{type(exc).__name__}: {exc}") from exc
        self.listeners.add(listener)
        return listener

    def transports(self) -> tuple[str, ...]:
        handles = [endpoint.handle for endpoint in self.endpoints.values() if endpoint.usable and endpoint.handle]
        lanes = [lane for handle in handles for lane in ucx_api.endpoint_lanes(handle)]
        names = dict.fromkeys(transport for transport, device in lanes if device)  # without a device: connection set-up
        return tuple(names) or ("unknown",)

    def why_failed(
        self, exc: Exception, peer: str, address: tuple[str, int] | None, *, connected: bool
    ) -> TransportError:
        """Our error for one of UCX's, which may be that this side's settings leave no way to that host."""
        error = self.binding.error(exc, peer=peer, connected=connected)
        if address is not None and isinstance(error, PeerLostError) and error.facts["reason"] == "unreachable":
            return no_way_to(address[0], self.context.info, self.settings, os.environ) or error
        return error

    def release(self) -> None:
        base.open_links.discard(self)
        del self.worker, self.context

    def forget(self) -> None:
        super().forget()
        base.keep_for_good(self)


class Listening:
    """UCX's listeners of a port, one each for IPv4 and IPv6, and how they end.

    A connection that was accepted keeps a pointer to its listener, which UCX's own thread follows at the client's first
    words, and which nothing takes back when the listener goes: a client that connects just then, or says nothing until
    then, would end the process (https://github.com/openucx/ucx/issues/11087). So before they go what comes is dropped,
    those that were accepted are shut down, and what they had said by then is read. An interrupt meanwhile cuts this
    short, and is printed, since no call is there to raise it from.
    """

    ucx: Any = None

    def __init__(self, link: UCXXLink, port: int, on_request: Callable[[int], None]) -> None:
        self._pid, self._ipv6 = os.getpid(), link.ipv6
        self._spare = os.open(os.devnull, os.O_RDONLY)  # to look with where no descriptor is left
        self.ucx = link.binding.lib.UCXListener.create(link.worker, port, on_request)
        self.port: int = self.ucx.port
        if link.ipv6 is not None:
            self._also = ucx_api.IPv6Listener(link.worker.handle, link.ipv6, self.port, on_request)

    def __del__(self) -> None:
        os.close(self._spare)
        late_s, looks = time.monotonic() + ACCEPTED_S, 2  # an accept may end just behind the first
        while self.ucx and looks and time.monotonic() < late_s and self._pid == os.getpid():
            waiting = sum(ucx_api.close_door(each) for each in ucx_api.tcp_sockets() if self._is_of(each))
            looks = 2 if waiting else looks - 1
            time.sleep(PAUSE_S)

    def _is_of(self, each: socket.socket) -> bool:
        """Whether a socket is bound to an address of these listeners; one of IPv6 says more than these two."""
        address = each.getsockname()
        return address[1] == self.port and (len(address) == 2 or address[0] == self._ipv6)


class UCXXListener:
    """See `Listener`. `on_endpoint` gets each connection in a turn of the link, outside of UCX's callbacks.

    UCX binds the wildcard address (0.0.0.0) and ucxx's API takes no other: narrow it outside, by a firewall or a
    network namespace. An IPv6 address besides is bound through UCX's own `ucp_listener_create`. UCX keeps the port
    bound until the last endpoint accepted on it is closed.
    """

    def __init__(self, link: UCXXLink, port: int, on_endpoint: OnEndpoint) -> None:
        self._link = link
        self._on_endpoint = on_endpoint
        here = weakref.WeakMethod(self._note_request)  # UCX keeps its listener, which keeps what it calls

        def note(request: int) -> None:
            call = here()
            if call is not None:
                call(request)

        bound = Listening(link, port, note)
        self.port = bound.port
        self._open: Listening | None = bound  # kept by the endpoints, too, when this one has gone
        self._bound = weakref.ref(bound)
        self._quiet_until_s = 0.0

    def close(self) -> None:
        if self._open is not None:
            self._link.check_usable()
            self._open = None
            self._link.listeners.discard(self)

    def _note_request(self, request: int) -> None:
        """A client connects, by a `ucp_conn_request_h`. Called inside UCX's progress: takes note, no more."""
        bound = self._bound()
        assert bound is not None  # else UCX does not listen any more
        peer = ucx_api.request_peer(request) or f"a client of port {self.port}"
        try:
            ucx = bound.ucx.create_endpoint_from_conn_request(request, True)  # noqa: FBT003
        except self._link.root as exc:  # it has gone already, or its address cannot be reached
            self._link.ready.append(partial(self._note_failed, peer, f"{type(exc).__name__}: {exc}"))
        else:
            self._link.ready.append(partial(self._hand_over, ucx, peer, bound))

    def _hand_over(self, ucx: ucx_api.UcxEndpoint, peer: str, bound: Listening) -> None:
        """Give a connection that came to its owner."""
        if self._open is None:
            with suppress(self._link.root):
                ucx.close_blocking()
        elif not self._link.hand_over(ucx, peer, self._on_endpoint, bound):
            self._note_failed(peer, "it was gone before it was handed over")

    def _note_failed(self, peer: str, reason: str) -> None:
        self._link.accepts_failed += 1
        now = self._link.timers.now()
        if now >= self._quiet_until_s:
            self._quiet_until_s = now + QUIET_S
            _log.warning("accept_failed", port=self.port, peer=peer, reason=reason, failed=self._link.accepts_failed)
