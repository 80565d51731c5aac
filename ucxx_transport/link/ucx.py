"""UCXXLink: the link over UCX, one context and one worker.

Nothing here changes `os.environ`; `settings` says which settings a context gets and why.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import Final

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.link.address import list_interfaces, other_family
from ucxx_transport.link.base import EndpointEvents, OnEndpoint, checked_port
from ucxx_transport.link.libraries import IPv6Listener, quiet_ucxx_log, request_peer, ucp_functions
from ucxx_transport.link.process import check_not_forked, keep_for_good, note_use, open_links, shortage
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.settings import context_settings, rdma_devices, require_free_port, require_network
from ucxx_transport.link.ucx_api import UcxEndpoint, UcxListener, load_binding
from ucxx_transport.link.ucx_endpoint import CLOSE_TIMEOUT_S, UCXXEndpoint
from ucxx_transport.link.ucx_flight import FUNCTIONS, STRAYS_EVERY, Flight, LinkState
from ucxx_transport.logs import get_logger

_log = get_logger(__name__)

BUSY: Final = 32
"""So many progress calls in a row that moved something put off the end of a broken connection's operations."""

SPIN_NS: Final = 5_000_000
"""The longest poll in one call, which no signal interrupts."""

PAUSE_S: Final = 1e-3
"""Pause between two turns of a close, so as not to burn a core."""

QUIET_S: Final = 60.0
"""After one event about connections that fail while they are accepted, further ones are only counted for so long."""


class UCXXLink(LinkState):
    """See `base.Link`.

    Args:
        timers: of the reactor that drives it.
        shm_lanes: let same-host connections use shared memory instead of TCP; both sides must.
        ucx: further UCX settings, such as `{"TLS": "tcp"}`.
        ipv6: an IPv6 address of this host that listeners listen on, too.

    Attributes:
        thread: that had the last turn.

    Raises:
        ConfigError: ucxx is missing, UCX refuses a setting, or this is a fork of a process that used UCX.
    """

    def __init__(
        self, timers: Reactor, *, shm_lanes: bool = False, ucx: Mapping[str, str] | None = None, ipv6: str | None = None
    ) -> None:
        check_not_forked()
        super().__init__(timers, load_binding(), ipv6)
        quiet_ucxx_log()
        lib = self.binding.lib
        self.rdma = bool(rdma_devices())
        settings = context_settings(shm_lanes=shm_lanes, rdma=self.rdma, ucx=ucx or {}, environment=os.environ)
        if ipv6 is not None:
            settings.setdefault("TCP_AF_PRIO", "inet6,inet")
        port_range = os.environ.get("UCX_TCP_PORT_RANGE", settings.get("TCP_PORT_RANGE"))
        if port_range is not None:
            require_free_port(port_range, [one.address for one in list_interfaces() if one.up])
        features = (lib.Feature.TAG, lib.Feature.STREAM, lib.Feature.WAKEUP)
        self.settings = settings
        try:
            self.context = lib.UCXContext(settings, features)
            require_network(self.context.info, settings, os.environ)
            self.worker = lib.UCXWorker(self.context, enable_delayed_submission=False, enable_python_future=False)
            self.worker.init_blocking_progress_mode()
        except self.binding.root as exc:
            raise ConfigError(
                "UCX does not start with these settings",
                ucx=f"{type(exc).__name__}: {exc}",
                environment={name: value for name, value in os.environ.items() if name.startswith("UCX_")},
                settings=settings,
            ) from exc
        self.flight = Flight(self.worker.handle, ucp_functions(*FUNCTIONS))
        self._turn: Callable[[int], bool] = self.flight.turn
        self._descriptor: int = self.worker.epoll_file_descriptor
        self.thread = get_ident()
        self._busy = self._moves = 0
        note_use(self)

    def connect(self, host: str, port: int, events: EndpointEvents) -> UCXXEndpoint:
        self.check_usable()
        peer = f"{host}:{checked_port(port, lowest=1)}"
        ucx: UcxEndpoint | None = None
        error: TransportError | None = shortage(sum(not endpoint.greeted for endpoint in self.endpoints.values()))
        if error is None and not self.rdma:
            error = other_family(host, self.settings, os.environ)
        try:
            if error is None:
                ucx = self.binding.lib.UCXEndpoint.create(self.worker, host, port, endpoint_error_handling=True)
        except self.binding.root as exc:
            error = self.why_failed(exc, peer, (host, port), connected=False)
        return UCXXEndpoint(self, ucx, peer, events=events, address=(host, port), error=error)

    def listen(self, port: int, on_endpoint: OnEndpoint) -> UCXXListener:
        """See `base.Link.listen`. Binds 0.0.0.0, as ucxx's API takes no address, and `ipv6`."""
        self.check_usable()
        checked_port(port, lowest=0)
        try:
            listener = UCXXListener(self, port, on_endpoint)
        except self.binding.lib.UCXBusyError as exc:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=port) from exc
        except (self.binding.root, OSError) as exc:
            raise ConfigError("UCX cannot listen on this port", port=port, ucx=f"{type(exc).__name__}: {exc}") from exc
        self.listeners.add(listener)
        return listener

    def progress(self, spin_s: float = 0.0) -> bool:
        self.thread = get_ident()
        left_ns = 0 if self.ready or self.broken else int(spin_s * 1e9)
        moved = self._turn(min(left_ns, SPIN_NS))
        while not moved and left_ns > SPIN_NS and not self.ready:
            left_ns -= SPIN_NS
            moved = self._turn(min(left_ns, SPIN_NS))
        if moved:
            self._busy += 1
            self._moves += 1
            if not self._moves % STRAYS_EVERY:
                self.discard_unexpected()
        else:
            self._busy = 0
        if self.ready or self.ending or self.broken:
            return self._call_back() or moved
        return moved

    def arm(self) -> bool:
        if self.forked or self.closed:
            self.check_usable()
        waits = self.ready or self.broken or self.flight.has_ends()
        return not waits and bool(self.worker.arm())

    def fileno(self) -> int:
        return self._descriptor

    def transports(self) -> tuple[str, ...]:
        lanes = [lane for endpoint in self.endpoints.values() for lane in endpoint.lanes()]
        names = dict.fromkeys(transport for transport, device in lanes if device)  # without a device: connection set-up
        return tuple(names) or ("unknown",)

    def close(self) -> None:
        """See `base.Link.close`: end what is in flight, endpoints, listeners, then the worker."""
        if self.closed or self.forked:
            return
        self.closing = True
        failure: Exception | None = None
        late_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self._is_open() and time.monotonic() < late_s + PAUSE_S * 100:
            try:
                self._end_all(late=time.monotonic() > late_s)
                if not self.progress():
                    time.sleep(PAUSE_S)
            except Exception as exc:  # noqa: BLE001  # of a callback; raised when all is closed
                failure = failure or exc
        self.closed = True
        self.closing = False
        open_links.discard(self)
        self._turn = self._refused
        del self.worker, self.context
        self.flight.release()
        if failure is not None:
            raise failure

    def forget(self) -> None:
        super().forget()
        self._turn = self._refused
        keep_for_good(self)
        for endpoint in self.endpoints.values():
            endpoint.disown()

    def _refused(self, _: int) -> bool:
        self.check_usable()
        raise AssertionError

    def _call_back(self) -> bool:
        """Call what is ready, those who have lost their peer, and who is closed; whether anything was called."""
        called = bool(self.ready)
        for _ in range(len(self.ready)):
            self.ready.popleft()()
        cut_off = [endpoint for endpoint, handled in self.broken.items() if handled is None]
        if cut_off and self._busy % BUSY == 0:
            # What had arrived has been taken in; the rest of a broken connection's operations will never come.
            self.broken.update(dict.fromkeys(cut_off, self.flight.cancel(cut_off)))
            called = self.flight.turn(0) or called
        for endpoint in tuple(self.ending):
            if endpoint.ended():
                called = True
                endpoint.end_close()
        for endpoint, handled in tuple(self.broken.items()):
            if handled is not None and self.flight.handled >= handled:
                called = True
                if endpoint.alive:
                    endpoint.lose()
                else:
                    del self.broken[endpoint]
        return called

    def _is_open(self) -> bool:
        self.discard_unexpected()
        return bool(self.endpoints or self.listeners or self.ready or self.posted)

    def _end_all(self, *, late: bool) -> None:
        for listener in list(self.listeners):
            listener.close()
        for endpoint in list(self.endpoints.values()):
            endpoint.close()
            if late:
                endpoint.end_close()


