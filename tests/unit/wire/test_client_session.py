"""The client's session: numbers, window, ends, and what is owed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.rows import row
from tests.unit.wire.session_rig import RING_ID, Pair, frame_of, in_flight, ok, payload, ref
from ucxx_transport.errors import (
    BusyError,
    StaleSlotError,
)
from ucxx_transport.wire.actions import Attempt, Serve
from ucxx_transport.wire.client_side import Asked
from ucxx_transport.wire.codec import decode_frame, encode_error
from ucxx_transport.wire.frames import (
    MAX_CHANNEL,
    Kind,
    Status,
    Window,
)

# --- Numbers and channels ---


def test_attempts_and_frames_are_counted_from_one() -> None:
    pair = Pair()
    hello = frame_of(pair.client.hello())
    assert (hello.attempt, hello.sequence) == (1, 1)
    pair = Pair().open()
    fetch = pair.client.ask([ref(0), ref(1)])
    assert (fetch.attempts, decode_frame(fetch.frame).sequence) == ([2, 3], 2)
    assert (frame_of(pair.client.describe(RING_ID)).attempt, frame_of(pair.client.bye()).sequence) == (4, 4)


def test_channel_zero_and_channels_that_await_an_answer_are_skipped() -> None:
    pair, [late] = in_flight(ref(0))
    seen = [late]
    while len(seen) < MAX_CHANNEL + 100:
        names = [ref(1)] * 60
        numbers, attempts = pair.fetch(*names)
        for number, attempt in zip(numbers, attempts, strict=True):
            pair.server.sent(attempt, pair.now)
            pair.client.judge(number, payload(ref(1)))
            pair.client.finish(number, delivered=False)
        seen += numbers
    assert seen == sorted(set(seen))
    assert all(number & MAX_CHANNEL for number in seen)
    assert [number for number in seen if number & MAX_CHANNEL == late] == [late]
    pair.client.judge(late, payload(ref(0)))


def test_a_take_has_a_run_of_numbers_without_a_gap() -> None:
    pair = Pair().open()
    skipping = [pair.client.describe(RING_ID).attempt for _ in range(3)]
    pair.client._last = MAX_CHANNEL - 5  # noqa: SLF001 - near the end of the channels, which are many
    asked = pair.client.take(16, 1000)
    assert asked.attempt == (1 << 16) + 5  # 65536 has no channel, and 2, 3 and 4 await answers
    assert [channel & MAX_CHANNEL for channel in skipping] == [2, 3, 4]
    assert pair.client.describe(RING_ID).attempt == asked.attempt + 17


# --- The window; how much of it a frame uses, `tests/unit/client/test_ports.py` says ---


def test_an_attempt_leaves_the_window_when_its_end_is_queued_or_it_is_refused() -> None:
    for delivered in (True, False):
        pair = Pair(window=Window(2, 1000)).open()
        numbers, _ = pair.fetch(ref(0), ref(1))
        assert not pair.client.room(0)
        pair.client.judge(numbers[0], payload(ref(0)))
        assert not pair.client.room(0)
        pair.client.finish(numbers[0], delivered=delivered)
        assert pair.client.room(0)
        with pytest.raises(StaleSlotError):
            pair.client.judge(numbers[1], encode_error(Status.STALE, ""))
        assert pair.client.room(1000, 2)
        assert pair.client.in_flight == 0
        assert pair.client.ends


# --- Ends ---


def test_the_next_frame_of_any_kind_takes_all_ends_along() -> None:
    ask: list[Callable[[Pair], bytes]] = [
        lambda pair: pair.client.ask([ref(9)]).frame,
        lambda pair: pair.client.ask([ref(8), ref(9)], packed=True).frame,
        lambda pair: pair.client.take(4, 1000).frame,
        lambda pair: pair.client.confirm([ref(9)]).frame,
        lambda pair: pair.client.describe(RING_ID).frame,
        lambda pair: pair.client.bye().frame,
        lambda pair: bytes(pair.client.ends_frame()),
    ]
    for number, frame in enumerate(ask):
        pair = Pair().open()
        attempts = pair.deliver(ref(0), ref(1), delivered=False)
        with row(number=number):
            assert pair.client.ends
            decoded = decode_frame(frame(pair))
            assert decoded.ends == tuple(attempt.number << 1 for attempt in attempts)
            assert not pair.client.ends


def test_ends_alone_are_a_fetch_without_names_and_await_nothing() -> None:
    pair = Pair().open()
    [attempt] = pair.deliver(ref(0))
    before = dict(pair.client._awaited)  # noqa: SLF001 - no answer will come
    decoded = decode_frame(pair.client.ends_frame())
    assert (decoded.kind, decoded.names, decoded.ends) == (Kind.FETCH, (), (attempt.number << 1 | 1,))
    assert pair.client._awaited == before  # noqa: SLF001 - as above


def test_an_attempt_is_ended_once_and_only_after_it_has_arrived() -> None:
    pair, [number] = in_flight(ref(0))
    with pytest.raises(KeyError):
        pair.client.finish(number, delivered=True)
    pair.client.judge(number, payload(ref(0)))
    pair.client.finish(number, delivered=True)
    with pytest.raises(KeyError):
        pair.client.finish(number, delivered=True)
    with pytest.raises(KeyError):
        pair.client.judge(number, payload(ref(0)))
    pair, [number] = in_flight(ref(0))
    with pytest.raises(BusyError):
        pair.client.judge(number, encode_error(Status.BUSY, ""))
    with pytest.raises(KeyError):
        pair.client.finish(number, delivered=False)


def test_a_lone_payload_is_asked_for_and_ended_by_the_same_bytes_as_several() -> None:
    one, several = Pair().open(), Pair().open()
    for _ in range(3):
        asked, fetch = one.client.ask_one(ref()), several.client.ask([ref()])
        assert (asked.frame, [asked.attempt]) == (fetch.frame, fetch.attempts)
        for pair, number in ((one, asked.attempt), (several, fetch.attempts[0])):
            [attempt] = pair.action(asked.frame, Serve).attempts
            pair.server.sent(attempt, pair.now)
            pair.client.judge(number, payload(ref()))
        for pair, number in ((one, asked.attempt), (several, fetch.attempts[0])):
            pair.client.finish(number, delivered=True)
        frame = several.client.ends_frame()
        assert one.client.ends_frame() == frame
        assert (slots(one), slots(several)) == ([2], [2])
        assert [len(pair.actions(frame)) for pair in (one, several)] == [1, 1]
    assert (one.client.in_flight, one.client.ends) == (0, [])


def test_a_lone_payload_takes_the_ends_along_that_wait() -> None:
    pair = Pair().open()
    waiting = pair.deliver(ref(0), ref(1))
    asked = pair.client.ask_one(ref(2))
    assert decode_frame(asked.frame).ends == tuple(attempt.number << 1 | 1 for attempt in waiting)
    pair.action(asked, Serve)
    pair.deliver(ref(3))
    pair.client.judge(asked.attempt, payload(ref(2)))
    pair.client.finish(asked.attempt, delivered=False)
    ends = decode_frame(pair.client.ends_frame()).ends
    assert ends == (asked.attempt + 1 << 1 | 1, asked.attempt << 1)


# --- What is owed ---


def slots(pair: Pair) -> list[int]:
    return sorted(named.slot for named in pair.client.owed())


def test_a_delivery_is_owed_until_an_answer_to_its_frame_or_a_later_one() -> None:
    pair = Pair().open()
    pair.deliver(ref(0))
    assert slots(pair) == [0], "its end waits"
    pair.actions(pair.client.ends_frame())
    assert slots(pair) == [0], "its end has left, which proves nothing"
    numbers, _ = pair.fetch(ref(1))
    assert slots(pair) == [0]
    pair.client.judge(numbers[0], payload(ref(1)))
    assert slots(pair) == [], "the server has answered a later frame"


def test_an_answer_to_an_earlier_frame_proves_nothing_of_a_later_one() -> None:
    pair = Pair().open()
    early, _ = pair.fetch(ref(5))
    pair.deliver(ref(0))
    pair.actions(pair.client.ends_frame())
    pair.client.judge(early[0], payload(ref(5)))
    assert slots(pair) == [0]


def test_any_kind_of_answer_proves_what_came_with_its_frame() -> None:
    answers: list[tuple[str, Callable[[Pair], object]]] = [
        ("refused", lambda pair: refuse(pair, *pair.fetch(ref(1)))),
        ("described", lambda pair: answered(pair.client.answered, pair.client.describe(RING_ID), ok(b"schema"))),
        ("confirmed", lambda pair: answered(pair.client.confirmed, pair.client.confirm([ref(1)]), ok(b"\0"))),
        ("farewell", lambda pair: answered(pair.client.answered, pair.client.bye(), ok(b""))),
        ("empty", lambda pair: answered(pair.client.on_offer, pair.client.take(1, 9), encode_error(Status.EMPTY, ""))),
        ("busy", lambda pair: answered(pair.client.on_offer, pair.client.take(1, 9), encode_error(Status.BUSY, ""))),
    ]
    for name, answer in answers:
        pair = Pair().open()
        pair.deliver(ref(0))
        with row(name=name):
            assert slots(pair) == [0]
            answer(pair)
            assert slots(pair) == []


def refuse(pair: Pair, numbers: list[int], _: list[Attempt]) -> None:
    with pytest.raises(StaleSlotError):
        pair.client.judge(numbers[0], encode_error(Status.STALE, ""))


def answered(judge: Callable[[int, bytes], object], asked: Asked, message: bytes) -> None:
    try:
        judge(asked.attempt, message)
    except BusyError:
        return


def test_what_was_not_delivered_is_not_owed() -> None:
    pair = Pair().open()
    pair.deliver(ref(0), delivered=False)
    assert slots(pair) == []
    pair.actions(pair.client.ends_frame())
    assert slots(pair) == []


def test_an_unanswered_confirm_stays_owed() -> None:
    pair = Pair().open()
    asked = pair.client.confirm([ref(3), ref(4)])
    assert slots(pair) == [3, 4]
    assert pair.client.confirmed(asked.attempt, ok(bytes([Status.OK, Status.STALE]))) == [Status.OK, Status.STALE]
    assert slots(pair) == []
