"""The server's session as a table: every phase meets every frame, and each pair has its one outcome."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.rows import row
from tests.unit.wire.session_rig import (
    CLIENT_NONCE,
    RING_ID,
    SERVER_NONCE,
    TOKEN,
    Pair,
    header_of,
    payload,
    ref,
    text_of,
)
from ucxx_transport.wire.actions import Action, Attempt, Reply, Serve, Settle, Take
from ucxx_transport.wire.codec import encode_frame, token_mac
from ucxx_transport.wire.frames import FLAG_PACKED, Frame, Kind, Status, Window
from ucxx_transport.wire.server_side import Phase

NAME = (2, 0, 6, 5, 128)
PHASES = (Phase.GREETING, Phase.CHALLENGED, Phase.OPEN, Phase.CLOSING)
FRAMES: dict[str, Frame] = {
    "HELLO": Frame(Kind.HELLO, attempt=5, word=77, secret=CLIENT_NONCE),
    "AUTH": Frame(Kind.AUTH, attempt=5, secret=token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE)),
    "FETCH": Frame(Kind.FETCH, ring_id=RING_ID, names=(NAME,)),
    "TAKE": Frame(Kind.TAKE, ring_id=RING_ID, attempt=5, word=1000, max_payloads=4, wait_ms=500),
    "CONFIRM": Frame(Kind.CONFIRM, ring_id=RING_ID, attempt=5, names=((2, 0, 6, 0, 0),)),
    "DESCRIBE": Frame(Kind.DESCRIBE, ring_id=RING_ID, attempt=5),
    "BYE": Frame(Kind.BYE, attempt=5),
}
ALLOWED: dict[tuple[Phase, str], tuple[type[Action], Phase]] = {
    (Phase.GREETING, "HELLO"): (Reply, Phase.CHALLENGED),
    (Phase.CHALLENGED, "AUTH"): (Reply, Phase.OPEN),
    (Phase.OPEN, "FETCH"): (Serve, Phase.OPEN),
    (Phase.OPEN, "TAKE"): (Take, Phase.OPEN),
    (Phase.OPEN, "CONFIRM"): (Settle, Phase.OPEN),
    (Phase.OPEN, "DESCRIBE"): (Reply, Phase.OPEN),
    (Phase.OPEN, "BYE"): (Reply, Phase.CLOSING),
}
# What else the client's session would ask, with the sequence of the next frame.
NEXT = {Phase.GREETING: 1, Phase.CHALLENGED: 2, Phase.OPEN: 3, Phase.CLOSING: 4}


def at_phase(phase: Phase) -> Pair:
    """A pair with a token, its server brought to `phase` by legal frames."""
    pair, hello = Pair(token=TOKEN), b""
    for step in PHASES[: PHASES.index(phase)]:
        if step is Phase.GREETING:
            hello = pair.reply(pair.client.hello())
        elif step is Phase.CHALLENGED:
            auth = pair.client.on_welcome(hello)
            assert auth is not None
            pair.client.on_authenticated(pair.reply(auth))
        else:
            pair.reply(pair.client.bye())
    assert pair.server.phase is phase
    return pair


def closed_by(pair: Pair, frame: Frame | bytes, status: Status = Status.BAD_REQUEST) -> str:
    """The words of the last reply, to this frame; what came before it in the same frame is done."""
    *_, last = pair.actions(frame if isinstance(frame, bytes) else encode_frame(frame))
    assert isinstance(last, Reply), last
    assert last.status is status
    assert pair.server.phase is Phase.CLOSING
    return text_of(last.message)


def test_every_frame_has_its_one_outcome() -> None:
    for phase in PHASES:
        for name, frame in FRAMES.items():
            pair = at_phase(phase)
            with row(phase=phase, frame=name):
                actions = pair.actions(encode_frame(frame._replace(sequence=NEXT[phase])))
                if phase is Phase.CLOSING:
                    assert actions == [], "nothing reopens it"
                    continue
                [action] = actions
                kind, following = ALLOWED.get((phase, name), (Reply, Phase.CLOSING))
                assert (type(action), pair.server.phase) == (kind, following)
                if not isinstance(action, Reply):
                    continue
                assert action.channel == 5
                if (phase, name) in ALLOWED:
                    assert action.status is Status.OK
                    continue
                refused = phase is not Phase.OPEN and name != "HELLO"
                assert action.status is (Status.UNAUTHORIZED if refused else Status.BAD_REQUEST)
                assert header_of(action.message).nbytes > 0, "a refusal says why"


def test_bytes_that_are_no_frame_close_in_every_phase() -> None:
    for phase in PHASES[:-1]:
        for garbage in (b"\xde\xad" * 64, bytes(200), b"UXTQ"):
            with row(phase=phase, garbage=garbage):
                assert closed_by(at_phase(phase), garbage)


def test_a_frame_out_of_sequence_closes() -> None:
    for sequence in (0, 1, 2, 4, 1 << 63, (1 << 64) - 1):
        for frame in FRAMES.values():
            with row(sequence=sequence, frame=frame):
                words = closed_by(at_phase(Phase.OPEN), frame._replace(sequence=sequence))
                assert words == f"frame {sequence} came where 3 was due"


def test_two_frames_in_a_row_never_reach_a_payload_without_the_handshake() -> None:
    for first in FRAMES.values():
        for second in FRAMES.values():
            pair = Pair(token=TOKEN)
            pair.actions(encode_frame(first._replace(sequence=1)))
            actions = pair.actions(encode_frame(second._replace(sequence=2)))
            with row(first=first, second=second):
                assert not any(isinstance(action, Serve | Settle | Take | Attempt) for action in actions)


def test_no_end_comes_before_the_first_payload() -> None:
    for phase in (Phase.GREETING, Phase.CHALLENGED):
        for name in ("HELLO", "AUTH", "FETCH"):
            with row(phase=phase, frame=name):
                frame = FRAMES[name]._replace(sequence=NEXT[phase], ends=(3,))
                [last] = at_phase(phase).actions(encode_frame(frame))
                assert isinstance(last, Reply)
                assert last.status is not Status.OK


# --- Attempts and the window ---


def test_a_fetch_is_served_as_it_names_it() -> None:
    pair = Pair().open()
    fetch = pair.client.ask([ref(2, nbytes=128), ref(7, generation=9, nbytes=0)])
    served = pair.action(fetch, Serve)
    assert [(one.slot, one.generation, one.nbytes, one.number) for one in served.attempts] == [
        (2, 6, 128, fetch.attempts[0]),
        (7, 9, 0, fetch.attempts[1]),
    ]
    assert [one.number for one in served.attempts] == fetch.attempts
    assert list(pair.server.in_flight) == fetch.attempts


def test_attempts_that_are_not_new_close() -> None:
    first, second = (2, 0, 6, 20, 128), (3, 0, 6, 21, 128)
    packed = Frame(Kind.FETCH, 2, RING_ID, FLAG_PACKED, 19, names=(first, second))
    rows: list[tuple[Frame, Frame | None]] = [
        (Frame(Kind.FETCH, 2, RING_ID, names=((2, 0, 6, 1, 128),)), None),
        (Frame(Kind.FETCH, 2, RING_ID, names=((2, 0, 6, 0, 128),)), None),
        (Frame(Kind.FETCH, 2, RING_ID, names=((2, 0, 6, 1 << 16, 128),)), None),
        (Frame(Kind.FETCH, 2, RING_ID, names=(first, first)), None),
        (Frame(Kind.FETCH, 2, RING_ID, names=(second, first)), None),
        (packed._replace(attempt=1), None),
        (packed._replace(attempt=20), None),
        (Frame(Kind.FETCH, 2, RING_ID, names=(first,)), Frame(Kind.FETCH, 3, RING_ID, names=(first,))),
        (packed, Frame(Kind.FETCH, 3, RING_ID, names=(second,))),
        (packed, packed._replace(sequence=3)),
        (FRAMES["TAKE"]._replace(sequence=2, attempt=20), Frame(Kind.FETCH, 3, RING_ID, names=((1, 0, 1, 24, 0),))),
        (FRAMES["DESCRIBE"]._replace(sequence=2, attempt=20), FRAMES["BYE"]._replace(sequence=3, attempt=20)),
    ]
    for frame, following in rows:
        pair = Pair().open()
        with row(frame=frame, following=following):
            if following is not None:
                pair.actions(encode_frame(frame))
                assert pair.server.phase is Phase.OPEN
            assert "not new" in closed_by(pair, following or frame)


def test_more_than_the_window_closes() -> None:
    rows: list[tuple[list[int], list[int], bool]] = [
        ([10] * 3, [], True),
        ([10] * 4, [], False),
        ([10] * 2, [10], True),
        ([10] * 3, [10], False),
        ([600, 401], [], False),
        ([600, 400], [], True),
        ([600], [401], False),
        ([1001], [], True),
        ([1 << 40], [], True),
        ([1001], [0], False),
    ]
    for first, second, fits in rows:
        pair = Pair(window=Window(3, 1000)).open()
        with row(first=first, second=second):
            frames = [pair.client.ask([ref(nbytes=nbytes) for nbytes in sizes]) for sizes in (first, second) if sizes]
            if fits:
                for fetch in frames:
                    pair.action(fetch, Serve)
                continue
            for fetch in frames[:-1]:
                pair.action(fetch, Serve)
            assert "window" in closed_by(pair, frames[-1].frame)
            assert len(pair.server.in_flight) == len(first) * (len(frames) - 1), "nothing of it is served"


def test_ends_make_room_for_the_names_of_their_own_frame() -> None:
    pair = Pair(window=Window(2, 1000)).open()
    for _ in range(5):
        assert len(pair.deliver(ref(0, nbytes=500), ref(1, nbytes=500))) == 2
    assert len(pair.server.in_flight) == 2


def test_a_refused_name_leaves_the_window_and_the_connection_goes_on() -> None:
    for status in (Status.STALE, Status.BUSY, Status.NOT_READY, Status.BAD_REQUEST, Status.INTERNAL):
        pair = Pair(window=Window(1, 1000)).open()
        [number], [attempt] = pair.fetch(ref())
        reply = pair.server.refused(attempt, status, "because")
        with row(status=status):
            header = header_of(reply.message)
            assert (header.status, header.slot, header.generation) == (status, 2, 6)
            assert (text_of(reply.message), reply.channel) == ("because", number)
            assert pair.server.in_flight == {}
            assert "not in flight" in closed_by(pair, Frame(Kind.FETCH, 3, ends=(number << 1,)))


# --- Ends ---


@pytest.mark.parametrize("delivered", [True, False])
def test_an_attempt_is_over_when_it_has_ended_and_its_message_has_left_in_any_order(*, delivered: bool) -> None:
    pair = Pair().open()
    [number], [attempt] = pair.fetch(ref())
    assert not pair.server.sent(attempt, pair.now)
    pair.client.judge(number, payload(ref()))
    pair.client.finish(number, delivered=delivered)
    assert pair.actions(pair.client.ends_frame()) == [attempt]
    assert (attempt.delivered, attempt.sent_s) == (delivered, pair.now)
    assert pair.server.leaving == {}
    [number], [attempt] = pair.fetch(ref())
    pair.client.judge(number, payload(ref()))
    pair.client.finish(number, delivered=delivered)
    assert pair.actions(pair.client.ends_frame()) == [attempt]
    assert (attempt.delivered, attempt.sent_s) == (delivered, None)
    assert list(pair.server.leaving) == [number]
    assert pair.server.sent(attempt, pair.now)
    assert pair.server.leaving == {}


def test_ends_are_done_before_what_their_frame_asks_for() -> None:
    ask: list[Callable[[Pair], bytes]] = [
        lambda pair: pair.client.ask([ref(9)]).frame,
        lambda pair: pair.client.take(4, 1000).frame,
        lambda pair: pair.client.confirm([ref(9)]).frame,
        lambda pair: pair.client.describe(RING_ID).frame,
        lambda pair: pair.client.bye().frame,
    ]
    for number, frame in enumerate(ask):
        pair = Pair().open()
        attempts = pair.deliver(ref(0), ref(1))
        first, second, third = pair.actions(frame(pair))
        with row(number=number):
            assert [first, second] == attempts
            assert not isinstance(third, Attempt)


def test_an_end_of_what_is_not_in_flight_closes_and_the_ends_before_it_count() -> None:
    for word in (0, 1, 99 << 1 | 1, (1 << 64) - 1):
        pair = Pair().open()
        [number], [attempt] = pair.fetch(ref())
        frame = Frame(Kind.FETCH, 3, RING_ID, names=((1, 0, 1, 50, 0),), ends=(number << 1 | 1, word))
        with row(word=word):
            first, last = pair.actions(encode_frame(frame))
            assert first == attempt
            assert isinstance(last, Reply)
            assert pair.server.phase is Phase.CLOSING
            assert pair.server.in_flight == {}, "what it names is not served"


def test_an_attempt_cannot_end_twice() -> None:
    for ends in ((5, 5), (5, 4), (4, 5)):
        pair = Pair().open()
        [number], _ = pair.fetch(ref())
        assert number == 2
        with row(ends=ends):
            assert "not in flight" in closed_by(pair, Frame(Kind.FETCH, 3, ends=ends))


def test_a_lone_name_and_a_lone_end_are_read_as_in_any_other_frame() -> None:
    """They come on a straight path; where an earlier reply has not left, on the common one."""
    name = Frame(Kind.FETCH, 4, RING_ID, names=((2, 0, 6, 20, 128),))
    words = [(2, 0, 0, 20, 128), (2, 1, 6, 20, 128), (2, 0, 6, 3, 128), (2, 0, 6, 1 << 16, 1), (2, 0, 6, 1 << 63, 1)]
    rows = [name._replace(names=(one,)) for one in (*words, (2, 0, 6, 20, 901), (2, 0, 6, 20, 99))]
    rows += [name, name._replace(ring_id=b"F" * 16), name._replace(ends=(4,)), name._replace(sequence=5)]
    rows += [Frame(Kind.FETCH, sequence, RING_ID, ends=(end,)) for sequence, end in ((4, 5), (4, 4), (4, 99), (3, 5))]
    for frame in rows:
        for cut in (None, -8):
            outcomes = []
            for has_unsent in (False, True):
                pair = Pair(window=Window(2, 1000)).open()
                pair.fetch(ref(nbytes=100))
                describe = pair.action(pair.client.describe(RING_ID), Reply)
                assert describe.status is Status.OK
                if not has_unsent:
                    pair.server.replied()
                actions = pair.actions(encode_frame(frame)[:cut])
                numbers = [(type(one), getattr(one, "number", 0), getattr(one, "delivered", None)) for one in actions]
                served = [one.number for action in actions if isinstance(action, Serve) for one in action.attempts]
                texts = [text_of(action.message) for action in actions if isinstance(action, Reply)]
                outcomes.append((numbers, served, texts, pair.server.phase, list(pair.server.in_flight)))
            with row(frame=frame, cut=cut):
                assert outcomes[0] == outcomes[1]
