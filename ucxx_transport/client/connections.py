"""All connections of a client: one for each port in use, opened by turns, and kept by least recent use.

Beside them what outlives each: the schemas of rings, and what servers may not have heard yet.

| a new connection waits, without its `connect_timeout_s`, for | until                                                 |
|--------------------------------------------------------------|-------------------------------------------------------|
| descriptors                                                  | those of another one are free: idle ones are closed   |
| its turn, while `CONNECTS_AT_ONCE` others are being opened   | one is open or lost, or has had `CONNECT_TURN_S`      |

So the answers to many first reads do not come too late by each other's work, and a port is not blamed for it; nor do
many hosts that never answer hold up the others for long. One is open once the schema of its ring is known.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Never

from ucxx_transport.errors import PeerLostError, ProtocolError, TransportError
from ucxx_transport.link.base import PER_CONNECTION, connection_budget, descriptors_in_use, loopback_hint, raised_limit
from ucxx_transport.logs import get_logger
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.wire.frames import MAX_NAMES, Status

if TYPE_CHECKING:
    from ucxx_transport.client.jobs import Call, Carrier, ClientBase
    from ucxx_transport.client.ports import PortKey
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.wire.client_side import Asked, ClientSession

UNSETTLED_PER_RING: Final = 1024
UNSETTLED_RINGS: Final = 256
"""Deliveries and discards that servers may not know of are remembered so far; beyond it a server's own timeout frees
what was delivered, and what was discarded stays until it is overwritten."""

CONNECTS_AT_ONCE: Final = 16
CONNECT_TURN_S: Final = 0.25

OWN_DELAY_S: Final = 0.05
"""A timer that is called so much later than it was due says that the reactor was not run: no fault of the port's."""

SHORTAGE_S: Final = 1.0
"""After there were no descriptors for a connection, they are counted again once none waits, this much later or more."""

ENDS_DELAY_S: Final = 0.001
"""How long an end waits for a request to go along with, while other answers are still to come."""

GOODBYE_TIMEOUT_S: Final = 0.5

_log = get_logger(__name__)


class Schemas(dict[int, "Schema | None"]):
    """By fingerprint, those of the rings behind all connections so far; raw bytes have none."""

    def __missing__(self, fingerprint: int) -> Never:
        raise ProtocolError("the reference names another schema than the ring at its port has")


