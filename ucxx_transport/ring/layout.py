"""The byte map of a segment. Little-endian; all words are unsigned, 64 bits, aligned.

```
byte      words
0         0-63     identity, written once at creation: magic, layout version, sizes, ring id, creator, policy
512       64-127   what changes: write sequence, slot in transition, version of the published address, the lists of
                   slots (FREE; READY and READING by age; READY by age), slots in each state, the counts that writers
                   and takers wait on
1024      128-135  the lock (pthread_mutex_t)
1536      192-255  counters (`Counter`)
2048      256-383  published address: two banks of 64 words, the version's lowest bit says which holds
4096      512-     words of the server (SERVER_WORDS)
…                  the schema as msgpack, padded to 64
…                  slot headers: 16 words + 4 words a read entry, padded to 64 bytes, one after another
…4096              slots: [envelope | headroom 64 | payload, padded to 64 | tailroom 64], one after another
```

Headroom, payload and tailroom are the message that a server sends: the header of `wire.frames` lies in the headroom,
zeros and the trailer behind the payload. A commit writes them, once. The envelope is msgpack.

A slot header:
```
word 0    state word (see `states`)                word 5     reads that free the payload
word 1    bytes of the payload                     word 6     writer: lease id, 0 when there is none
word 2    write sequence                           word 7, 8  writer: pid, start time
word 3    checksum                                 word 16-   read entries of 4 words:
word 4    1 when the checksum counts                          lease id << 1 | consumed (0: empty), pid, start, reader
word 9    the slot before it in its list, + 1        word 10    the slot behind it in its list, + 1; 0: none
word 11   bytes of the envelope                     word 12    time of the commit: ns since 1970
word 13   the READY slot before it, + 1             word 14    the READY slot behind it, + 1; 0: none
```

A read entry is a read attempt in flight, or, once consumed, the record that its reader has had the payload. Consuming
is one store: it turns the one into the other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from ucxx_transport.errors import ConfigError, ProtocolError

MAGIC: Final = int.from_bytes(b"UCXXRING", "little")
LAYOUT_VERSION: Final = 3
WORD_BYTES: Final = 8
PAGE_BYTES: Final = 4096
HEADER_WORDS: Final = 512
HEADROOM_BYTES: Final = 64
TAILROOM_BYTES: Final = 64
TRAILER_BYTES: Final = 16
SERVER_WORDS: Final = 64 * 32 + 64
MAX_SLOTS: Final = 65536
MAX_READERS: Final = 64
MAX_SCHEMA_BYTES: Final = 4 << 20
MAX_SLOT_BYTES: Final = 1 << 48
MAX_ENVELOPE_BYTES: Final = 1024

# Words of the identity.
MAGIC_WORD: Final = 0
VERSION_WORD: Final = 1
TOTAL_BYTES_WORD: Final = 2
COMPLETE_WORD: Final = 3
"""1 once everything else of the identity is written: the last store of a creation."""
RING_ID_WORD: Final = 4
SLOTS_WORD: Final = 6
SLOT_BYTES_WORD: Final = 7
READERS_WORD: Final = 8
SCHEMA_BYTES_WORD: Final = 9
FINGERPRINT_WORD: Final = 10
POLICY_WORD: Final = 11
CHECKSUM_WORD: Final = 12
BLOCK_TIMEOUT_NS_WORD: Final = 13
LOCK_TIMEOUT_NS_WORD: Final = 14
ENVELOPE_BYTES_WORD: Final = 15
CREATOR_PID_WORD: Final = 16
CREATOR_START_WORD: Final = 17
BOOT_ID_WORD: Final = 18
PID_NAMESPACE_WORD: Final = 20
IDENTITY_WORDS: Final = 21

# Words that change, under the lock.
SEQUENCE_WORD: Final = 64
IN_TRANSITION_WORD: Final = 66
"""1 + the slot whose header is being changed, 0 between changes: where the next holder of the lock repairs."""
ADDRESS_VERSION_WORD: Final = 67
FREE_FIRST_WORD: Final = 68
FREE_LAST_WORD: Final = 69
"""The FREE slots in the order in which they became so, each 1 + its number; writes take the first."""
HELD_FIRST_WORD: Final = 70
HELD_LAST_WORD: Final = 71
"""The READY and READING slots in the order of their writes."""
STATE_COUNT_WORD: Final = 72
"""Slots in each of the four states."""
FREED_WORD: Final = 76
"""Slots that became FREE, modulo 2**32 in its low half, which a blocked write waits on (futex)."""
SLEEPERS_WORD: Final = 77
"""Not 0 while a write may be asleep on `FREED_WORD`."""
READY_FIRST_WORD: Final = 78
READY_LAST_WORD: Final = 79
"""The READY slots in the order of their writes."""
READIED_WORD: Final = 80
"""Slots that became READY, modulo 2**32 in its low half, which takers wait on (futex)."""
TAKERS_WORD: Final = 81
"""Not 0 while a taker may be asleep on `READIED_WORD`."""

MUTEX_BYTE: Final = 1024
MUTEX_BYTES: Final = 64
COUNTER_WORD: Final = 192
ADDRESS_WORD: Final = 256
ADDRESS_BANK_WORDS: Final = 64
SERVER_WORD: Final = HEADER_WORDS
SCHEMA_BYTE: Final = (HEADER_WORDS + SERVER_WORDS) * WORD_BYTES

# Words of a slot header, as in the table above.
STATE, NBYTES, SEQUENCE, CHECKSUM, HAS_CHECKSUM, REQUIRED_READS, WRITER, WRITER_PID, WRITER_START = range(9)
PREVIOUS, NEXT, ENVELOPE_BYTES, COMMIT_TIME, READY_PREVIOUS, READY_NEXT = range(9, 15)
FIRST_ENTRY: Final = 16

# Words of a read entry.
ENTRY_LEASE, ENTRY_PID, ENTRY_START, ENTRY_READER, ENTRY_WORDS = range(5)

# Words of a hold: what a caller and a transition say to each other of one write or read attempt. RING is where the
# caller's `struct ring` is, for the calls that take nothing but a hold, and ARGUMENT the one argument of such a call.
# STATE is the slot's state word as the transition found it, ATTEMPTS how many were in flight; ENVELOPE_BYTES what a
# write's envelope takes, also when that is more than there is room for.
HOLD_SLOT, HOLD_GENERATION, HOLD_LEASE, HOLD_PID, HOLD_START, HOLD_READER, HOLD_RING, HOLD_ARGUMENT = range(8)
HOLD_NBYTES, HOLD_CHECKSUM, HOLD_HAS_CHECKSUM, HOLD_STATE, HOLD_OUTCOME, HOLD_ATTEMPTS = range(8, 14)
HOLD_ENVELOPE_BYTES, HOLD_COMMIT_TIME, HOLD_WORDS = range(14, 17)

# Words of a take. Asked for: payloads and bytes at most, which shrink as they are given, and 1 for the newest first.
TAKE_ROOM, TAKE_BYTES, TAKE_NEWEST = range(3)
# Its reader's place, from take to take: nothing is left for it up to 1 + the slot SLOT, with the payload of the write
# SEQUENCE, unless more attempts than RETURNS have ended unread.
TAKE_SLOT, TAKE_SEQUENCE, TAKE_RETURNS = range(3, 6)
# What came of it: payloads taken, 1 + the size of one that was left for want of bytes (or 0), and `READIED_WORD` as the
# walk began. Where one call does not come to its end, NEXT is 1 + the slot to go on with, else 0; FOLLOWS is 1 while
# the place follows the walk, FIRST where it began; STEPS counts the slots that the last call looked at.
TAKE_NUMBER, TAKE_LARGE, TAKE_SEEN, TAKE_NEXT, TAKE_NEXT_SEQUENCE, TAKE_FOLLOWS = range(6, 12)
TAKE_FIRST, TAKE_FIRST_SEQUENCE, TAKE_STEPS, TAKE_WORDS = range(12, 16)

RAW_FIELD: Final = "data"
"""The one array of a raw ring's payload: its bytes as uint8."""

