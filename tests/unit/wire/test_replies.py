"""Replies: header, body, trailer; short, stale and lying messages are detected."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.wire.frame_strategies import ERROR_HEADERS, HEADERS, OK_HEADERS
from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.codec import (
    check_trailer,
    clear_ends,
    decode_header,
    encode_error,
    encode_header_into,
    encode_reply,
    error_text,
    seal,
)
from ucxx_transport.wire.frames import (
    ERROR_TEXT_BYTES,
    HEADER_BYTES,
    MAX_BODY_BYTES,
    TRAILER_BYTES,
    ReadReply,
    Status,
    message_bytes,
    padded,
    receive_bytes,
)

NOT_OK = [status for status in Status if status is not Status.OK]


def sealed(body: bytes, generation: int = 5) -> bytearray:
    """A whole OK reply, as a server sends it straight from a slot."""
    reply = ReadReply(status=Status.OK, nbytes=len(body), generation=generation)
    message = bytearray(message_bytes(len(body)))
    message[HEADER_BYTES : HEADER_BYTES + len(body)] = body
    assert seal(message, reply) == len(message)
    return message


@settings(max_examples=150, deadline=None)
@given(HEADERS)
def test_every_header_survives_the_trip(reply: ReadReply) -> None:
    buffer = bytearray(HEADER_BYTES)
    encode_header_into(buffer, reply)
    assert decode_header(buffer) == reply


@settings(max_examples=60, deadline=None)
@given(HEADERS, st.integers(1, 0xFF))
def test_a_mutated_header_is_valid_within_its_limits_or_a_protocol_error(reply: ReadReply, mask: int) -> None:
    buffer = bytearray(HEADER_BYTES)
    encode_header_into(buffer, reply)
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
def test_a_header_cut_short_is_refused(reply: ReadReply) -> None:
    buffer = bytearray(HEADER_BYTES)
    encode_header_into(buffer, reply)
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
def test_a_body_longer_than_any_segment_is_refused(reply: ReadReply, nbytes: int) -> None:
    buffer = bytearray(HEADER_BYTES)
    encode_header_into(buffer, reply)
    struct.pack_into("<Q", buffer, 16, nbytes)
    with pytest.raises(ProtocolError, match="more bytes"):
        decode_header(buffer)


@settings(max_examples=100, deadline=None)
@given(ERROR_HEADERS, st.integers(ERROR_TEXT_BYTES + 1, (1 << 64) - 1))
def test_an_error_text_beyond_1_kib_is_refused(reply: ReadReply, nbytes: int) -> None:
    buffer = bytearray(HEADER_BYTES)
    encode_header_into(buffer, reply)
    struct.pack_into("<Q", buffer, 16, nbytes)
    with pytest.raises(ProtocolError, match="more bytes"):
        decode_header(buffer)


def test_an_unknown_status_is_refused() -> None:
    buffer = bytearray(encode_error(Status.STALE, ""))
    for code in (7, 8, 0xFFFF):
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
    assert not any(message[HEADER_BYTES + len(body) : HEADER_BYTES + padded(len(body))])
    assert len(message) == HEADER_BYTES + padded(len(body)) + TRAILER_BYTES
    assert encode_reply(reply, body) == message


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=50))
def test_a_message_cut_anywhere_is_detected_in_a_cleared_buffer(body: bytes) -> None:
    message = sealed(body)
    for length in range(HEADER_BYTES, len(message)):
        buffer = memoryview(bytearray(b"\xaa" * receive_bytes(len(body))))
        clear_ends(buffer, len(body))
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
    check_trailer(buffer, decode_header(buffer))  # undetectable: hence `clear_ends` before every receive
    clear_ends(buffer, len(body))
    with pytest.raises(ProtocolError):
        decode_header(buffer)
    buffer[:HEADER_BYTES] = message[:HEADER_BYTES]
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
