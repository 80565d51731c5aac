"""Answers: header, body, trailer, offers; short, stale and lying messages are detected."""

from __future__ import annotations

import gc
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.payloads import ref_to
from tests.support.rows import row
from tests.unit.wire.frame_strategies import ERROR_HEADERS, HEADERS, OFFERED, OK_HEADERS
from tests.unit.wire.session_rig import Pair
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    RingFullError,
    SlotError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.schema import SlotRef
from ucxx_transport.wire.codec import (
    check_trailer,
    clear_trailer,
    decode_header,
    decode_offer,
    encode_error,
    encode_header,
    encode_offer,
    encode_reply,
    error_of,
    error_text,
    seal_of,
    status_of,
)
from ucxx_transport.wire.frames import (
    ERROR_TEXT_BYTES,
    HEADER_BYTES,
    MAX_BODY_BYTES,
    MAX_ENVELOPE_BYTES,
    MAX_NAMES,
    TRAILER_BYTES,
    OfferedPayload,
    ReplyHeader,
    Status,
    message_bytes,
    receive_bytes,
)

NOT_OK = [status for status in Status if status is not Status.OK]


def sealed(body: bytes, generation: int = 5) -> bytearray:
    """A whole OK reply, as a server sends it straight from a slot."""
    reply = ReplyHeader(status=Status.OK, nbytes=len(body), generation=generation)
    message = bytearray(encode_reply(reply, body))
    assert len(message) == message_bytes(len(body))
    return message


@settings(max_examples=150, deadline=None)
@given(HEADERS)
def test_every_header_survives_the_trip(reply: ReplyHeader) -> None:
    buffer = bytearray(encode_header(reply))
    assert decode_header(buffer) == reply


@settings(max_examples=60, deadline=None)
@given(HEADERS, st.integers(1, 0xFF))
def test_a_mutated_header_is_valid_within_its_limits_or_a_protocol_error(reply: ReplyHeader, mask: int) -> None:
    buffer = bytearray(encode_header(reply))
    for position in range(HEADER_BYTES):
        buffer[position] ^= mask
        try:
            decoded = decode_header(buffer)
        except ProtocolError:
            continue
        else:
            assert decoded.nbytes <= (MAX_BODY_BYTES if decoded.status is Status.OK else ERROR_TEXT_BYTES)
        finally:
            buffer[position] ^= mask


@settings(max_examples=20, deadline=None)
@given(HEADERS)
def test_a_header_cut_short_is_refused(reply: ReplyHeader) -> None:
    buffer = bytearray(encode_header(reply))
    for length in range(HEADER_BYTES):
        with pytest.raises(ProtocolError):
            decode_header(buffer[:length])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_no_header(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(garbage)


@settings(max_examples=100, deadline=None)
@given(OK_HEADERS, st.integers(MAX_BODY_BYTES + 1, (1 << 64) - 1))
def test_a_body_longer_than_any_segment_is_refused(reply: ReplyHeader, nbytes: int) -> None:
    buffer = bytearray(encode_header(reply))
    struct.pack_into("<Q", buffer, 16, nbytes)
    with pytest.raises(ProtocolError, match="more bytes"):
        decode_header(buffer)


@settings(max_examples=100, deadline=None)
@given(ERROR_HEADERS, st.integers(ERROR_TEXT_BYTES + 1, (1 << 64) - 1))
def test_an_error_text_beyond_1_kib_is_refused(reply: ReplyHeader, nbytes: int) -> None:
    buffer = bytearray(encode_header(reply))
    struct.pack_into("<Q", buffer, 16, nbytes)
    with pytest.raises(ProtocolError, match="more bytes"):
        decode_header(buffer)


def test_an_unknown_status_is_refused() -> None:
    buffer = bytearray(encode_error(Status.STALE, ""))
    for code in (8, 9, 0xFFFF):
        struct.pack_into("<H", buffer, 6, code)
        with pytest.raises(ProtocolError, match="status"):
            decode_header(buffer)


def test_another_version_of_the_server_is_named() -> None:
    buffer = bytearray(encode_error(Status.STALE, ""))
    struct.pack_into("<H", buffer, 4, 7)
    with pytest.raises(ProtocolError, match="version 7"):
        decode_header(buffer)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NOT_OK), st.text(max_size=2000))
def test_an_error_text_is_bounded_printable_and_fits_what_is_posted(status: Status, text: str) -> None:
    message = encode_error(status, text, slot=3, generation=4)
    assert len(message) <= HEADER_BYTES + ERROR_TEXT_BYTES <= receive_bytes(0)
    reply = decode_header(message)
    assert (reply.status, reply.slot, reply.generation) == (status, 3, 4)
    shown = error_text(message, reply)
    assert shown.isprintable() or not shown
    assert len(shown) <= ERROR_TEXT_BYTES
    if text.isprintable() and len(text.encode("utf-8", "replace")) <= ERROR_TEXT_BYTES:
        assert shown == text


