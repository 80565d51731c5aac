"""Transitions: the calls into `native/ring.c`, and the errors that their outcomes are.

Each call is one whole transition under the segment's lock. It is tried without releasing the GIL first, since a
critical section takes a fraction of a microsecond; where the lock is taken for longer it is waited for with the GIL
released, in slices, so that Ctrl-C is noticed.

A hold is passed to the transitions as a `HoldWords`, an array whose words `layout` names (`HOLD_SLOT` …).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ucxx_transport.errors import (
    BusyError,
    ConfigError,
    DeadlineExceededError,
    SlotError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.native import Library, RingStruct, load
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Counter, Geometry, Outcome
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import SlotState, generation_of, state_of

HoldWords = ctypes.c_uint64 * layout.HOLD_WORDS
TakeWords = ctypes.c_uint64 * layout.TAKE_WORDS
Words = ctypes.Array[ctypes.c_uint64]

_HOLDS_A_CALL: Final = 1024
"""Holds or payloads listed in one critical section."""

_THREAD_ID_MASK: Final = 0x3FFFFFFF
"""Of a robust mutex's first word (<linux/futex.h>): who holds it."""

# An attribute of an enum costs 0.3 µs in Python 3.11, a module's name nothing; these are on the hot path.
_DONE: Final = int(Outcome.DONE)
_LOCKED: Final = int(Outcome.LOCKED)
_DAMAGED: Final = int(Outcome.DAMAGED)
_FULL: Final = int(Outcome.FULL)


class SeenHold(NamedTuple):
    """A write or read attempt as the segment names it; `words` are itself, as the calls take it."""

    owner: Owner
    lease_id: int
    words: Words

    @property
    def is_write(self) -> bool:
        """Whether it is a write."""
        return state_of(self.words[layout.HOLD_STATE]) is SlotState.WRITING


class ReadyPayload(NamedTuple):
    """A payload that waits to be read."""

    slot: int
    generation: int
    nbytes: int
    checksum: int | None


