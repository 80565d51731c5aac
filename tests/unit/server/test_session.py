"""The session's table: every phase meets every frame, and each pair has its one outcome."""

from __future__ import annotations

import itertools

import pytest

from tests.support.rows import row
from tests.unit.server.session_rig import (
    ATTEMPT,
    CLIENT_NONCE,
    LIMITS,
    NAMED,
    RING_ID,
    SCHEMA,
    SERVER_NONCE,
    TOKEN,
    at_phase,
    auth_with,
    body_of,
    header_of,
    session_with,
    text_of,
)
from ucxx_transport.server.session import LINGER_S, Action, Finish, Phase, Reply, Serve, Settle
from ucxx_transport.wire.codec import encode_request, token_mac
from ucxx_transport.wire.frames import (
    MAX_SCHEMA_BYTES,
    REQUEST_BYTES,
    Ack,
    Auth,
    Bye,
    Confirm,
    Describe,
    Hello,
    ReadRequest,
    Request,
    Status,
)

RIGHT_ACK = Ack(slot=NAMED.slot, generation=NAMED.generation, attempt=ATTEMPT, delivered=True)
FRAMES: dict[str, Request] = {
    "HELLO": Hello(reader=77, nonce=CLIENT_NONCE),
    "AUTH": auth_with(TOKEN),
    "READ": NAMED,
    "ACK": RIGHT_ACK,
    "CONFIRM": Confirm(request=NAMED),
    "DESCRIBE": Describe(ring_id=RING_ID),
    "BYE": Bye(),
}
GARBAGE = {"GARBAGE": b"\xde\xad" * 64, "BLANK": bytes(REQUEST_BYTES), "SHORT": b"UXTQ"}

# What is allowed; everything else closes.
ALLOWED: dict[tuple[Phase, str], tuple[type[Action], Phase]] = {
    (Phase.GREETING, "HELLO"): (Reply, Phase.CHALLENGED),
    (Phase.CHALLENGED, "AUTH"): (Reply, Phase.IDLE),
    (Phase.IDLE, "READ"): (Serve, Phase.SERVING),
    (Phase.IDLE, "CONFIRM"): (Settle, Phase.IDLE),
    (Phase.IDLE, "DESCRIBE"): (Reply, Phase.IDLE),
    (Phase.IDLE, "BYE"): (Reply, Phase.CLOSING),
    (Phase.SERVING, "ACK"): (Finish, Phase.IDLE),
}
BEFORE_THE_HANDSHAKE = {Phase.GREETING, Phase.CHALLENGED}
NEEDS_A_HANDSHAKE = {"READ", "CONFIRM", "DESCRIBE", "BYE", "AUTH"}


def test_every_frame_has_its_one_outcome() -> None:
    for phase in Phase:
        with row(phase=phase):
            for name, frame in FRAMES.items():
                session = at_phase(phase)
                action = session.receive(encode_request(frame), 50.0)
                kind, following = ALLOWED.get((phase, name), (Reply, Phase.CLOSING))
                assert (type(action), session.phase) == (kind, following), name
                if (phase, name) in ALLOWED:
                    assert not isinstance(action, Reply) or action.status is Status.OK, name
                    continue
                assert isinstance(action, Reply)
                refused = phase in BEFORE_THE_HANDSHAKE and name in NEEDS_A_HANDSHAKE
                assert action.status is (Status.UNAUTHORIZED if refused else Status.BAD_REQUEST), name
                assert header_of(action).nbytes > 0, "a refusal says why"


def test_bytes_that_are_no_frame_close_in_every_phase() -> None:
    for phase in Phase:
        with row(phase=phase):
            for frame in GARBAGE.values():
                session = at_phase(phase)
                action = session.receive(frame, 50.0)
                assert isinstance(action, Reply)
                assert action.status is Status.BAD_REQUEST
                assert session.phase is Phase.CLOSING
                assert session.deadline_s == 50.0 + LINGER_S


def test_nothing_reopens_a_session_that_is_closing() -> None:
    session = at_phase(Phase.CLOSING)
    for frame in FRAMES.values():
        assert isinstance(session.receive(encode_request(frame), 1.0), Reply)
        assert session.phase is Phase.CLOSING


def test_two_frames_in_a_row_never_reach_a_payload_without_the_handshake() -> None:
    for first, second in itertools.product(FRAMES.values(), repeat=2):
        session = session_with()
        session.receive(encode_request(first), 1.0)
        action = session.receive(encode_request(second), 2.0)
        assert not isinstance(action, Serve | Settle | Finish)


def test_without_a_token_hello_alone_opens() -> None:
    session = session_with(token=None)
    action = session.receive(encode_request(FRAMES["HELLO"]), 3.0)
    assert isinstance(action, Reply)
    assert session.phase is Phase.IDLE
    assert session.reader == 77
    assert not header_of(action).token_required
    assert body_of(action) == SERVER_NONCE


def test_with_a_token_hello_is_answered_by_a_challenge() -> None:
    session = session_with()
    action = session.receive(encode_request(FRAMES["HELLO"]), 3.0)
    assert isinstance(action, Reply)
    assert session.phase is Phase.CHALLENGED
    assert header_of(action).token_required
    assert body_of(action) == SERVER_NONCE


def test_the_right_token_opens_and_the_server_proves_its_own_knowledge() -> None:
    session = at_phase(Phase.CHALLENGED)
    action = session.receive(encode_request(auth_with(TOKEN)), 3.0)
    assert isinstance(action, Reply)
    assert body_of(action) == token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE)


