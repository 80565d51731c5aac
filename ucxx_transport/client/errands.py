"""What else a connection is needed for than reads by name: payloads discarded unread.

Everything here runs in the thread that runs the reactor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from ucxx_transport.client.connections import UNSETTLED_PER_RING
from ucxx_transport.wire.frames import Status

if TYPE_CHECKING:
    from ucxx_transport.client.connection import Connection
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.ports import PortKey
    from ucxx_transport.errors import TransportError
    from ucxx_transport.link.reactor import Timer
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.wire.answers import Named

DISCARD_PAUSE_S: Final = 0.25
"""Between two tries to discard payloads: a server process that died is back after a second or two."""

_OK: Final = Status.OK


class Discard:
    """One call that discards payloads.

    Attributes:
        found: how many were still there.
        until_s: its deadline, on the reactor's clock.
        done: whether all servers have been asked, or the deadline has passed.
        on_done: called once it is.
        left: parts that are not over, and one until all have been started.
    """

    __slots__ = ("done", "found", "left", "on_done", "until_s")

    def __init__(self, found: int, until_s: float, on_done: Callable[[Discard], object] | None = None) -> None:
        self.found = found
        self.until_s = until_s
        self.done = False
        self.on_done = on_done
        self.left = 1

    def one_over(self) -> None:
        """One ring's part is over."""
        self.left -= 1
        if not self.left:
            self.done = True
            if self.on_done is not None:
                self.on_done(self)


class RingDiscard:
    """The part of it that is of one ring. It is an `Errand` of one connection at a time.

    Args:
        call: the whole.
        refs: payloads of one ring.
        pool: all connections.
        port: gives the port to ask now.

    What cannot be said by the deadline is owed: the ring hears of it with the next read.
    """

    __slots__ = ("_call", "_pending", "_pool", "_port", "_ring_id", "_timer", "_waiting")

    def __init__(
        self,
        call: Discard,
        refs: Sequence[SlotRef],
        pool: Connections,
        port: Callable[[], PortKey],
    ) -> None:
        self._call = call
        self._ring_id = refs[0].ring_id
        self._waiting: deque[SlotRef] = deque(refs)
        self._pending: set[tuple[int, int]] = set()
        self._pool = pool
        self._port = port
        self._timer: Timer | None = None
        call.left += 1
        pool.listeners.append(self.confirmed)
        pool.reactor.call_at(call.until_s, self._too_late)

    def ask(self) -> None:
        """Ask a port; again, until the deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._pending:
            some = [self._waiting.popleft() for _ in range(min(len(self._waiting), UNSETTLED_PER_RING // 2))]
            self._pending.update((ref.slot, ref.generation) for ref in some)
            self._pool.owe(some)
        self._pool.to(self._port(), self._pool.reactor.now()).run(self)

    def start(self, connection: Connection) -> None:
        """See `Errand`."""
        if self._pending:
            self._pool.settle(connection, self._ring_id)

    def lost(self, error: TransportError) -> None:
        """See `Errand`: what was not heard is owed, and said again after a pause."""
        if not self._pending:
            return
        if not error.retryable:
            self._end()  # asking again would be refused again
        elif self._timer is None:
            reactor = self._pool.reactor
            self._timer = reactor.call_at(reactor.now() + DISCARD_PAUSE_S, self.ask)

    def confirmed(self, names: Sequence[Named], statuses: Sequence[Status]) -> int:
        """A server has heard of these; returns how many of them were this call's and still there."""
        if names[0].ring_id != self._ring_id:
            return 0
        found = 0
        for name, status in zip(names, statuses, strict=True):
            key = (name.slot, name.generation)
            if key in self._pending:
                self._pending.discard(key)
                found += status is _OK
        self._call.found += found
        if not self._pending:
            if self._waiting:
                self.ask()
            else:
                self._end()
        return found

    def _too_late(self) -> None:
        if self._pending:
            self._end()

    def _end(self) -> None:
        self._pending.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._pool.owe(self._waiting)
        self._waiting.clear()
        self._pool.listeners.remove(self.confirmed)
        self._call.one_over()
