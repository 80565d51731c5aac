"""Transitions: the calls into `native/ring.c`, and the errors that their outcomes are.

Each call is one whole transition under the segment's lock. It is tried without releasing the GIL first, since a
critical section takes a fraction of a microsecond; where the lock is taken for longer it is waited for with the GIL
released, in slices, so that Ctrl-C is noticed.

A hold is passed to the transitions as a `HoldWords`, an array whose words `layout` names (`HOLD_SLOT` …).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import (
    BusyError,
    ConfigError,
    DeadlineExceededError,
    SlotError,
    StaleSlotError,
)
from ucxx_transport.logs import get_logger
from ucxx_transport.native import Library, RingStruct, load
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Counter, Identity, Outcome
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import SlotState, generation_of, state_of

HoldWords = ctypes.c_uint64 * layout.HOLD_WORDS
TakeWords = ctypes.c_uint64 * layout.TAKE_WORDS
Words = ctypes.Array[ctypes.c_uint64]

_HOLDS_A_CALL: Final = 1024
"""Holds listed in one critical section."""

_THREAD_ID_MASK: Final = 0x3FFFFFFF
"""Of a robust mutex's first word (<linux/futex.h>): who holds it."""

# An attribute of an enum costs 0.3 µs in Python 3.11, a module's name nothing; these are on the hot path.
_DONE: Final = int(Outcome.DONE)
_LOCKED: Final = int(Outcome.LOCKED)
_DAMAGED: Final = int(Outcome.DAMAGED)
_FULL: Final = int(Outcome.FULL)

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStatistics:
    """Counts since the ring was made, of all its processes. They live in the segment, so a process's death loses none.

    Attributes:
        slots: number of slots; `free`, `writing`, `ready`, `reading`: how many hold nothing, are being written, have a
            payload to read, are being read.
        written: writes begun; `committed`: completed; `committed_bytes`: payload bytes of these.
        overwritten: unread payloads dropped for a new one (`on_full="overwrite"`).
        aborted: writes that ended without a payload: failed, or given up.
        acquired: read attempts begun; `consumed`, `released`: ended with the payload received, or without.
        freed: payloads that all their readers have had; `discarded`: dropped on request.
        stale: reads refused because the slot no longer held that payload; `out_of_range`: because the ring has no such
            slot; `busy`: because the slot carried as many attempts as it can.
        late_finalise: finalises by a lease that had ended; they changed nothing.
        reclaimed_writes: writes ended because their process had died, or forgotten them; `reclaimed_reads`: attempts.
        full: writes refused because no slot was to be had; `blocked`: writes that had to wait for a slot.
        lock_recoveries: times the lock was taken over from a thread that died with it.
        repaired_slots: transitions that were cut off (kill, interrupt) and completed or undone by the next process.
        envelopes_left_out: payloads whose record or meta is larger than the ring's `envelope_bytes`; it is in their
            reference alone.
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
    envelopes_left_out: int


class Transitions:
    """The transitions of one segment's slots, as one handle makes them.

    Each waits for the lock as long as the segment says, or `lock_wait_s`, or as it is asked to.

    `address` is of what the calls know of the segment, `HOLD_RING` of the holds that they are given. Slot 0's payload
    is at `first_payload` in this process's memory, at `first_byte` in the segment, its envelope at `first_envelope`;
    the next slot's are `stride` bytes further. `readable` is the segment as bytes, read-only.
    """

    __slots__ = (
        *("_acquire", "_brief", "_clock", "_commit", "_finalise", "_lock_wait_s", "_reserve", "_sleeping", "_struct"),
        *("_warned_late", "address", "first_byte", "first_envelope", "first_payload", "readable", "ring_id"),
        *("segment", "stride"),
    )

    def __init__(
        self,
        segment: Segment,
        identity: Identity,
        *,
        lock_wait_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        library: Library | None = None,
    ) -> None:
        self.segment = segment
        self._clock = clock
        self._lock_wait_s = identity.lock_timeout_ns / 1e9 if lock_wait_s is None else lock_wait_s
        self._warned_late = False
        geometry = identity.geometry
        self.first_byte, self.stride = geometry.payload_byte(0), geometry.stride_bytes
        self.first_payload = segment.address + self.first_byte
        self.first_envelope = self.first_byte - layout.HEADROOM_BYTES - geometry.envelope_bytes
        self.ring_id = identity.ring_id
        self.readable = segment.memory.data.toreadonly()
        self._struct = RingStruct(
            segment.address,
            *(geometry.slots, geometry.slot_bytes, geometry.first_slot_word, geometry.slot_words, geometry.entries),
            *(geometry.max_attempts, self.first_byte, self.stride, geometry.envelope_bytes),
        )
        self.address = ctypes.addressof(self._struct)
        self._brief, self._sleeping = library or load()
        self._reserve, self._commit = self._brief.reserve_now, self._brief.commit_now
        self._acquire, self._finalise = self._brief.acquire_now, self._brief.finalise_now

    def payload(self, words: Words) -> npt.NDArray[np.uint8]:
        """The bytes of a hold's payload, shape (nbytes,), writable; they do not keep the hold."""
        start = self.first_byte + words[layout.HOLD_SLOT] * self.stride
        return self.segment.memory[start : start + words[layout.HOLD_NBYTES]]

    def initialise(self) -> None:
        """Make the lock and the lists of a segment not in use yet; a ConfigError where robust mutexes are unknown."""
        code = self._brief.initialise(self.address)
        if code:
            raise ConfigError(
                f"a robust process-shared mutex cannot be made (errno {code}): ucxx_transport runs on Linux with glibc",
                errno=code,
            )

    def reserve(self, words: Words, *, overwrites: bool, wait_s: float | None = None) -> bool:
        """FREE → WRITING, or the oldest READY one if `overwrites`; gives slot and generation. False: there is none."""
        words[layout.HOLD_ARGUMENT] = overwrites
        code = self._reserve(words)
        if code and code != _FULL:
            code = self._waited(code, wait_s, "reserve", words, overwrites)
        return code != _FULL

    def commit(self, words: Words, required_reads: int) -> None:
        """WRITING → READY: the payload of a write, whose size and checksum are in the words, is complete.

        Raises:
            SlotError: the hold has ended: committed, aborted, or reclaimed.
        """
        words[layout.HOLD_ARGUMENT] = required_reads
        code = self._commit(words)
        if code and self._waited(code, None, "commit", words, required_reads):
            raise SlotError(
                "this write lease no longer holds its slot; nothing was committed",
                slot=words[layout.HOLD_SLOT],
                generation=words[layout.HOLD_GENERATION],
                state=state_of(words[layout.HOLD_STATE]).name,
            )

    def abort(self, words: Words, reason: Counter | int = Counter.ABORTED, wait_s: float | None = None) -> bool:
        """WRITING → FREE: a write ends without a payload; False, and nothing changes, unless this hold had the slot."""
        return self._call("abort", words, reason, wait_s=wait_s) == _DONE

    def discard(self, slot: int, generation: int) -> bool:
        """READY → FREE, if the slot holds that generation, unread."""
        return self._call("discard", slot, generation) == _DONE

    def discard_until(self, sequence: int) -> int:
        """Discard the unread payloads of the writes up to `sequence`; how many of these are being read or written."""
        left = ctypes.c_uint64()
        self._waited(_LOCKED, None, "discard_until", sequence, ctypes.addressof(left))
        return left.value

    def acquire(self, words: Words, wait_s: float | None = None) -> None:
        """READY → READING, or one attempt more within READING; gives nbytes and checksum.

        Raises:
            StaleSlotError: another generation, no payload, or one that all its readers, or this one, have had.
            BusyError: the slot carries as many attempts as it can, or other readers' attempts are in flight for all
                the reads that the payload asks for.
            SlotError: the ring has no such slot.
        """
        code = self._acquire(words)
        if code == _LOCKED:
            self._waited(code, wait_s, "acquire", words, 1)
            code = words[layout.HOLD_OUTCOME]
        if code:
            raise _refusal(Outcome(code), words)

    def finalise(self, words: Words, reason: Counter | int, wait_s: float | None = None) -> bool:
        """End a read attempt, counted by `reason`: `CONSUMED` when its reader has had the payload; False: it was over.

        The last one takes the slot to FREE, or back to READY while a reader is missing.
        """
        words[layout.HOLD_ARGUMENT] = reason
        code = self._finalise(words)
        if code:
            code = self._waited(code, wait_s, "finalise", words, 1, reason)
        return code == _DONE

    def take(self, holds: Sequence[Words], asked: Words, wait_s: float | None = None) -> None:
        """READY → READING of payloads that the holds' reader has neither had nor holds; `TAKE_NUMBER` of them are.

        There are as many holds as `TAKE_ROOM` says; the first are given a payload. Where `TAKE_NEXT` of `asked` is not
        0 then, the same call goes on from there.
        """
        pointers = (ctypes.c_void_p * len(holds))(*map(ctypes.addressof, holds))
        self._call("take", pointers, asked, wait_s=wait_s)

    def count(self, counter: Counter) -> None:
        """Add one to a counter."""
        self._call("count", counter)

    def count_late(self, words: Words) -> bool:
        """Count a finalise that came too late, and say so once for this handle; False: it changed nothing."""
        self.count(Counter.LATE_FINALISE)
        if not self._warned_late:
            self._warned_late = True
            _log.warning(
                "finalise_ignored",
                ring=self.segment.name,
                slot=words[layout.HOLD_SLOT],
                generation=words[layout.HOLD_GENERATION],
                attempt=words[layout.HOLD_LEASE],
                pid=os.getpid(),
                reason="the lease had ended; counted from here on",
            )
        return False

    def holds(self) -> Iterator[Words]:
        """The writes and read attempts in the segment, as the calls take them, read in several critical sections."""
        first, number = ctypes.c_uint64(0), ctypes.c_uint64(0)
        room = max(_HOLDS_A_CALL, self._struct.entries)
        seen = (HoldWords * room)()
        while first.value < self._struct.slots:
            pointers = ctypes.addressof(first), seen, room, ctypes.addressof(number)
            self._waited(_LOCKED, None, "holds", *pointers)
            for index in range(number.value):
                yield HoldWords(*seen[index])

    def ready(self) -> list[Words]:
        """The payloads that wait to be read, the oldest first, all of one moment: slot, generation, size, checksum."""
        room = self._struct.slots
        seen, number = (HoldWords * room)(), ctypes.c_uint64(0)
        self._waited(_LOCKED, None, "ready", seen, room, ctypes.addressof(number))
        return list(seen[: number.value])

    def statistics(self) -> RingStatistics:
        """The counters and the number of slots in each state, of one moment."""
        out = (ctypes.c_uint64 * (len(Counter) + len(SlotState)))()
        self._waited(_LOCKED, None, "snapshot", out)
        free, writing, ready, reading = states = out[len(Counter) :]
        counts = {counter.name.lower(): out[counter] for counter in Counter}
        return RingStatistics(slots=sum(states), free=free, writing=writing, ready=ready, reading=reading, **counts)

    def publish(self, address: bytes) -> None:
        """Store the server's address, a bank of `ADDRESS_BANK_WORDS` words."""
        bank = (ctypes.c_uint64 * layout.ADDRESS_BANK_WORDS).from_buffer_copy(address)
        self._waited(_LOCKED, None, "publish", bank)

    def wait_for_free(self, seen: int, wait_s: float) -> None:
        """Sleep until a slot is FREE since `reserve` found none and left `seen` in `HOLD_STATE`, or for `wait_s`."""
        self._sleeping.wait(self.address, seen, int(wait_s * 1e9))

    def wait_for_ready(self, seen: int, wait_s: float) -> None:
        """Sleep until a slot is READY since `take` left `seen` in `TAKE_SEEN`, or for `wait_s`."""
        self._sleeping.wait_ready(self.address, seen, int(wait_s * 1e9))

    def _call(self, name: str, *arguments: Any, wait_s: float | None = None) -> int:
        """Make a call, and return its outcome; errors as `_waited`."""
        code: int = getattr(self._brief, name)(self.address, *arguments, 0)
        return self._waited(code, wait_s, name, *arguments) if code else code

    def _waited(self, code: int, wait_s: float | None, name: str, *arguments: Any) -> int:
        """Repeat a call that found the lock taken (`code` LOCKED), and return its outcome.

        Raises:
            DeadlineExceededError: the lock was not to be had in time: its holder is stopped.
            SlotError: the lock or a list of slots is damaged.
        """
        if code == _LOCKED:
            call = getattr(self._sleeping, name)
            bound_s = self._lock_wait_s if wait_s is None else min(wait_s, self._lock_wait_s)
            until_s = self._clock() + bound_s
            left_s = bound_s
            while (code := call(self.address, *arguments, max(1, int(left_s * 1e9)))) == _LOCKED:
                left_s = until_s - self._clock()
                if left_s <= 0:
                    raise DeadlineExceededError(
                        "the ring's lock is held by a thread that does not get on (stopped?)",
                        waited_s=bound_s,
                        holder_thread_id=self.segment.words[layout.MUTEX_BYTE // 8] & _THREAD_ID_MASK,
                    )
        if code == _DAMAGED:
            raise SlotError("the lock or a list of slots of the segment is damaged; recreate the ring")
        return code


_REFUSALS: Final[Mapping[Outcome, tuple[type[SlotError | BusyError], str]]] = {
    Outcome.OUT_OF_RANGE: (SlotError, "the ring has no such slot"),
    Outcome.DAMAGED: (SlotError, "the lock or the slot's header is damaged; recreate the ring"),
    Outcome.CROWDED: (BusyError, "the slot carries as many read attempts as it can"),
    Outcome.TAKEN: (
        BusyError,
        (
            "other readers have attempts in flight for all the reads that this payload asks for; it is theirs unless "
            "one of them gives it back"
        ),
    ),
    Outcome.HAD: (StaleSlotError, "stale slot: the payload was read already, though an attempt is still in flight"),
    Outcome.STALE: (
        StaleSlotError,
        "stale slot: the slot was recycled, or its payload was read, dropped or never written",
    ),
}


def _refusal(outcome: Outcome, words: Words) -> SlotError | BusyError:
    """The error that an outcome of `acquire` is."""
    kind, text = _REFUSALS[outcome]
    facts: dict[str, object] = {"slot": words[layout.HOLD_SLOT], "generation": words[layout.HOLD_GENERATION]}
    if kind is StaleSlotError:
        found = words[layout.HOLD_STATE]
        facts |= {"found_generation": generation_of(found), "state": state_of(found).name}
    elif kind is BusyError:
        facts["attempts"] = words[layout.HOLD_ATTEMPTS]
    return kind(text, **facts)
