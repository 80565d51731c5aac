"""The ring as the connections of one port share it: slots are acquired, sent from, and given back once each.

A stopped process may hold the ring's lock. Then one wait for it a turn of the reactor is in vain, and no more; what
could not be given back is kept for the port's next sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, cast

from ucxx_transport import errors
from ucxx_transport.errors import TransportError
from ucxx_transport.link.base import Message
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.layout import AWAITED, HOLD_NBYTES
from ucxx_transport.ring.leases import ReadLease
from ucxx_transport.server.counters import BYTES_SENT, DELIVERED, RELEASED, REQUESTS, PortCounters
from ucxx_transport.wire.actions import Attempt
from ucxx_transport.wire.frames import Status

_log = get_logger(__name__)

MAX_ANSWERS: Final = 4096  # slots, by length, whose memory is kept prepared for the link
MAX_SPARE: Final = 128  # leases that are kept for further attempts: making one costs 2 µs
CLOGGED: Final = 8  # the part of the ring that stuck sends may hold
NO_EPOCH: Final = "the worker has no epoch yet"
_LOCKED: Final = "the ring's lock is held by a process that does not get on"

# Of ports that are gone: while UCX may read from a slot, its lease must not be dropped.
_never_ended: list[Attempt] = []


class Slots:
    """See the module."""

    def __init__(self, ring: SharedRingBuffer, counters: PortCounters, reactor: Reactor) -> None:
        self.counters = counters
        self.words = counters.words
        self.awaited = ring.server_words[AWAITED : AWAITED + 1]  # not 0 while the source waits for its epoch
        self._answers: dict[tuple[int, int], Message] = {}  # by slot and length of the payload
        self._ring = ring
        self.reactor = reactor
        # UCX has not ended the sends of so many slots that only the end of this process can give them back
        self.is_clogged = False
        self._locked_turn = -1
        self._kept: list[Attempt] = []
        self._spare: list[ReadLease] = []

    @property
    def is_locked(self) -> bool:
        """Whether the ring's lock was waited for in vain in this turn: others wait too, so not again."""
        return self._locked_turn == self.reactor.turns

    def acquire(self, attempt: Attempt, reader: int) -> Message:
        """Enter the attempt at its slot; the whole answer, as it lies there. A TransportError: see `status_of`."""
        self.words[REQUESTS] += 1
        if self.awaited[0]:
            raise errors.NotReadyError(NO_EPOCH)
        if self._locked_turn == self.reactor.turns:
            raise errors.BusyError(_LOCKED)
        slot, nbytes = attempt.slot, attempt.nbytes
        try:
            lease = self._ring.acquire_slot(slot, attempt.generation, reader=reader, again=self._spare)
        except TransportError as error:
            self._note_lock(error)
            raise
        attempt.lease = lease
        found = lease.words[HOLD_NBYTES]
        if found != nbytes:
            self.finish(attempt)
            raise errors.ProtocolError(f"the payload has {found} bytes, the reference says {nbytes}")
        return self._answers.get((slot, nbytes)) or self.answer_of(attempt)

    def answer_of(self, attempt: Attempt) -> Message:
        """The whole answer that the attempt's slot is, kept for the next one of that length."""
        known = self._answers.get((attempt.slot, attempt.nbytes))
        if known is None:
            if len(self._answers) >= MAX_ANSWERS:
                del self._answers[next(iter(self._answers))]
            known = self.reactor.link.message(cast("ReadLease", attempt.lease).message)
            self._answers[attempt.slot, attempt.nbytes] = known
        return known

    def take(self, max_payloads: int, *, max_bytes: int, newest: bool, reader: int) -> list[ReadLease]:
        """What is there and fits; none where the lock is not to be had. A ConfigError: the first one does not fit."""
        if not max_payloads or self.is_locked:
            return []
        try:
            leases = self._ring.take(max_payloads, max_bytes=max_bytes, newest=newest, reader=reader)
        except errors.DeadlineExceededError as error:
            self._note_lock(error)
            return []
        self.counters.add("takes", len(leases))
        return leases

    def consume(self, names: Iterable[tuple[int, int]], reader: int) -> list[Status]:
        """Consume what the client has had of these, as far as it is still there."""
        statuses = []
        for slot, generation in names:
            status = Status.BUSY
            if not self.is_locked:
                try:
                    consumed = self._ring.acquire_slot(slot, generation, reader=reader).mark_consumed()
                    self.counters.add("confirms", int(consumed))
                    status = Status.OK if consumed else Status.STALE
                except TransportError as error:
                    self._note_lock(error)
                    status = Status.BUSY if error.retryable else Status.STALE
            statuses.append(status)
        return statuses

    def finish(self, attempt: Attempt) -> None:
        """Its message is over, and its end known, or will never be: the slot is given back, exactly once."""
        lease = attempt.lease
        if lease is None:
            return
        if self._locked_turn == self.reactor.turns:
            self._kept.append(attempt)
            return
        try:
            if attempt.delivered and not attempt.is_recorded:
                lease.mark_consumed()
            else:
                lease.release_reading()
        except TransportError as error:
            self._note_lock(error)
            _log.warning("slot_not_released", slot=attempt.slot, reason=str(error))
            self._kept.append(attempt)
            return
        attempt.lease = None
        if type(lease) is ReadLease and len(self._spare) < MAX_SPARE:
            self._spare.append(lease)
        words = self.words
        if attempt.delivered:
            words[DELIVERED] += 1
            words[BYTES_SENT] += attempt.nbytes
        else:
            words[RELEASED] += 1

    def record(self, attempt: Attempt, reader: int) -> None:
        """The client has ended it, and its message has not left. A delivery is recorded all the same.

        Else the next answer would prove to the client that it was heard, and a port that dies before the message has
        left would give the payload to another. Another attempt of the reader holds the slot from here on; it cannot be
        recorded of reader 0, whose reads all count.
        """
        lease = attempt.lease
        if lease is None or not attempt.delivered or not reader or self.is_locked:
            return
        try:
            attempt.lease = self._ring.acquire_slot(attempt.slot, attempt.generation, reader=reader)
            lease.mark_consumed()
            attempt.is_recorded = True
        except TransportError as error:
            attempt.lease = lease
            self._note_lock(error)

    def abandon(self, attempts: Sequence[Attempt]) -> None:
        """Their connection is closed: finish each, now or as soon as UCX does not read its slot any more."""
        for attempt in attempts:
            if not _is_over(attempt):
                self.counters.add("stuck_sends")
                _log.warning("send_stuck", slot=attempt.slot, nbytes=attempt.nbytes)
        self._kept += attempts
        self.settle_kept()

    def settle_kept(self) -> None:
        """Finish what was kept and is over."""
        kept, self._kept = self._kept, []
        for attempt in kept:
            if _is_over(attempt):
                self.finish(attempt)
            else:
                self._kept.append(attempt)
        self.is_clogged = sum(not _is_over(attempt) for attempt in self._kept) > self._ring.slots // CLOGGED

    def reclaim(self) -> None:
        """Give back what dead processes hold; where the lock is not to be had, the next time."""
        if self.is_locked:
            return
        try:
            self._ring.reclaim_dead()
        except TransportError as error:
            self._note_lock(error)
            _log.warning("reclaim_failed", reason=str(error))

    def retire(self) -> None:
        """The link is closed, or given up: keep what UCX may still read from, for good."""
        self._locked_turn = -1
        self.settle_kept()
        _never_ended.extend(attempt for attempt in self._kept if not _is_over(attempt))

    def _note_lock(self, error: TransportError) -> None:
        if isinstance(error, errors.DeadlineExceededError):
            self._locked_turn = self.reactor.turns


def _is_over(attempt: Attempt) -> bool:
    """Whether UCX reads nothing for it any more."""
    return attempt.send is None or attempt.send.completed
