"""Identity: what a segment says of itself in its first words, so that attaching needs nothing but the name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.ring.layout import (
    BLOCK_TIMEOUT_NS_WORD,
    BOOT_ID_WORD,
    CHECKSUM_WORD,
    CREATOR_PID_WORD,
    CREATOR_START_WORD,
    FINGERPRINT_WORD,
    LAYOUT_VERSION,
    LOCK_TIMEOUT_NS_WORD,
    MAGIC,
    MAGIC_WORD,
    PID_NAMESPACE_WORD,
    POLICIES,
    POLICY_WORD,
    READERS_WORD,
    RING_ID_WORD,
    SCHEMA_BYTES_WORD,
    SLOT_BYTES_WORD,
    SLOTS_WORD,
    TOTAL_BYTES_WORD,
    VERSION_WORD,
    WORD_BYTES,
    Geometry,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a segment says of itself. Nothing of it changes after creation.

    Attributes:
        geometry: sizes and offsets.
        ring_id: 16 random bytes, new for every created segment.
        fingerprint: the schema's, 0 for a raw ring.
        on_full: "overwrite", "block" or "raise".
        checksum: whether writes take a checksum.
        block_timeout_ns: how long a write waits for a slot under "block".
        lock_timeout_ns: how long the lock is waited for.
        creator_pid: pid of the process that made the segment.
        creator_start: its start time in clock ticks since boot.
        boot_id: 16 bytes that name the boot of the machine.
        pid_namespace: inode of the creator's pid namespace.
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
            *_words_of(self.ring_id),
            *(geometry.slots, geometry.slot_bytes, geometry.readers, geometry.schema_bytes, self.fingerprint),
            *(POLICIES.index(self.on_full), int(self.checksum), self.block_timeout_ns, self.lock_timeout_ns, 0),
            *(self.creator_pid, self.creator_start, *_words_of(self.boot_id), self.pid_namespace),
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
        if words[MAGIC_WORD] != MAGIC:
            found = words[MAGIC_WORD].to_bytes(WORD_BYTES, "little")
            raise ProtocolError(f"not a ring: it begins with {found!r}", field="magic", found=found.hex())
        if words[VERSION_WORD] != LAYOUT_VERSION:
            raise ProtocolError(
                f"a ring of layout version {words[VERSION_WORD]}; this program reads version {LAYOUT_VERSION}: "
                "run the same release of ucxx_transport on both sides",
                field="layout_version",
                found=words[VERSION_WORD],
                expected=LAYOUT_VERSION,
            )
        try:
            geometry = Geometry(
                slots=words[SLOTS_WORD],
                slot_bytes=words[SLOT_BYTES_WORD],
                readers=words[READERS_WORD],
                schema_bytes=words[SCHEMA_BYTES_WORD],
            )
        except ConfigError as exc:
            raise ProtocolError(f"a damaged ring: {exc.message}", **exc.facts) from exc
        if not geometry.total_bytes == words[TOTAL_BYTES_WORD] == segment_bytes:
            raise ProtocolError(
                "a ring whose sizes contradict each other",
                field="total_bytes",
                segment_bytes=segment_bytes,
                declared_bytes=words[TOTAL_BYTES_WORD],
                computed_bytes=geometry.total_bytes,
            )
        if words[POLICY_WORD] >= len(POLICIES):
            raise ProtocolError("a ring of an unknown policy", field="on_full", found=words[POLICY_WORD])
        return cls(
            geometry=geometry,
            ring_id=_bytes_of(words, RING_ID_WORD),
            fingerprint=words[FINGERPRINT_WORD],
            on_full=POLICIES[words[POLICY_WORD]],
            checksum=bool(words[CHECKSUM_WORD]),
            block_timeout_ns=words[BLOCK_TIMEOUT_NS_WORD],
            lock_timeout_ns=words[LOCK_TIMEOUT_NS_WORD],
            creator_pid=words[CREATOR_PID_WORD],
            creator_start=words[CREATOR_START_WORD],
            boot_id=_bytes_of(words, BOOT_ID_WORD),
            pid_namespace=words[PID_NAMESPACE_WORD],
        )


def _words_of(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")


def _bytes_of(words: Sequence[int], index: int) -> bytes:
    return words[index].to_bytes(8, "little") + words[index + 1].to_bytes(8, "little")
