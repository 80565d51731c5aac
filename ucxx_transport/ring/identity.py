"""Identity: what a segment says of itself in its first words, so that attaching needs nothing but the name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Geometry


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
            *(layout.MAGIC, layout.LAYOUT_VERSION, geometry.total_bytes, 0),
            *_words_of(self.ring_id),
            *(geometry.slots, geometry.slot_bytes, geometry.readers, geometry.schema_bytes, self.fingerprint),
            *(layout.POLICIES.index(self.on_full), int(self.checksum), self.block_timeout_ns, self.lock_timeout_ns),
            geometry.envelope_bytes,
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
        if words[layout.MAGIC_WORD] != layout.MAGIC:
            found = words[layout.MAGIC_WORD].to_bytes(layout.WORD_BYTES, "little")
            raise ProtocolError(f"not a ring: it begins with {found!r}", field="magic", found=found.hex())
        version, expected = words[layout.VERSION_WORD], layout.LAYOUT_VERSION
        if version != expected:
            raise ProtocolError(
                f"a ring of layout version {version}; this program reads version {expected}: run the same release of "
                "ucxx_transport on both sides",
                field="layout_version",
                found=version,
                expected=expected,
            )
        try:
            geometry = Geometry(
                slots=words[layout.SLOTS_WORD],
                slot_bytes=words[layout.SLOT_BYTES_WORD],
                readers=words[layout.READERS_WORD],
                schema_bytes=words[layout.SCHEMA_BYTES_WORD],
                envelope_bytes=words[layout.ENVELOPE_BYTES_WORD],
            )
        except ConfigError as exc:
            raise ProtocolError(f"a damaged ring: {exc.message}", **exc.facts) from exc
        if not geometry.total_bytes == words[layout.TOTAL_BYTES_WORD] == segment_bytes:
            raise ProtocolError(
                "a ring whose sizes contradict each other",
                field="total_bytes",
                segment_bytes=segment_bytes,
                declared_bytes=words[layout.TOTAL_BYTES_WORD],
                computed_bytes=geometry.total_bytes,
            )
        if words[layout.POLICY_WORD] >= len(layout.POLICIES):
            raise ProtocolError("a ring of an unknown policy", field="on_full", found=words[layout.POLICY_WORD])
        return cls(
            geometry=geometry,
            ring_id=_bytes_of(words, layout.RING_ID_WORD),
            fingerprint=words[layout.FINGERPRINT_WORD],
            on_full=layout.POLICIES[words[layout.POLICY_WORD]],
            checksum=bool(words[layout.CHECKSUM_WORD]),
            block_timeout_ns=words[layout.BLOCK_TIMEOUT_NS_WORD],
            lock_timeout_ns=words[layout.LOCK_TIMEOUT_NS_WORD],
            creator_pid=words[layout.CREATOR_PID_WORD],
            creator_start=words[layout.CREATOR_START_WORD],
            boot_id=_bytes_of(words, layout.BOOT_ID_WORD),
            pid_namespace=words[layout.PID_NAMESPACE_WORD],
        )


def _words_of(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")


def _bytes_of(words: Sequence[int], index: int) -> bytes:
    return words[index].to_bytes(8, "little") + words[index + 1].to_bytes(8, "little")
