"""The time a connection may spend in each phase, and what it may leave unread."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.rows import row
from tests.unit.wire.session_rig import LIMITS, RING_ID, TOKEN, Pair, offered, ref, text_of
from ucxx_transport.wire.actions import Reply, Serve, Take
from ucxx_transport.wire.codec import encode_frame
from ucxx_transport.wire.frames import FLAG_PACKED, MAX_NAMES, Frame, Kind, Status
from ucxx_transport.wire.server_side import LINGER_S, MAX_UNSENT, Phase

START = 1000.0
IDLE = "idle_evictions"
DELIVERY = "delivery_timeouts"


def test_the_first_frame_limit_covers_the_whole_handshake() -> None:
    pair = Pair(token=TOKEN)
    limit = (START + LIMITS.first_frame_timeout_s, "handshake_timeouts")
    assert pair.server.limit() == limit
    pair.now += 4.0
    auth = pair.client.on_welcome(pair.reply(pair.client.hello()))
    assert auth is not None
    assert pair.server.limit() == limit
    pair.reply(auth)
    assert pair.server.limit() == (START + 4.0 + LIMITS.idle_timeout_s, IDLE)


def test_every_frame_of_an_idle_connection_renews_its_limit() -> None:
    pair = Pair().open()
    pair.deliver(ref())
    frames: list[Callable[[], bytes]] = [
        pair.client.ends_frame,
        lambda: pair.client.describe(RING_ID).frame,
        lambda: pair.client.confirm([ref()]).frame,
        lambda: pair.client.ask([ref(ring_id=b"F" * 16)]).frame,
    ]
    for number, frame in enumerate(frames):
        pair.now += 100.0
        pair.actions(frame())
        with row(number=number):
            assert pair.server.limit() == (pair.now + LIMITS.idle_timeout_s, IDLE)


def test_a_payload_has_the_send_limit_and_then_that_of_its_end() -> None:
    pair = Pair().open()
    _, [attempt] = pair.fetch(ref())
    assert pair.server.limit() == (START + LIMITS.send_timeout_s, DELIVERY)
    pair.now += 3.0
    pair.server.sent(attempt, pair.now)
    assert pair.server.limit() == (START + 3.0 + LIMITS.ack_timeout_s, DELIVERY)


def test_the_earliest_limit_of_all_attempts_counts() -> None:
    pair = Pair().open()
    _, [first, second] = pair.fetch(ref(0), ref(1))
    pair.now += 1.0
    pair.server.sent(second, pair.now)
    assert pair.server.limit() == (START + 1.0 + LIMITS.ack_timeout_s, DELIVERY)
    pair.actions(encode_frame(Frame(Kind.FETCH, 3, ends=(second.number << 1,))))
    assert pair.server.limit() == (START + 1.0 + LIMITS.send_timeout_s, DELIVERY), "something moved at 1.0"
    pair.now += 5.0
    pair.server.sent(first, pair.now)
    assert pair.server.limit() == (START + 6.0 + LIMITS.ack_timeout_s, DELIVERY)


def test_new_frames_do_not_extend_the_limit_of_an_attempt() -> None:
    pair = Pair().open()
    _, [attempt] = pair.fetch(ref())
    pair.now += 30.0
    pair.actions(pair.client.describe(RING_ID).frame)
    assert pair.server.limit() == (START + LIMITS.send_timeout_s, DELIVERY)
    pair.server.sent(attempt, pair.now)
    pair.now += 5.0
    pair.actions(pair.client.describe(RING_ID).frame)
    assert pair.server.limit() == (START + 30.0 + LIMITS.ack_timeout_s, DELIVERY)


def test_an_ended_attempt_whose_message_does_not_leave_keeps_the_send_limit() -> None:
    pair = Pair().open()
    _, [attempt] = pair.fetch(ref())
    pair.now += 3.0
    pair.actions(encode_frame(Frame(Kind.FETCH, 3, ends=(attempt.number << 1,))))
    assert pair.server.limit() == (START + LIMITS.send_timeout_s, DELIVERY)
    pair.server.sent(attempt, pair.now)
    assert pair.server.limit() == (START + 3.0 + LIMITS.idle_timeout_s, IDLE)


def test_a_take_that_waits_is_not_idle() -> None:
    pair = Pair().open()
    take = pair.action(pair.client.take(1, 1, wait_ms=60_000), Take)
    assert pair.server.limit() == (START + 60.0 + LIMITS.idle_timeout_s, IDLE)
    pair.server.taken(take, [offered(ref(nbytes=1))], START + 50.0)
    assert pair.server.limit() == (START + 50.0 + LIMITS.send_timeout_s, DELIVERY)


def test_the_last_reply_lingers_for_a_moment_only() -> None:
    for frame in (Frame(Kind.BYE, 2, attempt=9), Frame(Kind.HELLO, 2, attempt=9, word=1)):
        pair = Pair().open()
        pair.now += 3.0
        pair.actions(encode_frame(frame))
        with row(frame=frame):
            assert pair.server.phase is Phase.CLOSING
            assert pair.server.limit() == (pair.now + LINGER_S, "")


# --- A peer that reads nothing ---


def rejected(pair: Pair, frame: bytes) -> bool:
    *_, last = pair.actions(frame)
    if not isinstance(last, Reply) or last.status is not Status.BAD_REQUEST:
        return False
    assert "not read" in text_of(last.message)
    return True


def test_replies_that_are_not_read_are_bounded() -> None:
    pair = Pair().open()
    count = 0
    while not rejected(pair, pair.client.describe(RING_ID).frame):
        count += 1
        assert count <= MAX_UNSENT + 1
    pair = Pair().open()
    for _ in range(10 * MAX_UNSENT):
        pair.reply(pair.client.describe(RING_ID))


def test_refusals_that_are_not_read_are_bounded() -> None:
    pair = Pair().open()
    replies, sequence = 0, 2
    while True:
        names = tuple((1, 0, 1, sequence * 100 + index, 10) for index in range(MAX_NAMES))
        actions = pair.actions(encode_frame(Frame(Kind.FETCH, sequence, b"F" * 16, names=names)))
        sequence += 1
        if pair.server.phase is Phase.CLOSING:
            break
        replies += len(actions)
    assert MAX_NAMES < replies <= MAX_UNSENT + MAX_NAMES


def test_ended_attempts_whose_messages_are_not_read_are_bounded() -> None:
    pair = Pair().open()
    sequence, messages = 2, 0
    ends: tuple[int, ...] = ()
    while True:
        names = tuple((1, 0, 1, sequence * 100 + index, 10) for index in range(MAX_NAMES))
        *_, last = pair.actions(encode_frame(Frame(Kind.FETCH, sequence, RING_ID, names=names, ends=ends)))
        if not isinstance(last, Serve):
            break
        messages += len(last.attempts)
        ends, sequence = tuple(name[3] << 1 for name in names), sequence + 1
    assert pair.server.phase is Phase.CLOSING
    assert MAX_NAMES < messages <= MAX_UNSENT + 2 * MAX_NAMES


def test_shared_messages_that_are_not_read_are_bounded_even_if_all_in_them_is_refused() -> None:
    pair = Pair().open()
    sequence, messages = 2, 0
    while True:
        names = ((1, 0, 1, sequence * 10 + 1, 10), (2, 0, 1, sequence * 10 + 2, 10))
        frame = Frame(Kind.FETCH, sequence, RING_ID, FLAG_PACKED, sequence * 10, names=names)
        [served] = pair.actions(encode_frame(frame))
        if not isinstance(served, Serve):
            break
        for attempt in served.attempts:
            pair.server.refused_part(attempt, Status.STALE, "")
        messages, sequence = messages + 1, sequence + 1
    assert pair.server.phase is Phase.CLOSING
    assert messages == MAX_UNSENT + 1
