"""A link inside one process and one event loop, for tests and examples.

It behaves as the UCX link does where callers can tell: small sends complete at once and larger ones when received, a
shorter message is a silent success, a longer one fails the receive alone, a closed end resets the other one. `Faults`
makes it misbehave on purpose.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType

from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.base import LinkStatistics, LostReason, OnEndpoint
from ucxx_transport.link.buffers import byte_view

__all__ = ["Faults", "MemoryEndpoint", "MemoryLink", "MemoryListener", "MemoryNetwork", "MemoryPending"]

EAGER_BYTES = 8191
"""Sends up to this size complete before they are received (measured of UCX over TCP with its default settings)."""


@dataclass(slots=True, kw_only=True)
class Faults:
    """Switches of a `MemoryNetwork`; each message sent takes them in this order.

    Attributes:
        reset_after: this many further messages pass, then the connection of the next one breaks instead.
        drop: this many messages vanish; their sends succeed.
        truncate_to: the next message loses what is beyond this many bytes.
        flip_byte: the next message arrives with the byte at this offset inverted.
        hold: while set to an event, messages are delivered only once it is set, in order.
        refuse: connections are refused.
        hang_connect: connections neither succeed nor fail.
        never_complete: further receives never end, not even by `close()`, which then returns False.
    """

    reset_after: int | None = None
    drop: int = 0
    truncate_to: int | None = None
    flip_byte: int | None = None
    hold: asyncio.Event | None = None
    refuse: bool = False
    hang_connect: bool = False
    never_complete: bool = False


@dataclass(slots=True, kw_only=True)
class MemoryNetwork:
    """What several `MemoryLink`s share: the ports in use, and the faults."""

    faults: Faults = field(default_factory=Faults)
    listeners: dict[int, MemoryListener] = field(default_factory=dict)
    free_ports: itertools.count[int] = field(default_factory=lambda: itertools.count(49152))


class MemoryPending:
    """One operation of a `MemoryEndpoint`."""

    __slots__ = ("_endpoint", "_error", "_waiters", "completed", "immortal", "nbytes", "sending", "view")

    def __init__(self, endpoint: MemoryEndpoint, view: memoryview, *, sending: bool) -> None:
        self._endpoint = endpoint
        self._error: PeerLostError | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self.completed = False
        self.immortal = False
        self.view: memoryview | None = view
        self.nbytes = view.nbytes
        self.sending = sending

    def finish(self, error: PeerLostError | None = None) -> None:
        """End the operation, once; the buffer is let go."""
        if self.completed:
            return
        self.completed = True
        self._error = error
        self.view = None
        self._endpoint.link.count_end(self, error)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self) -> None:
        """See `base.Pending.wait`."""
        if not self.completed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._error is not None:
            raise self._error


class MemoryEndpoint:
    """One end of a connection; `other` is the end its messages go to."""

    def __init__(self, link: MemoryLink, peer: str) -> None:
        self.link = link
        self.peer = peer
        self.alive = True
        self.closed = False
        self.other: MemoryEndpoint | None = None
        self._receives: deque[MemoryPending] = deque()
        self._sends: deque[MemoryPending] = deque()  # not yet matched by the other end's receives
        self._arrived: deque[tuple[bytes | memoryview, MemoryPending]] = deque()  # of the other end
        self._delivery: asyncio.Task[None] | None = None
        self._outbox: deque[tuple[bytes | memoryview, MemoryPending]] = deque()

    def post_receive(self, buffer: object) -> MemoryPending:
        """See `base.Endpoint.post_receive`."""
        pending = self._post(buffer, sending=False)
        pending.immortal = self.link.network.faults.never_complete
        self._receives.append(pending)
        self._match()
        return pending

    def post_send(self, buffer: object) -> MemoryPending:
        """See `base.Endpoint.post_send`."""
        pending = self._post(buffer, sending=True)
        faults = self.link.network.faults
        if faults.reset_after is not None:
            faults.reset_after -= 1
            if faults.reset_after < 0:
                faults.reset_after = None
                pending.finish(_lost("reset", self.peer))
                self.reset()
                return pending
        if faults.drop > 0:
            faults.drop -= 1
            pending.finish()
            return pending
        self._sends.append(pending)
        self._outbox.append((_altered(pending, faults), pending))
        if pending.nbytes <= EAGER_BYTES:
            pending.finish()
        self._deliver(faults.hold)
        return pending

    async def close(self) -> bool:
        """See `base.Endpoint.close`."""
        if not self.closed:
            self.closed = True
            self._end("closed", itself=True)
            if self.other is not None:
                self.other.lose("reset")
            self.link.forget(self)
        return not any(pending.immortal and not pending.completed for pending in self._receives)

    def reset(self) -> None:
        """Break the connection, as a fault does: both ends find their peer lost."""
        self.lose("reset")
        if self.other is not None:
            self.other.lose("reset")

    def lose(self, reason: LostReason) -> None:
        """The other end is gone."""
        if self.alive:
            self.link.count(peers_lost=1)
            self._end(reason)

    def _end(self, reason: LostReason, *, itself: bool = False) -> None:
        self.alive = False
        if self._delivery is not None:
            self._delivery.cancel()
        self._outbox.clear()
        self._arrived.clear()
        for pending in (*self._sends, *self._receives):
            if not pending.immortal:
                pending.finish(_lost(reason, self.peer))
            elif itself:
                self.link.count(parked_buffers=1, parked_bytes=pending.nbytes)
        self._sends.clear()

    def _post(self, buffer: object, *, sending: bool) -> MemoryPending:
        self.link.check_owner()
        if not self.alive:
            raise _lost("closed" if self.closed else "reset", self.peer)
        view = byte_view(buffer, writable=not sending)
        self.link.count(**{"sends" if sending else "receives": 1, "in_flight": 1})
        return MemoryPending(self, view.cast("B") if view.nbytes else memoryview(b""), sending=sending)

    def _deliver(self, hold: asyncio.Event | None) -> None:
        if self._delivery is not None and not self._delivery.done():
            return  # what is held goes first
        if hold is not None and not hold.is_set():
            self._delivery = asyncio.get_running_loop().create_task(self._deliver_after(hold))
            return
        other = self.other
        if other is not None:
            other._arrived.extend(self._outbox)
            self._outbox.clear()
            other._match()

    async def _deliver_after(self, hold: asyncio.Event) -> None:
        await hold.wait()
        self._delivery = None
        self._deliver(None)

    def _match(self) -> None:
        while self._arrived and self._receives and not self._receives[0].immortal:
            content, send = self._arrived.popleft()
            receive = self._receives.popleft()
            if receive.view is None:  # already ended; cannot be while the endpoint lives
                continue
            if len(content) > receive.nbytes:
                receive.finish(_lost("truncated", self.peer))
            else:
                receive.view[: len(content)] = content
                receive.finish()
            send.finish()
            if self.other is not None and send in self.other._sends:
                self.other._sends.remove(send)


def _altered(pending: MemoryPending, faults: Faults) -> bytes | memoryview:
    view = pending.view
    assert view is not None  # just made by the caller
    content: bytes | memoryview = bytes(view) if pending.nbytes <= EAGER_BYTES else view
    if faults.truncate_to is not None:
        content, faults.truncate_to = bytes(content[: faults.truncate_to]), None
    if faults.flip_byte is not None:
        flipped = bytearray(content)
        flipped[faults.flip_byte] ^= 0xFF
        content, faults.flip_byte = bytes(flipped), None
    return content


def _lost(reason: LostReason, peer: str) -> PeerLostError:
    return PeerLostError("the connection is over", reason=reason, peer=peer)


class MemoryListener:
    """One port of a `MemoryNetwork`."""

    def __init__(self, link: MemoryLink, port: int, on_endpoint: OnEndpoint) -> None:
        self.link = link
        self.port = port
        self.on_endpoint = on_endpoint

    async def close(self) -> None:
        """See `base.Listener.close`."""
        if self.link.network.listeners.get(self.port) is self:
            del self.link.network.listeners[self.port]


class MemoryLink:
    """A `Link` whose peers are other links of the same network, event loop and process.

    Args:
        network: shared with the links to talk to; a new one by default, on which the link can only reach itself.
    """

    def __init__(self, network: MemoryNetwork | None = None) -> None:
        self.network = network if network is not None else MemoryNetwork()
        self.closed = False
        self._thread = threading.get_ident()
        self._counts: dict[str, int] = {}
        self._endpoints: set[MemoryEndpoint] = set()
        self._listeners: list[MemoryListener] = []

    async def __aenter__(self) -> MemoryLink:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def connect(self, host: str, port: int) -> MemoryEndpoint:
        """See `base.Link.connect`; the host is only a name."""
        self.check_owner()
        peer = f"{host}:{port}"
        if self.network.faults.hang_connect:
            await asyncio.get_running_loop().create_future()
        listener = self.network.listeners.get(port)
        if listener is None or self.network.faults.refuse:
            raise PeerLostError("nothing listens there", reason="refused", peer=peer)
        here = self._adopt(MemoryEndpoint(self, peer), "endpoints_connected")
        there = listener.link._adopt(MemoryEndpoint(listener.link, f"memory:{id(here):x}"), "endpoints_accepted")
        here.other, there.other = there, here
        listener.on_endpoint(there)
        return here

    async def listen(self, port: int, on_endpoint: OnEndpoint) -> MemoryListener:
        """See `base.Link.listen`."""
        self.check_owner()
        used = self.network.listeners
        chosen = port or next(number for number in self.network.free_ports if number not in used)
        if chosen in used:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=chosen)
        used[chosen] = listener = MemoryListener(self, chosen, on_endpoint)
        self._listeners.append(listener)
        return listener

    def statistics(self) -> LinkStatistics:
        """See `base.Link.statistics`."""
        return LinkStatistics(endpoints_open=len(self._endpoints), **self._counts)

    def transports(self) -> tuple[str, ...]:
        """Always `("memory",)`."""
        return ("memory",)

    async def aclose(self) -> None:
        """See `base.Link.aclose`."""
        self.closed = True
        for listener in self._listeners:
            await listener.close()
        for endpoint in list(self._endpoints):
            await endpoint.close()

    def check_owner(self) -> None:
        """Refuse another thread, and a closed link."""
        if threading.get_ident() != self._thread:
            raise ConfigError("this link belongs to another thread; open one per event loop")
        if self.closed:
            raise ConfigError("this link is closed; open another")

    def count(self, **steps: int) -> None:
        """Add to counters of `LinkStatistics`, by name."""
        for name, step in steps.items():
            self._counts[name] = self._counts.get(name, 0) + step

    def count_end(self, pending: MemoryPending, error: PeerLostError | None) -> None:
        """Count the end of an operation."""
        if error is None:
            self.count(**{"sent_bytes" if pending.sending else "posted_receive_bytes": pending.nbytes})
        else:
            self.count(failed=1, truncated=int(error.facts["reason"] == "truncated"))
        self.count(in_flight=-1)

    def forget(self, endpoint: MemoryEndpoint) -> None:
        """Drop a closed endpoint."""
        self._endpoints.discard(endpoint)

    def _adopt(self, endpoint: MemoryEndpoint, counter: str) -> MemoryEndpoint:
        self._endpoints.add(endpoint)
        self.count(**{counter: 1})
        return endpoint
