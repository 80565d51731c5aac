"""What an open server session does about TAKE, CONFIRM, DESCRIBE, shared messages, and another ring."""

from __future__ import annotations

import pytest

from tests.support.rows import row
from tests.unit.wire.session_rig import (
    RING_ID,
    SCHEMA,
    Pair,
    body_of,
    header_of,
    offered,
    ref,
    text_of,
)
from ucxx_transport.errors import StaleSlotError
from ucxx_transport.wire.actions import Attempt, Reply, Settle, Take
from ucxx_transport.wire.codec import decode_offer, encode_frame
from ucxx_transport.wire.frames import MAX_SCHEMA_BYTES, Frame, Kind, Status, Window, message_bytes
from ucxx_transport.wire.server_side import MAX_TAKES, Phase

FOREIGN = b"F" * 16


def test_another_ring_is_stale_and_the_connection_stays_usable() -> None:
    foreign = [ref(slot, ring_id=FOREIGN) for slot in (1, 2)]
    pair = Pair().open()
    fetch = pair.client.ask(foreign)
    replies = pair.actions(fetch.frame)
    for number, reply in zip(fetch.attempts, replies, strict=True):
        assert isinstance(reply, Reply)
        assert (reply.channel, reply.status) == (number, Status.STALE)
        with pytest.raises(StaleSlotError, match="another ring"):
            pair.client.judge(number, reply.message)
    fetch = pair.client.ask(foreign, packed=True)
    message = pair.reply(fetch)
    size = message_bytes(128)
    assert len(message) == 2 * size
    for index, number in enumerate(fetch.attempts):
        with pytest.raises(StaleSlotError, match="another ring"):
            pair.client.judge(number, message[index * size : (index + 1) * size])
    confirm = pair.client.confirm(foreign)
    assert pair.client.confirmed(confirm.attempt, pair.reply(confirm)) == [Status.STALE] * 2
    assert header_of(pair.reply(pair.client.describe(FOREIGN))).status is Status.STALE
    pair.client.ring_id = FOREIGN
    assert header_of(pair.reply(pair.client.take(1, 1))).status is Status.STALE
    assert pair.server.in_flight == {}
    assert pair.server.takes == {}
    pair.fetch(ref())


# --- TAKE, CONFIRM, DESCRIBE ---


def test_a_take_says_what_is_asked_for_and_until_when() -> None:
    pair = Pair().open()
    for newest in (False, True):
        asked = pair.client.take(3, 500, newest=newest, wait_ms=1500)
        take = pair.action(asked, Take)
        assert take == Take(asked.attempt, 3, 500, newest, pair.now + 1.5)
        assert pair.server.take_room(take) == (3, 500)
    assert len(pair.server.takes) == 2


def test_what_is_taken_is_offered_sent_and_ended_under_numbers_that_follow_the_takes() -> None:
    pair = Pair().open()
    asked = pair.client.take(4, 1000)
    take = pair.action(asked, Take)
    reply, attempts = pair.server.taken(take, [offered(ref(3), b"said"), offered(ref(4))], pair.now)
    assert reply.channel == asked.attempt
    assert decode_offer(body_of(reply.message)) == [offered(ref(3), b"said"), offered(ref(4))]
    assert [(one.number, one.slot) for one in attempts] == [(asked.attempt + 1, 3), (asked.attempt + 2, 4)]
    assert list(pair.server.in_flight) == [one.number for one in attempts]
    assert pair.server.takes == {}
    pair.server.sent(attempts[0], pair.now)
    ends = pair.actions(encode_frame(Frame(Kind.FETCH, 3, ends=(attempts[0].number << 1 | 1,))))
    assert ends == [attempts[0]]


