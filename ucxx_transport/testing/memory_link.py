"""MemoryNetwork and MemoryLink: a link inside one process, for tests of programs that transport payloads.

It behaves as the UCX link does where callers can see it: small sends complete at once and larger ones when received, a
shorter message is a silent success, a longer one fails the receive alone, a closed end resets the other one. `Faults`
makes it misbehave on purpose.

Each link belongs to the thread and event loop it is used in, as every link does; those of one network reach each other
whatever their threads. Between two loops, what one end does to the other is handed to the other's loop.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self, TypeVarTuple

from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.base import LinkStatistics, LostReason, OnEndpoint, byte_view, checked_port, hand_over
from ucxx_transport.link.translate import lost
from ucxx_transport.testing.faults import Faults

EAGER_BYTES = 8191
"""Sends up to this size complete before they are received (measured of UCX over TCP with its default settings)."""


Arguments = TypeVarTuple("Arguments")


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
        """End the operation, once; its buffer is released."""
        if self.completed:
            return
        self.completed = True
        self._error = error
        self.view = None
        self._endpoint.link.count_end(self, error)
        self._wake()

    def give_up(self, error: PeerLostError) -> None:
        """Wake the waiters with an error: it never ends, and the buffer is still in use."""
        if not self.completed:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self, until_s: float | None = None) -> None:
        if not self.completed and self._error is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            async with asyncio.timeout_at(until_s):
                await waiter
        if self._error is not None:
            raise self._error


class MemoryEndpoint:
    """One end of a connection; `other` is the end its messages go to, perhaps in another thread."""

    def __init__(self, link: MemoryLink, peer: str) -> None:
        self.link = link
        self.peer = peer
        self.alive = True
        self.closed = False
        self.other: MemoryEndpoint | None = None
        self._receives: deque[MemoryPending] = deque()
        self.sends: deque[MemoryPending] = deque()  # not yet matched by the other end's receives
        self.arrived: deque[tuple[bytes | memoryview, MemoryPending]] = deque()  # of the other end
        self._delivery: asyncio.Task[None] | None = None
        self._outbox: deque[tuple[bytes | memoryview, MemoryPending]] = deque()

    def post_receive(self, buffer: object) -> MemoryPending:
        pending = self._post(buffer, sending=False)
        pending.immortal = self.link.network.faults.never_complete
        self._receives.append(pending)
        self.match()
        return pending

    def post_send(self, buffer: object) -> MemoryPending:
        pending = self._post(buffer, sending=True)
        faults = self.link.network.faults
        if faults.breaks_connection():
            pending.finish(lost("reset", peer=self.peer))
            self.reset()
            return pending
        content = faults.apply(self._content(pending))
        if content is None:
            pending.finish()
            return pending
        self.sends.append(pending)
        self._outbox.append((content, pending))
        if pending.nbytes <= EAGER_BYTES:
            pending.finish()
        self._deliver(faults.hold)
        return pending

    async def close(self) -> bool:
        if not self.closed:
            self.closed = True
            self._end("closed", itself=True)
            self._reset_other()
            self.link.forget(self)
        return not any(pending.immortal and not pending.completed for pending in self._receives)

    def reset(self) -> None:
        """Break the connection, as a fault does: both ends find their peer lost."""
        self.lose("reset")
        self._reset_other()

    def _reset_other(self) -> None:
        if self.other is not None:
            self.other.link.call(self.other.lose, "reset")

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
        self.link.count(unexpected_messages=len(self.arrived))
        self.arrived.clear()
        for pending in (*self.sends, *self._receives):
            if not pending.immortal:
                pending.finish(lost(reason, peer=self.peer))
            elif itself:
                pending.give_up(lost(reason, peer=self.peer))
                self.link.count(leaked_buffers=1, leaked_bytes=pending.nbytes)
        self.sends.clear()

    def _post(self, buffer: object, *, sending: bool) -> MemoryPending:
        self.link.check_owner()
        if not self.alive:
            raise lost("closed" if self.closed else "reset", peer=self.peer)
        view = byte_view(buffer, writable=not sending)
        self.link.count(**{"sends" if sending else "receives": 1, "in_flight": 1})
        return MemoryPending(self, view.cast("B") if view.nbytes else memoryview(b""), sending=sending)

    def _deliver(self, hold: asyncio.Event | None) -> None:
        if self._delivery is not None and not self._delivery.done():
            return  # what is held goes first
        if hold is not None and not hold.is_set():
            self._delivery = asyncio.get_running_loop().create_task(self._deliver_after(hold))
            return
        if self.other is not None:
            messages = tuple(self._outbox)
            self._outbox.clear()
            self.other.link.call(self.other.take, messages)

    async def _deliver_after(self, hold: asyncio.Event) -> None:
        await hold.wait()
        self._delivery = None
        self._deliver(None)

    def take(self, messages: tuple[tuple[bytes | memoryview, MemoryPending], ...]) -> None:
        """Messages of the other end have arrived."""
        if self.alive:
            self.arrived.extend(messages)
            self.match()

    def sent(self, send: MemoryPending) -> None:
        """A message of this end has been received."""
        send.finish()
        if send in self.sends:
            self.sends.remove(send)

    def match(self) -> None:
        """Bring what has arrived and the receives posted for it together."""
        while self.arrived and self._receives and not self._receives[0].immortal:
            content, send = self.arrived.popleft()
            receive = self._receives.popleft()
            if receive.view is None:  # already ended; cannot be while the endpoint lives
                continue
            if len(content) > receive.nbytes:
                receive.finish(lost("truncated", peer=self.peer))
            else:
                receive.view[: len(content)] = content
                receive.finish()
            if self.other is not None:
                self.other.link.call(self.other.sent, send)

    def _content(self, pending: MemoryPending) -> bytes | memoryview:
        view = pending.view
        assert view is not None  # just made by the caller
        assert self.other is not None  # connected
        # a large message is read from the sender's buffer, but not while the sender's own thread may take that back
        is_read_in_place = pending.nbytes > EAGER_BYTES and self.other.link.thread == self.link.thread
        return view if is_read_in_place else bytes(view)


@dataclass(slots=True, kw_only=True)
class MemoryNetwork:
    """What several `MemoryLink`s share: the ports in use, and the faults.

    Attributes:
        faults: what goes wrong, from now on; nothing by default.
        listeners: by port. Of several networks, those that share this one reach each other, each with its own faults.
        free_ports: the next ones to listen on.
    """

    faults: Faults = field(default_factory=Faults)
    listeners: dict[int, MemoryListener] = field(default_factory=dict)
    free_ports: itertools.count[int] = field(default_factory=lambda: itertools.count(49152))

    def link(self) -> MemoryLink:
        """A link of this network: `link_factory=network.link` for a server or a client."""
        return MemoryLink(self)


class MemoryListener:
    """One port of a `MemoryNetwork`."""

    def __init__(self, link: MemoryLink, port: int, on_endpoint: OnEndpoint) -> None:
        self.link = link
        self.port = port
        self.on_endpoint = on_endpoint

    async def close(self) -> None:
        if self.link.network.listeners.get(self.port) is self:
            del self.link.network.listeners[self.port]

    def accept(self, endpoint: MemoryEndpoint) -> None:
        """Hand over the end of a new connection, in the link's own thread."""
        if self.link.closed:
            endpoint.reset()
            return
        self.link.adopt(endpoint, "endpoints_accepted")
        failed = hand_over(endpoint, self.on_endpoint, asyncio.get_running_loop())
        if failed is not None:
            self.link.keep(failed)


