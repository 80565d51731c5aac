"""UCXXLink: the link over UCX, one context and one worker.

Nothing here changes `os.environ`; `settings` says which settings a context gets and why.
"""

from __future__ import annotations

import ipaddress
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from os import sched_yield
from typing import Any, Final

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.address import list_interfaces, other_family
from ucxx_transport.link.base import (
    CLOSED,
    FORKED,
    Counters,
    EndpointEvents,
    LinkStatistics,
    OnEndpoint,
    Timer,
    Timers,
    byte_view,
    checked_port,
)
from ucxx_transport.link.descriptors import shortage
from ucxx_transport.link.settings import (
    context_settings,
    limits_in_words,
    loopback_only,
    rdma_devices,
    require_free_port,
    require_network,
)
from ucxx_transport.link.translate import Translator
from ucxx_transport.link.ucx_api import (
    IN_PROGRESS,
    UcxArray,
    UcxEndpoint,
    UcxRequest,
    UcxWorker,
    load_binding,
    quiet_ucxx_log,
)
from ucxx_transport.link.ucx_endpoint import (
    CLOSE_TIMEOUT_S,
    UCXXEndpoint,
)
from ucxx_transport.link.ucx_flight import EVERYTHING, Flight, UCXXMessage, UCXXOperation
from ucxx_transport.link.ucx_hello import CHANNEL_BITS
from ucxx_transport.link.ucx_listener import UCXXListener
from ucxx_transport.link.ucx_process import check_not_forked, keep_for_good, link_closed, link_opened

BUSY: Final = 32
"""So many progress calls in a row that moved something put off the end of a broken connection's operations."""

TURN_S: Final = 1e-3
"""How long `progress` goes on while something moves that ends no operation. One call of UCX's takes in 512 KiB."""

STRAYS_EVERY: Final = 8
"""Turns in which something moved between two looks for unexpected messages: at 64 KiB each some 16 MiB of them."""

UNEXPECTED_AT_ONCE: Final = 4096
"""Unexpected messages are cleared away this many at a time, so that a flood cannot hold the thread."""

PAUSE_S: Final = 1e-3
"""Pause after an error of UCX itself in a turn, and between two turns of a close, so as not to burn a core."""