class Transitions:
    """The transitions of one segment's slots; each waits `lock_wait_s` for the lock, unless it says otherwise.

    Attributes:
        address: of what the calls know of the segment, `HOLD_RING` of the holds that they are given.
        first_payload: where slot 0's payload is in this process's memory.
        stride: bytes from there to the next slot's.
        lock_wait_s: how long one call waits for the lock.
    """

    __slots__ = (
        *("_acquire", "_brief", "_clock", "_commit", "_finalise", "_reserve", "_segment"),
        *("_sleeping", "_struct", "address", "first_payload", "lock_wait_s", "stride"),
    )

    def __init__(
        self,
        segment: Segment,
        geometry: Geometry,
        *,
        lock_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
        library: Library | None = None,
    ) -> None:
        self._segment = segment  # keeps the memory mapped
        self._clock = clock
        self.lock_wait_s = lock_wait_s
        self._struct = RingStruct(
            segment.address,
            geometry.slots,
            geometry.slot_bytes,
            geometry.first_slot_word,
            geometry.slot_words,
            geometry.entries,
            geometry.max_attempts,
            geometry.payload_byte(0),
            geometry.stride_bytes,
            geometry.envelope_bytes,
        )
        self.address = ctypes.addressof(self._struct)
        self.first_payload = segment.address + geometry.payload_byte(0)
        self.stride = geometry.stride_bytes
        library = library or load()
        self._brief = library.brief
        self._sleeping = library.sleeping
        self._reserve = self._brief.reserve_now
        self._commit = self._brief.commit_now
        self._acquire = self._brief.acquire_now
        self._finalise = self._brief.finalise_now

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
        if code:
            if code != _FULL:
                code = self._waited(code, wait_s, self._sleeping.reserve, words, overwrites)
            if code == _FULL:
                return False
        return True

    def commit(self, words: Words, required_reads: int) -> None:
        """WRITING → READY: the payload of a write, whose size and checksum are in the words, is complete.

        Raises:
            SlotError: the hold has ended: committed, aborted, or reclaimed.
        """
        words[layout.HOLD_ARGUMENT] = required_reads
        code = self._commit(words)
        if code:
            code = self._waited(code, None, self._sleeping.commit, words, required_reads)
            if code:
                raise SlotError(
                    "this write lease no longer holds its slot; nothing was committed",
                    slot=words[layout.HOLD_SLOT],
                    generation=words[layout.HOLD_GENERATION],
                    state=state_of(words[layout.HOLD_STATE]).name,
                )

    def abort(self, words: Words, reason: Counter | int = Counter.ABORTED, wait_s: float | None = None) -> bool:
        """WRITING → FREE: a write ends without a payload; False, and nothing changes, unless this hold had the slot."""
        code = self._brief.abort(self.address, words, reason, 0)
        if code:
            code = self._waited(code, wait_s, self._sleeping.abort, words, reason)
        return code == _DONE

    def discard(self, slot: int, generation: int) -> bool:
        """READY → FREE, if the slot holds that generation, unread."""
        code = self._brief.discard(self.address, slot, generation, 0)
        if code:
            code = self._waited(code, None, self._sleeping.discard, slot, generation)
        return code == _DONE

    def discard_until(self, sequence: int) -> int:
        """Discard the unread payloads of the writes up to `sequence`; how many of these are being read or written."""
        left = ctypes.c_uint64()
        self._waited(_LOCKED, None, self._sleeping.discard_until, sequence, ctypes.addressof(left))
        return left.value

    def acquire(self, words: Words, wait_s: float | None = None) -> None:
        """READY → READING, or one attempt more within READING; gives nbytes and checksum.

        Raises:
            StaleSlotError: another generation, no payload, or one that all its readers, or this one, have had.
            BusyError: the slot carries as many attempts as it can, or other readers' attempts are in flight for all
                the reads that the payload asks for.
        """
        code = self._acquire(words)
        if code:
            if code == _LOCKED:
                self._waited(code, wait_s, self._sleeping.acquire, words, 1)
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
            code = self._waited(code, wait_s, self._sleeping.finalise, words, 1, reason)
        return code == _DONE

    def take(self, holds: Sequence[Words], asked: Words, wait_s: float | None = None) -> None:
        """READY → READING of payloads that the holds' reader has neither had nor holds; `TAKE_NUMBER` of them are.

        Args:
            holds: as many as `TAKE_ROOM` says; those that are given a payload are the first.
            asked: `layout` names its words. Where `TAKE_NEXT` is not 0 then, the same call goes on from there.
            wait_s: how long to wait for the lock.
        """
        pointers = (ctypes.c_void_p * len(holds))(*map(ctypes.addressof, holds))
        code = self._brief.take(self.address, pointers, asked, 0)
        if code:
            self._waited(code, wait_s, self._sleeping.take, pointers, asked)

    def count(self, counter: Counter) -> None:
        """Add one to a counter."""
        code = self._brief.count(self.address, counter, 0)
        if code:
            self._waited(code, None, self._sleeping.count, counter)

    def holds(self) -> Iterator[SeenHold]:
        """The writes and read attempts in the segment, read in several critical sections."""
        first, number = ctypes.c_uint64(0), ctypes.c_uint64(0)
        room = max(_HOLDS_A_CALL, self._struct.entries)
        seen = (HoldWords * room)()
        while first.value < self._struct.slots:
            self._waited(
                _LOCKED,
                None,
                self._sleeping.holds,
                ctypes.addressof(first),
                seen,
                room,
                ctypes.addressof(number),
            )
            for index in range(number.value):
                words = HoldWords(*seen[index])
                yield SeenHold(Owner(words[layout.HOLD_PID], words[layout.HOLD_START]), words[layout.HOLD_LEASE], words)

    def ready(self) -> list[ReadyPayload]:
        """The payloads that wait to be read, the oldest first, all of one moment."""
        room = self._struct.slots
        seen, number = (HoldWords * room)(), ctypes.c_uint64(0)
        self._waited(_LOCKED, None, self._sleeping.ready, seen, room, ctypes.addressof(number))
        return [
            ReadyPayload(
                words[layout.HOLD_SLOT],
                words[layout.HOLD_GENERATION],
                words[layout.HOLD_NBYTES],
                words[layout.HOLD_CHECKSUM] if words[layout.HOLD_HAS_CHECKSUM] else None,
            )
            for words in seen[: number.value]
        ]

    def snapshot(self) -> tuple[list[int], list[int]]:
        """The counters (`Counter`) and the number of slots in each state, of one moment."""
        out = (ctypes.c_uint64 * (len(Counter) + len(SlotState)))()
        self._waited(_LOCKED, None, self._sleeping.snapshot, out)
        values = list(out)
        return values[: len(Counter)], values[len(Counter) :]

    def publish(self, address: bytes) -> None:
        """Store the server's address, a bank of `ADDRESS_BANK_WORDS` words."""
        bank = (ctypes.c_uint64 * layout.ADDRESS_BANK_WORDS).from_buffer_copy(address)
        self._waited(_LOCKED, None, self._sleeping.publish, bank)

    def wait_for_free(self, seen: int, wait_s: float) -> None:
        """Sleep until a slot is FREE since `reserve` found none and left `seen` in `HOLD_STATE`, or for `wait_s`."""
        self._sleeping.wait(self.address, seen, int(wait_s * 1e9))

    def wait_for_ready(self, seen: int, wait_s: float) -> None:
        """Sleep until a slot is READY since `take` left `seen` in `TAKE_SEEN`, or for `wait_s`."""
        self._sleeping.wait_ready(self.address, seen, int(wait_s * 1e9))

    @property
    def holder_thread_id(self) -> int:
        """Kernel id of the thread that holds the lock now, 0 when none does."""
        return self._segment.words[layout.MUTEX_BYTE // 8] & _THREAD_ID_MASK

    def _waited(self, code: int, wait_s: float | None, call: Callable[..., int], *arguments: Any) -> int:
        """Repeat a call that found the lock taken (`code` LOCKED), and return its outcome.

        Raises:
            DeadlineExceededError: the lock was not to be had in time: its holder is stopped.
            SlotError: the lock or a list of slots is damaged.
        """
        if code == _LOCKED:
            bound_s = self.lock_wait_s if wait_s is None else min(wait_s, self.lock_wait_s)
            until_s = self._clock() + bound_s
            left_s = bound_s
            while True:
                code = call(self.address, *arguments, max(1, int(left_s * 1e9)))
                if code != _LOCKED:
                    break
                left_s = until_s - self._clock()
                if left_s <= 0:
                    raise DeadlineExceededError(
                        "the ring's lock is held by a thread that does not get on (stopped?)",
                        waited_s=bound_s,
                        holder_thread_id=self.holder_thread_id,
                    )
        if code == _DAMAGED:
            raise SlotError("the lock or a list of slots of the segment is damaged; recreate the ring")
        return code


def _refusal(outcome: Outcome, words: Words) -> TransportError:
    """The error that an outcome of `acquire` is."""
    found = words[layout.HOLD_STATE]
    slot, generation = words[layout.HOLD_SLOT], words[layout.HOLD_GENERATION]
    if outcome is Outcome.OUT_OF_RANGE:
        return SlotError("the ring has no such slot", slot=slot)
    if outcome is Outcome.DAMAGED:
        return SlotError("the lock or the slot's header is damaged; recreate the ring", slot=slot)
    if outcome is Outcome.CROWDED:
        return BusyError(
            "the slot carries as many read attempts as it can", slot=slot, attempts=words[layout.HOLD_ATTEMPTS]
        )
    if outcome is Outcome.TAKEN:
        return BusyError(
            "other readers have attempts in flight for all the reads that this payload asks for; it is theirs unless "
            "one of them gives it back",
            slot=slot,
            generation=generation,
            attempts=words[layout.HOLD_ATTEMPTS],
        )
    why = (
        "the payload was read already, though an attempt is still in flight"
        if outcome is Outcome.HAD
        else "the slot was recycled, or its payload was read, dropped or never written"
    )
    return StaleSlotError(
        f"stale slot: {why}",
        slot=slot,
        generation=generation,
        found_generation=generation_of(found),
        state=state_of(found).name,
    )