def test_an_error_of_the_server_is_the_status_that_its_class_has() -> None:
    rows: list[tuple[type[TransportError], Status]] = [
        (StaleSlotError, Status.STALE),
        (NotReadyError, Status.NOT_READY),
        (BusyError, Status.BUSY),
        (ProtocolError, Status.BAD_REQUEST),
        (SlotError, Status.BAD_REQUEST),
        (RingFullError, Status.BAD_REQUEST),
        (AuthenticationError, Status.UNAUTHORIZED),
        (DeadlineExceededError, Status.BUSY),
        (PeerLostError, Status.INTERNAL),
        (ConfigError, Status.INTERNAL),
    ]
    for cls, status in rows:
        with row(cls=cls):
            assert status_of(cls("it failed")) is status


def test_a_client_makes_of_a_status_the_error_that_the_server_sends_it_for() -> None:
    for status in NOT_OK:
        message = encode_error(status, "")
        error = error_of(decode_header(message), message)
        with row(status=status, error=error):
            # EMPTY answers a TAKE without an error; to anything else it is a breach of the protocol
            assert status_of(error) is (Status.BAD_REQUEST if status is Status.EMPTY else status)


def test_control_characters_of_a_peer_never_reach_a_log() -> None:
    message = encode_error(Status.INTERNAL, "a\x1b[2Jb\nc\0")
    assert error_text(message, decode_header(message)) == "a?[2Jb?c?"


def test_bytes_that_are_no_utf8_are_shown_as_replacements() -> None:
    message = bytearray(encode_error(Status.INTERNAL, "xyz"))
    message[HEADER_BYTES : HEADER_BYTES + 3] = b"\xff\xfe\xfd"
    assert error_text(message, decode_header(message)) == "\ufffd" * 3


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.integers(0, (1 << 64) - 1))
def test_a_sealed_message_is_whole_padded_and_leaves_the_body_alone(body: bytes, generation: int) -> None:
    message = sealed(body, generation)
    reply = decode_header(message)
    check_trailer(message, reply)
    assert message[HEADER_BYTES : HEADER_BYTES + len(body)] == body
    assert not any(message[HEADER_BYTES + len(body) : -TRAILER_BYTES])
    assert len(message) == message_bytes(len(body))
    assert encode_reply(reply, body) == message


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=50))
def test_a_message_cut_anywhere_is_detected_in_a_cleared_buffer(body: bytes) -> None:
    message = sealed(body)
    for length in range(HEADER_BYTES, len(message)):
        buffer = memoryview(bytearray(b"\xaa" * receive_bytes(len(body))))
        clear_trailer(buffer, message_bytes(len(body)) - TRAILER_BYTES)
        buffer[:length] = message[:length]
        if buffer[: len(message)] == message:
            continue  # what was cut off is zeros, and zeros were put there
        with pytest.raises(ProtocolError, match="cut short"):
            check_trailer(buffer, decode_header(buffer))


def test_without_clearing_a_short_message_would_pass_for_the_one_before_it() -> None:
    body = bytes(range(64))
    buffer = memoryview(bytearray(receive_bytes(len(body))))
    message = sealed(body)
    buffer[: len(message)] = message  # the last reply in this pooled buffer
    buffer[:HEADER_BYTES] = message[:HEADER_BYTES]  # the next one brings its header and nothing else
    check_trailer(buffer, decode_header(buffer))  # undetectable: hence `clear_trailer` before every receive
    clear_trailer(buffer, message_bytes(len(body)) - TRAILER_BYTES)
    with pytest.raises(ProtocolError, match="cut short"):
        check_trailer(buffer, decode_header(buffer))


def test_the_trailer_of_another_generation_or_length_is_not_this_ones() -> None:
    body = b"x" * 16
    message = sealed(body, generation=5)
    other_generation = sealed(body, generation=6)
    message[-TRAILER_BYTES:] = other_generation[-TRAILER_BYTES:]
    with pytest.raises(ProtocolError):
        check_trailer(message, decode_header(message))
    message = sealed(body)
    struct.pack_into("<Q", message, len(message) - 8, 15)
    with pytest.raises(ProtocolError):
        check_trailer(message, decode_header(message))


@pytest.mark.parametrize("nbytes", [17, 1 << 20, MAX_BODY_BYTES])
def test_a_header_that_claims_more_than_was_posted_is_refused(nbytes: int) -> None:
    message = sealed(b"x" * 16)
    struct.pack_into("<Q", message, 16, nbytes)
    with pytest.raises(ProtocolError, match="more bytes than were posted"):
        check_trailer(message, decode_header(message))