def test_a_wrong_mac_is_unauthorized_and_closes() -> None:
    rows: list[bytes] = [
        auth_with(b"wrong").mac,
        auth_with(b"").mac,
        bytes(32),
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE),
        token_mac(TOKEN, "client", CLIENT_NONCE, bytes(32)),
    ]
    for mac in rows:
        with row(mac=mac):
            session = at_phase(Phase.CHALLENGED)
            action = session.receive(encode_request(Auth(mac=mac)), 3.0)
            assert isinstance(action, Reply)
            assert action.status is Status.UNAUTHORIZED
            assert session.phase is Phase.CLOSING
            assert TOKEN not in action.message


def test_a_failed_auth_cannot_be_tried_again() -> None:
    session = at_phase(Phase.CHALLENGED)
    session.receive(encode_request(auth_with(b"wrong")), 3.0)
    action = session.receive(encode_request(auth_with(TOKEN)), 3.0)
    assert isinstance(action, Reply)
    assert action.status is not Status.OK
    assert session.phase is Phase.CLOSING


def test_a_connection_above_the_cap_is_busy_whatever_it_says() -> None:
    for frame in (*map(encode_request, FRAMES.values()), *GARBAGE.values()):
        session = session_with(admitted=False)
        action = session.receive(frame, 5.0)
        assert isinstance(action, Reply)
        assert action.status is Status.BUSY
        assert session.phase is Phase.CLOSING


def test_a_foreign_ring_is_stale_and_the_connection_stays_usable() -> None:
    foreign = ReadRequest(ring_id=b"F" * 16, slot=1, generation=2, attempt=3, nbytes=4)
    for frame in (foreign, Confirm(request=foreign), Describe(ring_id=b"F" * 16)):
        session = at_phase(Phase.IDLE)
        action = session.receive(encode_request(frame), 9.0)
        assert isinstance(action, Reply)
        assert action.status is Status.STALE
        assert session.phase is Phase.IDLE
        assert session.deadline_s == 9.0 + LIMITS.idle_timeout_s
        assert isinstance(session.receive(encode_request(NAMED), 10.0), Serve)


def test_serve_names_exactly_what_was_asked_for() -> None:
    action = at_phase(Phase.IDLE).receive(encode_request(NAMED), 1.0)
    assert action == Serve(request=NAMED)


@pytest.mark.parametrize("delivered", [True, False])
def test_the_ack_decides_between_consumed_and_released(*, delivered: bool) -> None:
    ack = Ack(slot=NAMED.slot, generation=NAMED.generation, attempt=ATTEMPT, delivered=delivered)
    session = at_phase(Phase.SERVING)
    assert session.receive(encode_request(ack), 1.0) == Finish(delivered=delivered)
    assert session.phase is Phase.IDLE


@pytest.mark.parametrize(
    "ack",
    [
        Ack(slot=NAMED.slot + 1, generation=NAMED.generation, attempt=ATTEMPT, delivered=True),
        Ack(slot=NAMED.slot, generation=NAMED.generation + 1, attempt=ATTEMPT, delivered=True),
        Ack(slot=NAMED.slot, generation=NAMED.generation, attempt=ATTEMPT + 1, delivered=True),
    ],
    ids=["slot", "generation", "attempt"],
)
def test_an_ack_of_another_attempt_closes_and_consumes_nothing(ack: Ack) -> None:
    session = at_phase(Phase.SERVING)
    action = session.receive(encode_request(ack), 1.0)
    assert isinstance(action, Reply)
    assert action.status is Status.BAD_REQUEST
    assert session.phase is Phase.CLOSING


def test_a_second_ack_of_the_same_attempt_closes() -> None:
    session = at_phase(Phase.SERVING)
    session.receive(encode_request(RIGHT_ACK), 1.0)
    action = session.receive(encode_request(RIGHT_ACK), 1.0)
    assert isinstance(action, Reply)
    assert session.phase is Phase.CLOSING


def test_a_slot_the_ring_refuses_is_answered_by_name_and_the_session_goes_on() -> None:
    rows: list[Status] = [Status.STALE, Status.BUSY, Status.BAD_REQUEST, Status.INTERNAL]
    for status in rows:
        with row(status=status):
            session = at_phase(Phase.SERVING)
            reply = session.refused(status, "because", 7.0)
            header = header_of(reply)
            assert (header.status, header.slot, header.generation) == (status, NAMED.slot, NAMED.generation)
            assert text_of(reply) == "because"
            assert session.phase is Phase.IDLE
            assert session.deadline_s == 7.0 + LIMITS.idle_timeout_s
            assert isinstance(session.receive(encode_request(NAMED), 8.0), Serve)


def test_settled_answers_ok_or_stale() -> None:
    session = at_phase(Phase.IDLE)
    assert session.receive(encode_request(Confirm(request=NAMED)), 1.0) == Settle(request=NAMED)
    assert session.settled(Status.OK).status is Status.OK
    assert session.settled(Status.STALE).status is Status.STALE
    assert session.phase is Phase.IDLE


def test_describe_carries_the_schema() -> None:
    action = at_phase(Phase.IDLE).receive(encode_request(Describe(ring_id=RING_ID)), 1.0)
    assert isinstance(action, Reply)
    assert body_of(action) == SCHEMA


def test_a_schema_beyond_the_wires_limit_is_an_error_not_a_message() -> None:
    session = session_with(token=None, schema_bytes=bytes(MAX_SCHEMA_BYTES + 1))
    session.receive(encode_request(FRAMES["HELLO"]), 1.0)
    action = session.receive(encode_request(Describe(ring_id=RING_ID)), 1.0)
    assert isinstance(action, Reply)
    assert action.status is Status.INTERNAL
