"""The byte map of a segment. Little-endian; all words are unsigned, 64 bits, aligned.

```
byte      words
0         0-63     identity, written once at creation: magic, layout version, sizes, ring id, creator, policy
512       64-127   what changes: write sequence, slot in transition, version of the published address, the lists of
                   slots (FREE; READY and READING by age; READY by age), slots in each state, the counts that writers
                   and takers wait on
1024      128-135  the lock (pthread_mutex_t)
1536      192-255  counters (`COUNTERS`)
2048      256-383  published address: two banks of 64 words, the version's lowest bit says which holds
4096      512-     words of the server (SERVER_WORDS)
…                  the schema as msgpack, padded to 64
…                  slot headers: 16 words + 5 words a read entry, padded to 64 bytes, one after another
…4096              slots: [envelope | headroom 64 | payload, padded to 64 | tailroom 64], one after another
```

Headroom, payload and tailroom are the message that a server sends: the header of `wire.frames` lies in the headroom,
zeros and the trailer behind the payload. A commit writes them, once. The envelope is msgpack.

A slot header:
```
word 0    state word (see `states`)                word 5     reads that free the payload
word 1    bytes of the payload                     word 6     writer: lease id, 0 when there is none
word 2    write sequence                           word 7, 8  writer: pid, start time
word 3    checksum                                 word 16-   read entries of 5 words: lease id << 1 | consumed
word 4    1 when the checksum counts                          (0: empty), pid, start, reader, since
word 9    the slot before it in its list, + 1        word 10    the slot behind it in its list, + 1; 0: none
word 11   bytes of the envelope                     word 12    time of the commit: ns since 1970
word 13   the READY slot before it, + 1             word 14    the READY slot behind it, + 1; 0: none
```

A read entry is a read attempt in flight, or, once consumed, the record that its reader has had the payload. Consuming
is one store: it turns the one into the other. Its last word is when it began, ns of CLOCK_MONOTONIC, which all
processes of one boot share and no one sets.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from typing import Final

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.units import MAX_PORTS

MAGIC: Final = int.from_bytes(b"UCXXRING", "little")
LAYOUT_VERSION: Final = 4
WORD_BYTES: Final = 8
PAGE_BYTES: Final = 4096
HEADER_WORDS: Final = 512
HEADROOM_BYTES: Final = 64
TAILROOM_BYTES: Final = 64
TRAILER_BYTES: Final = 16
PORT_WORDS: Final = 32
# Of the server's words, after those of its ports: 1 while the source waits for its epoch: reads are answered NOT_READY.
AWAITED: Final = MAX_PORTS * PORT_WORDS
SERVER_WORDS: Final = AWAITED + 64
MAX_SLOTS: Final = 65536
MAX_READERS: Final = 64
MAX_SCHEMA_BYTES: Final = 4 << 20
MAX_SLOT_BYTES: Final = 1 << 48
MAX_ENVELOPE_BYTES: Final = 1024

# Words of the identity. COMPLETE is 1 once everything else of it is written: the last store of a creation.
MAGIC_WORD, VERSION_WORD, TOTAL_BYTES_WORD, COMPLETE_WORD, RING_ID_WORD = range(5)
SLOTS_WORD, SLOT_BYTES_WORD, READERS_WORD, SCHEMA_BYTES_WORD, FINGERPRINT_WORD, POLICY_WORD = range(6, 12)
CHECKSUM_WORD, BLOCK_TIMEOUT_NS_WORD, LOCK_TIMEOUT_NS_WORD, ENVELOPE_BYTES_WORD = range(12, 16)
CREATOR_PID_WORD, CREATOR_START_WORD, BOOT_ID_WORD = range(16, 19)
PID_NAMESPACE_WORD: Final = 20

# Words that change, under the lock. IN_TRANSITION is 1 + the slot whose header is being changed, 0 between changes:
# where the next holder of the lock repairs. The lists of slots, each 1 + its number: FREE in the order in which they
# became so (writes take the first), HELD, which are READY or READING, and READY, both in the order of their writes.
# STATE_COUNT is of slots in each of the four states. FREED and READIED count slots that became FREE or READY, modulo
# 2**32 in their low halves, which blocked writes and takers wait on (futex); SLEEPERS and TAKERS are not 0 while one
# may be asleep there.
SEQUENCE_WORD: Final = 64
IN_TRANSITION_WORD, ADDRESS_VERSION_WORD, FREE_FIRST_WORD, FREE_LAST_WORD = range(66, 70)
HELD_FIRST_WORD, HELD_LAST_WORD, STATE_COUNT_WORD = range(70, 73)
FREED_WORD, SLEEPERS_WORD, READY_FIRST_WORD, READY_LAST_WORD, READIED_WORD, TAKERS_WORD = range(76, 82)

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
ENTRY_LEASE, ENTRY_PID, ENTRY_START, ENTRY_READER, ENTRY_SINCE, ENTRY_WORDS = range(6)

# Words of a hold: what a caller and a transition say to each other of one write or read attempt. RING is where the
# caller's `struct ring` is, WAIT_NS how long the lock is waited for, and ARGUMENT the one argument of a transition.
# STATE is the slot's state word as the transition found it, ATTEMPTS how many were in flight; ENVELOPE_BYTES what a
# write's envelope takes, also when that is more than there is room for.
HOLD_SLOT, HOLD_GENERATION, HOLD_LEASE, HOLD_PID, HOLD_START, HOLD_READER, HOLD_RING, HOLD_ARGUMENT = range(8)
HOLD_NBYTES, HOLD_CHECKSUM, HOLD_HAS_CHECKSUM, HOLD_STATE, HOLD_WAIT_NS, HOLD_ATTEMPTS = range(8, 14)
HOLD_ENVELOPE_BYTES, HOLD_COMMIT_TIME, HOLD_SEQUENCE, HOLD_WORDS = range(14, 18)

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

RAW_FIELD: Final = "data"  # the one array of a raw ring's payload: its bytes as uint8
POLICIES: Final = ("overwrite", "block", "raise")

# What becomes of a transition. LOCKED: the lock was not to be had in time. DAMAGED: the lock, a list of slots, or the
# slot is unusable. FULL: no slot can be written. STALE: another generation, or no payload. HAD: this reader, or every
# reader that the payload asks for, has had it. CROWDED: the slot carries as many attempts as it can. TAKEN: all reads
# that the payload asks for are taken by other readers' attempts in flight. LATE: the hold had ended, or never was.
OUTCOMES: Final = ("DONE", "LOCKED", "DAMAGED", "FULL", "OUT_OF_RANGE", "STALE", "HAD", "CROWDED", "TAKEN", "LATE")
DONE, LOCKED, DAMAGED, FULL, OUT_OF_RANGE, STALE, HAD, CROWDED, TAKEN, LATE = range(len(OUTCOMES))


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """Counts since the ring was made, of all its processes. They live in the segment, so a process's death loses none.

    Attributes:
        slots: number of slots.
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
        free: slots that hold nothing; `writing`, `ready`, `reading`: that are being written, have a payload to read,
            are being read.
    """

    slots: int
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
    free: int
    writing: int
    ready: int
    reading: int


COUNTERS: Final = RingStatistics.__slots__[1:-4]  # in the order of their words
ABORTED: Final = COUNTERS.index("aborted")
CONSUMED: Final = COUNTERS.index("consumed")
RELEASED: Final = COUNTERS.index("released")
RECLAIMED_WRITES: Final = COUNTERS.index("reclaimed_writes")
RECLAIMED_READS: Final = COUNTERS.index("reclaimed_reads")


def round_up(value: int, multiple: int) -> int:
    """The next multiple from `value` on."""
    return (value + multiple - 1) // multiple * multiple


@dataclass(frozen=True, slots=True)
class Identity:
    """What a segment says of itself, and so where everything lies in it. Nothing of it changes after creation.

    The fields are its words behind the first four, in their order.

    Attributes:
        ring_id: 16 random bytes, new for every created segment.
        schema_bytes: size of the schema's msgpack form, 0 for a raw ring, whose `fingerprint` is 0 too.
        envelope_bytes: the largest envelope of a payload, a multiple of 64; 0 for none.
        creator_start: the creator's start time in clock ticks since boot; pids count in one `boot_id` (16 bytes) and
            one `pid_namespace` (its inode).
    """

    ring_id: bytes
    slots: int
    slot_bytes: int
    readers: int
    schema_bytes: int
    fingerprint: int
    on_full: str
    checksum: bool
    block_timeout_ns: int
    lock_timeout_ns: int
    envelope_bytes: int
    creator_pid: int
    creator_start: int
    boot_id: bytes
    pid_namespace: int

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
    def header_bytes(self) -> int:
        """Bytes in front of the slots' memory."""
        return round_up((self.first_slot_word + self.slots * self.slot_words) * WORD_BYTES, PAGE_BYTES)

    @property
    def stride_bytes(self) -> int:
        """Bytes from one slot's memory to the next's."""
        return self.envelope_bytes + HEADROOM_BYTES + round_up(self.slot_bytes, 64) + TAILROOM_BYTES

    @property
    def first_payload_byte(self) -> int:
        """First byte of slot 0's payload; 64 bytes of headroom lie in front of it, and the envelope before these."""
        return self.header_bytes + self.envelope_bytes + HEADROOM_BYTES

    @property
    def total_bytes(self) -> int:
        """Size of the segment."""
        return round_up(self.header_bytes + self.slots * self.stride_bytes, PAGE_BYTES)

    def to_bytes(self) -> bytes:
        """The identity as it lies in the segment, still marked incomplete."""
        values = asdict(self) | {"on_full": POLICIES.index(self.on_full)}
        return _IDENTITY.pack(MAGIC, LAYOUT_VERSION, self.total_bytes, 0, *values.values())

    @classmethod
    def from_bytes(cls, raw: bytes, segment_bytes: int) -> Identity:
        """Read an identity that anyone may have written, of a segment of that size; a ProtocolError: it is none."""
        magic, version, declared, _, *values = _IDENTITY.unpack(raw)
        if magic != MAGIC:
            found = raw[:WORD_BYTES]
            raise ProtocolError(f"not a ring: it begins with {found!r}", field="magic", found=found.hex())
        if version != LAYOUT_VERSION:
            remedy = "run the same release of ucxx_transport on both sides"
            text = f"a ring of layout version {version}; this program reads version {LAYOUT_VERSION}: {remedy}"
            raise ProtocolError(text, field="layout_version", found=version, expected=LAYOUT_VERSION)
        stated = dict(zip(cls.__slots__, values, strict=True))
        if stated["on_full"] >= len(POLICIES):
            raise ProtocolError("a ring of an unknown policy", field="on_full", found=stated["on_full"])
        try:
            identity = cls(**stated | {"on_full": POLICIES[stated["on_full"]], "checksum": bool(stated["checksum"])})
        except ConfigError as exc:
            raise ProtocolError(f"a damaged ring: {exc.message}", **exc.facts) from exc
        if not (computed := identity.total_bytes) == declared == segment_bytes:
            text = "a ring whose sizes contradict each other"
            raise ProtocolError(
                text, field="total_bytes", segment_bytes=segment_bytes, declared_bytes=declared, computed_bytes=computed
            )
        return identity


_IDENTITY: Final = struct.Struct("<4Q16s12Q16sQ")
IDENTITY_BYTES: Final = _IDENTITY.size
