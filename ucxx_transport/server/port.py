"""One port: a listener, its connections, and what they share. Callbacks of one reactor; no thread and no loop inside.

| what                            | when                                                                              |
|---------------------------------|-----------------------------------------------------------------------------------|
| a frame of a connection         | as it arrives; a second one in the same turn of the reactor has the next turn     |
| time limits, beat, stuck sends  | every `SWEEP_INTERVAL_S`                                                          |
| slots of dead processes         | every `RECLAIM_INTERVAL_S`, by one port of a server                               |
| clients that wait for a payload | see `takes`                                                                       |
"""

from __future__ import annotations

import errno
import secrets
import time
from typing import TYPE_CHECKING, Final, Protocol, cast

from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.server.connection import Connection
from ucxx_transport.server.counters import BYTES_SENT, DELIVERED, RELEASED
from ucxx_transport.server.takes import Takes
from ucxx_transport.wire.frames import NONCE_BYTES
from ucxx_transport.wire.server_side import ServerSession, SessionLimits, SessionSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ucxx_transport.config import ServerConfig
    from ucxx_transport.link.base import Endpoint, Listener, Message
    from ucxx_transport.link.reactor import Reactor, Timer
    from ucxx_transport.ring.reading import ReadLease
    from ucxx_transport.server.counters import Binding, PortCounters
    from ucxx_transport.wire.actions import Attempt, Send

_log = get_logger(__name__)

SWEEP_INTERVAL_S: Final = 0.25
"""How often time limits are looked at: four wake-ups a second cost nothing that can be measured, and no limit needs to
be kept more exactly."""

RECLAIM_INTERVAL_S: Final = 1.0
"""A killed reader's slot is back this soon even if no writer asks for it."""

BUSY_ANSWERS: Final = 16
"""Connections above the limit that are still answered BUSY; beyond them a newcomer is closed without a word."""

MAX_ANSWERS: Final = 4096
"""Slots, by length, whose memory is kept prepared for the link."""

_NEVER_ENDED: list[Attempt] = []
"""Of ports that are gone: while UCX may read from a slot, its lease must not be dropped."""


class ServedRing(Protocol):
    """What a port needs of a ring."""

    @property
    def ring_id(self) -> bytes: ...

    @property
    def fingerprint(self) -> int: ...

    def acquire_slot(self, slot: int, generation: int, *, reader: int = 0) -> ReadLease: ...

    def take(self, max_payloads: int, *, max_bytes: int, newest: bool, reader: int) -> list[ReadLease]: ...

    def reclaim_dead(self) -> int: ...