class UCXXListener:
    """See `base.Listener`. `on_endpoint` gets each connection in a turn of the link, outside of UCX's callbacks.

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

        ucx: UcxListener = link.binding.lib.UCXListener.create(link.worker, port, note)
        self.port: int = ucx.port
        self._ucx = deque([ucx])  # shared with the endpoints, which keep it when this one does no more
        self._bound = weakref.ref(self._ucx)
        if link.ipv6 is not None:
            self._ucx.append(IPv6Listener(link.worker.handle, link.ipv6, self.port, note))
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
        peer = request_peer(request) or f"a client of port {self.port}"
        try:
            ucx = bound[0].create_endpoint_from_conn_request(request, True)  # noqa: FBT003
        except self._link.binding.root as exc:  # it has gone already, or its address cannot be reached
            self._link.ready.append(partial(self._note_failed, peer, f"{type(exc).__name__}: {exc}"))
        else:
            self._link.ready.append(partial(self._hand_over, ucx, peer, bound))

    def _hand_over(self, ucx: UcxEndpoint, peer: str, bound: deque[UcxListener]) -> None:
        """Give a connection that came to its owner."""
        if self._closed:
            with suppress(self._link.binding.root):
                ucx.close_blocking()
        elif ucx.alive:
            endpoint = UCXXEndpoint(self._link, ucx, peer, accepted_by=bound)
            try:
                endpoint.events = self._on_endpoint(endpoint)
            finally:
                if endpoint.events is None:
                    endpoint.close()
        else:
            self._note_failed(peer, "it was gone before it was handed over")

    def _note_failed(self, peer: str, reason: str) -> None:
        self._link.counters.accepts_failed += 1
        now = self._link.timers.now()
        if now >= self._quiet_until_s:
            self._quiet_until_s = now + QUIET_S
            count = self._link.counters.accepts_failed
            _log.warning("accept_failed", port=self.port, peer=peer, reason=reason, failed=count)
