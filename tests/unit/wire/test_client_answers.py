"""What the client's session makes of answers: payloads, offers, statuses, and garbage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from tests.unit.wire.session_rig import FINGERPRINT, RING_ID, Pair, frame_of, in_flight, offered, ok, payload, ref
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.wire.actions import Take
from ucxx_transport.wire.client_side import Attempt
from ucxx_transport.wire.codec import clear_trailer, decode_frame, encode_error, encode_offer, encode_reply
from ucxx_transport.wire.frames import (
    ERROR_TEXT_BYTES,
    FLAG_PACKED,
    HEADER_BYTES,
    MAX_SCHEMA_BYTES,
    OfferedPayload,
    ReplyHeader,
    Status,
    Window,
    message_bytes,
    receive_bytes,
)


def slots(pair: Pair) -> list[int]:
    return sorted(named.slot for named in pair.client.owed())


# --- Payloads ---


def test_the_promised_payload_is_accepted_also_in_a_longer_buffer() -> None:
    for named in (ref(), ref(nbytes=0), ref(nbytes=1), ref(nbytes=1000), ref(nbytes=5000)):
        for checksum in (None, 5):
            message = payload(named, checksum=checksum)
            for received in (message, bytearray(message).ljust(receive_bytes(named.nbytes), b"\xaa")):
                pair, [number] = in_flight(named)
                with row(named=named, checksum=checksum):
                    pair.client.judge(number, memoryview(received))
                    assert not pair.client.broken


def test_another_payload_than_the_one_asked_for_breaks_the_session() -> None:
    named = ref(2, generation=6, nbytes=128)
    other_schema = encode_reply(ReplyHeader(Status.OK, 128, RING_ID, 2, 6, None, FINGERPRINT + 1), bytes(128))
    rows: list[tuple[bytes, str, dict[str, object]]] = [
        (payload(ref(3, generation=6, nbytes=128)), "another payload", {"asked": "2/6", "got": "3/6"}),
        (payload(ref(2, generation=7, nbytes=128)), "another payload", {"asked": "2/6", "got": "2/7"}),
        (payload(ref(2, generation=6, nbytes=128, ring_id=b"S" * 16)), "another payload", {}),
        (payload(ref(2, generation=6, nbytes=127)), "reference promised", {"promised_bytes": 128, "nbytes": 127}),
        (payload(ref(2, generation=6, nbytes=120)), "reference promised", {"promised_bytes": 128, "nbytes": 120}),
        (other_schema, "reference promised", {"promised_fingerprint": FINGERPRINT, "fingerprint": FINGERPRINT + 1}),
    ]
    for message, said, facts in rows:
        pair, [number] = in_flight(named)
        with row(message=message[:64]):
            with pytest.raises(ProtocolError, match=said) as caught:
                pair.client.judge(number, message.ljust(receive_bytes(128), b"\0"))
            assert facts.items() <= caught.value.facts.items()
        assert pair.client.broken


def test_a_payload_cut_anywhere_breaks_the_session() -> None:
    named = ref(nbytes=40)
    message = payload(named)
    for length in range(len(message)):
        buffer = memoryview(bytearray(message).ljust(receive_bytes(40), b"\xaa"))  # an earlier answer of the same kind
        clear_trailer(buffer, HEADER_BYTES + 40)
        buffer[:length] = message[:length]
        pair, [number] = in_flight(named)
        if buffer[: len(message)] == message:
            continue  # what was cut off is zeros, and zeros were put there
        with row(length=length), pytest.raises(ProtocolError):
            pair.client.judge(number, buffer)
        assert pair.client.broken


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 0xFF))
def test_a_mutated_answer_is_the_same_payload_or_a_transport_error(mask: int) -> None:
    named = ref(nbytes=16)
    pair, numbers = in_flight(*[named] * 60)
    message = bytearray(payload(named))
    for position, number in zip((*range(0, HEADER_BYTES, 2), *range(HEADER_BYTES + 16, len(message))), numbers):  # noqa: B905 - as many as there are
        message[position] ^= mask
        try:
            pair.client.judge(number, message)
        except TransportError:
            pass
        else:  # the checksum's flag and word: what a reference without a checksum does not promise
            assert position in {*range(24, 32), *range(52, 56)}
        message[position] ^= mask


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    pair, [number] = in_flight(ref(nbytes=16))
    with pytest.raises(ProtocolError):
        pair.client.judge(number, garbage)
    assert pair.client.broken


def test_every_status_is_its_error_brings_the_servers_words_and_ends_the_attempt() -> None:
    rows: list[tuple[Status, type[TransportError]]] = [
        (Status.STALE, StaleSlotError),
        (Status.NOT_READY, NotReadyError),
        (Status.BUSY, BusyError),
        (Status.BAD_REQUEST, ProtocolError),
        (Status.UNAUTHORIZED, AuthenticationError),
        (Status.INTERNAL, PeerLostError),
        (Status.EMPTY, ProtocolError),
    ]
    assert {status for status, _ in rows} == set(Status) - {Status.OK}
    for status, expected in rows:
        pair, [number] = in_flight(ref())
        message = encode_error(status, "because of this", slot=2, generation=6)
        with row(status=status):
            with pytest.raises(expected, match="because of this") as caught:
                pair.client.judge(number, message)
            assert type(caught.value) is expected
            assert caught.value.facts == {"status": status.name, "slot": 2, "generation": 6}
            assert not pair.client.broken, "the connection goes on"
            assert pair.client.in_flight == 0


def test_an_error_text_beyond_its_limit_is_refused_before_it_is_read() -> None:
    for nbytes in (ERROR_TEXT_BYTES + 1, 1 << 46, (1 << 64) - 1):
        message = bytearray(encode_error(Status.STALE, "x" * ERROR_TEXT_BYTES))
        message[16:24] = nbytes.to_bytes(8, "little")
        pair, [number] = in_flight(ref(nbytes=4096))
        with row(nbytes=nbytes), pytest.raises(ProtocolError, match="more bytes than its kind"):
            pair.client.judge(number, message)


# --- Shared messages ---


def test_a_packed_fetch_has_one_channel_for_all_and_an_end_for_each() -> None:
    pair = Pair().open()
    names = [ref(slot, nbytes=slot * 10) for slot in range(4)]
    fetch = pair.client.ask(names, packed=True)
    decoded = decode_frame(fetch.frame)
    assert (decoded.flags, decoded.attempt) == (FLAG_PACKED, fetch.shared)
    assert fetch.shared < min(fetch.attempts)
    assert [name[3] for name in decoded.names] == fetch.attempts
    message = b"".join(payload(named) for named in names[:3]) + encode_error(
        Status.STALE, "x" * 500, room=message_bytes(30)
    )
    message = message.ljust(sum(message_bytes(named.nbytes) for named in names), b"\0")
    offset = 0
    for number, named in zip(fetch.attempts, names, strict=True):
        part = memoryview(message)[offset : offset + message_bytes(named.nbytes)]
        if named.slot == 3:
            with pytest.raises(StaleSlotError, match="x" * 48):
                pair.client.judge(number, part)
        else:
            pair.client.judge(number, part)
            pair.client.finish(number, delivered=True)
        offset += len(part)
    assert pair.client.in_flight == 0
    assert decode_frame(pair.client.ends_frame()).ends == tuple(number << 1 | 1 for number in fetch.attempts[:3])
    assert pair.client._awaited == {}  # noqa: SLF001 - every channel is free again


# --- TAKE ---


def taken(pair: Pair, *payloads: OfferedPayload, max_payloads: int = 4, max_bytes: int = 1000) -> list[Attempt]:
    asked = pair.client.take(max_payloads, max_bytes)
    take = pair.action(asked, Take)
    reply, attempts = pair.server.taken(take, payloads, pair.now)
    for attempt in attempts:
        pair.server.sent(attempt, pair.now)
    return pair.client.receive_offer(asked.attempt, reply.message)


def test_a_take_brings_envelopes_and_attempts_that_end_like_any_other() -> None:
    pair = Pair().open()
    payloads = [offered(ref(0, nbytes=300), b"first"), offered(ref(5, nbytes=700), b"")]
    asked = pair.client.take(4, 1000)
    reply, attempts = pair.server.taken(pair.action(asked, Take), payloads, pair.now)
    offer = pair.client.on_offer(asked.attempt, reply.message)
    assert (offer.ring_id, offer.fingerprint, offer.payloads, offer.reason) == (RING_ID, FINGERPRINT, payloads, "")
    taken = [Attempt(ref(0, nbytes=300)), Attempt(ref(5, nbytes=700))]
    pair.client.receive(offer, taken)
    assert [one.number for one in taken] == [one.number for one in attempts]
    assert pair.client.in_flight == 2
    for one in taken:
        pair.client.verify(one, payload(one.ref))
        pair.client.end(one, delivered=True)
    assert slots(pair) == [0, 5]
    assert pair.client.in_flight == 0
    frame = decode_frame(pair.client.ends_frame())
    assert frame.ends == tuple(one.number << 1 | 1 for one in taken)


def test_what_is_taken_leaves_the_window_of_names_alone() -> None:
    pair = Pair(window=Window(2, 1000)).open()
    taken(pair, offered(ref(0, nbytes=500)), offered(ref(1, nbytes=500)))
    assert pair.client.room(1000, 2)


def test_an_empty_offer_may_say_why() -> None:
    for text in ("", "the oldest payload has 5000 bytes"):
        pair = Pair().open()
        asked = pair.client.take(4, 1000, wait_ms=5)
        take = pair.action(asked, Take)
        with row(text=text):
            offer = pair.client.on_offer(asked.attempt, pair.server.nothing(take, text).message)
            assert (offer.payloads, offer.reason) == ([], text)
            assert pair.client._awaited == {}  # noqa: SLF001 - every channel is free again


def test_the_channels_that_an_offer_does_not_use_are_free_again() -> None:
    pair = Pair().open()
    [attempt] = taken(pair, offered(ref(0)))
    assert list(pair.client._awaited) == [attempt.number]  # noqa: SLF001 - its channel is not free yet


def test_an_offer_that_was_not_asked_for_breaks_the_session() -> None:
    small = OfferedPayload(1, 1, 10, None, 0, b"")
    rows: list[list[OfferedPayload]] = [
        [small._replace(slot=slot) for slot in range(5)],
        [small, small._replace(slot=2, nbytes=991)],
        [small._replace(nbytes=1001)],
        [small, small],
        [small._replace(generation=0)],
    ]
    for payloads in rows:
        pair = Pair().open()
        asked = pair.client.take(4, 1000)
        with row(payloads=payloads), pytest.raises(ProtocolError):
            pair.client.on_offer(asked.attempt, ok(encode_offer(payloads)))
        assert pair.client.broken
        assert pair.client.in_flight == 0


def test_offers_never_leave_the_window() -> None:
    pair = Pair(window=Window(2, 1000)).open()
    taken(pair, offered(ref(0)))
    asked = pair.client.take(4, 1000)
    with pytest.raises(ProtocolError, match="more than was asked"):
        pair.client.on_offer(asked.attempt, ok(encode_offer([offered(ref(1)), offered(ref(2))])))


# --- The other answers ---


def test_a_confirm_has_one_status_a_name_and_no_others() -> None:
    names = [ref(1), ref(2), ref(3)]
    pair = Pair().open()
    asked = pair.client.confirm(names)
    assert [name[:3] for name in frame_of(asked).names] == [(slot, 0, 6) for slot in (1, 2, 3)]
    statuses = [Status.STALE, Status.OK, Status.BUSY]
    assert pair.client.confirmed(asked.attempt, ok(bytes(statuses))) == statuses
    for body in (b"", b"\0\0", b"\0\0\0\0", b"\0\x02\0", b"\0\xff\0"):
        pair = Pair().open()
        asked = pair.client.confirm(names)
        with row(body=body), pytest.raises(ProtocolError, match="CONFIRM"):
            pair.client.confirmed(asked.attempt, ok(body))
        assert pair.client.broken


def test_a_schema_comes_whole_and_within_its_limit() -> None:
    pair = Pair().open()
    asked = pair.client.describe(RING_ID)
    assert frame_of(asked).ring_id == RING_ID
    assert pair.client.answered(asked.attempt, ok(b"s" * MAX_SCHEMA_BYTES)) == b"s" * MAX_SCHEMA_BYTES
    asked = pair.client.describe(RING_ID)
    with pytest.raises(ProtocolError, match="more bytes than were posted for it"):
        pair.client.answered(asked.attempt, ok(b"s" * (MAX_SCHEMA_BYTES + 1))[: asked.receive_bytes])
    assert pair.client.broken
    pair = Pair().open()
    with pytest.raises(StaleSlotError, match="another ring"):
        pair.client.answered(pair.client.describe(RING_ID).attempt, encode_error(Status.STALE, "another ring"))
    assert not pair.client.broken
