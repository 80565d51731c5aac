"""Client frames: they survive the trip, and what is not one of them is `ProtocolError` and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from tests.unit.wire.frame_strategies import REQUESTS
from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.codec import decode_request, encode_read, encode_request
from ucxx_transport.wire.frames import (
    MAX_BODY_BYTES,
    REQUEST_BYTES,
    Ack,
    Bye,
    Confirm,
    Hello,
    Kind,
    ReadRequest,
    Request,
)

NAMED = ReadRequest(ring_id=b"R" * 16, slot=7, generation=9, attempt=3, nbytes=4096)
EVERY_BIT = 0xFF


def patched(frame: bytes, offset: int, layout: str, value: int) -> bytes:
    """`frame` with one field overwritten."""
    changed = bytearray(frame)
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


@settings(max_examples=150, deadline=None)
@given(REQUESTS)
def test_every_request_survives_the_trip_in_128_bytes(request: Request) -> None:
    frame = encode_request(request)
    assert len(frame) == REQUEST_BYTES
    assert decode_request(frame) == request
    assert decode_request(memoryview(bytearray(frame))) == request


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.integers(1, EVERY_BIT))
def test_a_mutated_byte_gives_another_valid_frame_or_a_protocol_error(request: Request, mask: int) -> None:
    frame = encode_request(request)
    for position in range(REQUEST_BYTES):
        changed = bytearray(frame)
        changed[position] ^= mask
        try:
            decoded = decode_request(changed)
        except ProtocolError:
            continue
        assert decode_request(encode_request(decoded)) == decoded


@pytest.mark.parametrize("region", [range(4), range(4, 8), range(120, 128)], ids=["magic", "version_kind", "end"])
def test_no_bit_of_the_fixed_words_may_flip(region: range) -> None:
    frame = encode_read(NAMED)
    for position in region:
        for bit in range(8):
            changed = bytearray(frame)
            changed[position] ^= 1 << bit
            try:
                decoded = decode_request(changed)
            except ProtocolError:
                continue
            # Kinds are small neighbours: a flipped bit of that word may name another kind, never the same frame.
            assert position in {6, 7}
            assert decoded != NAMED


@settings(max_examples=40, deadline=None)
@given(REQUESTS)
def test_a_frame_cut_anywhere_is_refused(request: Request) -> None:
    frame = encode_request(request)
    for length in range(REQUEST_BYTES):
        with pytest.raises(ProtocolError):
            decode_request(frame[:length])
        # What a short UCX message leaves in a blank receive buffer.
        with pytest.raises(ProtocolError):
            decode_request(frame[:length].ljust(REQUEST_BYTES, b"\0"))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(garbage)


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=112, max_size=112), st.integers(0, 1 << 16))
def test_garbage_inside_a_proper_frame_never_raises_anything_else(garbage: bytes, kind: int) -> None:
    proper = encode_request(Bye())
    frame = proper[:6] + struct.pack("<H", kind & 0xFFFF) + garbage + proper[120:]
    try:
        decode_request(frame)
    except ProtocolError:
        return
    assert kind in {int(known) for known in Kind}


def test_generation_zero_is_refused_in_read_and_confirm() -> None:
    for kind in (Kind.READ, Kind.CONFIRM):
        frame = patched(encode_read(NAMED, kind), 24, "<Q", 0)
        with pytest.raises(ProtocolError, match="generation 0"):
            decode_request(frame)


@pytest.mark.parametrize("nbytes", [MAX_BODY_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_a_length_beyond_any_segment_is_refused(nbytes: int) -> None:
    for kind in (Kind.READ, Kind.CONFIRM):
        with pytest.raises(ProtocolError, match="more bytes"):
            decode_request(patched(encode_read(NAMED, kind), 40, "<Q", nbytes))


def test_the_longest_allowed_length_is_accepted() -> None:
    frame = patched(encode_read(NAMED), 40, "<Q", MAX_BODY_BYTES)
    decoded = decode_request(frame)
    assert isinstance(decoded, ReadRequest)
    assert decoded.nbytes == MAX_BODY_BYTES


def test_slot_and_generation_are_read_as_unsigned_numbers() -> None:
    frame = patched(patched(encode_read(NAMED), 48, "<i", -1), 24, "<q", -1)
    decoded = decode_request(frame)
    assert isinstance(decoded, ReadRequest)
    assert decoded.slot == (1 << 32) - 1
    assert decoded.generation == (1 << 64) - 1


def test_a_reader_out_of_its_range_is_refused() -> None:
    frame = encode_request(Hello(reader=1, nonce=bytes(32)))
    for reader in (0, 1 << 63, (1 << 64) - 1):
        with pytest.raises(ProtocolError, match="reader"):
            decode_request(patched(frame, 40, "<Q", reader))


@pytest.mark.parametrize("delivered", [2, 255, (1 << 32) - 1])
def test_an_ack_that_is_neither_yes_nor_no_is_refused(delivered: int) -> None:
    frame = encode_request(Ack(slot=1, generation=2, attempt=3, delivered=True))
    with pytest.raises(ProtocolError, match="ACK"):
        decode_request(patched(frame, 52, "<I", delivered))


def test_an_unknown_kind_is_refused() -> None:
    rows: list[int] = [0, 8, 99, 0xFFFF]
    for kind in rows:
        with row(kind=kind), pytest.raises(ProtocolError, match="kind"):
            decode_request(patched(encode_request(Bye()), 6, "<H", kind))


def test_another_version_is_refused_and_named() -> None:
    with pytest.raises(ProtocolError, match="version 2") as caught:
        decode_request(patched(encode_request(Bye()), 4, "<H", 2))
    assert caught.value.facts["version"] == 2


def test_confirm_and_read_of_one_payload_differ_only_in_their_kind() -> None:
    confirm = decode_request(encode_request(Confirm(request=NAMED)))
    assert confirm == Confirm(request=NAMED)
    assert decode_request(encode_read(NAMED)) == NAMED
