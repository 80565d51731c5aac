"""Dispatch: which port each read is given, what follows when its attempt fails, and when one has taken too long.

Everything here runs in the thread that runs the reactor. The decisions are in `ports`. One timer serves everything that
is due at some time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ucxx_transport.client.jobs import copy_of, too_late
from ucxx_transport.client.ports import (
    PROBE_S,
    PortKey,
    Ports,
    Source,
    backoff_s,
    blames_port,
    retries_slot,
    rotates,
    shares,
)
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    ChecksumError,
    DeadlineExceededError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    TransportError,
)
from ucxx_transport.logs import get_logger

if TYPE_CHECKING:
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.jobs import Attempt, Carrier, Engine, Read
    from ucxx_transport.link.reactor import Timer

LATE_GRACE_S: Final = 1.0
"""A connection on which everything in flight is late for so long is closed."""

_REASONS: Final[dict[type[TransportError], str]] = {
    PeerLostError: "peers_lost",
    DeadlineExceededError: "timeouts",
    BusyError: "busy",
    NotReadyError: "not_ready",
    ProtocolError: "protocol_errors",
    ChecksumError: "checksum_errors",
    AuthenticationError: "unauthorized",
}

_log = get_logger(__name__)


class Dispatch:
    """See the module.

    Attributes:
        reads: whose. ports: of all sources. connections: to them. now, call_at: the reactor's.
        wary: whether any port is in quarantine.
        again: reads that are to go on, until `run`: by source, and at a port where that is decided.
        look_s: when it looks next for what is due.
    """

    def __init__(self, reads: Engine, connections: Connections) -> None:
        config = connections.config
        self.ports = Ports(config.port_quarantine_s, reads.reader)
        self.connections = connections
        self.now = connections.reactor.now
        self.call_at = connections.reactor.call_at
        self.wary = False
        self.again: dict[tuple[Source, PortKey | None], list[Read]] = {}
        self.look_s = math.inf
        self.read_attempts = config.read_attempts
        self.reads = reads
        self._counters = connections.counters
        self._look: Timer | None = None

    def run(self) -> None:
        """Give every read that waits for one a port."""
        while self.again:
            (source, key), reads = self.again.popitem()
            reads = [read for read in reads if read.job is not None]
            if reads and key is None:
                self.assign(source, reads, self.now())
            elif reads and key is not None:
                self._enqueue(key, reads, self.now())

    def assign(self, source: Source, reads: list[Read], now: float) -> None:
        """Give reads, of one source, a port each."""
        keys = source.keys
        if self.wary:
            keys = self.ports.healthy(source, now)
            if not keys:
                keys = source.keys
                for read in reads:
                    if read.job is not None and not read.job.alone:
                        read.limit_s = min(read.limit_s, now + PROBE_S)
        first, count, ports = source.first(keys, alone=source.under_way <= len(reads)), len(reads), len(keys)
        nbytes = sum(read.ref.nbytes for read in reads) if ports > 1 and count > 1 else 0
        start = 0
        for number, share in enumerate(shares(count, nbytes, ports), start=first):
            group = reads[start : start + share]
            start += share
            for read in group:
                read.alternate = keys[(number + 1) % ports] if ports > 1 else None
            self._enqueue(keys[number % ports], group, now)

    def reassign(self, reads: Iterable[Read]) -> None:
        """Give reads that were not asked yet a port again."""
        for read in reads:
            read.connection = None
            self._go_on(read)

    def next_port(self, host: str, ports: tuple[int, ...]) -> PortKey:
        """The port that is due for something else than a read."""
        source = self.ports.source(host, ports)
        keys = self.ports.healthy(source, self.now()) or source.keys
        key = keys[source.first(keys, alone=True)]
        source.advance()
        return key

    def _go_on(self, read: Read, key: PortKey | None = None) -> None:
        self.again.setdefault((read.source, key), []).append(read)

    def _enqueue(self, key: PortKey, reads: list[Read], now: float) -> None:
        """Let reads wait for their turn on a connection, which may have come."""
        connection = self.connections.to(key, now)
        is_open = connection.is_open
        for read in reads:
            read.place = "queued"
            read.connection = connection
            limit_s = read.limit_s
            is_last = is_open or (read.alternate is None and read.call >= self.read_attempts)
            read.due_s = due_s = limit_s if is_last else (now + limit_s) / 2
            self.look_at(due_s)
        connection.queue.extend(reads)
        if is_open:
            connection.pump()

    def quarantine(self, key: PortKey, error: TransportError) -> None:
        """Avoid a port; each further failure prolongs it, and is counted."""
        now = self.now()
        self._counters.add("quarantined")
        if not self.ports.avoids(key, now):
            _log.warning("port_quarantined", host=key[0], port=key[1], reason=error.message)
        self.ports.quarantine(key, now)
        self.wary = True
        self.connections.evict(key)

    def forgive(self, key: PortKey) -> None:
        """A port has answered, or is said to be there."""
        if self.wary:
            self.ports.forgive(key)
            self.wary = self.ports.avoids_any(self.now())

    def connection_lost(
        self, connection: Carrier, asked: list[Read], queued: list[Read], error: TransportError, *, stale: bool
    ) -> None:
        """A connection is closed: what was `asked` there, and `queued` for it, goes on elsewhere, or fails.

        It is `stale` if it had answered nothing since it last lay idle: it may have been dead since then.
        """
        key = connection.key
        reads = [read for read in (*asked, *queued) if read.job is not None]
        for read in reads:
            read.attempt = None
        if stale and isinstance(error, PeerLostError):
            for read in reads:
                self._go_on(read, key)  # no reason to distrust the port
        else:
            failed = [read for read in (asked if connection.is_open else reads) if read.job is not None]
            if blames_port(error) and (failed or not connection.is_open):
                self.quarantine(key, error)
            for source in {read.source for read in failed}:
                source.advance()
            for read in failed:
                self.failed(read, copy_of(error))
            if connection.is_open:
                self.reassign(queued)
        self.reads.settle()

    def failed(self, read: Read, error: TransportError) -> None:
        """The port layer: go on at the next port, or give the call up."""
        if type(error) in _REASONS:
            self._counters.add(_REASONS[type(error)])
        now = self.now()
        alternate, read.alternate = read.alternate, None
        if (
            alternate is None
            or now >= read.limit_s
            or not rotates(error)
            or (self.ports.avoids(alternate, now) and self.ports.healthy(read.source, now))
        ):
            self._call_failed(read, error, now)
        else:
            self._counters.add("rotations")
            self._go_on(read, alternate)

    def _call_failed(self, read: Read, error: TransportError, now: float) -> None:
        """The slot layer: a fresh call, or the end of the read."""
        job, source = read.job, read.source
        assert job is not None
        is_port, is_late = blames_port(error), isinstance(error, DeadlineExceededError)
        remaining_s = job.until_s - now
        hopeless = (
            is_port
            and not job.alone
            and (read.limit_s < job.until_s or (is_late and not self.ports.healthy(source, now)))
        )
        if not hopeless and retries_slot(
            error, attempt=read.call, read_attempts=self.read_attempts, remaining_s=remaining_s
        ):
            self._counters.add("retries")
            pause_s = backoff_s(error, read.call)
            read.call += 1
            read.limit_s = job.until_s
            if pause_s:
                read.place = "paused"
                read.connection = None
                read.due_s = now + pause_s
                self.look_at(read.due_s)
            else:
                self._go_on(read)
            return
        if remaining_s <= 0 and error.retryable and not is_late:
            error = too_late(read.ref, last=error.message)
        self.reads.fail(read, error)

    def attempt_due_s(self, read: Read) -> float:
        """A read is asked of its port now; when that will have taken too long."""
        read.place = "asked"
        limit_s = read.limit_s
        if read.alternate is not None or read.call < self.read_attempts:
            limit_s = (self.now() + limit_s) / 2  # see `ports.attempt_budget_s`
        read.due_s = limit_s
        if limit_s < self.look_s:
            self.look_at(limit_s)
        return limit_s

    def look_at(self, when_s: float) -> None:
        """See that `_look_round` is called by then."""
        if when_s < self.look_s:
            if self._look is not None:
                self._look.cancel()
            self.look_s = when_s
            self._look = self.call_at(when_s, self._look_round)

    def _look_round(self) -> None:
        """Take a step with everything that is due."""
        reads = self.reads
        self._look = None
        self.look_s = math.inf
        now = self.now()
        for job in tuple(reads.jobs):
            for read in tuple(job.reads):
                if read.job is not None and read.due_s <= now:
                    self._due(read, now)
        for attempt in tuple(reads.orphans):
            if attempt.due_s <= now:
                attempt.due_s = now + LATE_GRACE_S
                if attempt.late:
                    _close_if_all_is_late(attempt.connection)
                else:
                    attempt.late = True
                    attempt.connection.late += 1
        reads.settle()
        due_s = [read.due_s for job in reads.jobs for read in job.reads if read.job is not None]
        self.look_at(min([*due_s, *(attempt.due_s for attempt in reads.orphans)], default=math.inf))

    def _due(self, read: Read, now: float) -> None:
        job, place, connection = read.job, read.place, read.connection
        assert job is not None
        if place == "paused" and now < job.until_s:
            self._go_on(read)
            return
        if read.limit_s < job.until_s and connection is not None and not self.ports.avoids(connection.key, now):
            read.limit_s = read.due_s = job.until_s  # the port has answered another read meanwhile
            return
        attempt = read.attempt
        error: TransportError = too_late(read.ref)
        if place == "asked" and attempt is not None:
            error = too_late(read.ref, port=attempt.connection.key[1])
            self._late(attempt, error, now)
            read.attempt = None
        elif place == "queued" and connection is not None and read in connection.queue:
            other = self.connections.known.get(read.alternate) if read.alternate is not None else None
            if now < read.limit_s and connection in self.connections.waiting and not (other and other.is_open):
                read.due_s = read.limit_s  # no port has failed, and another connection would wait as well
                return
            connection.queue.remove(read)
        if place == "paused":
            self.reads.fail(read, error)
        else:
            read.source.advance()
            self.failed(read, error)

    def _late(self, attempt: Attempt, error: TransportError, now: float) -> None:
        """An attempt has exceeded its time: its connection takes no new ones until it has been answered."""
        connection = attempt.connection
        attempt.late = True
        attempt.due_s = now + LATE_GRACE_S
        self.reads.orphans.add(attempt)
        connection.late += 1
        self.quarantine(connection.key, error)
        if connection.late == 1:
            queued = list(connection.queue)
            connection.queue.clear()
            self.reassign(queued)


def _close_if_all_is_late(connection: Carrier) -> None:
    """There is nothing to wait for there."""
    if connection.late and connection.late == len(connection.attempts):
        host, port = connection.key
        connection.fail(PeerLostError("the port has not answered in time", host=host, port=port, reason="aborted"))
