"""ReadableRing: read attempts are entered, by name or in the order of the writes, and each ends once.

What a take gives a reader where one read frees a payload: the READY ones, in that order, each given to one taker. Where
several readers share a ring (`readers` > 1): those too that others are reading, but none that it has had or holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from operator import itemgetter
from time import monotonic
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
import xxhash

from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ChecksumError, ConfigError, ProtocolError, SlotError, StaleSlotError, TransportError
from ucxx_transport.ring import layout
from ucxx_transport.ring.handle import RingHandle
from ucxx_transport.ring.layout import RELEASED
from ucxx_transport.ring.leases import ReadLease, settle, unsettled
from ucxx_transport.ring.states import SlotState
from ucxx_transport.ring.transitions import LOOK_EVERY_S, TakeWords, Transitions, Words
from ucxx_transport.schema.episode_record import Referring, slot_ref_of
from ucxx_transport.schema.slot_ref import SlotRef, renumbered
from ucxx_transport.schema.wire_form import record_and_meta

_MAX_READER: Final = (1 << 63) - 1
_READY: Final = layout.STATE_COUNT_WORD + SlotState.READY
_READING: Final = layout.STATE_COUNT_WORD + SlotState.READING
_U32: Final = (1 << 32) - 1
_NO_LIMIT: Final = (1 << 64) - 1
_REMEMBERED_READERS: Final = 1024
# Where a reader's last take ended: TAKE_SLOT, TAKE_SEQUENCE, TAKE_RETURNS, and, where nothing was left, TAKE_SEEN.
_NOWHERE: Final[tuple[int, int, int, int | None]] = (0, 0, 0, None)


def verify_checksum(content: npt.NDArray[np.uint8], ref: SlotRef) -> None:
    """Compare a payload with the checksum that its reference may carry; a ChecksumError where they differ."""
    if ref.checksum is not None and (found := xxhash.xxh3_64_intdigest(content.data)) != ref.checksum:
        text = "the payload's bytes are not those that were written"
        raise ChecksumError(
            text, slot=ref.slot, generation=ref.generation, expected=f"{ref.checksum:#018x}", found=f"{found:#018x}"
        )


class ReadableRing(RingHandle):
    """The reading half of `SharedRingBuffer`."""

    def __init__(self, transitions: Transitions) -> None:
        super().__init__(transitions)
        self._places: dict[int, tuple[int, int, int, int | None]] = {}
        self.again: list[ReadLease] = []  # that have ended, and that no caller has

    def acquire(self, ref: Referring, *, reader: int = 0, deadline_s: float | str | None = None) -> ReadLease:
        """Begin to read a payload in place. Leave the lease by `mark_consumed`, or it is released.

        Args:
            ref: the payload's name, or its record, as for a client.
            reader: who reads, where several do (`readers` > 1): a reader's second read does not count. 0: unnamed; each
                of its reads counts.
            deadline_s: how long to wait for the ring's lock; None: as configured.

        Raises:
            StaleSlotError: the payload is not in the ring any more, or never was.
            SlotError: the ring has no such slot.
            BusyError: the slot carries as many read attempts as it can.
            ProtocolError: the reference was damaged on its way: its payload has another length or schema.
        """
        if type(ref) is not SlotRef:
            ref = slot_ref_of(ref)
        if ref.ring_id != self.ring_id:
            self._require_open()
            self.transitions.count("stale")
            text = "stale slot: the reference names another ring, or an earlier one of that name"
            asked, found = ref.ring_id.hex(), self.ring_id.hex()
            raise StaleSlotError(text, slot=ref.slot, generation=ref.generation, ring_id=asked, found_ring_id=found)
        if deadline_s is not None:
            deadline_s = checked_seconds(deadline_s, "deadline_s")
        lease = self.acquire_slot(ref.slot, ref.generation, reader=reader, deadline_s=deadline_s)
        if ref.fingerprint != self.fingerprint or ref.nbytes != lease.words[layout.HOLD_NBYTES]:
            self.refuse(lease, ref)
        return lease

    def refuse(self, lease: ReadLease, ref: SlotRef) -> NoReturn:
        """Release a payload of another length or schema than its reference says: a ProtocolError."""
        lease.release_reading()
        raise ProtocolError(
            "the payload is not what its reference promised",
            promised_bytes=ref.nbytes,
            nbytes=lease.nbytes,
            promised_fingerprint=ref.fingerprint,
            fingerprint=self.fingerprint,
        )

    def acquire_slot(
        self,
        slot: int,
        generation: int,
        *,
        reader: int = 0,
        deadline_s: float | None = None,
        again: list[ReadLease] | None = None,
    ) -> ReadLease:
        """`acquire` for a port and a client: the ring's id has been checked, of the numbers that they have 64 bits.

        `again` has leases that have ended, and that no caller has, to be used again.
        """
        if self.closed or unsettled or not 0 <= reader <= _MAX_READER:
            self._prepare(reader)
        try:
            lease = again.pop() if again else None
        except IndexError:  # another thread was faster
            lease = None
        if lease is None:
            lease = ReadLease(self.transitions, slot, generation, reader, RELEASED)
        else:
            lease.begin(slot, generation, reader)
        try:
            self.transitions.acquire(lease.words, deadline_s)
        except TransportError:
            lease.forget()
            raise
        return lease

    def take(
        self,
        max_payloads: int,
        *,
        max_bytes: int | None = None,
        newest: bool = False,
        reader: int = 0,
        deadline_s: float | str | None = None,
    ) -> list[ReadLease]:
        """Begin to read what is there, without references. No two takers get the same payload for the same read.

        Args:
            max_payloads: how many at most.
            max_bytes: of them all; the first that exceeds what is left of it ends the list. None: without a limit.
            newest: the newest first; else the oldest.
            reader: as for `acquire`; it is given none that it has had or holds.
            deadline_s: how long to wait for the ring's lock; None: as configured.

        Returns:
            A lease for each payload, in order; [] when there is none for this reader (see `wait_for_ready`). Each has
            the payload's `record`; `reference` gives its name.

        Raises:
            ConfigError: the very first payload is larger than `max_bytes`; `facts["nbytes"]` says how large. Or one of
                the numbers is out of its range.
        """
        if max_payloads < 1:
            raise ConfigError("take at least one payload", field="max_payloads", value=max_payloads)
        if max_bytes is not None and max_bytes < 0:
            raise ConfigError("max_bytes is 0 or more, or None", field="max_bytes", value=max_bytes)
        if deadline_s is not None:
            deadline_s = checked_seconds(deadline_s, "deadline_s")
        self._prepare(reader)
        words = self._words
        there = words[_READY] + (words[_READING] if self.readers > 1 else 0)
        room = max(1, min(max_payloads, there))
        limit = _NO_LIMIT if max_bytes is None else min(max_bytes, _NO_LIMIT)
        asked = TakeWords(room, limit, newest, *self._places.get(reader, _NOWHERE)[:3])
        # registered before their attempts begin, as every hold is
        leases = [ReadLease(self.transitions, 0, 0, reader, RELEASED) for _ in range(room)]
        holds = (ctypes.c_void_p * room)(*[ctypes.addressof(lease.words) for lease in leases])
        try:
            self._walk(holds, asked, deadline_s)
        except TransportError:
            if not asked[layout.TAKE_NUMBER]:
                raise
        finally:
            number = asked[layout.TAKE_NUMBER]
            for lease in leases[number:]:
                lease.forget()
        large = asked[layout.TAKE_LARGE]
        seen = asked[layout.TAKE_SEEN] if number < room and not (large or asked[layout.TAKE_NEXT]) else None
        self._places[reader] = (asked[layout.TAKE_SLOT], asked[layout.TAKE_SEQUENCE], asked[layout.TAKE_RETURNS], seen)
        if len(self._places) > _REMEMBERED_READERS:
            self._places.pop(next(iter(self._places)), None)
        if large and not number:
            text = f"the next payload has {large - 1} bytes, which is more than max_bytes = {max_bytes}"
            raise ConfigError(text, field="max_bytes", nbytes=large - 1, max_bytes=max_bytes)
        return leases[:number]

    def _walk(self, holds: ctypes.Array[ctypes.c_void_p], asked: Words, limit_s: float | None) -> None:
        """Enter the attempts of a take, in as many critical sections as it needs."""
        walked, began_s, left_s = 0, monotonic(), limit_s
        # A place that is gone when the walk goes on costs it its beginning again: not without end.
        while walked <= 2 * self.slots:
            self.transitions.call("take", holds, asked, wait_s=left_s)
            if not asked[layout.TAKE_NEXT]:
                break
            walked += asked[layout.TAKE_STEPS]
            left_s = None if limit_s is None else max(0.0, began_s + limit_s - monotonic())

    def wait_for_ready(self, wait_s: float | str, *, reader: int = 0) -> bool:
        """Wait until something has become READY since `take` left nothing for this reader, through this handle.

        Args:
            wait_s: how long at most. Any other thread runs meanwhile, and Ctrl-C ends it.
            reader: as for `take`.

        Returns:
            Whether something has: `take` again, another taker may be faster. Before the first `take`: whether anything
            is READY.
        """
        self._require_open()
        wait_s = checked_seconds(wait_s, "wait_s")
        words, transitions = self._words, self.transitions
        started = monotonic()
        seen = self._places.get(reader, _NOWHERE)[3]
        if seen is None:
            # looked at first: one that comes in between is waited for no longer
            seen = words[layout.READIED_WORD] & _U32
            if words[_READY]:
                return True
        while words[layout.READIED_WORD] & _U32 == seen:
            left_s = started + wait_s - monotonic()
            if left_s <= 0:
                return False
            transitions.sleep(seen, left_s, for_ready=True)
            if left_s > LOOK_EVERY_S and words[_READING] and words[layout.READIED_WORD] & _U32 == seen:
                self._reclaim()  # also of a handle that another thread has closed meanwhile
        return True

    def reference(self, lease: ReadLease) -> SlotRef:
        """The reference of a payload that was taken, with the `meta` that its writer gave it, if its envelope has it.

        Raises:
            SlotError: the lease has ended, or is of another ring.
            ProtocolError: the payload's envelope is malformed.
        """
        self._require_open()
        if lease.transitions.identity.ring_id != self.ring_id:
            raise SlotError("this lease is of another ring", slot=lease.slot, name=self.name)
        return self._named(lease.words, record_and_meta(lease.envelope)[1])

    def read(self, ref: Referring, *, reader: int = 0) -> dict[str, Any]:
        """A copy of a payload's arrays, nested as the schema says (`{"data": uint8}` of a raw ring); consumes it.

        Raises:
            ChecksumError: the ring takes checksums and this one does not match; the payload is released, not consumed.
            StaleSlotError: as for `acquire`, like the others there.
        """
        with self.acquire(ref, reader=reader) as lease:
            copy = np.array(lease)
            if lease.checksum is not None:
                verify_checksum(copy, self._named(lease.words))
            arrays = {layout.RAW_FIELD: copy} if self.schema is None else self.schema.views(copy.data, writable=True)
            lease.mark_consumed()
        return arrays

    def ready_refs(self) -> list[SlotRef]:
        """References of the payloads that wait to be read, oldest first; without `meta` (see `take`, `reference`)."""
        self._require_open()
        ready = sorted(self.transitions.holds(SlotState.READY), key=itemgetter(layout.HOLD_SEQUENCE))
        return [self._named(words) for words in ready]

    def discard(self, ref: Referring) -> bool:
        """Drop an unread payload; False: it is being read, or not in the ring any more."""
        self._require_open()
        ref = slot_ref_of(ref)
        return ref.ring_id == self.ring_id and not self.transitions.call("discard", ref.slot, ref.generation)

    def discard_until(self, sequence: int) -> int:
        """Drop the unread payloads of all writes up to one, a `write_sequence`: no reference to them is to be read.

        Returns:
            How many payloads of these writes are still being read: call again, until there are none. A write that is
            completed later than `sequence` keeps its payload, whenever it began.

        Raises:
            DeadlineExceededError: the ring's lock was not to be had in time.
        """
        self._require_open()
        in_use = set()
        for words in self.transitions.holds(SlotState.READY, SlotState.READING):
            slot, generation = words[layout.HOLD_SLOT], words[layout.HOLD_GENERATION]
            if words[layout.HOLD_SEQUENCE] <= sequence and self.transitions.call("discard", slot, generation):
                in_use.add(slot)
        return len(in_use)

    def _named(self, words: Words, meta: Mapping[str, object] | None = None) -> SlotRef:
        """The reference of a hold's payload."""
        slot, generation, nbytes = words[layout.HOLD_SLOT], words[layout.HOLD_GENERATION], words[layout.HOLD_NBYTES]
        checksum = words[layout.HOLD_CHECKSUM] if words[layout.HOLD_HAS_CHECKSUM] else None
        return renumbered(self._common(), slot, generation, nbytes, checksum, meta)

    def _prepare(self, reader: int) -> None:
        """Before leases are made: is the handle open, the reader's id one, and nothing dropped left to be ended?"""
        self._require_open()
        if not 0 <= reader <= _MAX_READER:
            raise ConfigError("a reader's id must be 0 (unnamed) to 2**63 - 1", field="reader", value=reader)
        if unsettled:
            settle()
