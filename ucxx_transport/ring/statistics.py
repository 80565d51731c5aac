"""RingStatistics: what has happened to a ring's payloads, by reason, and what its slots hold now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucxx_transport.ring.layout import Counter
from ucxx_transport.ring.states import SlotState


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStatistics:
    """Counts since the ring was made, of all its processes. They live in the segment, so a process's death loses none.

    Attributes:
        slots: number of slots.
        free: slots that hold nothing.
        writing: slots being written.
        ready: slots with a payload to read.
        reading: slots being read.
        written: writes begun.
        committed: writes completed.
        committed_bytes: payload bytes of these.
        overwritten: unread payloads dropped for a new one (`on_full="overwrite"`).
        aborted: writes that ended without a payload: failed, or given up.
        acquired: read attempts begun.
        consumed: read attempts that ended with the payload received.
        released: read attempts that ended without.
        freed: payloads that all their readers have had.
        discarded: payloads dropped on request.
        stale: reads refused because the slot no longer held that payload.
        out_of_range: reads refused because the ring has no such slot.
        busy: reads refused because the slot carried as many attempts as it can.
        late_finalise: finalises by a lease that had ended; they changed nothing.
        reclaimed_writes: writes ended because their process had died, or forgotten them.
        reclaimed_reads: read attempts ended for the same reason.
        full: writes refused because no slot was to be had.
        blocked: writes that had to wait for a slot.
        lock_recoveries: times the lock was taken over from a thread that died with it.
        repaired_slots: transitions that were cut off (kill, interrupt) and completed or undone by the next process.
    """

    slots: int
    free: int
    writing: int
    ready: int
    reading: int
    written: int
    committed: int
    committed_bytes: int
    overwritten: int
    aborted: int
    acquired: int
    consumed: int
    released: int
    freed: int
    discarded: int
    stale: int
    out_of_range: int
    busy: int
    late_finalise: int
    reclaimed_writes: int
    reclaimed_reads: int
    full: int
    blocked: int
    lock_recoveries: int
    repaired_slots: int


def statistics_of(counters: Sequence[int], states: Sequence[int]) -> RingStatistics:
    """The statistics, from the counters (`Counter`) and the number of slots in each state (`SlotState`)."""
    counts = {counter.name.lower(): counters[counter] for counter in Counter}
    return RingStatistics(
        slots=sum(states),
        free=states[SlotState.FREE],
        writing=states[SlotState.WRITING],
        ready=states[SlotState.READY],
        reading=states[SlotState.READING],
        **counts,
    )