def test_what_is_posted_holds_any_body_and_any_error_text() -> None:
    for nbytes in (0, 1, 7, 8, 1023, 1024, 1025, 1 << 20):
        assert receive_bytes(nbytes) >= message_bytes(nbytes)
        assert receive_bytes(nbytes) >= HEADER_BYTES + ERROR_TEXT_BYTES
        assert message_bytes(nbytes) - HEADER_BYTES - TRAILER_BYTES - nbytes in range(8)


@settings(max_examples=100, deadline=None)
@given(st.lists(OFFERED, min_size=1, max_size=5))
def test_an_offer_survives_the_trip(payloads: list[OfferedPayload]) -> None:
    body = encode_offer(payloads)
    assert decode_offer(body) == payloads
    for wrong in (body[:-1], body + b"\0", body[:8]):
        with pytest.raises(ProtocolError):
            decode_offer(wrong)


def test_the_largest_offer_fits_what_is_posted_for_it() -> None:
    payload = OfferedPayload((1 << 32) - 1, 1, MAX_BODY_BYTES, 5, 7, b"e" * MAX_ENVELOPE_BYTES)
    for count in (1, 16, MAX_NAMES):
        body = encode_offer([payload] * count)
        asked = Pair().open().client.take(count, MAX_BODY_BYTES)
        assert len(encode_reply(ReplyHeader(Status.OK), body)) <= asked.receive_bytes
        assert decode_offer(body) == [payload] * count


def test_an_offer_whose_words_do_not_add_up_is_refused() -> None:
    fine = OfferedPayload(3, 4, 100, None, 5, b"envelope")
    body = encode_offer([fine, fine])
    rows: list[tuple[str, int, str, list[int]]] = [
        ("payloads", 0, "<I", [0, 1, 3, MAX_NAMES + 1, (1 << 32) - 1]),
        ("bytes of an envelope", 12, "<I", [7, 9, MAX_ENVELOPE_BYTES + 1, (1 << 32) - 1]),
        ("generation", 16, "<Q", [0]),
        ("nbytes", 24, "<Q", [MAX_BODY_BYTES + 1, (1 << 64) - 1]),
    ]
    for what, offset, layout, values in rows:
        for value in values:
            changed = bytearray(body)
            struct.pack_into(layout, changed, offset, value)
            with row(what=what, value=value), pytest.raises(ProtocolError):
                decode_offer(bytes(changed))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_garbage_is_an_offer_or_a_protocol_error(garbage: bytes, count: int) -> None:
    body = struct.pack("<II", count, 0) + garbage
    try:
        offered = decode_offer(body)
    except ProtocolError:
        return
    assert len(offered) == count
    assert all(payload.nbytes <= MAX_BODY_BYTES and payload.generation for payload in offered)


def is_sealed(message: bytearray | memoryview, promised: SlotRef) -> bool:
    header, trailer, end, whole = seal_of(promised)
    return bytes(message[:HEADER_BYTES]) == header and bytes(message[end:whole]) == trailer


def test_what_is_sealed_as_promised_is_the_payload_and_nothing_else_is() -> None:
    body = b"a payload of 27 bytes......"
    header = ReplyHeader(Status.OK, len(body), b"R" * 16, 7, 9, 11, 13)
    message = bytearray(encode_reply(header, body))
    promised = ref_to(b"R" * 16, 7, 9, len(body), 11, fingerprint=13)
    assert is_sealed(message, promised)
    assert is_sealed(memoryview(message), promised)
    for position in (*range(HEADER_BYTES), *range(len(message) - TRAILER_BYTES, len(message))):
        message[position] ^= 1
        with row(position=position):
            assert not is_sealed(message, promised)
        message[position] ^= 1
    changes: list[dict[str, Any]] = [{"ring_id": b"S" * 16}, {"slot": 8}, {"generation": 10}, {"nbytes": 28}]
    for change in (*changes, {"checksum": None}, {"fingerprint": 0}):
        with row(**change):
            assert not is_sealed(message, replace(promised, **change))


def test_a_refusal_in_a_shared_message_keeps_to_its_room() -> None:
    for nbytes in (0, 1, 100, 5000):
        room = message_bytes(nbytes)
        message = encode_error(Status.STALE, "x" * 2000, slot=1, generation=2, room=room)
        with row(nbytes=nbytes):
            assert len(message) <= room
            assert error_text(message, decode_header(message)) == "x" * min(ERROR_TEXT_BYTES, room - HEADER_BYTES)


def test_the_error_of_an_offer_may_be_garbage_in_a_cycle() -> None:
    body = bytearray(encode_offer([OfferedPayload(3, 4, 100, None, 5, b"envelope")] * 2))
    struct.pack_into("<Q", body, 16, 0)  # no generation
    with pytest.raises(ProtocolError) as raised:
        decode_offer(bytes(body))
    raised.value.facts["itself"] = raised.value
    del raised
    assert gc.collect() > 0, "and the interpreter has not crashed"