POLICIES: Final = ("overwrite", "block", "raise")


_TWO_WORDS: Final = struct.Struct("<2Q")


class Counter(IntEnum):
    """Words of the counters, in order; each counts one reason."""

    WRITTEN = 0
    COMMITTED = 1
    COMMITTED_BYTES = 2
    OVERWRITTEN = 3
    ABORTED = 4
    ACQUIRED = 5
    CONSUMED = 6
    RELEASED = 7
    FREED = 8
    DISCARDED = 9
    STALE = 10
    OUT_OF_RANGE = 11
    BUSY = 12
    LATE_FINALISE = 13
    RECLAIMED_WRITES = 14
    RECLAIMED_READS = 15
    FULL = 16
    BLOCKED = 17
    LOCK_RECOVERIES = 18
    REPAIRED_SLOTS = 19
    ENVELOPES_LEFT_OUT = 20


class Outcome(IntEnum):
    """What became of a transition."""

    DONE = 0
    LOCKED = 1
    """The lock was not to be had in time."""
    DAMAGED = 2
    """The lock, or a list of slots, is unusable."""
    FULL = 3
    """No slot can be written."""
    OUT_OF_RANGE = 4
    """The ring has no such slot."""
    STALE = 5
    """Another generation, or no payload."""
    HAD = 6
    """This reader, or every reader that the payload asks for, has had it."""
    CROWDED = 7
    """The slot carries as many attempts as it can."""
    TAKEN = 8
    """All reads that the payload asks for are taken by other readers' attempts in flight."""
    LATE = 9
    """The hold had ended, or never was."""


