"""What follows from a failed attempt, and when one has failed by taking too long. The policy is in `ports`.

Everything here runs in the thread that runs the reactor. One timer serves everything that is due at some time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Protocol

from ucxx_transport.client.jobs import Read, copy_of, too_late
from ucxx_transport.client.ports import PortVerdict, backoff_s, judge_port, retries_slot
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

if TYPE_CHECKING:
    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.client.jobs import Attempt, Carrier, Job
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.link.base import Timer
    from ucxx_transport.link.reactor import Reactor

LATE_GRACE_S: Final = 1.0
"""A connection on which everything in flight is late for so long is closed."""

_REASONS: Final[tuple[tuple[type[TransportError], str], ...]] = (
    (PeerLostError, "peers_lost"),
    (DeadlineExceededError, "timeouts"),
    (BusyError, "busy"),
    (NotReadyError, "not_ready"),
    (ProtocolError, "protocol_errors"),
    (ChecksumError, "checksum_errors"),
    (AuthenticationError, "unauthorized"),
)


class Reading(Protocol):
    """What this needs of the client's `Reads`."""

    jobs: set[Job]
    orphans: set[Attempt]

    @property
    def dispatch(self) -> Dispatch: ...
    def fail(self, read: Read, error: TransportError) -> None: ...
    def settle(self) -> None: ...


class Failures:
    """See the module.

    Attributes:
        look_s: when it looks next for what is due.
    """

    def __init__(self, reads: Reading, reactor: Reactor, counters: ClientCounters, read_attempts: int) -> None:
        self.look_s = math.inf
        self._reads = reads
        self._now = reactor.now
        self._call_at = reactor.call_at
        self._counters = counters
        self._read_attempts = read_attempts
        self._look: Timer | None = None

    def attempt_due_s(self, read: Read) -> float:
        """A read is asked of its port now; when that will have taken too long."""
        read.place = "asked"
        limit_s = read.limit_s
        if read.alternate is not None or read.call < self._read_attempts:
            limit_s = (self._now() + limit_s) / 2  # see `ports.attempt_budget_s`
        read.due_s = limit_s
        self.look_at(limit_s)
        return limit_s

    def connection_lost(
        self, connection: Carrier, asked: list[Read], queued: list[Read], error: TransportError, *, stale: bool
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
                self._reads.dispatch.moved.setdefault(key, []).extend(reads)  # no reason to distrust the port
        else:
            failed = [read for read in (asked if connection.is_open else reads) if read.job is not None]
            if judge_port(error) is PortVerdict.ROTATE_AND_QUARANTINE and (failed or not connection.is_open):
                self._reads.dispatch.quarantine(key, error)
            for source in {read.source for read in failed}:
                source.advance()
            for read in failed:
                self.failed(read, copy_of(error))
            if connection.is_open:
                self._reads.dispatch.reassign(queued)
        self._reads.settle()

    def failed(self, read: Read, error: TransportError) -> None:
        """The port layer: go on at the next port, or give the call up."""
        for cls, reason in _REASONS:
            if isinstance(error, cls):
                self._counters.add(reason)
                break
        now = self._now()
        alternate = read.alternate
        if (
            alternate is None
            or now >= read.limit_s
            or judge_port(error) is PortVerdict.PROPAGATE
            or (read.source.probe is not read and self._reads.dispatch.avoids(alternate, now))
        ):
            self._call_failed(read, error, now)
            return
        self._counters.add("rotations")
        read.alternate = None
        self._reads.dispatch.moved.setdefault(alternate, []).append(read)

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
                    self._call_failed(other, copy_of(error), now)
            self._reads.dispatch.probe_over(source)
        remaining_s = job.until_s - now
        is_late = isinstance(error, DeadlineExceededError)
        hopeless = (
            is_port
            and not job.alone
            and (read.limit_s < job.until_s or (is_late and not self._reads.dispatch.healthy(source, now)))
        )
        if not hopeless and retries_slot(
            error, attempt=read.call, read_attempts=self._read_attempts, remaining_s=remaining_s
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
                self._reads.dispatch.again.setdefault(source, []).append(read)
            return
        if remaining_s <= 0 and error.retryable and not is_late:
            error = too_late(read.ref, last=error.message)
        self._reads.fail(read, error)

    # --- Time ---

    def look_at(self, when_s: float) -> None:
        """See that `_look_round` is called by then."""
        if when_s < self.look_s:
            if self._look is not None:
                self._look.cancel()
            self.look_s = when_s
            self._look = self._call_at(when_s, self._look_round)

    def _look_round(self) -> None:
        """Take a step with everything that is due; one timer serves all."""
        self._look = None
        self.look_s = math.inf
        now = self._now()
        for job in tuple(self._reads.jobs):
            for read in tuple(job.reads):
                if read.job is not None and read.due_s <= now:
                    self._due(read, now)
        for attempt in tuple(self._reads.orphans):
            if attempt.due_s <= now:
                attempt.due_s = now + LATE_GRACE_S
                if attempt.late:
                    _close_if_all_is_late(attempt.connection)
                else:
                    attempt.late = True
                    attempt.connection.late += 1
        self._reads.settle()
        next_s = min(
            (read.due_s for job in self._reads.jobs for read in job.reads if read.job is not None), default=math.inf
        )
        next_s = min(next_s, min((attempt.due_s for attempt in self._reads.orphans), default=math.inf))
        self.look_at(next_s)

    def _due(self, read: Read, now: float) -> None:
        job, place, connection = read.job, read.place, read.connection
        assert job is not None
        if place == "paused" and now < job.until_s:
            self._reads.dispatch.again.setdefault(read.source, []).append(read)
            return
        attempt = read.attempt
        error: TransportError = too_late(read.ref)
        if place == "asked" and attempt is not None:
            error = too_late(read.ref, port=attempt.connection.key[1])
            self._late(attempt, error, now)
            read.attempt = None
        elif place == "queued" and connection is not None and read in connection.queue:
            connection.queue.remove(read)
            if connection.shortage is not None and now >= job.until_s:
                error = copy_of(connection.shortage)
        if place in ("queued", "asked"):
            read.source.advance()
            self.failed(read, error)
        else:
            self._reads.fail(read, error)

    def _late(self, attempt: Attempt, error: TransportError, now: float) -> None:
        """An attempt has exceeded its time: its connection takes no new ones until it has been answered."""
        connection = attempt.connection
        attempt.late = True
        attempt.due_s = now + LATE_GRACE_S
        self._reads.orphans.add(attempt)
        connection.late += 1
        self._reads.dispatch.quarantine(connection.key, error)
        if connection.late == 1:
            queued = list(connection.queue)
            connection.queue.clear()
            self._reads.dispatch.reassign(queued)


def _close_if_all_is_late(connection: Carrier) -> None:
    """There is nothing to wait for there."""
    if connection.late and connection.late == len(connection.attempts):
        host, port = connection.key
        connection.fail(PeerLostError("the port has not answered in time", host=host, port=port, reason="aborted"))
