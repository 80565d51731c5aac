"""Dispatch: which port each read is given, what follows when its attempt has ended, and when one has taken too long.

Everything here runs in the thread that runs the reactor. The decisions are in `ports`. One timer serves everything that
is due at some time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Final

from ucxx_transport import errors
from ucxx_transport.client import ports
from ucxx_transport.client.jobs import Carrier, ClientBase, Job, Outcome, Read, too_late
from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import PeerLostError, StaleSlotError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring.reading import verify_checksum
from ucxx_transport.wire.frames import HEADER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.ports import PortKey, Source
    from ucxx_transport.link.reactor import Reactor, Timer
    from ucxx_transport.schema import SlotRef

LATE_GRACE_S: Final = 1.0
"""A connection on which everything in flight is late for so long is closed."""

_REASONS: Final[dict[type[TransportError], str]] = {
    PeerLostError: "peers_lost",
    errors.DeadlineExceededError: "timeouts",
    errors.BusyError: "busy",
    errors.NotReadyError: "not_ready",
    errors.ProtocolError: "protocol_errors",
    errors.ChecksumError: "checksum_errors",
    errors.AuthenticationError: "unauthorized",
}

_log = get_logger(__name__)


class Dispatch:
    """See the module; the calls that reads are of are in `reads`.

    Attributes:
        delivered: counts what came over the link. claim: see `Deduplicator`. claimed: the last that was.
        jobs: those with reads that have no outcome. finished: that have all of them, until `settle` reports them.
        again: reads that are to go on, until `settle`: by source, and at a port where that is decided.
        look_s: when it looks next for what is due.
    """

    connections: Connections

    def __init__(self, base: ClientBase, reactor: Reactor) -> None:
        self.counters = base.counters
        self.claimed: list[SlotRef] = []
        self.claim = partial(base.delivered.claim, note=self.claimed)
        self.delivered = base.counters.ways["ucx"]
        self.ports = ports.Ports(base.config.port_quarantine_s, base.reader)
        self.reactor = reactor
        self.now = reactor.now
        self.call_at = reactor.call_at
        self.jobs: set[Job] = set()
        self.finished: list[Job] = []
        self.again: dict[tuple[Source, PortKey | None], list[Read]] = {}
        self.look_s = math.inf
        self.read_attempts = base.config.read_attempts
        self._verify_checksum = base.config.verify_checksum
        self._look: Timer | None = None
        self._settling = False

    def assign(self, source: Source, reads: list[Read], now: float) -> None:
        """Give reads, of one source, a port each."""
        keys = source.keys
        if self.ports.avoided:
            keys = self.ports.healthy(source, now)
            if not keys:
                keys = source.keys
                for read in reads:
                    if read.job is not None and not read.job.alone:
                        read.limit_s = min(read.limit_s, now + ports.PROBE_S)
        first, count = source.first(keys, alone=source.under_way <= len(reads)), len(keys)
        parts, start = [len(reads)], 0
        if count > 1 and len(reads) > 1:
            parts = ports.shares(len(reads), sum([read.ref.nbytes for read in reads]), count)
        for number, share in enumerate(parts, start=first):
            group = reads[start : start + share]
            start += share
            alternate = keys[(number + 1) % count] if count > 1 else None
            for read in group:
                read.alternate = alternate
            self._enqueue(keys[number % count], group, now)

    def reassign(self, reads: Iterable[Read], key: PortKey | None = None) -> None:
        """Give reads that are not asked any more, or not yet, a port again: this one, or the one that is due."""
        for read in reads:
            self.again.setdefault((read.source, key), []).append(read)

    def _enqueue(self, key: PortKey, reads: list[Read], now: float) -> None:
        """Let reads wait for their turn on a connection, which may have come."""
        connection = self.connections.to(key, now)
        queue = connection.queue
        if len(reads) == 1 and not reads[0].goes_first and connection.ask_one(reads[0], now):
            return
        for read in reads:
            read.connection, read.due_s = connection, read.limit_s
            if read.goes_first:  # also of a lost connection's reads, which come together: no payload is before it
                queue.appendleft(read)
            else:
                queue.append(read)
        if not connection.is_open:
            self.asked(connection, reads)
            return
        connection.pump()
        if queue:
            self.look_at(min([read.limit_s for read in reads]))

    def asked(self, connection: Carrier, reads: Iterable[Read]) -> None:
        """Reads are asked of a port now, if only for a connection: half of what is left is for that, all if it is last.

        So a silent port costs half the deadline, never all of it, and a slow link has the longest possible time.
        """
        now, soonest_s = self.now(), math.inf
        for read in reads:
            due_s = read.limit_s
            if read.alternate is not None or read.call < self.read_attempts:
                due_s = (now + due_s) / 2
            read.connection, read.due_s = connection, due_s
            soonest_s = min(soonest_s, due_s)
        self.look_at(soonest_s)

    def quarantine(self, key: PortKey, error: TransportError) -> None:
        """Avoid a port; each further failure prolongs it, and is counted."""
        now = self.now()
        self.counters.add("quarantined")
        if not self.ports.avoids(key, now):
            _log.warning("port_quarantined", host=key[0], port=key[1], reason=error.message)
        self.ports.quarantine(key, now)
        self.connections.evict(key)

    def connection_lost(
        self, connection: Carrier, asked: list[Read], queued: list[Read], error: TransportError
    ) -> None:
        """A connection is closed: what was `asked` there, and `queued` for it, goes on elsewhere, or fails."""
        asked = [read for read in asked if read.job is not None]
        queued = [read for read in queued if read.job is not None]
        key = connection.key
        if connection.rested and isinstance(error, PeerLostError):
            self.reassign(asked + queued, key)  # it may have been dead since it lay idle: the port is not to blame
        else:
            failed = asked if connection.is_open else asked + queued
            if isinstance(error, ports.BLAMING) and (failed or not connection.is_open):
                self.quarantine(key, error)
            for source in {read.source for read in failed}:
                source.advance()
            for read in failed:
                self.failed(read, copy(error))  # each is raised somewhere else
            if connection.is_open:
                self.reassign(queued)
        self.settle()

    def failed(self, read: Read, error: TransportError) -> None:
        """The port layer: go on at the next port, or give the call up."""
        if type(error) in _REASONS:
            self.counters.add(_REASONS[type(error)])
        now = self.now()
        alternate, read.alternate = read.alternate, None
        if (
            alternate is None
            or now >= read.limit_s
            or not isinstance(error, ports.ROTATING)
            or (self.ports.avoids(alternate, now) and self.ports.healthy(read.source, now))
        ):
            self._call_failed(read, error, now)
        else:
            self.counters.add("rotations")
            self.reassign((read,), alternate)

    def _call_failed(self, read: Read, error: TransportError, now: float) -> None:
        """The slot layer: a fresh call, or the end of the read."""
        job, source = read.job, read.source
        assert job is not None
        is_port, is_late = isinstance(error, ports.BLAMING), isinstance(error, errors.DeadlineExceededError)
        is_probe, remaining_s = read.limit_s < job.until_s, job.until_s - now
        hopeless = is_port and not job.alone and (is_probe or (is_late and not self.ports.healthy(source, now)))
        waits, attempts = now < job.wait_until_s, self.read_attempts
        attempt = 0 if waits else read.call
        if not hopeless and ports.retries_slot(error, attempt=attempt, read_attempts=attempts, remaining_s=remaining_s):
            self.counters.add("retries")
            pause_s = ports.backoff_s(error, read.call)
            if waits and read.call >= attempts:
                pause_s = min(ports.WAIT_PAUSE_S, remaining_s)
            read.call += 1
            read.limit_s = job.until_s
            if pause_s:
                self.call_at(now + pause_s, partial(self._resume, read))
            else:
                self.reassign((read,))
            return
        if remaining_s <= 0 and error.retryable and not is_late:
            error = too_late(read.ref, last=error.message)
        elif remaining_s > 0 and is_late and is_probe:
            message = (
                f"all ports of the source had failed, and none has answered within the {ports.PROBE_S} s that such a "
                "source gets in a batch beside others; read it again, and raise connect_timeout_s where hosts are busy"
            )
            error = errors.DeadlineExceededError(message, **error.facts)
        self.fail(read, error)

    def look_at(self, when_s: float) -> None:
        if when_s < self.look_s:
            if self._look is not None:
                self._look.cancel()
            self.look_s = when_s
            self._look = self.call_at(when_s, self._look_round)

    def _look_round(self) -> None:
        """Take a step with everything that is due."""
        self._look = None
        self.look_s = math.inf
        now, known = self.now(), self.connections.known
        for connection in tuple(known.values()):
            for read in tuple(connection.queue):
                if read.due_s <= now and read.job is not None:
                    self._queued_too_long(connection, read, read.job, now)
            for read in tuple(connection.attempts):
                if read.due_s <= now and not connection.closed:
                    self._asked_too_long(connection, read, now)
        self.settle()
        due_s = [read.due_s for connection in known.values() for read in connection.queue if read.job is not None]
        due_s += [read.due_s for connection in known.values() for read in connection.attempts]
        self.look_at(min(due_s, default=math.inf))

    def _queued_too_long(self, connection: Carrier, read: Read, job: Job, now: float) -> None:
        if self._probes_no_more(connection, read, job, now):
            return
        other = self.connections.known.get(read.alternate) if read.alternate is not None else None
        if now < read.limit_s and connection in self.connections.waiting and not (other and other.is_open):
            read.due_s = read.limit_s  # no port has failed, and another connection would wait as well
            return
        connection.queue.remove(read)
        read.source.advance()
        self.failed(read, too_late(read.ref))

    def _asked_too_long(self, connection: Carrier, read: Read, now: float) -> None:
        """An attempt has exceeded its time: its connection takes no new ones until it has been answered."""
        job = read.job
        if not read.late and job is not None and self._probes_no_more(connection, read, job, now):
            return
        read.due_s = now + LATE_GRACE_S
        if read.late:
            if connection.late == len(connection.attempts):  # there is nothing to wait for
                facts = {"host": connection.key[0], "port": connection.key[1], "reason": "aborted"}
                connection.lost(PeerLostError("the port has not answered in time", **facts))
            return
        read.late = True
        connection.late += 1
        if job is not None:
            error = too_late(read.ref, port=connection.key[1])
            self.quarantine(connection.key, error)
            if connection.late == 1:
                self.reassign(connection.queue)
                connection.queue.clear()
            job.reads[read.index] = successor = read.successor()
            read.source.advance()
            self.failed(successor, error)

    def _probes_no_more(self, connection: Carrier, read: Read, job: Job, now: float) -> bool:
        """Whether the port has answered another read since this one was to be a probe: then it has all its time."""
        if read.limit_s >= job.until_s or self.ports.avoids(connection.key, now):
            return False
        read.limit_s = read.due_s = job.until_s
        return True

    def _resume(self, read: Read) -> None:
        if read.job is not None:
            if self.now() < read.job.until_s:
                self.reassign((read,))
            else:
                self.fail(read, too_late(read.ref))
            self.settle()

    def arrived(self, connection: Carrier, reads: Sequence[Read]) -> None:
        """Attempts have brought their payloads, whose schemas are known; each is ended, unless it is held."""
        if self.ports.avoided:
            self.ports.forgive(connection.key, self.now())
        end, schemas, way = connection.session.end, self.connections.schemas, self.delivered
        now_s = time.perf_counter()
        for read in reads:
            job, ref = read.job, read.ref
            if job is None:  # it is not wanted
                end(read, delivered=False)
                continue
            start = read.start + HEADER_BYTES
            content = read.message[start : start + ref.nbytes]
            try:
                if ref.checksum is not None and self._verify_checksum:
                    # Also a large one here, at 18-35 GB/s: less than receiving it has held this thread.
                    verify_checksum(content, ref)
                payload = Payload(ref, content, schemas[ref.fingerprint], "ucx")
                if job.is_held:
                    job.held = read
                    self.over(read, payload)
                    continue
                self.claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
            except TransportError as error:  # its bytes have changed; or it has been delivered before
                error.__traceback__ = None  # its frames hold the payload
                end(read, delivered=isinstance(error, StaleSlotError))
                self.refused(read, error)
                continue
            way.reads += 1
            way.nbytes += ref.nbytes
            way.recent_s.append(now_s - job.began_s)
            try:
                self.over(read, payload if job.on_payload is None else job.on_payload(read.index, payload))
            except TransportError as error:  # of the caller's callback
                self.fail(read, error)
            end(read, delivered=True)

    def refused(self, read: Read, error: TransportError) -> None:
        """The server has answered without a payload, or with something that is none."""
        key = read.connection.key
        self.ports.forgive(key, self.now())
        if read.job is None or read.late:
            return  # the read has gone on without it
        if isinstance(error, ports.BLAMING):
            self.quarantine(key, error)
        read.source.advance()
        self.failed(read, error)

    def fail(self, read: Read, error: TransportError) -> None:
        error.__traceback__ = None  # its frames may hold a buffer
        if read.job is not None and read.job.counts:
            self.counters.failed(error)
        self.over(read, error)

    def over(self, read: Read, outcome: Outcome) -> None:
        """A payload has its outcome, by this read, or by the late attempt of one before it."""
        job, index = read.job, read.index
        assert job is not None
        attempt: Read | None = job.reads.pop(index)
        read.source.under_way -= 1
        while attempt is not None:  # those in flight go on without it
            attempt.job = None
            attempt = attempt.before
        job.outcomes[index] = outcome
        job.left -= 1
        if not job.left:
            self.finished.append(job)

    def settle(self) -> None:
        """Do what follows from the last step: reads go on, and jobs that have all outcomes are reported."""
        if self._settling:
            return
        self._settling = True
        try:
            while True:
                if self.again:
                    (source, key), reads = self.again.popitem()
                    reads = [read for read in reads if read.job is not None]
                    if reads and key is None:
                        self.assign(source, reads, self.now())
                    elif reads and key is not None:
                        self._enqueue(key, reads, self.now())
                    continue
                if not self.finished:
                    break
                if self.connections.ending:
                    self.connections.send_ends()
                job = self.finished.pop(0)
                job.finish()
                self.jobs.discard(job)  # not before: an interrupt must not lose it
        finally:
            self._settling = False