def test_what_may_be_picked_depends_on_what_is_taken_already() -> None:
    pair = Pair(window=Window(3, 1000)).open()
    first = pair.action(pair.client.take(10, 5000), Take)
    assert pair.server.take_room(first) == (3, 5000), "where nothing else is taken, what was asked for"
    pair.fetch(ref(nbytes=800), ref(nbytes=100), ref(nbytes=100))
    assert pair.server.take_room(first) == (3, 5000), "names have a window of their own"
    _, attempts = pair.server.taken(first, [offered(ref(1, nbytes=300)), offered(ref(2, nbytes=300))], pair.now)
    second = pair.action(pair.client.take(10, 5000), Take)
    assert pair.server.take_room(second) == (1, 400)
    _, more = pair.server.taken(second, [offered(ref(3, nbytes=400))], pair.now)
    third = pair.action(pair.client.take(1, 100), Take)
    assert pair.server.take_room(third) == (0, 0)
    words = tuple(one.number << 1 for one in (*attempts, *more))
    pair.actions(encode_frame(Frame(Kind.FETCH, 6, ends=words)))
    assert pair.server.take_room(third) == (1, 100)


def test_a_take_that_finds_nothing_is_empty_or_what_the_port_says() -> None:
    for status, text in ((Status.EMPTY, ""), (Status.EMPTY, "5000 bytes"), (Status.NOT_READY, "no epoch yet")):
        pair = Pair().open()
        take = pair.action(pair.client.take(1, 1), Take)
        reply = pair.server.nothing(take, text, status)
        with row(status=status):
            assert (reply.status, text_of(reply.message), reply.channel) == (status, text, take.attempt)
            assert pair.server.takes == {}


def test_only_so_many_takes_wait_on_one_connection() -> None:
    pair = Pair().open()
    for _ in range(MAX_TAKES):
        pair.action(pair.client.take(1, 1, wait_ms=1000), Take)
    assert header_of(pair.reply(pair.client.take(1, 1))).status is Status.BUSY
    assert len(pair.server.takes) == MAX_TAKES
    assert pair.server.phase is Phase.OPEN


def test_a_confirm_is_settled_name_by_name() -> None:
    pair = Pair().open()
    asked = pair.client.confirm([ref(1), ref(2, generation=8)])
    settle = pair.action(asked, Settle)
    assert settle == Settle([(1, 6), (2, 8)], asked.attempt)
    reply = pair.server.settled(settle, [Status.BUSY, Status.OK])
    assert (body_of(reply.message), reply.channel) == (bytes([Status.BUSY, Status.OK]), asked.attempt)


def test_describe_carries_the_largest_schema_there_is() -> None:
    pair = Pair().open()
    assert body_of(pair.reply(pair.client.describe(RING_ID))) == SCHEMA
    pair = Pair(schema=bytes(MAX_SCHEMA_BYTES)).open()
    assert len(body_of(pair.reply(pair.client.describe(RING_ID)))) == MAX_SCHEMA_BYTES


def test_goodbye_is_answered_last() -> None:
    pair = Pair().open()
    asked = pair.client.bye()
    assert pair.client.answered(asked.attempt, pair.reply(asked)) == b""
    assert pair.server.phase is Phase.CLOSING


def shared(pair: Pair, *sizes: int) -> tuple[list[int], list[Attempt]]:
    return pair.fetch(*[ref(slot, nbytes=nbytes) for slot, nbytes in enumerate(sizes)], packed=True)


def test_a_refused_part_of_a_shared_message_is_as_long_as_its_payload_would_have_been() -> None:
    pair = Pair().open()
    _, attempts = shared(pair, 0, 100, 4000)
    for attempt in attempts:
        part = pair.server.refused_part(attempt, Status.STALE, "t" * 2000)
        with row(nbytes=attempt.nbytes):
            assert len(part) == message_bytes(attempt.nbytes)
            assert set(text_of(part)) == {"t"}
    assert pair.server.in_flight == {}


def test_a_shared_message_leaves_for_all_at_once() -> None:
    pair = Pair().open()
    numbers, attempts = shared(pair, 10, 20, 30)
    ends = (numbers[0] << 1 | 1, numbers[2] << 1)
    pair.actions(encode_frame(Frame(Kind.FETCH, 3, ends=ends)))
    pair.server.replied()
    assert [pair.server.sent(attempt, pair.now) for attempt in attempts] == [True, False, True]
    assert list(pair.server.in_flight) == [numbers[1]]