class Port:
    """Serves a ring at one port.

    Args:
        ring: the ring.
        source: what its clients are told of it.
        settings: of the server.
        counters: of this port.
        binding: whether the source has its epoch.
        reactor: what runs it, in whatever thread.
        reclaims: whether it also gives back what dead processes hold; one port of a server does.

    Attributes:
        words: of the counters. awaited: of the binding.
        now: the reactor's clock.
        answers: by slot and length, whole answers as the slots are: prepared for the link, and as memory.
        pack_buffers: for packed payloads, those that are not in use.
        locked_turn: the reactor's turn in which the ring's lock was waited for in vain.
        takes: the clients that are given what is there.
    """

    def __init__(  # noqa: PLR0917 - what it is made of
        self,
        ring: ServedRing,
        source: SessionSource,
        settings: ServerConfig,
        counters: PortCounters,
        binding: Binding,
        reactor: Reactor,
        *,
        reclaims: bool = False,
    ) -> None:
        self.ring = ring
        self.counters = counters
        self.words = counters.words
        self.awaited = binding.words
        self.reactor = reactor
        self.now = reactor.now
        self.answers: dict[tuple[int, int], tuple[Message, memoryview]] = {}
        self.pack_buffers: list[bytearray] = []
        self.locked_turn = -1
        self.takes = Takes(self)
        self._source = source
        self._limits = SessionLimits(
            first_frame_timeout_s=settings.first_frame_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            send_timeout_s=settings.send_timeout_s,
            ack_timeout_s=settings.ack_timeout_s,
        )
        self._max_connections = settings.max_connections
        self._reclaims = reclaims
        self._listener: Listener | None = None
        self._is_stopping = False
        self._connections: dict[Connection, None] = {}
        self._admitted = 0
        self._deferred: list[Connection] = []
        self._kept: list[Attempt] = []
        self._sweeper: Timer | None = None
        self._reclaim_s = 0.0
        self._accepts_failed = 0

    def start(self, candidates: Sequence[int]) -> int:
        """Listen on the first of `candidates` that is free, 0 being any free one; returns the port.

        Raises:
            ConfigError: none of them can be bound, or the link cannot be opened.
        """
        self._listener = self._listen(candidates)
        self.counters.set("port", self._listener.port)
        self.counters.set("connections", 0)
        self._reclaim_s = self.now()
        self._beat()
        return self._listener.port

    def stop(self) -> None:
        """Take no further connection and close those there are; it has `stopped` some turns later."""
        self._is_stopping = True
        if self._listener is not None:
            self._listener.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.takes.clear()
        for connection in list(self._connections):
            connection.close()

    @property
    def stopped(self) -> bool:
        """Whether every connection is closed, and what it held is given back."""
        return not self._connections

    def retire(self) -> None:
        """The link is closed, or given up: keep what UCX may still read from, for good."""
        self.counters.set("port", 0)
        self.locked_turn = -1
        self._settle_kept()
        _NEVER_ENDED.extend(attempt for attempt in self._kept if not _is_over(attempt.send))

    # --- For connections ---

    def defer(self, connection: Connection) -> None:
        """Let the connection handle its next frame in the next turn."""
        if not self._deferred:
            self.reactor.call_at(self.now(), self._serve_deferred)
        self._deferred.append(connection)

    def prepare(self, attempt: Attempt) -> tuple[Message, memoryview]:
        """The whole answer that the attempt's slot is: prepared for the link, and as memory; kept in `answers`."""
        lease = cast("ReadLease", attempt.lease)
        memory = lease.message
        if len(self.answers) >= MAX_ANSWERS:
            del self.answers[next(iter(self.answers))]
        answer = self.answers[attempt.slot, attempt.nbytes] = (self.reactor.link.message(memory), memory)
        return answer

    def finish(self, attempt: Attempt) -> None:
        """Its message is over, and its end known, or will never be: the slot is given back, exactly once."""
        lease = attempt.lease
        if lease is None:
            return
        if self.locked_turn == self.reactor.turns:
            self._kept.append(attempt)
            return
        try:
            if attempt.delivered:
                lease.mark_consumed()
            else:
                lease.release_reading()
        except TransportError as error:  # the ring's lock is held by a stopped process: the next sweep tries again
            self.note_lock(error)
            _log.warning("slot_not_released", slot=attempt.slot, reason=str(error))
            self._kept.append(attempt)
            return
        attempt.lease = None
        words = self.words
        if attempt.delivered:
            words[DELIVERED] += 1
            words[BYTES_SENT] += attempt.nbytes
        else:
            words[RELEASED] += 1

    def note_lock(self, error: TransportError) -> None:
        """If the ring's lock was waited for in vain: not again in this turn, since others wait too."""
        if isinstance(error, DeadlineExceededError):
            self.locked_turn = self.reactor.turns

    def keep_stuck(self, attempt: Attempt) -> None:
        """End this attempt once UCX does not read the slot any more."""
        self.counters.add("stuck_sends")
        _log.warning("send_stuck", slot=attempt.slot, nbytes=attempt.nbytes)
        self._kept.append(attempt)

    def forget(self, connection: Connection) -> None:
        """The connection is closed, and holds nothing any more."""
        del self._connections[connection]
        self._admitted -= connection.is_admitted
        self.counters.set("connections", len(self._connections))

    # --- Callbacks ---

    def _listen(self, candidates: Sequence[int]) -> Listener:
        link, last = self.reactor.link, None
        for port in candidates:
            try:
                return link.listen(port, self._admit)
            except ConfigError as error:
                last = error
        raise ConfigError(
            f"no free port among {list(candidates)[:4]}… ({len(candidates)} tried); choose others with "
            "ServerConfig(ports=…) or 0 for any free one",
            errno=errno.EADDRINUSE,
        ) from last

    def _admit(self, endpoint: Endpoint) -> Connection | None:
        if self._is_stopping:
            return None
        self.counters.add("accepted")
        # Those that only wait for their BUSY do not count.
        is_admitted = self._admitted < self._max_connections
        if not is_admitted:
            self.counters.add("refused")
            if len(self._connections) - self._admitted >= BUSY_ANSWERS:
                return None
        nonce = secrets.token_bytes(NONCE_BYTES)
        session = ServerSession(self._source, self._limits, nonce=nonce, now=self.now(), admitted=is_admitted)
        connection = Connection(self, session, endpoint, is_admitted=is_admitted)
        self._connections[connection] = None
        self._admitted += is_admitted
        self.counters.set("connections", len(self._connections))
        connection.open()
        return connection

    def _serve_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for connection in deferred:
            connection.is_deferred = False
            connection.serve_next()

    def _sweep(self) -> None:
        try:
            now = self.now()
            before, self._accepts_failed = self._accepts_failed, self.reactor.link.statistics().accepts_failed
            self.counters.add("accepts_failed", self._accepts_failed - before)
            for connection in list(self._connections):
                self._close_if_overdue(connection, now)
            self._settle_kept()
            if self._reclaims and now >= self._reclaim_s:
                self._reclaim_s = now + RECLAIM_INTERVAL_S
                self._reclaim()
        except Exception:  # noqa: BLE001 - the edge of a callback: the port goes on serving
            _log.exception("sweep_failed")
        self._beat()

    def _close_if_overdue(self, connection: Connection, now: float) -> None:
        when_s, counter = connection.limit()
        if now >= when_s and not connection.is_closing:
            if counter:
                self.counters.add(counter)
            connection.close()

    def _beat(self) -> None:
        self.counters.beat(time.monotonic_ns())
        self._sweeper = self.reactor.call_at(self.now() + SWEEP_INTERVAL_S, self._sweep)

    def _reclaim(self) -> None:
        try:
            self.ring.reclaim_dead()
        except TransportError as error:  # the ring's lock is held by a stopped process: the next sweep tries again
            _log.warning("reclaim_failed", reason=str(error))

    def _settle_kept(self) -> None:
        kept, self._kept = self._kept, []
        for attempt in kept:
            if _is_over(attempt.send):
                self.finish(attempt)
            else:
                self._kept.append(attempt)


def _is_over(send: Send | None) -> bool:
    """Whether UCX reads nothing for it any more."""
    return send is None or send.completed