class UCXXLink:
    """See `base.Link`.

    Args:
        timers: of the reactor that drives it.
        shm_lanes: let same-host connections use shared memory instead of TCP; both sides must.
        ucx: further UCX settings, such as `{"TLS": "tcp"}`.
        ipv6: an IPv6 address of this host that listeners listen on, too.

    Attributes:
        thread: that had the last turn.
        For the others see `ucx_flight.LinkContext`.

    Raises:
        ConfigError: ucxx is missing, UCX refuses a setting, or this is a fork of a process that used UCX.
    """

    def __init__(
        self,
        timers: Timers,
        *,
        shm_lanes: bool = False,
        ucx: Mapping[str, str] | None = None,
        ipv6: str | None = None,
    ) -> None:
        check_not_forked()
        self.timers = timers
        self.ipv6 = ipv6
        self.binding = load_binding()
        quiet_ucxx_log()
        lib = self.binding.lib
        self.translator = Translator(lib)
        self.counters = Counters()
        self._rdma = bool(rdma_devices())
        settings = context_settings(shm_lanes=shm_lanes, rdma=self._rdma, ucx=ucx or {}, environment=os.environ)
        if ipv6 is not None:
            settings.setdefault("TCP_AF_PRIO", "inet6,inet")
        port_range = os.environ.get("UCX_TCP_PORT_RANGE", settings.get("TCP_PORT_RANGE"))
        if port_range is not None:
            require_free_port(port_range, [one.address for one in list_interfaces() if one.up])
        features = (lib.Feature.TAG, lib.Feature.STREAM, lib.Feature.WAKEUP)
        self._settings = settings
        try:
            self._context: Any = lib.UCXContext(settings, features)
            require_network(self._context.info, settings, os.environ)
            self.worker: UcxWorker = lib.UCXWorker(
                self._context, enable_delayed_submission=False, enable_python_future=False
            )
            self.worker.init_blocking_progress_mode()
        except self.translator.root as exc:
            raise ConfigError(
                "UCX does not start with these settings",
                ucx=f"{type(exc).__name__}: {exc}",
                environment={name: value for name, value in os.environ.items() if name.startswith("UCX_")},
                settings=settings,
            ) from exc
        self._progress_once: Callable[[], bool] = self.worker.progress_once
        self._descriptor: int = self.worker.epoll_file_descriptor
        self._any_tag, self._any_mask = lib.UCXXTag(0), lib.UCXXTagMask(0)
        self.flight = Flight()
        self.ready: deque[tuple[Callable[[Any], object], object]] = deque()
        self.cancel_due = False
        self.closing = False
        self.thread = threading.get_ident()
        self._busy = 0
        self._lost: deque[UCXXEndpoint] = deque()
        self._closing: dict[UCXXEndpoint, Timer] = {}
        self._listeners: set[UCXXListener] = set()
        self._bases: set[int] = set()
        self._strays: list[tuple[UcxRequest, UcxArray]] = []
        self._closed = self._forked = False
        link_opened(self)

    def connect(self, host: str, port: int, events: EndpointEvents) -> UCXXEndpoint:
        self.check_usable()
        peer = f"{host}:{checked_port(port, lowest=1)}"
        ucx: UcxEndpoint | None = None
        error: TransportError | None = shortage(sum(not endpoint.greeted for endpoint in self.flight.endpoints))
        if error is None and not self._rdma:
            error = other_family(host, self._settings, os.environ)
        try:
            if error is None:
                ucx = self.binding.lib.UCXEndpoint.create(self.worker, host, port, endpoint_error_handling=True)
        except self.translator.root as exc:
            error = self.explain_unreachable(self.translator.error(exc, peer=peer, connected=False), (host, port))
        endpoint = UCXXEndpoint(self, ucx, peer, events=events, address=(host, port), error=error)
        self.adopt(endpoint)
        self.counters.endpoints_connected += 1
        return endpoint

    def listen(self, port: int, on_endpoint: OnEndpoint) -> UCXXListener:
        """See `base.Link.listen`. Binds 0.0.0.0, as ucxx's API takes no address, and `ipv6`."""
        self.check_usable()
        checked_port(port, lowest=0)
        try:
            listener = UCXXListener(self, port, on_endpoint)
        except self.binding.lib.UCXBusyError as exc:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=port) from exc
        except (self.translator.root, OSError) as exc:
            raise ConfigError("UCX cannot listen on this port", port=port, ucx=f"{type(exc).__name__}: {exc}") from exc
        self._listeners.add(listener)
        return listener

    def message(self, buffer: object) -> UCXXMessage:
        self.check_usable()
        view = byte_view(buffer, writable=False)
        return UCXXMessage(view, self.binding.make_array(view))

    def progress(self, spin_s: float = 0.0) -> bool:
        self.thread = threading.get_ident()
        self.counters.progress_turns += 1
        progress_once = self._progress_once
        clock = time.perf_counter
        turn_end = 0.0
        while True:
            moved = False
            looks = self.flight.overlooked
            try:
                moved = progress_once()
                if not moved and spin_s and not (looks or self.ready or self.cancel_due):
                    end = clock() + spin_s
                    while not moved and clock() < end:
                        sched_yield()  # on a full machine the peer waits for this very core: 4 KiB in 280 us, not 433
                        moved = progress_once()
            except self.translator.root:
                self.counters.suppressed_errors += 1
                time.sleep(PAUSE_S)
            if self._call_back(moved):
                return True
            if not (moved or looks):
                return False
            now = clock()
            turn_end = turn_end or now + TURN_S
            if now > turn_end:
                return True

    def arm(self) -> bool:
        if self._forked or self._closed:
            self.check_usable()
        if self.ready or self.cancel_due or self.flight.overlooked or self._lost or not self.worker.arm():
            return False
        self.counters.sleeps += 1
        return True

    def fileno(self) -> int:
        return self._descriptor

    def statistics(self) -> LinkStatistics:
        self.counters.endpoints_open = len(self.flight.endpoints)
        return self.counters.snapshot()

    def transports(self) -> tuple[str, ...]:
        lanes = [lane for endpoint in self.flight.endpoints for lane in endpoint.lanes()]
        names = dict.fromkeys(transport for transport, device in lanes if device)  # without a device: connection set-up
        return tuple(names) or ("unknown",)

    def close(self) -> None:
        """See `base.Link.close`: end what is in flight, endpoints, listeners, then the worker."""
        if self._closed or self._forked:
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
        self._closed = True
        self.closing = False
        keep_for_good(*self._strays)
        self.worker.cancel_inflight_requests()  # also releases those that it has cancelled before
        link_closed(self)
        self._progress_once = self._refused
        del self.worker, self._context
        if failure is not None:
            raise failure

    def forget(self) -> None:
        self._forked = True
        self._progress_once = self._refused
        for endpoint in self.flight.endpoints:
            endpoint.disown()

    def check_usable(self) -> None:
        """Refuse a closed link, and one of a parent process.

        Raises:
            ConfigError: it is one of these.
        """
        if self._forked:
            raise ConfigError(FORKED)
        if self._closed:
            raise ConfigError(CLOSED)

    def adopt(self, endpoint: UCXXEndpoint) -> None:
        """Count an endpoint among the open ones."""
        self.flight.add(endpoint)
        self._bases.add(endpoint.base)

    def note_lost(self, endpoint: UCXXEndpoint) -> None:
        """An endpoint's peer is gone: the next turn says so to its owner, when what had arrived is called back."""
        self._lost.append(endpoint)
        self.cancel_due = True

    def note_closing(self, endpoint: UCXXEndpoint) -> None:
        """An endpoint has been closed: its operations end soon, or it is ended without them."""
        self._closing[endpoint] = self.in_turn_after(CLOSE_TIMEOUT_S, self._end_late, endpoint)

    def in_turn_after(self, delay_s: float, action: Callable[[Any], object], argument: object) -> Timer:
        """Call this in a turn, after a while."""
        call = (action, argument)
        return self.timers.call_at(self.timers.now() + delay_s, lambda: self.ready.append(call))

    def forget_endpoint(self, endpoint: UCXXEndpoint) -> None:
        """An endpoint is closed."""
        self.flight.remove(endpoint)
        self._bases.discard(endpoint.base)
        self._discard_unexpected()

    def forget_listener(self, listener: UCXXListener) -> None:
        """A listener is closed."""
        self._listeners.discard(listener)

    def leak(self, operation: UCXXOperation, ucx: UcxEndpoint | None) -> None:
        """Keep the buffer of an operation that never ends, for good."""
        self.counters.leaked_buffers += 1
        self.counters.leaked_bytes += operation.nbytes
        keep_for_good(operation, ucx)

    def explain_unreachable(self, error: TransportError, address: tuple[str, int] | None) -> TransportError:
        """The same error, or a ConfigError where it is this side's settings that leave no way to another host."""
        if address is None or not isinstance(error, PeerLostError) or error.facts["reason"] != "unreachable":
            return error
        limits = limits_in_words(self._settings, os.environ)
        if limits and loopback_only(self._context.info) and not ipaddress.ip_address(address[0]).is_loopback:
            return ConfigError(
                f"{limits} leaves UCX nothing but loopback; add an interface of this host", host=address[0]
            )
        return error

    def _refused(self) -> bool:
        self.check_usable()
        raise AssertionError

    def _call_back(self, moved: bool) -> bool:  # noqa: FBT001  # positional is what it costs least
        """Call what is ready, what has ended, who is lost and who is closed; whether anything was called."""
        called = False
        self._busy = self._busy + 1 if moved else 0
        if self.ready:
            called = True
            for _ in range(len(self.ready)):
                action, argument = self.ready.popleft()
                action(argument)
        everywhere = self.flight.overlooked and not moved
        if self.cancel_due and self._busy % BUSY == 0:
            # What had arrived has been taken in; the rest of a broken connection's operations will never come.
            self.cancel_due = False
            self.worker.cancel_inflight_requests()
            everywhere = True
        if everywhere or moved:
            called = self.flight.search(everywhere=everywhere) or called
            if self.flight.searches % STRAYS_EVERY == 0:
                self._discard_unexpected()
        if self._closing:
            called = self._end_closing() or called
        while self._lost and not (self.ready or self.cancel_due):
            called = True
            self._lost.popleft().lose()
        return called

    def _end_closing(self) -> bool:
        ended = [endpoint for endpoint in tuple(self._closing) if endpoint.search(EVERYTHING) or endpoint.ended()]
        for endpoint in ended:
            if endpoint.ended() and endpoint in self._closing:
                self._closing.pop(endpoint).cancel()
                endpoint.end_close()
        return bool(ended)

    def _end_late(self, endpoint: UCXXEndpoint) -> None:
        timer = self._closing.pop(endpoint, None)
        if timer is not None:
            timer.cancel()
            endpoint.end_close()

    def _is_open(self) -> bool:
        self._discard_unexpected()
        return bool(self.flight.endpoints or self._listeners or self.ready or self._strays)

    def _end_all(self, *, late: bool) -> None:
        for listener in list(self._listeners):
            listener.close()
        for endpoint in list(self.flight.endpoints):
            endpoint.close()
            if late:
                self._end_late(endpoint)

    def _discard_unexpected(self) -> None:
        """Drop messages that no endpoint waits for, which UCX would keep until the worker's end.

        They are what came to an endpoint that has been closed, or under a tag that never was one's: tags are matched in
        the whole worker, so any peer may send such.
        """
        if self._strays:
            self._strays = [stray for stray in self._strays if stray[0].status == IN_PROGRESS]
        found = self.worker.tag_probe(self._any_tag, self._any_mask)
        if not found.matched:
            return
        nowhere = self.binding.make_array(bytearray(1))
        for _ in range(UNEXPECTED_AT_ONCE):
            tag = found.sender_tag
            if tag.value >> CHANNEL_BITS in self._bases:
                return  # its receive is about to be posted; what lies behind it is seen to next time
            request = self.worker.tag_recv(nowhere, tag)
            self.counters.unexpected_messages += 1
            if request.status == IN_PROGRESS:  # UCX still refers to it: dropping it, or the array, could be a crash
                self._strays.append((request, nowhere))
            found = self.worker.tag_probe(self._any_tag, self._any_mask)
            if not found.matched:
                return
