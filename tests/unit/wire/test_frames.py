"""Client frames: they survive the trip, and what is not one of them is `ProtocolError` and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from tests.unit.wire.frame_strategies import FRAMES
from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.codec import decode_frame, encode_frame
from ucxx_transport.wire.frames import (
    FLAG_PACKED,
    FRAME_BYTES,
    FRAME_HEAD_BYTES,
    MAX_ATTEMPT,
    MAX_BODY_BYTES,
    MAX_ENDS,
    MAX_NAMES,
    MAX_WAIT_MS,
    NAME_BYTES,
    PACK_BYTES,
    Frame,
    Kind,
    message_bytes,
)

RING = b"R" * 16
NAME = (7, 0, 9, 3, 4096)
FETCH = Frame(Kind.FETCH, 5, RING, names=(NAME,), ends=(3, 4))
PACKED = Frame(Kind.FETCH, 5, RING, FLAG_PACKED, 2, names=((7, 0, 9, 3, 100), (8, 0, 9, 4, 100)))
TAKE = Frame(Kind.TAKE, 5, RING, 0, 3, 1 << 20, 16, 100)
CONFIRM = Frame(Kind.CONFIRM, 5, RING, attempt=3, names=((7, 0, 9, 0, 0),))
HELLO = Frame(Kind.HELLO, 1, attempt=1, word=7)
DESCRIBE = Frame(Kind.DESCRIBE, 5, RING, attempt=3)
BYE = Frame(Kind.BYE, 5, attempt=3)
EACH_KIND = (HELLO, Frame(Kind.AUTH, 2, attempt=2), FETCH, PACKED, TAKE, CONFIRM, DESCRIBE, BYE)

# Where the words of the head lie.
VERSION_AT, KIND_AT, NAMES_AT, ENDS_AT, FLAGS_AT, ATTEMPT_AT, WORD_AT, COUNT_AT, WAIT_AT = (
    4,
    6,
    32,
    34,
    36,
    40,
    48,
    56,
    60,
)
U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


def patched(frame: Frame, offset: int, layout: str, value: int) -> bytes:
    """The bytes of `frame` with one word overwritten."""
    changed = bytearray(encode_frame(frame))
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


@settings(max_examples=150, deadline=None)
@given(FRAMES)
def test_every_frame_survives_the_trip_within_what_is_posted_for_one(frame: Frame) -> None:
    encoded = encode_frame(frame)
    assert len(encoded) <= FRAME_BYTES
    assert decode_frame(encoded) == frame
    assert decode_frame(memoryview(bytearray(FRAME_BYTES - len(encoded)).join((encoded, b"")))) == frame


def test_the_longest_frame_fits_what_is_posted_for_one() -> None:
    names = tuple((slot, 0, 1, slot + 1, 5000) for slot in range(MAX_NAMES))
    assert len(encode_frame(Frame(Kind.FETCH, 1, RING, names=names, ends=tuple(range(MAX_ENDS))))) <= FRAME_BYTES


@settings(max_examples=40, deadline=None)
@given(FRAMES, st.integers(1, 0xFF))
def test_a_mutated_byte_gives_another_valid_frame_or_a_protocol_error(frame: Frame, mask: int) -> None:
    encoded = encode_frame(frame)
    for position in range(min(len(encoded), 200)):
        changed = bytearray(encoded)
        changed[position] ^= mask
        try:
            decoded = decode_frame(changed)
        except ProtocolError:
            continue
        assert decode_frame(encode_frame(decoded)) == decoded


def test_no_bit_of_the_fixed_words_may_flip() -> None:
    encoded = encode_frame(FETCH)
    for position in (*range(8), *range(8, 16), *range(len(encoded) - 8, len(encoded))):
        for bit in range(8):
            changed = bytearray(encoded)
            changed[position] ^= 1 << bit
            with row(position=position, bit=bit):
                try:
                    decoded = decode_frame(changed)
                except ProtocolError:
                    continue
                # Kinds are small neighbours: a flipped bit of that word may name another kind, never the same frame.
                assert position in {6, 7}
                assert decoded != FETCH


@settings(max_examples=30, deadline=None)
@given(FRAMES)
def test_a_frame_cut_anywhere_is_refused(frame: Frame) -> None:
    encoded = encode_frame(frame)
    for length in range(0, len(encoded), 1 if len(encoded) < 300 else 7):
        with pytest.raises(ProtocolError):
            decode_frame(encoded[:length])
        # What a short UCX message leaves in a blank receive buffer. The sequence's high bytes may be zeros anyway.
        if not encoded.startswith(encoded[:length].ljust(len(encoded), b"\0")):
            with pytest.raises(ProtocolError):
                decode_frame(encoded[:length].ljust(FRAME_BYTES, b"\0"))


def test_a_short_frame_is_not_completed_by_the_tail_of_the_one_before_it() -> None:
    """Receive buffers are used again without being cleared: the end mark of another frame does not fit."""
    before = encode_frame(FETCH)
    after = encode_frame(FETCH._replace(sequence=6, names=((1, 0, 2, 4, 4096),)))
    assert len(before) == len(after)
    for length in range(len(after)):
        buffer = bytearray(before)
        buffer[:length] = after[:length]
        if length <= 8:  # nothing of the new frame's sequence has come: the old frame, which its sequence gives away
            assert decode_frame(buffer).sequence == 5
        elif buffer != after:
            with row(length=length), pytest.raises(ProtocolError, match="cut short"):
                decode_frame(buffer)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(garbage)


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=80, max_size=80), st.binary(max_size=3000), st.integers(0, U16))
def test_garbage_inside_a_proper_head_never_raises_anything_else(head: bytes, rest: bytes, kind: int) -> None:
    proper = encode_frame(BYE)
    frame = proper[:6] + struct.pack("<H", kind) + proper[8:16] + head + rest
    try:
        decode_frame(frame.ljust(FRAME_BYTES, b"\0"))
    except ProtocolError:
        return
    assert kind in {int(known) for known in Kind}


def test_every_word_out_of_its_range_is_refused() -> None:
    name_at = FRAME_HEAD_BYTES
    rows: list[tuple[str, Frame, int, str, list[int]]] = [
        ("kind", BYE, KIND_AT, "<H", [0, 8, 99, U16]),
        ("names", FETCH, NAMES_AT, "<H", [MAX_NAMES + 1, 1000, U16]),
        ("ends", FETCH, ENDS_AT, "<H", [MAX_ENDS + 1, 1000, U16]),
        ("names of none", BYE, NAMES_AT, "<H", [1, MAX_NAMES]),
        ("flags of a fetch", PACKED, FLAGS_AT, "<I", [2, 3, U32]),
        ("flags of a take", TAKE, FLAGS_AT, "<I", [2, U32]),
        ("flags of none", DESCRIBE, FLAGS_AT, "<I", [1, U32]),
        ("attempt", BYE, ATTEMPT_AT, "<Q", [0, 1 << 16, 5 << 16, MAX_ATTEMPT + 1, U64]),
        ("shared attempt", PACKED, ATTEMPT_AT, "<Q", [0, 1 << 16, MAX_ATTEMPT + 1]),
        ("reader", HELLO, WORD_AT, "<Q", [0, 1 << 63, U64]),
        ("bytes to take", TAKE, WORD_AT, "<Q", [MAX_BODY_BYTES + 1, U64]),
        ("payloads to take", TAKE, COUNT_AT, "<I", [0, MAX_NAMES + 1, U32]),
        ("wait", TAKE, WAIT_AT, "<I", [MAX_WAIT_MS + 1, U32]),
        ("attempts of a take", TAKE, ATTEMPT_AT, "<Q", [U16, U16 - 15, MAX_ATTEMPT]),
        ("zero of a name", FETCH, name_at + 4, "<I", [1, U32]),
        ("generation", FETCH, name_at + 8, "<Q", [0]),
        ("generation to confirm", CONFIRM, name_at + 8, "<Q", [0]),
        ("attempt of a name", FETCH, name_at + 16, "<Q", [MAX_ATTEMPT + 1, U64]),
        ("nbytes", FETCH, name_at + 24, "<Q", [MAX_BODY_BYTES + 1, 1 << 63, U64]),
        ("nbytes to confirm", CONFIRM, name_at + 24, "<Q", [MAX_BODY_BYTES + 1]),
        ("nbytes to share", PACKED, name_at + 24, "<Q", [PACK_BYTES, MAX_BODY_BYTES]),
    ]
    for what, frame, offset, layout, values in rows:
        for value in values:
            with row(what=what, value=value), pytest.raises(ProtocolError):
                decode_frame(patched(frame, offset, layout, value).ljust(FRAME_BYTES, b"\0"))


def test_the_ends_of_every_range_are_allowed() -> None:
    rows: list[tuple[str, Frame, int, str, list[int]]] = [
        ("attempts of a take", TAKE, ATTEMPT_AT, "<Q", [1, U16 - 16, (1 << 16) + 1]),
        ("wait", TAKE, WAIT_AT, "<I", [0, MAX_WAIT_MS]),
        ("payloads to take", TAKE, COUNT_AT, "<I", [1, MAX_NAMES]),
        ("bytes to take", TAKE, WORD_AT, "<Q", [0, MAX_BODY_BYTES]),
        ("reader", HELLO, WORD_AT, "<Q", [1, (1 << 63) - 1]),
        ("attempt", BYE, ATTEMPT_AT, "<Q", [1, U16, MAX_ATTEMPT]),
        ("slot", FETCH, FRAME_HEAD_BYTES, "<I", [0, U32]),
        ("generation", FETCH, FRAME_HEAD_BYTES + 8, "<Q", [1, U64]),
        ("nbytes", FETCH, FRAME_HEAD_BYTES + 24, "<Q", [0, MAX_BODY_BYTES]),
    ]
    for what, frame, offset, layout, values in rows:
        for value in values:
            with row(what=what, value=value):
                encoded = patched(frame, offset, layout, value)
                assert encode_frame(decode_frame(encoded)) == encoded


def test_what_shares_a_message_is_at_least_two_and_fits_it() -> None:
    fits = PACK_BYTES // 2 - 80
    for sizes, fine in (([10], False), ([fits, fits], True), ([fits, fits + 8], False), ([0] * MAX_NAMES, True)):
        names = tuple((index, 0, 1, index + 3, nbytes) for index, nbytes in enumerate(sizes))
        with row(sizes=sizes):
            assert (sum(map(message_bytes, sizes)) <= PACK_BYTES and len(sizes) > 1) is fine
            encoded = encode_frame(PACKED._replace(names=names))
            if fine:
                assert decode_frame(encoded).names == names
            else:
                with pytest.raises(ProtocolError, match="share a message" if len(sizes) > 1 else "its kind"):
                    decode_frame(encoded)


def test_a_confirm_names_something() -> None:
    with pytest.raises(ProtocolError, match="words that its kind may not have"):
        decode_frame(encode_frame(CONFIRM._replace(names=())))


def test_another_version_is_refused_and_named() -> None:
    for version in (0, 1, 3, U16):
        for frame in EACH_KIND:
            with row(version=version, frame=frame), pytest.raises(ProtocolError, match=f"version {version}") as caught:
                decode_frame(patched(frame, VERSION_AT, "<H", version))
            assert caught.value.facts["version"] == version


def test_a_frame_of_version_1_is_named_as_such() -> None:
    """Its 128 bytes have magic, version and kind where these have them, and nothing else in common."""
    hello = struct.pack(
        "<IHH16sQQQII32s32xQ", *struct.unpack("<I", b"UXTQ"), 1, 1, bytes(16), 0, 0, 7, 0, 0, b"n" * 32, 1
    )
    assert len(hello) == 128
    for buffer in (hello, hello.ljust(FRAME_BYTES, b"\0"), hello.ljust(FRAME_BYTES, b"\xff")):
        with pytest.raises(ProtocolError, match="speaks protocol version 1, this side 2; install one release"):
            decode_frame(buffer)


def test_names_that_a_frame_claims_beyond_its_buffer_are_not_looked_for() -> None:
    encoded = bytearray(encode_frame(FETCH))
    for names, ends in ((2, 2), (1, 3), (MAX_NAMES, MAX_ENDS)):
        struct.pack_into("<HH", encoded, NAMES_AT, names, ends)
        with row(names=names, ends=ends), pytest.raises(ProtocolError, match="more names or ends"):
            decode_frame(encoded)
    assert NAME_BYTES == 32
