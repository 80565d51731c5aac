"""RingCore: one handle's view of a segment, below leases and the public class; all access to headers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import claims
from ucxx_transport.ring.claims import Claim, ClaimGuard
from ucxx_transport.ring.identity import Identity
from ucxx_transport.ring.layout import Counter
from ucxx_transport.ring.locking import ReenteredError, SegmentLock
from ucxx_transport.ring.owner import Owner, current_owner, owner_alive
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.slot_headers import Hold
from ucxx_transport.ring.slot_search import SlotSearch
from ucxx_transport.ring.slot_table import SlotTable
from ucxx_transport.ring.states import SlotState

ArgumentTs = TypeVarTuple("ArgumentTs")
ResultT = TypeVar("ResultT")

_CHORE_WAIT_S: Final = 0.05
"""A lost claim is ended in a finaliser: it waits this long for the lock, then leaves it to the next transition."""

# an enum's attribute costs 0.3 µs in Python 3.11
_CONSUMED: Final = Counter.CONSUMED
_RELEASED: Final = Counter.RELEASED
_ABORTED: Final = Counter.ABORTED

_log = get_logger(__name__)


class RingCore:
    """Segment, lock and slot table of one handle, and the policy of who may end which hold.

    Attributes:
        segment: the mapped memory.
        identity: what the segment says of itself.
        words: the segment as 64-bit words.
        table: transitions; call them through `transact` only.
        search: which slots are in which state.
        clock: monotonic seconds.
        lock_wait_s: how long one transition waits for the lock.
    """

    __slots__ = (
        "_alive",
        "_lock",
        "_owner",
        "_warned_late",
        "clock",
        "identity",
        "lock_wait_s",
        "search",
        "segment",
        "table",
        "words",
    )

    def __init__(
        self,
        segment: Segment,
        identity: Identity,
        *,
        owner: Owner | None = None,
        alive: Callable[[int, int], bool] = owner_alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind to a complete segment.

        Args:
            segment: the mapped memory.
            identity: what it says of itself.
            owner: in whose name holds are taken; None for this process.
            alive: whether the process (pid, start) lives.
            clock: monotonic seconds.
        """
        self.segment = segment
        self.identity = identity
        self.words = segment.words
        self.table = SlotTable(segment.words, identity.geometry)
        self.search = SlotSearch(segment.words, identity.geometry)
        self.clock = clock
        self.lock_wait_s = identity.lock_timeout_ns / 1e9
        self._owner = owner
        self._alive = alive
        self._warned_late = False
        self._lock = SegmentLock(segment.words, key=identity.ring_id, repair=self._repair, clock=clock)

    def owner(self) -> Owner:
        """In whose name this handle takes holds."""
        return self._owner or current_owner()

    def payload_address(self, slot: int) -> int:
        """Where a slot's payload is in this process's memory."""
        return self.segment.address + self.identity.geometry.payload_byte(slot)

    def transact(self, body: Callable[[*ArgumentTs], ResultT], *args: *ArgumentTs) -> ResultT:
        """Call `body(*args)` in the critical section, then do what finalisers left queued.

        Raises:
            DeadlineExceededError: the lock was not to be had within the ring's `lock_timeout_s`.
            ReenteredError: called from inside the section, by a finaliser or signal handler.
        """
        try:
            return self._lock.run(self.lock_wait_s, body, *args)
        finally:
            if claims.chores:
                claims.run_chores()

    def transact_within(self, wait_s: float, body: Callable[[*ArgumentTs], ResultT], *args: *ArgumentTs) -> ResultT:
        """`transact`, waiting for the lock no longer than `wait_s`."""
        try:
            return self._lock.run(min(wait_s, self.lock_wait_s), body, *args)
        finally:
            if claims.chores:
                claims.run_chores()

    def count(self, counter: Counter) -> None:
        """Add one to a counter, when it can be."""
        try:
            self.transact(self.table.count, counter)
        except ReenteredError:
            claims.defer(lambda: self._settle(self._count_soon, counter))

    def end_read(self, claim: Claim, *, consumed: bool) -> bool:
        """End a read attempt by its lease.

        Returns:
            Whether this call ended it. False changes nothing: it had ended, was reclaimed, or is another process's.
        """
        ended = self._end(claim, _CONSUMED if consumed else _RELEASED)
        if not ended:
            self.note_late(claim.hold)
        return ended

    def end_write(self, claim: Claim) -> bool:
        """Abort a write by its lease; False when there was nothing to abort."""
        return self._end(claim, _ABORTED)

    def note_late(self, hold: Hold) -> None:
        """Count a finalise that came too late, and say so once for this handle."""
        self.count(Counter.LATE_FINALISE)
        if not self._warned_late:
            self._warned_late = True
            _log.warning(
                "finalise_ignored",
                ring=self.segment.name,
                slot=hold.slot,
                generation=hold.generation,
                attempt=hold.lease_id,
                pid=os.getpid(),
                reason="the lease had ended; counted from here on",
            )

    def settle_lost(self, guard: ClaimGuard) -> bool:
        """End the hold of a claim that nobody refers to any more; False when the lock is not to be had now."""
        if guard.placed:
            reason = _ABORTED if guard.hold.is_write else _CONSUMED if guard.consumes else _RELEASED
            return self._settle(self._end_hold, guard.hold, reason)
        return self._settle(self.reclaim_dead)

    def reclaim_dead(self) -> int:
        """End every hold whose process is dead, and those of this process that no claim stands for.

        Returns:
            How many holds were ended.

        Raises:
            DeadlineExceededError: the lock was not to be had in time.
        """
        claims.settle_forgotten()
        if not self.search.slots_in(SlotState.WRITING, SlotState.READING):
            return 0
        mine = self.owner()
        verdicts: dict[Owner, bool] = {}
        reclaimed = 0
        # Looking at a process takes 20 µs (/proc): done between two sections, of which the second compares again.
        for hold in self._lock.run(self.lock_wait_s, self._all_holds):
            if hold.owner == mine:
                alive = claims.is_live(hold.lease_id)
            else:
                if hold.owner not in verdicts:
                    verdicts[hold.owner] = self._alive(*hold.owner)
                alive = verdicts[hold.owner]
            if not alive:
                reclaimed += self._lock.run(self.lock_wait_s, self._reclaim, hold)
        return reclaimed

    def _repair(self, deaths: int) -> None:
        self.table.count(Counter.LOCK_RECOVERIES, deaths)
        self.table.repair()

    def _end(self, claim: Claim, reason: Counter) -> bool:
        """End a claim that lives, once; inside a critical section of this thread, as soon as that is over."""
        hold = claim.hold
        if not claim.is_live:
            return False
        try:
            ended = self.transact(self.table.abort if hold.is_write else self.table.finalise, hold, reason)
        except ReenteredError:
            claims.defer(lambda: self._settle(self._end_hold, hold, reason))
            ended = True
        claim.forget()
        return ended

    def _end_hold(self, hold: Hold, reason: Counter) -> bool:
        end = self.table.abort if hold.is_write else self.table.finalise
        return self._lock.run(_CHORE_WAIT_S, end, hold, reason)

    def _count_soon(self, counter: Counter) -> None:
        self._lock.run(_CHORE_WAIT_S, self.table.count, counter)

    def _settle(self, action: Callable[[*ArgumentTs], object], *args: *ArgumentTs) -> bool:
        """Do it as a chore: it must not raise, since nobody is there to be told. False: not now."""
        if sys.is_finalizing():
            return True
        try:
            action(*args)
        except (ReenteredError, DeadlineExceededError):
            return False
        return True

    def _all_holds(self) -> list[Hold]:
        slots = self.search.slots_in(SlotState.WRITING, SlotState.READING)
        return [hold for slot in slots for hold in self.table.holds(slot)]

    def _reclaim(self, hold: Hold) -> bool:
        if hold.is_write:
            return self.table.abort(hold, Counter.RECLAIMED_WRITES)
        return self.table.finalise(hold, Counter.RECLAIMED_READS)