def message_bytes(nbytes: int) -> int:
    """Size of a payload's message, which begins in its headroom and ends in its tailroom."""
    return HEADROOM_BYTES + round_up(nbytes, 8) + TRAILER_BYTES


def round_up(value: int, multiple: int) -> int:
    """The next multiple from `value` on."""
    return (value + multiple - 1) // multiple * multiple


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where everything lies, from the five numbers that decide it.

    `schema_bytes` is the size of the schema's msgpack form, 0 for a raw ring, `envelope_bytes` the largest envelope of
    a payload, a multiple of 64, 0 for none. `stride_bytes` are from one slot's memory to the next's.
    """

    slots: int
    slot_bytes: int
    readers: int
    schema_bytes: int
    envelope_bytes: int
    header_bytes: int = field(init=False)
    stride_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Check the bounds before anything is sized by them; a ConfigError names the number in `facts["field"]`."""
        for name, value, low, high in (
            ("slots", self.slots, 1, MAX_SLOTS),
            ("slot_bytes", self.slot_bytes, 1, MAX_SLOT_BYTES),
            ("readers", self.readers, 1, MAX_READERS),
            ("schema_bytes", self.schema_bytes, 0, MAX_SCHEMA_BYTES),
            ("envelope_bytes", self.envelope_bytes, 0, MAX_ENVELOPE_BYTES),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, not {value}", field=name, value=value)
        if self.envelope_bytes % 64:
            raise ConfigError("envelope_bytes must be a multiple of 64", field="envelope_bytes")
        # Both are asked for at every read and write, so they are worked out once.
        words = self.first_slot_word + self.slots * self.slot_words
        object.__setattr__(self, "header_bytes", round_up(words * WORD_BYTES, PAGE_BYTES))
        stride_bytes = self.envelope_bytes + HEADROOM_BYTES + round_up(self.slot_bytes, 64) + TAILROOM_BYTES
        object.__setattr__(self, "stride_bytes", stride_bytes)

    @property
    def max_attempts(self) -> int:
        """Read attempts that one slot carries at a time."""
        return max(8, 2 * self.readers + 2)

    @property
    def entries(self) -> int:
        """Read entries of a slot: attempts in flight, and the record of each reader that has had the payload."""
        return self.max_attempts + self.readers

    @property
    def slot_words(self) -> int:
        """Words from one slot header to the next."""
        return round_up(FIRST_ENTRY + ENTRY_WORDS * self.entries, 8)

    @property
    def first_slot_word(self) -> int:
        """Word of slot 0's header."""
        return round_up(SCHEMA_BYTE + self.schema_bytes, 64) // WORD_BYTES

    @property
    def total_bytes(self) -> int:
        """Size of the segment."""
        return round_up(self.header_bytes + self.slots * self.stride_bytes, PAGE_BYTES)

    def payload_byte(self, slot: int) -> int:
        """First byte of a slot's payload; 64 bytes of headroom lie in front of it, and the envelope before these."""
        return self.header_bytes + slot * self.stride_bytes + self.envelope_bytes + HEADROOM_BYTES


@dataclass(frozen=True, slots=True)
class Identity:
    """What a segment says of itself. Nothing of it changes after creation.

    `ring_id` is 16 random bytes, new for every created segment, `fingerprint` the schema's, 0 for a raw ring, and
    `creator_start` the creator's start time in clock ticks since boot. Pids count in one `boot_id` (16 bytes) and one
    `pid_namespace` (its inode).
    """

    geometry: Geometry
    ring_id: bytes
    fingerprint: int
    on_full: str
    checksum: bool
    block_timeout_ns: int
    lock_timeout_ns: int
    creator_pid: int
    creator_start: int
    boot_id: bytes
    pid_namespace: int

    def to_words(self) -> list[int]:
        """The identity's words in order, still marked incomplete."""
        geometry = self.geometry
        return [
            *(MAGIC, LAYOUT_VERSION, geometry.total_bytes, 0),
            *_TWO_WORDS.unpack(self.ring_id),
            *(geometry.slots, geometry.slot_bytes, geometry.readers, geometry.schema_bytes, self.fingerprint),
            *(POLICIES.index(self.on_full), int(self.checksum), self.block_timeout_ns, self.lock_timeout_ns),
            geometry.envelope_bytes,
            *(self.creator_pid, self.creator_start, *_TWO_WORDS.unpack(self.boot_id), self.pid_namespace),
        ]

    @classmethod
    def from_words(cls, words: Sequence[int], segment_bytes: int) -> Identity:
        """Read an identity that anyone may have written.

        Args:
            words: the first `IDENTITY_WORDS` words of the segment.
            segment_bytes: how large the segment really is.

        Raises:
            ProtocolError: not a ring, another layout version, or sizes that contradict each other; says what was found.
        """
        magic, version, total_bytes, _, *ring_id = words[:SLOTS_WORD]
        slots, slot_bytes, readers, schema_bytes, fingerprint, policy, checksum, block_ns, lock_ns, envelope_bytes = (
            words[SLOTS_WORD:CREATOR_PID_WORD]
        )
        pid, start, boot_low, boot_high, namespace = words[CREATOR_PID_WORD:IDENTITY_WORDS]
        if magic != MAGIC:
            found = magic.to_bytes(WORD_BYTES, "little")
            raise ProtocolError(f"not a ring: it begins with {found!r}", field="magic", found=found.hex())
        if version != LAYOUT_VERSION:
            expected = LAYOUT_VERSION
            raise ProtocolError(
                f"a ring of layout version {version}; this program reads version {expected}: run the same release of "
                "ucxx_transport on both sides",
                field="layout_version",
                found=version,
                expected=expected,
            )
        try:
            geometry = Geometry(slots, slot_bytes, readers, schema_bytes, envelope_bytes)
        except ConfigError as exc:
            raise ProtocolError(f"a damaged ring: {exc.message}", **exc.facts) from exc
        if not geometry.total_bytes == total_bytes == segment_bytes:
            raise ProtocolError(
                "a ring whose sizes contradict each other",
                field="total_bytes",
                segment_bytes=segment_bytes,
                declared_bytes=total_bytes,
                computed_bytes=geometry.total_bytes,
            )
        if policy >= len(POLICIES):
            raise ProtocolError("a ring of an unknown policy", field="on_full", found=policy)
        return cls(
            geometry,
            _TWO_WORDS.pack(*ring_id),
            fingerprint,
            POLICIES[policy],
            bool(checksum),
            *(block_ns, lock_ns, pid, start),
            _TWO_WORDS.pack(boot_low, boot_high),
            namespace,
        )
