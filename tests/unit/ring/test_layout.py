from __future__ import annotations

import itertools

import pytest

from tests.support.rows import row
from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Identity
from ucxx_transport.wire.frames import message_bytes


def identity(
    *, slots: int = 4, slot_bytes: int = 1000, readers: int = 2, schema_bytes: int = 10, envelope_bytes: int = 64
) -> Identity:
    return Identity(
        ring_id=bytes(range(16)),
        slots=slots,
        slot_bytes=slot_bytes,
        readers=readers,
        schema_bytes=schema_bytes,
        fingerprint=2**64 - 1,
        on_full="raise",
        checksum=True,
        block_timeout_ns=30 * 10**9,
        lock_timeout_ns=5 * 10**9,
        envelope_bytes=envelope_bytes,
        creator_pid=4242,
        creator_start=987654,
        boot_id=bytes(range(100, 116)),
        pid_namespace=4026531836,
    )


IDENTITIES = [
    identity(
        slots=slots, slot_bytes=slot_bytes, readers=readers, schema_bytes=schema_bytes, envelope_bytes=envelope_bytes
    )
    for slots, slot_bytes, readers, schema_bytes, envelope_bytes in itertools.product(
        [1, 3, 64, 65536], [1, 63, 64, 4096, 94_000_001], [1, 2, 64], [0, 1, 777], [0, 64, 1024]
    )
]


def payload_byte(geometry: Identity, slot: int) -> int:
    return geometry.first_payload_byte + slot * geometry.stride_bytes


def test_no_two_parts_of_a_segment_overlap() -> None:
    for geometry in IDENTITIES:
        last = geometry.slots - 1
        parts = [
            (0, layout.IDENTITY_BYTES),
            (layout.SEQUENCE_WORD * 8, (layout.TAKERS_WORD + 1) * 8),
            (layout.MUTEX_BYTE, layout.MUTEX_BYTE + layout.MUTEX_BYTES),
            (layout.COUNTER_WORD * 8, (layout.COUNTER_WORD + len(layout.COUNTERS)) * 8),
            (layout.ADDRESS_WORD * 8, (layout.ADDRESS_WORD + 2 * layout.ADDRESS_BANK_WORDS) * 8),
            (layout.SERVER_WORD * 8, (layout.SERVER_WORD + layout.SERVER_WORDS) * 8),
            (layout.SCHEMA_BYTE, layout.SCHEMA_BYTE + geometry.schema_bytes),
        ]
        for slot in sorted({0, min(1, last), last}):
            start = (geometry.first_slot_word + slot * geometry.slot_words) * 8
            parts.append((start, start + (layout.FIRST_ENTRY + layout.ENTRY_WORDS * geometry.entries) * 8))
        for slot in sorted({0, min(1, last), last}):
            start = payload_byte(geometry, slot) - layout.HEADROOM_BYTES - geometry.envelope_bytes
            parts.append((start, start + geometry.envelope_bytes + message_bytes(geometry.slot_bytes)))
        assert all(end <= following for (_, end), (following, _) in itertools.pairwise(parts))
        assert parts[-1][1] <= geometry.total_bytes


def test_payloads_are_aligned_to_cache_lines_and_the_segment_to_pages() -> None:
    for geometry in IDENTITIES:
        for slot in {0, geometry.slots // 2, geometry.slots - 1}:
            assert payload_byte(geometry, slot) % 64 == 0
        assert geometry.first_slot_word * 8 % 64 == geometry.slot_words * 8 % 64 == 0
        assert geometry.total_bytes % layout.PAGE_BYTES == 0
        assert layout.MUTEX_BYTE % 64 == 0


def test_a_slot_has_room_for_all_attempts_and_all_records_of_its_readers() -> None:
    for readers in (1, 3, 4, 64):
        geometry = identity(slots=1, readers=readers)
        assert geometry.max_attempts >= max(8, 2 * readers + 2)
        assert geometry.entries >= geometry.max_attempts + readers


def test_numbers_out_of_bounds_size_nothing() -> None:
    rows: list[tuple[str, int]] = [
        ("slots", 0),
        ("slots", 65537),
        ("slot_bytes", 0),
        ("slot_bytes", 2**48 + 1),
        ("readers", 0),
        ("readers", 65),
        ("schema_bytes", -1),
        ("schema_bytes", (4 << 20) + 1),
        ("envelope_bytes", -64),
        ("envelope_bytes", 63),
        ("envelope_bytes", 1024 + 64),
    ]
    for field, value in rows:
        with row(field=field, value=value):
            with pytest.raises(ConfigError) as caught:
                identity(**{field: value})
            assert caught.value.facts["field"] == field


def test_an_identity_comes_back_from_its_bytes() -> None:
    for geometry in IDENTITIES:
        raw = geometry.to_bytes()
        assert len(raw) == layout.IDENTITY_BYTES
        assert not any(raw[8 * layout.COMPLETE_WORD :][:8])
        assert Identity.from_bytes(raw, geometry.total_bytes) == geometry


def test_a_foreign_or_damaged_identity_is_refused_with_what_was_found() -> None:
    rows: list[tuple[int, int, str]] = [
        (layout.MAGIC_WORD, 0x1234, "magic"),
        (layout.VERSION_WORD, 99, "layout_version"),
        (layout.SLOTS_WORD, 2**60, "slots"),
        (layout.SLOT_BYTES_WORD, 2**63, "slot_bytes"),
        (layout.READERS_WORD, 0, "readers"),
        (layout.SCHEMA_BYTES_WORD, 2**62, "schema_bytes"),
        (layout.TOTAL_BYTES_WORD, 4096, "total_bytes"),
        (layout.SLOTS_WORD, 50, "total_bytes"),
        (layout.POLICY_WORD, 3, "on_full"),
        (layout.ENVELOPE_BYTES_WORD, 2**63, "envelope_bytes"),
        (layout.ENVELOPE_BYTES_WORD, 1024, "total_bytes"),
    ]
    for word, value, field in rows:
        with row(word=word, value=value, field=field):
            raw = bytearray(identity().to_bytes())
            raw[8 * word : 8 * word + 8] = value.to_bytes(8, "little")
            with pytest.raises(ProtocolError) as caught:
                Identity.from_bytes(bytes(raw), identity().total_bytes)
            assert caught.value.facts["field"] == field


def test_an_identity_of_another_size_than_the_file_is_refused() -> None:
    with pytest.raises(ProtocolError, match="contradict"):
        Identity.from_bytes(identity().to_bytes(), identity().total_bytes + 4096)
