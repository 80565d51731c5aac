"""One read as the client judges it: the payload that was asked for, whole, or an error; whatever the server says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from tests.unit.client.references import RING_ID, reference
from ucxx_transport.client.exchange import (
    DESCRIBE_RECEIVE_BYTES,
    ReadExchange,
    bye_request,
    check_ok,
    describe_request,
    described,
)
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.wire.codec import clear_ends, decode_request, encode_error, encode_reply
from ucxx_transport.wire.frames import (
    HEADER_BYTES,
    MAX_SCHEMA_BYTES,
    TRAILER_BYTES,
    Ack,
    Bye,
    Confirm,
    Describe,
    ReadReply,
    ReadRequest,
    Status,
    message_bytes,
)

REF = reference(slot=3, generation=8, nbytes=100, fingerprint=55)
BODY = bytes(range(100))
TRUTH = ReadReply(status=Status.OK, nbytes=100, ring_id=RING_ID, slot=3, generation=8, fingerprint=55)
CLASSES: dict[Status, type[TransportError]] = {
    Status.STALE: StaleSlotError,
    Status.NOT_READY: NotReadyError,
    Status.BUSY: BusyError,
    Status.BAD_REQUEST: ProtocolError,
    Status.UNAUTHORIZED: AuthenticationError,
    Status.INTERNAL: PeerLostError,
}


def exchange() -> ReadExchange:
    return ReadExchange(REF, attempt=21)


def received(message: bytes | bytearray) -> memoryview:
    """What lies in a dirty pooled buffer after a receive of `message`."""
    buffer = memoryview(bytearray(b"\xaa" * exchange().receive_nbytes))
    clear_ends(buffer, REF.nbytes)
    buffer[: len(message)] = message
    return buffer


def test_the_frames_of_a_read_all_name_the_same_payload_and_attempt() -> None:
    named = ReadRequest(ring_id=RING_ID, slot=3, generation=8, attempt=21, nbytes=100)
    assert decode_request(exchange().request()) == named
    assert decode_request(exchange().confirm()) == Confirm(request=named)
    for delivered in (True, False):
        ack = Ack(slot=3, generation=8, attempt=21, delivered=delivered)
        assert decode_request(exchange().ack(delivered=delivered)) == ack


def test_the_promised_payload_is_accepted() -> None:
    message = received(encode_reply(TRUTH, BODY))
    assert exchange().verify(message) == TRUTH
    assert message[HEADER_BYTES : HEADER_BYTES + 100] == BODY


def test_another_payload_than_the_one_asked_for_is_a_protocol_error() -> None:
    rows: list[ReadReply] = [
        TRUTH._replace(slot=4),
        TRUTH._replace(generation=7),
        TRUTH._replace(generation=9),
        TRUTH._replace(generation=0),
        TRUTH._replace(ring_id=b"S" * 16),
        TRUTH._replace(fingerprint=0),
        TRUTH._replace(fingerprint=56),
    ]
    for lie in rows:
        with row(lie=lie), pytest.raises(ProtocolError):
            exchange().verify(received(encode_reply(lie, BODY)))


def test_another_length_is_a_protocol_error_even_if_the_message_is_whole() -> None:
    rows: list[int] = [0, 1, 99, 101, 500, 960]
    for nbytes in rows:
        with row(nbytes=nbytes):
            body = bytes(nbytes)
            with pytest.raises(ProtocolError):
                exchange().verify(received(encode_reply(TRUTH._replace(nbytes=nbytes), body)))


def test_a_header_that_claims_an_absurd_length_is_a_protocol_error() -> None:
    rows: list[int] = [1025, 1 << 32, 1 << 46, (1 << 64) - 1]
    for nbytes in rows:
        with row(nbytes=nbytes):
            message = bytearray(encode_reply(TRUTH, BODY))
            message[16:24] = nbytes.to_bytes(8, "little")
            with pytest.raises(ProtocolError):
                exchange().verify(received(message))


def test_a_payload_cut_anywhere_is_a_protocol_error() -> None:
    message = encode_reply(TRUTH, BODY)
    assert len(message) == message_bytes(100)
    # The last byte of the trailer is a zero of a length, as is what a cleared buffer holds: it cannot be missed.
    whole = len(message.rstrip(b"\0"))
    for length in range(whole):
        with pytest.raises(ProtocolError):
            exchange().verify(received(message[:length]))


def test_a_missing_trailer_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="cut short"):
        exchange().verify(received(encode_reply(TRUTH, BODY)[:-TRAILER_BYTES]))


def test_every_status_is_its_error_and_brings_the_servers_words() -> None:
    for status, expected in CLASSES.items():
        with row(status=status):
            message = encode_error(status, "words of the server", slot=3, generation=8)
            with pytest.raises(expected, match="words of the server") as caught:
                exchange().verify(received(message))
            assert type(caught.value) is expected
            assert caught.value.facts == {"status": status.name, "slot": 3, "generation": 8}


def test_every_status_but_ok_has_its_error() -> None:
    assert set(CLASSES) == set(Status) - {Status.OK}


@pytest.mark.parametrize("nbytes", [1025, 1 << 32])
def test_a_huge_error_text_is_refused_before_it_is_read(nbytes: int) -> None:
    message = bytearray(encode_error(Status.STALE, "x"))
    message[16:24] = nbytes.to_bytes(8, "little")
    with pytest.raises(ProtocolError, match="more bytes"):
        exchange().verify(received(message))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 0xFF))
def test_a_mutated_message_is_the_same_payload_or_a_transport_error(mask: int) -> None:
    whole = encode_reply(TRUTH, BODY)
    for position in (*range(HEADER_BYTES), *range(HEADER_BYTES + 104, len(whole))):
        message = bytearray(whole)
        message[position] ^= mask
        buffer = received(message)
        try:
            reply = exchange().verify(buffer)
        except TransportError:
            continue
        assert (reply.ring_id, reply.slot, reply.generation, reply.nbytes) == (RING_ID, 3, 8, 100)
        assert buffer[HEADER_BYTES : HEADER_BYTES + 100] == BODY


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=1088))
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        exchange().verify(received(garbage))


def test_a_description_comes_back_whole() -> None:
    schema = b"msgpack of a schema"
    assert decode_request(describe_request(RING_ID)) == Describe(ring_id=RING_ID)
    message = encode_reply(ReadReply(status=Status.OK, nbytes=len(schema)), schema)
    assert described(message.ljust(DESCRIBE_RECEIVE_BYTES, b"\0")) == schema


def test_a_description_beyond_the_wires_limit_is_refused() -> None:
    body = bytes(MAX_SCHEMA_BYTES + 1)
    with pytest.raises(ProtocolError):
        described(encode_reply(ReadReply(status=Status.OK, nbytes=len(body)), body))


def test_a_description_of_another_ring_is_stale() -> None:
    with pytest.raises(StaleSlotError):
        described(encode_error(Status.STALE, "another ring"))


def test_goodbye_is_judged_by_its_status_alone() -> None:
    assert decode_request(bye_request()) == Bye()
    check_ok(encode_reply(ReadReply(status=Status.OK)))
    with pytest.raises(StaleSlotError):
        check_ok(encode_error(Status.STALE, "gone"))
    with pytest.raises(ProtocolError):
        check_ok(bytes(100))
