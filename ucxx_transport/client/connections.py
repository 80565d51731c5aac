"""All connections of a client: one for each port in use, kept by least recent use within the process's descriptors.

Beside them what outlives each: the schemas of rings, and what servers may not have heard yet.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ucxx_transport.client.connection import Connection
from ucxx_transport.client.ports import PortKey
from ucxx_transport.errors import TransportError
from ucxx_transport.link.descriptors import connection_budget, descriptors_in_use, raised_limit
from ucxx_transport.wire.client_side import BYE_RECEIVE_BYTES, CONFIRM_RECEIVE_BYTES
from ucxx_transport.wire.frames import MAX_NAMES, Status

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.roles import Engine
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.schema import Schema
    from ucxx_transport.wire.actions import Asked
    from ucxx_transport.wire.answers import Named

UNSETTLED_PER_RING: Final = 1024
UNSETTLED_RINGS: Final = 256
"""Deliveries and discards that servers may not know of are remembered so far; beyond it a server's own timeout frees
what was delivered, and what was discarded stays until it is overwritten."""

ENDS_DELAY_S: Final = 0.001
"""How long an end waits for a request to go along with, while other answers are still to come."""

GOODBYE_TIMEOUT_S: Final = 0.5

SHORTAGE_PAUSE_S: Final = 0.005
"""A connection for which there were no descriptors is tried again after this: those of others come and go."""


class Connections:
    """See the module. Of the thread that runs the reactor.

    Attributes:
        known: by port, least recently used first.
        ending: connections with ends that wait for a request to go along with.
        max_age_s: one that has not been used for so long is not used again.
        schemas: by fingerprint, all that were asked for.
        unsettled: by ring, deliveries that its servers may not know of.
        waiting: connections that wait for descriptors.
        listeners: called with what servers have confirmed; each returns how much of it was discarded by itself.
        closed: whether `close` has been called.
    """

    def __init__(
        self,
        config: ClientConfig,
        reactor: Reactor,
        engine: Engine,
        *,
        counters: ClientCounters,
        lend: Callable[[int], Bytes],
    ) -> None:
        self.config = config
        self.reactor = reactor
        self.engine = engine
        self.counters = counters
        self.lend = lend
        self.max_age_s = config.pool_endpoint_max_age_s
        self.schemas: dict[int, Schema] = {}
        self.unsettled: OrderedDict[bytes, deque[Named]] = OrderedDict()
        self.waiting: deque[Connection] = deque()
        self.listeners: list[Callable[[Sequence[Named], Sequence[Status]], int]] = []
        self.closed = False
        self.known: OrderedDict[PortKey, Connection] = OrderedDict()
        self._closing = 0
        self._budget: int | None = None
        self.ending: set[Connection] = set()
        self._goodbyes = 0

    @property
    def idle_count(self) -> int:
        """Open connections that nothing uses now."""
        return sum(connection.idle for connection in tuple(self.known.values()))

    def to(self, key: PortKey, now: float) -> Connection:
        """The connection to a port, opened if there is none."""
        known = self.known
        connection = known.get(key)
        if connection is not None:
            if now - connection.used_s <= self.max_age_s or not connection.idle:
                known.move_to_end(key)
                connection.used_s = now
                return connection
            self._close_aged(now)
        return self._open(key, now)

    def evict(self, key: PortKey) -> None:
        """Close the connection to a port if nothing uses it."""
        connection = self.known.get(key)
        if connection is not None and connection.idle:
            connection.close()

    def _open(self, key: PortKey, now: float) -> Connection:
        self._close_aged(now)  # also those to sources that are not read any more
        connection = self.known[key] = Connection(self, key)
        connection.used_s = now
        if self._has_room():
            self.reactor.call_at(now, connection.start)  # in the next turn: who asked has not queued anything yet
        else:
            self.waiting.append(connection)
            self._close_idle()
        return connection

    def _has_room(self) -> bool:
        if self._budget is None:
            self._budget = connection_budget(
                limit=raised_limit(), in_use=descriptors_in_use(), asked=self.config.max_connections
            )
        return len(self.known) - len(self.waiting) + self._closing <= self._budget

    def _close_aged(self, now: float) -> None:
        limit_s = now - self.max_age_s
        for connection in tuple(self.known.values()):
            if connection.used_s >= limit_s:
                return  # they are in the order of their use
            if connection.idle:
                self.counters.add("aged_out")
                connection.close()

    def _close_idle(self, *, every: bool = False) -> None:
        """Make room for one that waits."""
        for connection in tuple(self.known.values()):
            if connection.idle:
                connection.close()
                if not every:
                    return

    def rested(self, connection: Connection) -> None:
        """Nothing uses it any more, while others wait for its descriptors."""
        if connection.idle:
            connection.close()

    def removed(self, connection: Connection) -> None:
        """It is closed, and its descriptors are not free yet."""
        if self.known.get(connection.key) is connection:
            del self.known[connection.key]
        with suppress(ValueError):
            self.waiting.remove(connection)
        self.ending.discard(connection)
        self._closing += 1

    def descriptors_free(self, _: bool) -> None:  # noqa: FBT001 - as a link calls it
        """A closed connection's descriptors are free."""
        self._closing -= 1
        self._start_waiting()

    def short(self, connection: Connection, error: TransportError) -> bool:
        """There were no descriptors for a connection, whatever the budget says; whether it now waits for others'."""
        self._close_idle(every=True)
        if len(self.known) - len(self.waiting) + self._closing < 2:  # this one is all there is
            return False
        again = self.known[connection.key] = Connection(self, connection.key)
        again.used_s, again.shortage = connection.used_s, error
        for read in connection.queue:
            read.connection = again
        again.queue, connection.queue = connection.queue, again.queue
        again.errands, connection.errands = connection.errands, again.errands
        self.waiting.append(again)
        connection.close()
        self.reactor.call_at(self.reactor.now() + SHORTAGE_PAUSE_S, self._start_waiting)
        return True

    def _start_waiting(self) -> None:
        while self.waiting and not self.closed:
            connection = self.waiting.popleft()
            if not self._has_room():
                self.waiting.appendleft(connection)
                return
            connection.start()

    # --- Ends and confirmations ---

    def delay_ends(self, connection: Connection) -> None:
        """Its ends go with its next request, or a little later."""
        if not self.ending:
            self.reactor.call_at(self.reactor.now() + ENDS_DELAY_S, self.send_ends)
        self.ending.add(connection)

    def send_ends(self) -> None:
        """Send all ends that wait."""
        while self.ending:
            self.ending.pop().send_ends()

    def owe(self, names: Iterable[Named]) -> None:
        """Remember payloads that are ours, or are not wanted, of which a server may not know."""
        for name in names:
            self.unsettled.setdefault(name.ring_id, deque(maxlen=UNSETTLED_PER_RING)).append(name)
        while len(self.unsettled) > UNSETTLED_RINGS:
            self.unsettled.popitem(last=False)

    def settle(self, connection: Connection, ring_id: bytes) -> None:
        """Say what a ring's server may not know; the answer is not waited for: frames are handled in order."""
        names = list(self.unsettled.pop(ring_id, ()))
        for start in range(0, len(names), MAX_NAMES):
            self._confirm(connection, names[start : start + MAX_NAMES])

    def _confirm(self, connection: Connection, names: list[Named]) -> None:
        session = connection.session

        def confirmed(asked: Asked, answer: bytearray) -> None:
            try:
                statuses = session.confirmed(asked.attempt, answer)
            except TransportError as error:
                if session.broken:
                    raise
                statuses = [Status.BUSY if error.retryable else Status.STALE] * len(names)
            self.confirmed(names, statuses)
            connection.after_answers()

        if connection.closed:  # by the frame before
            self.owe(names)
        else:
            connection.ask(session.confirm(names), CONFIRM_RECEIVE_BYTES, confirmed)

    def confirmed(self, names: list[Named], statuses: list[Status]) -> None:
        """A server has heard it; of what it could not look at, it hears again with the next read."""
        busy = Status.BUSY
        self.owe(name for name, status in zip(names, statuses, strict=True) if status is busy)
        discarded = sum(listener(names, statuses) for listener in tuple(self.listeners))
        self.counters.add("confirms", statuses.count(Status.OK) - discarded)

    # --- The end ---

    def say_goodbye(self, on_said: Callable[[], None]) -> None:
        """Take leave of every server; called back when all have answered, or in `GOODBYE_TIMEOUT_S`."""
        connections = [connection for connection in self.known.values() if connection.is_open]
        left = len(connections) + 1

        def said() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                on_said()

        def too_late() -> None:
            nonlocal left
            if left > 0:
                left = 0
                on_said()

        self.reactor.call_at(self.reactor.now() + GOODBYE_TIMEOUT_S, too_late)
        for connection in connections:
            _say_goodbye(connection, said)
        said()

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self.closed = True
        self.waiting.clear()
        for connection in tuple(self.known.values()):
            connection.close()


def _say_goodbye(connection: Connection, on_said: Callable[[], None]) -> None:
    """Called back once the server has handled everything, unless the connection is lost before."""
    session = connection.session

    def said(asked: Asked, answer: bytearray) -> None:
        session.farewell(asked.attempt, answer)
        on_said()

    connection.ask(session.bye(), BYE_RECEIVE_BYTES, said)
