"""The time a connection may spend in each phase."""

from __future__ import annotations

import pytest

from tests.support.rows import row
from tests.unit.server.session_rig import (
    ATTEMPT,
    CLIENT_NONCE,
    LIMITS,
    NAMED,
    RING_ID,
    TOKEN,
    at_phase,
    auth_with,
    session_with,
)
from ucxx_transport.server.session import LINGER_S, Phase
from ucxx_transport.wire.codec import encode_request
from ucxx_transport.wire.frames import Ack, Bye, Confirm, Describe, Hello, Request

START = 1000.0


def test_a_new_connection_has_the_first_frame_limit() -> None:
    assert session_with(now=START).deadline_s == START + LIMITS.first_frame_timeout_s


def test_the_first_frame_limit_covers_the_whole_handshake() -> None:
    session = session_with(now=START)
    session.receive(encode_request(Hello(reader=1, nonce=CLIENT_NONCE)), START + 4.0)
    assert session.phase is Phase.CHALLENGED
    assert session.deadline_s == START + LIMITS.first_frame_timeout_s


@pytest.mark.parametrize(
    "frame", [Describe(ring_id=RING_ID), Confirm(request=NAMED), Describe(ring_id=b"F" * 16)], ids=repr
)
def test_every_frame_of_an_idle_connection_renews_the_idle_limit(frame: Request) -> None:
    session = at_phase(Phase.IDLE, now=START)
    assert session.deadline_s == START + LIMITS.idle_timeout_s
    session.receive(encode_request(frame), START + 100.0)
    assert session.deadline_s == START + 100.0 + LIMITS.idle_timeout_s


def test_the_end_of_the_handshake_starts_the_idle_limit() -> None:
    session = at_phase(Phase.CHALLENGED, now=START)
    session.receive(encode_request(auth_with(TOKEN)), START + 1.0)
    assert session.deadline_s == START + 1.0 + LIMITS.idle_timeout_s


def test_a_payload_under_way_has_the_send_limit() -> None:
    session = at_phase(Phase.IDLE, now=START)
    session.receive(encode_request(NAMED), START + 2.0)
    assert session.deadline_s == START + 2.0 + LIMITS.send_timeout_s


def test_once_sent_the_acknowledgement_has_its_own_shorter_limit() -> None:
    session = at_phase(Phase.SERVING, now=START)
    session.sent(START + 1.0)
    assert session.deadline_s == START + 1.0 + LIMITS.ack_timeout_s


def test_being_told_again_that_the_payload_left_never_extends_the_limit() -> None:
    session = at_phase(Phase.SERVING, now=START)
    session.sent(START + 1.0)
    session.sent(START + 9.0)
    assert session.deadline_s == START + 1.0 + LIMITS.ack_timeout_s


def test_a_send_that_ends_late_does_not_gain_time_either() -> None:
    session = at_phase(Phase.SERVING, now=START)
    session.sent(START + LIMITS.send_timeout_s - 1.0)
    assert session.deadline_s == START + LIMITS.send_timeout_s


def test_sent_means_nothing_outside_serving() -> None:
    for phase in [phase for phase in Phase if phase is not Phase.SERVING]:
        with row(phase=phase):
            session = at_phase(phase, now=START)
            before = session.deadline_s
            session.sent(START - 500.0)
            assert session.deadline_s == before


def test_an_acknowledged_payload_puts_the_connection_back_to_idle() -> None:
    session = at_phase(Phase.SERVING, now=START)
    ack = Ack(slot=NAMED.slot, generation=NAMED.generation, attempt=ATTEMPT, delivered=True)
    session.receive(encode_request(ack), START + 3.0)
    assert session.deadline_s == START + 3.0 + LIMITS.idle_timeout_s


def test_the_last_word_lingers_for_a_moment_only() -> None:
    session = at_phase(Phase.IDLE, now=START)
    session.receive(encode_request(Bye()), START + 3.0)
    assert session.deadline_s == START + 3.0 + LINGER_S


def test_every_phase_has_a_limit() -> None:
    for phase in Phase:
        with row(phase=phase):
            assert (
                START
                < at_phase(phase, now=START).deadline_s
                <= START + max(LIMITS.idle_timeout_s, LIMITS.send_timeout_s)
            )