class MemoryLink:
    """A `Link` whose peers are other links of the same network. Bound to the thread it is made in.

    Args:
        network: shared with the links to talk to; a new one by default, on which the link can only reach itself.
    """

    def __init__(self, network: MemoryNetwork | None = None) -> None:
        self.network = network if network is not None else MemoryNetwork()
        self.closed = False
        self.thread = threading.get_ident()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._counts: dict[str, int] = {}
        self._endpoints: set[MemoryEndpoint] = set()
        self._listeners: list[MemoryListener] = []
        self._tasks: set[asyncio.Task[bool]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def connect(self, host: str, port: int) -> MemoryEndpoint:
        """See `base.Link.connect`; the host is only a name."""
        self.check_owner()
        self._loop = asyncio.get_running_loop()
        peer = f"{host}:{checked_port(port, lowest=1)}"
        if self.network.faults.hang_connect:
            await self._loop.create_future()
        listener = self.network.listeners.get(port)
        if listener is None or self.network.faults.refuse:
            raise lost("refused", peer=peer)
        here = MemoryEndpoint(self, peer)
        there = MemoryEndpoint(listener.link, f"memory:{id(here):x}")
        here.other, there.other = there, here
        if not listener.link.call(listener.accept, there):
            raise lost("refused", peer=peer)
        self.adopt(here, "endpoints_connected")
        return here

    async def listen(self, port: int, on_endpoint: OnEndpoint) -> MemoryListener:
        self.check_owner()
        self._loop = asyncio.get_running_loop()
        checked_port(port, lowest=0)
        used = self.network.listeners
        chosen = port or next(number for number in self.network.free_ports if number not in used)
        listener = MemoryListener(self, chosen, on_endpoint)
        if used.setdefault(chosen, listener) is not listener:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=chosen)
        self._listeners.append(listener)
        return listener

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(endpoints_open=len(self._endpoints), **self._counts)

    def transports(self) -> tuple[str, ...]:
        """Always `("memory",)`."""
        return ("memory",)

    async def aclose(self) -> None:
        self.closed = True
        for listener in self._listeners:
            await listener.close()
        for endpoint in list(self._endpoints):
            await endpoint.close()
        await asyncio.gather(*self._tasks)

    def check_owner(self) -> None:
        """Refuse another thread, and a closed link."""
        if threading.get_ident() != self.thread:
            raise ConfigError("this link belongs to another thread; open one per event loop")
        if self.closed:
            raise ConfigError("this link is closed; open another")

    def call(self, function: Callable[[*Arguments], object], *arguments: *Arguments) -> bool:
        """Call a function in this link's thread: now where that is the caller's, else in a turn of the loop there.

        Returns:
            Whether it is called; False when that loop is closed.
        """
        if threading.get_ident() == self.thread:
            function(*arguments)
            return True
        if self._loop is None or self._loop.is_closed():
            return False
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # closed in the meantime
            return False
        return True

    def keep(self, task: asyncio.Task[bool]) -> None:
        """Hold a task of clean-up until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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

    def adopt(self, endpoint: MemoryEndpoint, counter: str) -> None:
        """Count an endpoint among the open ones."""
        self._endpoints.add(endpoint)
        self.count(**{counter: 1})
