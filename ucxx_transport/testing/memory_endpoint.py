"""One end of a connection of a `MemoryLink`."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from ucxx_transport.errors import PeerLostError
from ucxx_transport.link.base import LostReason, byte_view
from ucxx_transport.link.translate import lost
from ucxx_transport.testing.faults import Faults

if TYPE_CHECKING:
    from ucxx_transport.testing.memory_link import MemoryLink

__all__ = ["MemoryEndpoint", "MemoryPending"]

EAGER_BYTES = 8191
"""Sends up to this size complete before they are received (measured of UCX over TCP with its default settings)."""


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
        self._wake()

    def give_up(self, error: PeerLostError) -> None:
        """Tell those who wait that it never ends; the buffer is still in use."""
        if not self.completed:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self, until_s: float | None = None) -> None:
        """See `base.Pending.wait`."""
        if not self.completed and self._error is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            async with asyncio.timeout_at(until_s):
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
        self.sends: deque[MemoryPending] = deque()  # not yet matched by the other end's receives
        self.arrived: deque[tuple[bytes | memoryview, MemoryPending]] = deque()  # of the other end
        self._delivery: asyncio.Task[None] | None = None
        self._outbox: deque[tuple[bytes | memoryview, MemoryPending]] = deque()

    def post_receive(self, buffer: object) -> MemoryPending:
        """See `base.Endpoint.post_receive`."""
        pending = self._post(buffer, sending=False)
        pending.immortal = self.link.network.faults.never_complete
        self._receives.append(pending)
        self.match()
        return pending

    def post_send(self, buffer: object) -> MemoryPending:
        """See `base.Endpoint.post_send`."""
        pending = self._post(buffer, sending=True)
        faults = self.link.network.faults
        if faults.reset_after is not None:
            faults.reset_after -= 1
            if faults.reset_after < 0:
                faults.reset_after = None
                pending.finish(lost("reset", peer=self.peer))
                self.reset()
                return pending
        spared = faults.spare > 0
        if spared:
            faults.spare -= 1
        elif faults.drop > 0:
            faults.drop -= 1
            pending.finish()
            return pending
        self.sends.append(pending)
        self._outbox.append((_content(pending) if spared else _altered(pending, faults), pending))
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
        self.link.count(stray_messages=len(self.arrived))
        self.arrived.clear()
        for pending in (*self.sends, *self._receives):
            if not pending.immortal:
                pending.finish(lost(reason, peer=self.peer))
            elif itself:
                pending.give_up(lost(reason, peer=self.peer))
                self.link.count(parked_buffers=1, parked_bytes=pending.nbytes)
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
        other = self.other
        if other is not None:
            other.arrived.extend(self._outbox)
            self._outbox.clear()
            other.match()

    async def _deliver_after(self, hold: asyncio.Event) -> None:
        await hold.wait()
        self._delivery = None
        self._deliver(None)

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
            send.finish()
            if self.other is not None and send in self.other.sends:
                self.other.sends.remove(send)


def _content(pending: MemoryPending) -> bytes | memoryview:
    view = pending.view
    assert view is not None  # just made by the caller
    return bytes(view) if pending.nbytes <= EAGER_BYTES else view


def _altered(pending: MemoryPending, faults: Faults) -> bytes | memoryview:
    content = _content(pending)
    if faults.truncate_to is not None:
        content, faults.truncate_to = bytes(content[: faults.truncate_to]), None
    if faults.flip_byte is not None:
        flipped = bytearray(content)
        flipped[faults.flip_byte] ^= 0xFF
        content, faults.flip_byte = bytes(flipped), None
    return content
