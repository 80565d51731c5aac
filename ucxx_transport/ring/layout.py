"""The byte map of a segment. Little-endian; all words are unsigned, 64 bits, aligned.

```
byte      words
0         0-63     identity, written once at creation: magic, layout version, sizes, ring id, creator, policy
512       64-127   what changes: write sequence, cursor, slot in transition, version of the published address
1024      128-135  the lock (pthread_mutex_t)
1536      192-255  counters (`Counter`)
2048      256-383  published address: two banks of 64 words, the version's lowest bit says which holds
4096      512-     words of the server (SERVER_WORDS)
…                  the schema as msgpack, padded to 64
…                  slot headers: 16 words + 4 words a read entry, padded to 64 bytes, one after another
…4096              slots: [headroom 64 | payload, padded to 64 | tailroom 64], one after another
```

A slot header:
```
word 0    state word (see `states`)                word 5     reads that free the payload
word 1    bytes of the payload                     word 6     writer: lease id, 0 when there is none
word 2    write sequence                           word 7, 8  writer: pid, start time
word 3    checksum                                 word 16-   read entries of 4 words:
word 4    1 when the checksum counts                          lease id << 1 | consumed (0: empty), pid, start, reader
```

A read entry is a read attempt in flight, or, once consumed, the record that its reader has had the payload. Consuming
is one store: it turns the one into the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Protocol, overload

from ucxx_transport.errors import ConfigError

MAGIC: Final = int.from_bytes(b"UCXXRING", "little")
LAYOUT_VERSION: Final = 1
WORD_BYTES: Final = 8
PAGE_BYTES: Final = 4096
HEADER_WORDS: Final = 512
HEADROOM_BYTES: Final = 64
TAILROOM_BYTES: Final = 64
SERVER_WORDS: Final = 64 * 32 + 64
MAX_SLOTS: Final = 65536
MAX_READERS: Final = 64
MAX_SCHEMA_BYTES: Final = 4 << 20
MAX_SLOT_BYTES: Final = 1 << 48

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
CREATOR_PID_WORD: Final = 16
CREATOR_START_WORD: Final = 17
BOOT_ID_WORD: Final = 18
PID_NAMESPACE_WORD: Final = 20
IDENTITY_WORDS: Final = 21

# Words that change, under the lock.
SEQUENCE_WORD: Final = 64
CURSOR_WORD: Final = 65
IN_TRANSITION_WORD: Final = 66
"""1 + the slot whose header is being changed, 0 between changes. Not 0 on entering: the last holder was cut off."""
ADDRESS_VERSION_WORD: Final = 67

MUTEX_BYTE: Final = 1024
MUTEX_BYTES: Final = 64
COUNTER_WORD: Final = 192
ADDRESS_WORD: Final = 256
ADDRESS_BANK_WORDS: Final = 64
SERVER_WORD: Final = HEADER_WORDS
SCHEMA_BYTE: Final = (HEADER_WORDS + SERVER_WORDS) * WORD_BYTES

# Words of a slot header.
STATE: Final = 0
NBYTES: Final = 1
SEQUENCE: Final = 2
CHECKSUM: Final = 3
HAS_CHECKSUM: Final = 4
REQUIRED_READS: Final = 5
WRITER: Final = 6
WRITER_PID: Final = 7
WRITER_START: Final = 8
FIRST_ENTRY: Final = 16

# Words of a read entry.
ENTRY_WORDS: Final = 4
ENTRY_LEASE: Final = 0
ENTRY_PID: Final = 1
ENTRY_START: Final = 2
ENTRY_READER: Final = 3

POLICIES: Final = ("overwrite", "block", "raise")


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


class Words(Protocol):
    """A segment as unsigned 64-bit words: a `memoryview`, whose store of one aligned word is atomic."""

    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> Iterable[int]: ...
    def __setitem__(self, index: int, word: int, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where everything lies, from the four numbers that decide it.

    Attributes:
        slots: number of slots.
        slot_bytes: largest payload of a slot.
        readers: reads that free a payload, unless a write asks for fewer.
        schema_bytes: size of the schema's msgpack form, 0 for a raw ring.
        header_bytes: bytes before slot 0's memory.
        stride_bytes: bytes from one slot's memory to the next's.
    """

    slots: int
    slot_bytes: int
    readers: int
    schema_bytes: int
    header_bytes: int = field(init=False)
    stride_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Check the bounds before anything is sized by them.

        Raises:
            ConfigError: a number is out of its bounds; `facts["field"]` names it.
        """
        for name, value, low, high in (
            ("slots", self.slots, 1, MAX_SLOTS),
            ("slot_bytes", self.slot_bytes, 1, MAX_SLOT_BYTES),
            ("readers", self.readers, 1, MAX_READERS),
            ("schema_bytes", self.schema_bytes, 0, MAX_SCHEMA_BYTES),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, not {value}", field=name, value=value)
        # Both are asked for at every read and write, so they are worked out once.
        words = self.first_slot_word + self.slots * self.slot_words
        object.__setattr__(self, "header_bytes", _round_up(words * WORD_BYTES, PAGE_BYTES))
        stride_bytes = HEADROOM_BYTES + _round_up(self.slot_bytes, 64) + TAILROOM_BYTES
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
        return _round_up(FIRST_ENTRY + ENTRY_WORDS * self.entries, 8)

    @property
    def first_slot_word(self) -> int:
        """Word of slot 0's header."""
        return _round_up(SCHEMA_BYTE + self.schema_bytes, 64) // WORD_BYTES

    @property
    def total_bytes(self) -> int:
        """Size of the segment."""
        return _round_up(self.header_bytes + self.slots * self.stride_bytes, PAGE_BYTES)

    def payload_byte(self, slot: int) -> int:
        """First byte of a slot's payload; 64 bytes of headroom lie in front of it."""
        return self.header_bytes + slot * self.stride_bytes + HEADROOM_BYTES


RAW_FIELD = "data"
"""The one array of a raw ring's payload: its bytes as uint8."""


def frame_bytes(nbytes: int) -> int:
    """Size of a payload with its headroom and tailroom: 64 + nbytes padded to 8 + 64."""
    return HEADROOM_BYTES + _round_up(nbytes, 8) + TAILROOM_BYTES


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
