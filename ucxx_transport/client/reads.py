"""Reads over a link: every payload that is asked of another host, from the call to its outcome.

A *job* is one call of a client: references, one deadline. Each of its payloads is a *read*, and each time that a read is
asked of a port is an *attempt*. Everything here runs in the thread that runs the reactor: a callback of the link, a
timer, or a call takes one step, and `settle` does what follows from it.

| a read is | because                                                | when it is due                             |
|-----------|--------------------------------------------------------|--------------------------------------------|
| queued    | its connection is being opened, or its window is full  | it goes on at the next port, without blame |
| asked     | its attempt is in flight                               | its port is quarantined; it goes elsewhere |
| waiting   | another one probes the ports, which are in quarantine  | it fails                                   |
| paused    | the server was busy, or not ready                      | it is asked again                          |

An attempt that has exceeded its time is *late*: if its answer comes after all and the read has no outcome yet, it is
delivered. The policy is in `ports`, how a connection is used in `connection`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from ucxx_transport.client.connections import Connections
from ucxx_transport.client.errands import Discard, RingDiscard
from ucxx_transport.client.local import verify_checksum
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import (
    PROBE_S,
    PortKey,
    PortVerdict,
    Quarantine,
    Source,
    Sources,
    backoff_s,
    judge_port,
    retries_slot,
    shares,
)
from ucxx_transport.client.takes import Take
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    ChecksumError,
    ConfigError,
    DeadlineExceededError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.logs import get_logger
from ucxx_transport.wire.frames import HEADER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import BufferPool
    from ucxx_transport.client.connection import Attempt, Connection
    from ucxx_transport.client.core import Into
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.client.takes import Takeable, TakeRequest
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import Reactor, Timer
    from ucxx_transport.membership.source_record import SourceRecord
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.wire.actions import Offered

_log = get_logger(__name__)

LATE_GRACE_S: Final = 1.0
"""A connection on which everything in flight is late for so long is closed."""

_NEVER: Final = float("inf")

_REASONS: Final[tuple[tuple[type[TransportError], str], ...]] = (
    (PeerLostError, "peers_lost"),
    (DeadlineExceededError, "timeouts"),
    (BusyError, "busy"),
    (NotReadyError, "not_ready"),
    (ProtocolError, "protocol_errors"),
    (ChecksumError, "checksum_errors"),
    (AuthenticationError, "unauthorized"),
)

Outcome = Payload | TransportError
OnJobDone = Callable[["Job"], None]
OnPayload = Callable[[int, Payload], Payload]
Place = Literal["queued", "asked", "waiting", "paused"]


class Job:
    """One call of a client.

    Attributes:
        refs: what it is to read.
        outcomes: one a reference, in order; None as long as there is none.
        left: how many have none.
        until_s: its deadline, on the reactor's clock.
        done: whether every outcome is there and what is to be said of the payloads has been sent.
        on_done: called once it is.
        on_payload: called with each payload that came over the link and its index; what it returns takes its place.
        into: the caller's memory for the payload; of a job of one.
        is_held: a payload is kept until `deliver` or `abandon`: one of a task that may be cancelled before it has it.
        held: that payload's attempt. Of a job of one, like `is_held`.
        began_s: of `perf_counter`.
        alone: whether all that it reads over the link is of one source: then nothing else waits for it.
        reads: those over the link.
    """

    __slots__ = (
        "alone", "began_s", "done", "held", "into", "is_held", "left", "on_done", "on_payload", "outcomes", "reads",
        "refs", "until_s",
    )  # fmt: skip

    def __init__(
        self,
        refs: Sequence[SlotRef],
        until_s: float,
        on_done: OnJobDone | None = None,
        on_payload: OnPayload | None = None,
        into: Into | None = None,
    ) -> None:
        self.refs = refs
        self.outcomes: list[Outcome | None] = [None] * len(refs)
        self.left = len(refs)
        self.until_s = until_s
        self.done = False
        self.on_done = on_done
        self.on_payload = on_payload
        self.into = into
        self.is_held = False
        self.held: Attempt | None = None
        self.began_s = time.perf_counter()
        self.alone = True
        self.reads: list[Read] = []


class Read:
    """One payload of a job that comes over the link.

    Attributes:
        job: whose; None once it has its outcome.
        index: in the job. ref: the payload. source: where it is.
        place: see the module. connection: where it is queued or asked. attempt: its attempt in flight.
        alternate: the port that this call may still rotate to.
        call: number of the slot layer's call, from 1.
        limit_s: when this call is over at the latest.
        due_s: when to look at it again.
    """

    __slots__ = (
        "alternate", "attempt", "call", "connection", "due_s", "index", "job", "limit_s", "place", "ref", "source",
    )  # fmt: skip

    def __init__(self, job: Job, index: int, ref: SlotRef, source: Source[Read]) -> None:
        self.job: Job | None = job
        self.index = index
        self.ref = ref
        self.source = source
        self.place: Place = "queued"
        self.connection: Connection | None = None
        self.attempt: Attempt | None = None
        self.alternate: PortKey | None = None
        self.call = 1
        self.limit_s = self.due_s = job.until_s


class Reads:
    """All jobs of a client that read over the link, and its connections.

    Attributes:
        connections: to any port of any source.
        finished: jobs that have all their outcomes, until `settle` reports them.
        orphans: attempts in flight that no read waits for, and late ones.
        takes: calls that take from a ring and have nothing yet.
        now: the reactor's clock. call_at: its timers. read_attempts: as configured.
    """

    def __init__(
        self,
        config: ClientConfig,
        reactor: Reactor,
        *,
        reader: int,
        pool: BufferPool,
        counters: ClientCounters,
        claim: Callable[[SlotRef], None],
        gone: Collection[bytes] = (),
    ) -> None:
        self.reader = reader
        self.finished: list[Job] = []
        self.orphans: set[Attempt] = set()
        self.takes: set[Take] = set()
        self.connections = Connections(config, reactor, self, counters=counters, lend=pool.lend)
        self._schemas = self.connections.schemas
        self.now = reactor.now
        self.call_at = reactor.call_at
        self._counters = counters
        self._claim = claim
        self._gone = gone
        self._verify_checksum = config.verify_checksum
        self.read_attempts = config.read_attempts
        self._quarantine = Quarantine(config.port_quarantine_s)
        self._sources: Sources[Read] = Sources(reader)
        self._probed: set[Source[Read]] = set()
        self._wary = False  # whether there are quarantined ports or probes
        self._jobs: set[Job] = set()
        self._look: Timer | None = None
        self._look_s = _NEVER
        self._again: dict[Source[Read], list[Read]] = {}
        self._moved: dict[PortKey, list[Read]] = {}
        self._settling = False

    @property
    def in_flight(self) -> int:
        """Jobs that are not done."""
        return len(self._jobs)

    # --- Calls ---

    def start(self, job: Job, indices: Iterable[int]) -> None:
        """Begin to read what a job reads over the link."""
        now = self.now()
        groups: dict[Source[Read], list[Read]] = {}
        self._jobs.add(job)
        for index in indices:
            ref = job.refs[index]
            host = ref.host
            if host is None or not ref.ports:
                message = "this reference carries no address to read from; start the UCXXServer before writing"
                self._fail_at(job, index, ConfigError(message, ring=ref.ring_name))
                continue
            source = self._sources.of(host, ref.ports)
            read = Read(job, index, ref, source)
            if ref.ring_id in self._gone:
                self._fail_at(job, index, _removed(ref))
                continue
            if job.until_s <= now:
                self._fail_at(job, index, _too_late(ref))  # before any port is blamed for it
                continue
            source.under_way += 1
            job.reads.append(read)
            if source in groups:
                groups[source].append(read)
            else:
                groups[source] = [read]
        job.alone = len(groups) < 2
        for source, reads in groups.items():
            self._assign(source, reads, now)
        self.settle()

    def start_one(self, job: Job) -> None:
        """`start` for a job of one; what is usual in few steps, for a read of 4 KiB costs no more than they do."""
        ref = job.refs[0]
        now = self.now()
        source = self._sources.known.get((ref.host, ref.ports))  # type: ignore[arg-type]  # None is in no key
        if not (source is None or source.under_way or self._wary or job.until_s <= now or ref.ring_id in self._gone):
            keys = source.keys
            ports = len(keys)
            first = source.position % ports
            connections = self.connections
            connection = connections.known.get(keys[first])
            if (
                connection is not None
                and connection.is_open
                and not (connection.attempts or connection.queue or ref.ring_id in connections.unsettled)
                and now - connection.used_s <= connections.max_age_s
                and (not ref.fingerprint or ref.fingerprint in self._schemas)
            ):
                connections.known.move_to_end(keys[first])
                connection.used_s = now
                read = Read(job, 0, ref, source)
                read.place = "asked"
                due_s = job.until_s
                if ports > 1 or self.read_attempts > 1:
                    due_s = (now + due_s) / 2
                    if ports > 1:
                        read.alternate = keys[(first + 1) % ports]
                read.due_s = due_s
                source.under_way = 1
                self._jobs.add(job)
                job.reads.append(read)
                if due_s < self._look_s:
                    self._look_at(due_s)
                connection.ask_one(read, due_s)
                if self._again or self._moved or self.finished:
                    self.settle()
                return
        self.start(job, (0,))

    def abandon(self, job: Job) -> None:
        """Nobody wants a job any more: what is in flight is ended as not delivered when it comes."""
        job.on_done = None
        if job.held is not None:
            job.held.connection.end_held(job.held, delivered=False)
            job.held = None
        for read in tuple(job.reads):
            if read.job is not None:
                self._over(read, PeerLostError("abandoned", reason="cancelled"))
        for outcome in job.outcomes:
            if isinstance(outcome, Payload):
                outcome.release()
        self.settle()

    def discard(self, call: Discard, refs: Sequence[SlotRef], until_s: float) -> None:
        """Have payloads of one ring discarded."""
        host, ports = refs[0].host, refs[0].ports
        if host is not None and ports:
            RingDiscard(call, refs, self.connections, partial(self.next_port, host, ports), until_s).ask()

    def take(self, request: TakeRequest, on_done: Callable[[Take], None] | None = None) -> Take:
        """A call that takes payloads from a ring; `ask` begins it."""
        source = request.source
        if source.host is None or not source.ports:
            raise ConfigError("this source has no address to take from; start its UCXXServer", ring=source.ring_name)
        take = Take(self, request, on_done)
        self.takes.add(take)
        if source.ring_id in self._gone:
            take.fail(_removed(source))
        return take

    def next_port(self, host: str, ports: tuple[int, ...]) -> PortKey:
        """The port that is due for something else than a read."""
        source = self._sources.of(host, ports)
        keys = source.healthy(self._quarantine, self.now()) or source.keys
        key = keys[source.first(keys, alone=True)]
        source.advance()
        return key

    def blame(self, key: PortKey, error: TransportError) -> None:
        """Something else than a read has failed at a port."""
        if judge_port(error) is PortVerdict.ROTATE_AND_QUARANTINE:
            self._quarantine_port(key, error)

    def adopt(self, connection: Connection, offered: Sequence[Offered], take: Take | None) -> None:
        """Payloads that a server has picked are on their way: the reads of a job, or not wanted any more."""
        reads: list[Read | None] = [None] * len(offered)
        if take is not None:
            refs = take.references(offered)
            job = Job(refs, take.until_s, take.came)
            self._jobs.add(job)
            host = refs[0].host
            assert host is not None  # checked where the call began
            source = self._sources.of(host, refs[0].ports)
            source.under_way += len(refs)
            others = [key for key in source.keys if key != connection.key]
            for index, ref in enumerate(refs):
                read = reads[index] = Read(job, index, ref, source)
                read.alternate = others[0] if others else None
                job.reads.append(read)
        connection.receive_taken(offered, reads)

    def source_gone(self, record: SourceRecord) -> None:
        """The reads of a source that is gone fail now, and its idle connections are closed."""
        for job in tuple(self._jobs):
            for read in tuple(job.reads):
                if read.job is not None and read.ref.ring_id == record.ring_id:
                    self._fail(read, _removed(read.ref))
        for take in tuple(self.takes):
            if take.ring_id == record.ring_id:
                take.fail(_removed(record))
        if record.host is not None:
            for port in record.ports:
                self.connections.evict((record.host, port))
        self.settle()

    def source_there(self, record: SourceRecord) -> None:
        """The ports of a source that is there are worth a try."""
        if record.host is not None:
            for port in record.ports:
                self.forgive((record.host, port))
        self.settle()

    def fail_all(self, error: TransportError) -> None:
        """Fail every job."""
        for job in tuple(self._jobs):
            for read in tuple(job.reads):
                if read.job is not None:
                    self._fail(read, _copy(error))
        for take in tuple(self.takes):
            take.fail(_copy(error))
        self.settle()

    # --- Which port ---

    def _assign(self, source: Source[Read], reads: list[Read], now: float) -> None:
        """Give reads, of one source, a port each."""
        keys = source.keys
        if self._wary:
            keys = source.healthy(self._quarantine, now)
            if not keys:
                self._probe(source, reads, now)
                return
        first = source.first(keys, alone=source.under_way <= len(reads))
        ports = len(keys)
        if ports == 1 or len(reads) == 1:
            alternate = keys[(first + 1) % ports] if ports > 1 else None
            for read in reads:
                read.alternate = alternate
            self._enqueue(keys[first], reads, now)
            return
        start = 0
        for part, count in enumerate(shares(len(reads), sum(read.ref.nbytes for read in reads), ports)):
            group = reads[start : start + count]
            start += count
            for read in group:
                read.alternate = keys[(first + part + 1) % ports]
            self._enqueue(keys[(first + part) % ports], group, now)

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
            if due_s < self._look_s:
                self._look_at(due_s)
        connection.queue.extend(reads)
        if is_open:
            connection.pump()

    def _probe(self, source: Source[Read], reads: list[Read], now: float) -> None:
        """All ports of a source are in quarantine: one read tries them, the others wait for what comes of it."""
        self._probed.add(source)
        for read in reads:
            job = read.job
            if job is None:
                continue
            if not job.alone:
                read.limit_s = min(read.limit_s, now + PROBE_S)
            if source.probe is None:
                source.probe = read
            if source.probe is not read:
                read.place = "waiting"
                read.connection = None
                read.due_s = read.limit_s
                source.waiting.append(read)
                if read.due_s < self._look_s:
                    self._look_at(read.due_s)
        probe = source.probe
        if probe is not None and probe in reads:
            first = source.first(source.keys, alone=True)
            ports = len(source.keys)
            probe.alternate = source.keys[(first + 1) % ports] if ports > 1 else None
            self._enqueue(source.keys[first], [probe], now)

    def forgive(self, key: PortKey) -> None:
        """A port has answered, or is said to be there."""
        if not self._wary:
            return
        self._quarantine.forgive(key)
        for source in tuple(self._probed):
            if key in source.keys:
                if source.probe is not None and source.probe.job is not None:
                    source.probe.limit_s = source.probe.job.until_s
                self._probe_over(source)
        self._wary = bool(len(self._quarantine) or self._probed)

    def _probe_over(self, source: Source[Read]) -> None:
        """Reads that waited for a probe are given a port."""
        source.probe = None
        self._probed.discard(source)
        waiting = [read for read in source.waiting if read.job is not None]
        source.waiting.clear()
        if waiting:
            self._again.setdefault(source, []).extend(waiting)

    def _quarantine_port(self, key: PortKey, error: TransportError) -> None:
        now = self.now()
        self._counters.add("quarantined")
        self._quarantine.prune(now)
        if not self._quarantine.holds(key, now):  # each further failure prolongs it, and is counted
            _log.warning("port_quarantined", host=key[0], port=key[1], reason=error.message)
        self._quarantine.add(key, now)
        self._wary = True
        self.connections.evict(key)

    # --- What a connection reports ---

    def attempt_due_s(self, read: Read) -> float:
        """A read is asked of its port now; when that will have taken too long."""
        read.place = "asked"
        limit_s = read.limit_s
        if read.alternate is not None or read.call < self.read_attempts:
            limit_s = (self.now() + limit_s) / 2  # see `ports.attempt_budget_s`
        read.due_s = limit_s
        if limit_s < self._look_s:
            self._look_at(limit_s)
        return limit_s

    def arrived(self, attempt: Attempt) -> bool | None:
        """An attempt has brought its payload, and its schema is known.

        Returns:
            Whether it is to be ended as delivered; None: it is not to be ended yet.
        """
        if self._wary:
            self.forgive(attempt.connection.key)
        read = attempt.read
        if attempt.late or read is None:
            self.orphans.discard(attempt)
        if read is None or read.job is None:
            return False
        job, ref = read.job, read.ref
        attempt.read = None
        if read.attempt is attempt:
            read.attempt = None  # else the payload would wait for the garbage collector
        content = attempt.message[HEADER_BYTES : HEADER_BYTES + ref.nbytes]
        if ref.checksum is not None and self._verify_checksum:
            try:
                # Also a large one here, at 18-35 GB/s: less than receiving it has held this thread.
                verify_checksum(content, ref)
            except ChecksumError as error:
                error.__traceback__ = None  # its frames hold the payload
                self._failed(read, error)
                return False
        payload = Payload(ref, content, self._schemas[ref.fingerprint] if ref.fingerprint else None, "ucx")
        if job.is_held:
            job.held = attempt
            self._over(read, payload)
            return None
        try:
            self._claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
        except StaleSlotError as error:
            error.__traceback__ = None
            self._fail(read, error)
            return True
        outcome: Outcome = payload
        try:
            if job.into is not None:
                outcome = payload = payload.copied_into(job.into)
            self._counters.delivered("ucx", ref.nbytes, time.perf_counter() - job.began_s)
            if job.on_payload is not None:
                outcome = job.on_payload(read.index, payload)
        except TransportError as error:
            error.__traceback__ = None
            self._counters.failed(error)
            outcome = error
        if read.attempt is not None or read.source.probe is read:
            self._over(read, outcome)
            return True
        read.job = None  # as `_over`
        read.source.under_way -= 1
        job.outcomes[read.index] = outcome
        job.left -= 1
        if not job.left:
            self._jobs.discard(job)
            job.reads.clear()
            self.finished.append(job)
        return True

    def deliver(self, job: Job) -> None:
        """The caller has got this far: what was held for it is its own now, and the server hears so."""
        attempt, job.held = job.held, None
        payload = job.outcomes[0]
        if attempt is None or not isinstance(payload, Payload):
            return
        try:
            self._claim(attempt.ref)
            if job.into is not None:
                job.outcomes[0] = payload.copied_into(job.into)
            self._counters.delivered("ucx", attempt.ref.nbytes, time.perf_counter() - job.began_s)
        except TransportError as error:
            error.__traceback__ = None  # its frames hold the payload
            self._counters.failed(error)
            job.outcomes[0] = error
        attempt.connection.end_held(attempt, delivered=True)

    def refused(self, attempt: Attempt, error: TransportError) -> None:
        """The server has answered without a payload, or with something that is none."""
        if self._wary:
            self.forgive(attempt.connection.key)
        read = attempt.read
        if attempt.late or read is None:
            self.orphans.discard(attempt)
        attempt.read = None
        if read is None or read.job is None:
            return
        if read.attempt is not attempt:
            return  # the read has gone on without it
        read.attempt = None
        if judge_port(error) is PortVerdict.ROTATE_AND_QUARANTINE:
            self._quarantine_port(attempt.connection.key, error)
        read.source.advance()
        self._failed(read, error)

    def no_memory(self, read: Read, error: TransportError) -> None:
        """There is no buffer for a read."""
        error.__traceback__ = None
        self._fail(read, error)

    def requeue(self, connection: Connection) -> None:
        """A connection was closed before its queue could be asked for."""
        self._reassign(connection.queue)
        connection.queue.clear()

    def connection_lost(
        self, connection: Connection, asked: list[Read], queued: list[Read], error: TransportError, *, stale: bool
    ) -> None:
        """A connection is of no use any more.

        Args:
            connection: it is closed.
            asked: reads whose attempts were in flight there.
            queued: reads that waited for it.
            error: why.
            stale: it had answered nothing since it last lay idle, and may have been dead since then.
        """
        key = connection.key
        reads = [read for read in (*asked, *queued) if read.job is not None]
        for read in reads:
            read.attempt = None
        if stale and isinstance(error, PeerLostError):
            if reads:
                self._moved.setdefault(key, []).extend(reads)  # no reason to distrust the port
        else:
            failed = [read for read in (asked if connection.is_open else reads) if read.job is not None]
            if judge_port(error) is PortVerdict.ROTATE_AND_QUARANTINE and (failed or not connection.is_open):
                self._quarantine_port(key, error)
            for source in {read.source for read in failed}:
                source.advance()
            for read in failed:
                self._failed(read, _copy(error))
            if connection.is_open:
                self._reassign(queued)
        self.settle()

    # --- What follows from a failure ---

    def _failed(self, read: Read, error: TransportError) -> None:
        """The port layer: go on at the next port, or give the call up."""
        for cls, reason in _REASONS:
            if isinstance(error, cls):
                self._counters.add(reason)
                break
        now = self.now()
        alternate = read.alternate
        if (
            alternate is None
            or now >= read.limit_s
            or judge_port(error) is PortVerdict.PROPAGATE
            or (read.source.probe is not read and self._quarantine.holds(alternate, now))
        ):
            self._call_failed(read, error, now)
            return
        self._counters.add("rotations")
        read.alternate = None
        self._moved.setdefault(alternate, []).append(read)

    def _call_failed(self, read: Read, error: TransportError, now: float) -> None:
        """The slot layer: a fresh call, or the end of the read."""
        job, source = read.job, read.source
        assert job is not None
        is_port = judge_port(error) is PortVerdict.ROTATE_AND_QUARANTINE
        if source.probe is read:
            source.probe = None
            if is_port:  # those that waited fail with it
                waiting = [other for other in source.waiting if other.job is not None]
                source.waiting.clear()
                for other in waiting:
                    self._call_failed(other, _copy(error), now)
            self._probe_over(source)
        remaining_s = job.until_s - now
        is_late = isinstance(error, DeadlineExceededError)
        hopeless = (
            is_port
            and not job.alone
            and (read.limit_s < job.until_s or (is_late and not source.healthy(self._quarantine, now)))
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
                if read.due_s < self._look_s:
                    self._look_at(read.due_s)
            else:
                self._again.setdefault(source, []).append(read)
            return
        if remaining_s <= 0 and error.retryable and not is_late:
            error = _too_late(read.ref, last=error.message)
        self._fail(read, error)

    def _reassign(self, reads: Iterable[Read]) -> None:
        """Give reads that were not asked yet a port again."""
        for read in reads:
            if read.job is not None:
                read.connection = None
                self._again.setdefault(read.source, []).append(read)

    def _fail(self, read: Read, error: TransportError) -> None:
        self._counters.failed(error)
        self._over(read, error)

    def _fail_at(self, job: Job, index: int, error: TransportError) -> None:
        """Fail what is no read yet."""
        self._counters.failed(error)
        job.outcomes[index] = error
        job.left -= 1
        if not job.left:
            self._jobs.discard(job)
            self.finished.append(job)

    def _over(self, read: Read, outcome: Outcome) -> None:
        job, source = read.job, read.source
        assert job is not None
        read.job = None
        source.under_way -= 1
        attempt = read.attempt
        if attempt is not None:  # it goes on without this read
            read.attempt = None
            attempt.read = None
            self.orphans.add(attempt)
            if attempt.due_s < self._look_s:
                self._look_at(attempt.due_s)
        if source.probe is read:
            self._probe_over(source)
        job.outcomes[read.index] = outcome
        job.left -= 1
        if not job.left:
            self._jobs.discard(job)
            job.reads.clear()
            self.finished.append(job)

    def settle(self) -> None:
        """Do what follows from the last step: reads go on, and jobs that have all outcomes are reported."""
        if self._settling or not (self._again or self._moved or self.finished):
            return
        self._settling = True
        try:
            while True:
                if self._again:
                    again, self._again = self._again, {}
                    for source, reads in again.items():
                        self._assign(source, reads, self.now())
                elif self._moved:
                    moved, self._moved = self._moved, {}
                    for key, reads in moved.items():
                        wanted = [read for read in reads if read.job is not None]
                        if wanted:
                            self._enqueue(key, wanted, self.now())
                elif self.finished:
                    if self.connections.ending:
                        self.connections.send_ends()
                    job = self.finished.pop(0)
                    job.done = True
                    on_done, job.on_done = job.on_done, None
                    if on_done is not None:
                        on_done(job)
                else:
                    return
        finally:
            self._settling = False

    # --- Time ---

    def _look_at(self, when_s: float) -> None:
        """See that `_look_round` is called by then."""
        if self._look is not None:
            self._look.cancel()
        self._look_s = when_s
        self._look = self.call_at(when_s, self._look_round)

    def _look_round(self) -> None:
        """Take a step with everything that is due; one timer serves all."""
        self._look = None
        self._look_s = _NEVER
        now = self.now()
        for job in tuple(self._jobs):
            for read in tuple(job.reads):
                if read.job is not None and read.due_s <= now:
                    self._due(read, now)
        for attempt in tuple(self.orphans):
            if attempt.due_s <= now:
                attempt.due_s = now + LATE_GRACE_S
                if attempt.late:
                    attempt.connection.drop_late()
                else:
                    attempt.late = True
                    attempt.connection.late += 1
        self.settle()
        next_s = min((read.due_s for job in self._jobs for read in job.reads if read.job is not None), default=_NEVER)
        next_s = min(next_s, min((attempt.due_s for attempt in self.orphans), default=_NEVER))
        if next_s < self._look_s:
            self._look_at(next_s)

    def _due(self, read: Read, now: float) -> None:
        job, place, connection = read.job, read.place, read.connection
        assert job is not None
        if place == "paused" and now < job.until_s:
            self._again.setdefault(read.source, []).append(read)
            return
        attempt = read.attempt
        error = _too_late(read.ref)
        if place == "asked" and attempt is not None:
            error = _too_late(read.ref, port=attempt.connection.key[1])
            self._late(attempt, error, now)
            read.attempt = None
        elif place == "queued" and connection is not None and read in connection.queue:
            connection.queue.remove(read)
        if place in ("queued", "asked"):
            read.source.advance()
            self._failed(read, error)
        else:
            self._fail(read, error)

    def _late(self, attempt: Attempt, error: TransportError, now: float) -> None:
        """An attempt has exceeded its time: its connection takes no new ones until it has been answered."""
        connection = attempt.connection
        attempt.late = True
        attempt.due_s = now + LATE_GRACE_S
        self.orphans.add(attempt)
        connection.late += 1
        self._quarantine_port(connection.key, error)
        if connection.late == 1:
            queued = list(connection.queue)
            connection.queue.clear()
            self._reassign(queued)


def _removed(source: Takeable) -> PeerLostError:
    """The error of a read whose source is known to be gone."""
    message = "the source of this payload is gone: its worker died, left, or published itself again"
    return PeerLostError(message, host=source.host, ring=source.ring_name, reason="removed")


def _too_late(ref: SlotRef, **facts: object) -> DeadlineExceededError:
    message = "the payload did not arrive in time"
    return DeadlineExceededError(message, host=ref.host, slot=ref.slot, nbytes=ref.nbytes, **facts)


def _copy(error: TransportError) -> TransportError:
    """An error of a read's own: several fail by one event, and each is raised somewhere else."""
    return type(error)(error.message, **error.facts)
