"""UCXXLink: the link over UCX, one context and one worker. `settings` says which settings a context gets and why."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link import base, ucx_api
from ucxx_transport.link.address import list_interfaces, other_family
from ucxx_transport.link.base import Timers
from ucxx_transport.link.endpoint import Endpoint, Link, OnEndpoint
from ucxx_transport.link.flight import FUNCTIONS, native_flight
from ucxx_transport.link.settings import context_settings, no_way_to, rdma_devices, require_free_port, require_network
from ucxx_transport.logs import get_logger

_log = get_logger(__name__)
_pids_that_used_ucx: Final[set[int]] = set()

QUIET_S: Final = 60.0
"""After one event about connections that fail while they are accepted, further ones are only counted for so long."""


class UCXXLink(Link):
    """See `Link`.

    Args:
        timers: of the reactor that drives it.
        shm_lanes: let same-host connections use shared memory instead of TCP; both sides must.
        ucx: further UCX settings, such as `{"TLS": "tcp"}`.
        ipv6: an IPv6 address of this host that listeners listen on, too.

    Raises:
        ConfigError: ucxx is missing, UCX refuses a setting, or this is a fork of a process that used UCX.
    """

    def __init__(
        self, timers: Timers, *, shm_lanes: bool = False, ucx: Mapping[str, str] | None = None, ipv6: str | None = None
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
        """See `Link`; of this side's settings where they leave no way to another host."""
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

        ucx = link.binding.lib.UCXListener.create(link.worker, port, note)
        self.port: int = ucx.port
        self._ucx = deque([ucx])  # shared with the endpoints, which keep it when this one does no more
        self._bound = weakref.ref(self._ucx)
        if link.ipv6 is not None:
            self._ucx.append(ucx_api.IPv6Listener(link.worker.handle, link.ipv6, self.port, note))
        self._closed = False
        self._quiet_until_s = 0.0

    def close(self) -> None:
        if not self._closed:
            self._link.check_usable()
            self._closed = True
            self._ucx = deque()
            self._link.listeners.discard(self)

    def _note_request(self, request: int) -> None:
        """A client connects, by a `ucp_conn_request_h`. Called inside UCX's progress: takes note, no more."""
        bound = self._bound()
        assert bound is not None  # else UCX does not listen any more
        peer = ucx_api.request_peer(request) or f"a client of port {self.port}"
        try:
            ucx = bound[0].create_endpoint_from_conn_request(request, True)  # noqa: FBT003
        except self._link.root as exc:  # it has gone already, or its address cannot be reached
            self._link.ready.append(partial(self._note_failed, peer, f"{type(exc).__name__}: {exc}"))
        else:
            self._link.ready.append(partial(self._hand_over, ucx, peer, bound))

    def _hand_over(self, ucx: ucx_api.UcxEndpoint, peer: str, bound: deque[Any]) -> None:
        """Give a connection that came to its owner."""
        if self._closed:
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