class Connections:
    """See the module. Of the thread that runs the reactor.

    Attributes:
        known: by port. waiting: those that have not been started.
        ending: those with ends that wait for a request to go along with.
        unsettled: by ring, deliveries and discards that its servers may not know of.
    """

    def __init__(self, base: ClientBase, reactor: Reactor, connect: Callable[[PortKey], Carrier]) -> None:
        self.base = base
        self.reactor = reactor
        self.max_age_s = base.config.pool_endpoint_max_age_s
        self.known: dict[PortKey, Carrier] = {}
        self.waiting: deque[Carrier] = deque()
        self.ending: set[Carrier] = set()
        self.schemas = Schemas({0: None})
        self.unsettled: OrderedDict[bytes, deque[SlotRef]] = OrderedDict()
        self.closed = False
        self._connect = connect
        self._opening: set[Carrier] = set()
        self._closing = 0
        self._budget: int | None = None
        self._is_queue_logged = False

    def to(self, key: PortKey, now: float) -> Carrier:
        connection = self.known.get(key)
        if connection is None or (now - connection.used_s > self.max_age_s and connection.idle):
            for other in tuple(self.known.values()):  # also those to sources that are not read any more
                if now - other.used_s > self.max_age_s and other.idle:
                    self.base.counters.add("aged_out")
                    other.close()
            connection = self.known[key] = self._connect(key)
            self.waiting.append(connection)
            self.reactor.call_at(now, self.start_waiting)  # in the next turn: who asked has not queued anything yet
        connection.used_s = now
        return connection

    def evict(self, key: PortKey) -> None:
        connection = self.known.get(key)
        if connection is not None and connection.idle:
            connection.close()

    def removed(self, connection: Carrier) -> None:
        """It is closed, and its descriptors are not free yet."""
        if self.known.get(connection.key) is connection:
            del self.known[connection.key]
        with suppress(ValueError):
            self.waiting.remove(connection)
        self.ending.discard(connection)
        self._opening.discard(connection)
        self._closing += 1

    def descriptors_free(self, _: bool) -> None:  # noqa: FBT001 - as a link calls it
        self._closing -= 1
        self.start_waiting()

    def short(self) -> None:
        """There were no descriptors for a connection, whatever the budget says: for a while it is less."""
        self._budget = max(1, self._in_use - 1)
        self.reactor.call_at(self.reactor.now() + SHORTAGE_S, self._count_again)
        for other in tuple(self.known.values()):
            if other.idle:
                other.close()

    def close(self) -> None:
        self.closed = True
        for connection in tuple(self.known.values()):
            connection.close()

    def start_waiting(self) -> None:
        """Start those that have waited longest, as descriptors and turns are there for them."""
        while self.waiting and not self.closed:
            if not self._has_room():
                if self._closing < len(self.waiting) and (idle := [one for one in self.known.values() if one.idle]):
                    min(idle, key=lambda other: other.used_s).close()  # the longest unused
                return
            if len(self._opening) >= CONNECTS_AT_ONCE:
                if not self._is_queue_logged:
                    _log.info("connects_queued", waiting=len(self.waiting), at_once=CONNECTS_AT_ONCE)
                    self._is_queue_logged = True
                return
            connection = self.waiting.popleft()
            self._opening.add(connection)
            self.reactor.call_at(self.reactor.now() + CONNECT_TURN_S, partial(self._turn_over, connection))
            self._set_limit(connection)
            self.reactor.resolve(connection.key[0], partial(self._resolved, connection))
        self._is_queue_logged = False

    def _set_limit(self, connection: Carrier) -> None:
        due_s = self.reactor.now() + self.base.config.connect_timeout_s
        self.reactor.call_at(due_s, partial(self._at_limit, connection, due_s))

    def _at_limit(self, connection: Carrier, due_s: float) -> None:
        if connection.is_open or connection.closed:
            return
        if self.reactor.now() - due_s > OWN_DELAY_S:
            self._set_limit(connection)  # this client has not looked meanwhile, and may have its answer
            return
        endpoint, (host, port) = connection.endpoint, connection.key
        hint = loopback_hint(host)
        words = f"no answer to the handshake within connect_timeout_s; is a ucxx_transport server there?{hint}"
        if endpoint is not None and endpoint.listener_has_answered():
            words = (
                "the listener answered, the data port did not: a firewall? UCX connects in both directions; set "
                "data_ports on both sides and open them"
            )
        connection.lost(PeerLostError(words, host=host, port=port, reason="unreachable"))

    def _resolved(self, connection: Carrier, address: str | PeerLostError) -> None:
        if connection.closed:
            return
        if isinstance(address, PeerLostError):
            connection.lost(address)
            return
        try:
            connection.endpoint = self.reactor.link.connect(address, connection.key[1], connection)
        except TransportError as error:
            connection.lost(error)
            return
        self._shake_hands(connection, self._handshake(connection.session))

    def _shake_hands(
        self, connection: Carrier, handshake: Generator[Asked, memoryview, None], answer: memoryview | None = None
    ) -> None:
        try:
            asked = next(handshake) if answer is None else handshake.send(answer)
        except StopIteration:
            connection.is_open = True
            for read in connection.queue:
                read.due_s = read.limit_s
            connection.pump()
            self.base.counters.add("connections")
            self._turn_over(connection)
        else:
            connection.ask(asked, lambda _, answer: self._shake_hands(connection, handshake, answer))

    def _handshake(self, session: ClientSession) -> Generator[Asked, memoryview, None]:
        """Each of its frames, for which it gets the answer."""
        challenge = session.on_welcome((yield session.hello()))
        if challenge is not None:
            session.on_authenticated((yield challenge))
        expected = session.fingerprint
        if expected not in self.schemas:  # once a schema
            asked = session.describe(session.ring_id)
            schema = Schema.from_bytes(session.answered(asked.attempt, (yield asked)))
            if schema.fingerprint != expected:
                raise ProtocolError(
                    "the server's schema is not the one that its ring names",
                    expected=f"{expected:#018x}",
                    found=f"{schema.fingerprint:#018x}",
                )
            self.schemas[expected] = schema

    def _count_again(self) -> None:
        if self.waiting:  # while many are being opened, nothing is known of what each takes
            self.reactor.call_at(self.reactor.now() + SHORTAGE_S, self._count_again)
        else:
            self._budget = None

    def _turn_over(self, connection: Carrier) -> None:
        self._opening.discard(connection)
        self.start_waiting()

    @property
    def _in_use(self) -> int:
        """Connections that have descriptors, or are about to."""
        return len(self.known) - len(self.waiting) + self._closing

    def _has_room(self) -> bool:
        if self._budget is None:
            most, others = self.base.config.max_connections, descriptors_in_use() - self._in_use * PER_CONNECTION
            self._budget = connection_budget(limit=raised_limit(), in_use=others, asked=most)
        return self._in_use < self._budget

    def delay_ends(self, connection: Carrier) -> None:
        """Its ends go with its next request, or a little later."""
        if not self.ending:
            self.reactor.call_at(self.reactor.now() + ENDS_DELAY_S, self.send_ends)
        self.ending.add(connection)

    def send_ends(self) -> None:
        while self.ending:
            self.ending.pop().send_ends()

    def owe(self, names: Iterable[SlotRef]) -> None:
        """Remember payloads that are ours, or are not wanted, of which a server may not know."""
        for name in names:
            self.unsettled.setdefault(name.ring_id, deque(maxlen=UNSETTLED_PER_RING)).append(name)
        while len(self.unsettled) > UNSETTLED_RINGS:
            self.unsettled.popitem(last=False)

    def settle(self, connection: Carrier, ring_id: bytes) -> bool:
        """Say what a ring's server may not know, while the connection is open; whether it still is.

        The answer is not waited for: frames are handled in order.
        """
        names = self.unsettled.pop(ring_id)
        while names and not connection.closed:  # by the frame before
            some = [names.popleft() for _ in range(min(MAX_NAMES, len(names)))]
            connection.ask(connection.session.confirm(some), partial(self._confirmed, connection, some))
        self.owe(names)
        return not connection.closed

    def _confirmed(self, connection: Carrier, names: list[SlotRef], asked: Asked, answer: memoryview) -> None:
        """A server has heard it; of what it could not look at, it hears again with the next read."""
        try:
            statuses = connection.session.confirmed(asked.attempt, answer)
        except TransportError as error:
            if connection.session.broken:
                raise
            statuses = [Status.BUSY if error.retryable else Status.STALE] * len(names)
        self.owe(name for name, status in zip(names, statuses, strict=True) if status is Status.BUSY)
        self.base.counters.add("confirms", statuses.count(Status.OK))
        connection.after_answers()

    def say_goodbye(self, goodbye: Call) -> None:
        """Take leave of every server; done once all have handled everything, or in `GOODBYE_TIMEOUT_S`."""
        awaited = {connection for connection in self.known.values() if connection.is_open}

        def said(connection: Carrier, asked: Asked, answer: memoryview) -> None:
            connection.session.answered(asked.attempt, answer)
            awaited.discard(connection)
            if not awaited:
                goodbye.finish()

        for connection in tuple(awaited):
            connection.ask(connection.session.bye(), partial(said, connection))
        if awaited:
            self.reactor.call_at(self.reactor.now() + GOODBYE_TIMEOUT_S, goodbye.finish)
        else:
            goodbye.finish()
