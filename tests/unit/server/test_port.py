"""One port and its connections: what peers do wrong costs them their own connection, and others nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.raw_peer import NONCE, READER, RawPeer
from tests.support.ring_owners import acting_for
from tests.support.rows import row
from tests.unit.server.port_rig import PortRig, open_rig
from ucxx_transport.machine import Owner
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.server.connection import FRAMES_POSTED, MAX_FRAMES
from ucxx_transport.server.counters import BEAT
from ucxx_transport.server.port import SWEEP_INTERVAL_S
from ucxx_transport.wire.codec import decode_header, encode_frame
from ucxx_transport.wire.frames import FRAME_BYTES, HEADER_BYTES, Frame, Kind, Status, message_bytes

EPISODE = bytes(range(256)) * 16
LARGE = bytes(60_000)
# Time limits are looked at this often; a limit is kept within one look.
SWEEP_S = SWEEP_INTERVAL_S + 0.05


def still_serves(rig: PortRig) -> bool:
    ref = rig.write(EPISODE)
    (answer,) = rig.peer().fetch(ref)
    return answer.body == EPISODE


def test_garbage_is_answered_bad_request_and_closed() -> None:
    bye = encode_frame(Frame(Kind.BYE, 1, attempt=1))
    rows = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 128,
        bytes(4096),
        bye[:-1],
        encode_frame(Frame(Kind.HELLO, 1, attempt=1, word=1, secret=NONCE))[:64],
    ]
    for garbage in rows:
        with row(garbage=garbage), open_rig() as rig:
            peer = rig.connect()
            answer = peer.expect(1)
            peer.say(garbage)
            rig.settle()
            assert answer.status is Status.BAD_REQUEST
            assert answer.body
            rig.advance(1.0 + SWEEP_S)
            assert peer.is_closed()
            assert rig.counts.bad_requests == 1
            assert still_serves(rig)


def test_a_port_gives_back_what_a_dead_reader_of_this_host_held_though_nobody_asks_for_it(rig: PortRig) -> None:
    nobody = Owner(2**22 + 1, 1)  # above every real pid
    dead = acting_for(SharedRingBuffer.attach(rig.ring.name, folder=rig.ring.folder), nobody)
    ref = rig.write(EPISODE)
    lease = dead.acquire(ref)
    assert rig.states(ref) == [SlotState.READING]
    rig.advance(SWEEP_S)
    assert rig.states(ref) == [SlotState.READY]
    assert not lease.release_reading()
    dead.close()


def test_a_port_shows_that_its_loop_turns_several_times_within_the_time_by_which_it_is_judged() -> None:
    for stall_timeout_s in (0.2, 1.0, 60.0):
        with row(stall_timeout_s=stall_timeout_s), open_rig(stall_timeout_s=stall_timeout_s) as rig:
            for _ in range(3):
                rig.counters.words[BEAT] = 0
                rig.advance(stall_timeout_s / 3)
                assert rig.counters.words[BEAT]


def test_a_peer_that_goes_on_sending_after_its_last_answer_is_cut_off_at_once(rig: PortRig) -> None:
    """What is not taken in piles up in the link: a second of a flood is half a GiB."""
    patient, flooding = rig.peer(), rig.peer()
    for peer, frames in ((patient, MAX_FRAMES - FRAMES_POSTED), (flooding, MAX_FRAMES + FRAMES_POSTED)):
        for _ in range(frames):
            peer.say(bytes(FRAME_BYTES))
    rig.settle()
    assert (patient.is_closed(), flooding.is_closed()) == (False, True)
    assert rig.counts.bad_requests == 2


def test_clients_that_the_link_could_not_accept_are_counted_once(rig: PortRig) -> None:
    for count, counted in [(2, 2), (0, 2), (1, 3)]:
        rig.fail_accepts(count)
        rig.advance(SWEEP_S)
        assert rig.counts.accepts_failed == counted


def test_a_message_longer_than_any_frame_ends_the_connection(rig: PortRig) -> None:
    peer = rig.connect()
    peer.say(bytes(100_000))
    assert peer.is_closed()
    assert still_serves(rig)


def test_a_frame_cannot_be_read_twice_when_the_next_message_is_short(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    frame = b""
    for _ in range(4):  # every buffer of the port has this frame once
        answers = peer.begin_fetch(replace(ref, generation=9))
        rig.settle()
        assert answers[0].status is Status.STALE
    peer.say(frame[:4])
    rig.settle()
    assert rig.counts.bad_requests == 1
    assert rig.counts.requests == 4


def test_frames_out_of_sequence_end_the_connection(rig: PortRig) -> None:
    for offset in (-1, 1, 1 << 40):
        with row(offset=offset):
            peer = rig.peer()
            peer.sequence += offset
            answer = peer.ask(Kind.DESCRIBE, ring_id=rig.ring.ring_id)
            assert answer.status is Status.BAD_REQUEST
            rig.advance(1.0 + SWEEP_S)
            assert peer.is_closed()


def test_a_connection_that_says_nothing_is_closed(rig: PortRig) -> None:
    peer = rig.connect()
    rig.advance(4.9)
    assert not peer.is_closed()
    rig.advance(0.1 + SWEEP_S)
    assert peer.is_closed()
    assert rig.counts.handshake_timeouts == 1
    assert rig.counts.connections == 0


def test_a_challenge_left_unanswered_is_closed_too() -> None:
    with open_rig(token="t") as rig:
        peer = rig.connect()
        assert peer.greet().header.token_required
        rig.advance(5.0 + SWEEP_S)
        assert peer.is_closed()
        assert rig.counts.handshake_timeouts == 1


def asked_too_early(peer: RawPeer, kind: Kind, rig: PortRig) -> Status:
    ref = rig.write(EPISODE)
    if kind is Kind.FETCH:
        return peer.fetch(ref)[0].status
    names = ((ref.slot, 0, ref.generation, 0, 0),) if kind is Kind.CONFIRM else ()
    answer = peer.ask(kind, ring_id=rig.ring.ring_id, names=names, max_payloads=int(kind is Kind.TAKE))
    assert EPISODE not in answer.body
    return answer.status


def test_without_the_token_nothing_is_said_and_nothing_is_given() -> None:
    with open_rig(token="t") as rig:
        for kind in (Kind.FETCH, Kind.TAKE, Kind.CONFIRM, Kind.DESCRIBE, Kind.BYE):
            with row(kind=kind):
                assert asked_too_early(rig.connect(), kind, rig) is Status.UNAUTHORIZED
                challenged = rig.connect()
                challenged.greet()
                assert asked_too_early(challenged, kind, rig) is Status.UNAUTHORIZED
        peer = rig.connect()
        peer.greet()
        assert peer.ask(Kind.AUTH, secret=bytes(32)).status is Status.UNAUTHORIZED
        assert set(rig.ring.slot_states()) == {SlotState.READY}
        assert rig.counts.requests == 0


def test_an_idle_connection_is_evicted_and_a_used_one_is_not(rig: PortRig) -> None:
    idle, used = rig.peer(), rig.peer()
    rig.advance(100.0)
    assert used.ask(Kind.DESCRIBE, ring_id=rig.ring.ring_id).status is Status.OK
    rig.advance(20.0 + SWEEP_S)
    assert idle.is_closed()
    assert not used.is_closed()
    assert rig.counts.idle_evictions == 1


@pytest.mark.parametrize("nbytes", [100, 60_000], ids=["eager", "rendezvous"])
def test_a_payload_that_is_never_acknowledged_is_ready_again(nbytes: int, rig: PortRig) -> None:
    ref = rig.write(bytes(nbytes))
    peer = rig.peer()
    assert peer.fetch(ref)[0].status is Status.OK
    rig.advance(9.9)
    assert rig.states(ref) == [SlotState.READING]
    rig.advance(0.1 + SWEEP_S)
    assert peer.is_closed()
    assert rig.states(ref) == [SlotState.READY]
    assert rig.counts.delivery_timeouts == 1
    assert rig.counts.released == 1


def test_a_payload_that_does_not_move_is_given_up_after_its_own_longer_limit(rig: PortRig) -> None:
    ref = rig.write(LARGE)
    peer = rig.peer()
    peer.say(peer.frame(Kind.FETCH, ring_id=rig.ring.ring_id, names=peer.names([ref])))  # and no receive is posted
    rig.advance(59.0)
    assert rig.states(ref) == [SlotState.READING]
    rig.advance(1.0 + SWEEP_S)
    assert peer.is_closed()
    assert rig.states(ref) == [SlotState.READY]
    assert rig.counts.delivery_timeouts == 1


def test_a_payload_that_does_not_move_costs_the_others_of_its_connection_nothing(rig: PortRig) -> None:
    stuck, *others = [rig.write(bytes([number]) * 60_000) for number in range(4)]
    peer = rig.peer()
    peer.say(peer.frame(Kind.FETCH, ring_id=rig.ring.ring_id, names=peer.names([stuck])))
    for number, ref in enumerate(others, 1):
        (answer,) = peer.fetch(ref)
        assert answer.body == bytes([number]) * 60_000
        peer.end(peer.attempt)
    assert rig.states(stuck, *others) == [SlotState.READING, *[SlotState.FREE] * 3]
    assert rig.counts.delivered == 3


def test_a_client_that_dies_between_request_and_acknowledgement_loses_nothing(rig: PortRig) -> None:
    refs = [rig.write(bytes([number]) * 100) for number in range(4)]
    for ref in refs:
        peer = rig.peer()
        peer.fetch(ref)
        peer.reset()
    assert rig.states(*refs) == [SlotState.READY] * 4
    assert rig.counts.delivered == 0
    assert rig.counts.released == 4


def test_an_end_that_arrives_with_the_death_of_its_client_counts(rig: PortRig) -> None:
    refs = [rig.write(EPISODE) for _ in range(3)]
    peer = rig.peer()
    peer.fetch(*refs)
    for attempt in range(peer.attempt - 2, peer.attempt + 1):  # several frames, of which the port handles one a turn
        peer.say(peer.frame(Kind.FETCH, ends=peer.ends([(attempt, True)])))
    peer.endpoint.close()
    rig.settle()
    assert rig.states(*refs) == [SlotState.FREE] * 3
    assert (rig.counts.delivered, rig.counts.released) == (3, 0)


def test_an_end_of_another_attempt_consumes_nothing_and_ends_the_connection(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    peer.fetch(ref)
    peer.end(peer.attempt + 1)
    rig.advance(1.0 + SWEEP_S)
    assert peer.is_closed()
    assert rig.states(ref) == [SlotState.READY]
    assert (rig.counts.delivered, rig.counts.released, rig.counts.bad_requests) == (0, 1, 1)


def test_an_attempt_ends_once(rig: PortRig) -> None:
    first, second = rig.write(EPISODE), rig.write(EPISODE)
    peer = rig.peer()
    peer.fetch(first, second)
    ended, left = peer.attempt - 1, peer.attempt
    peer.end(ended)
    peer.end(ended, left)
    rig.advance(1.0 + SWEEP_S)
    assert peer.is_closed()
    assert rig.states(first, second) == [SlotState.FREE, SlotState.READY]
    assert rig.ring.statistics().late_finalise == 0


def test_a_refused_delivery_is_ready_for_the_next_request_on_the_same_connection(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    for _ in range(3):
        (answer,) = peer.fetch(ref)
        assert answer.body == EPISODE
        peer.end(peer.attempt, delivered=False)
        assert rig.states(ref) == [SlotState.READY]


def test_ends_ride_with_the_next_request_and_come_first() -> None:
    with open_rig() as rig:
        peer = rig.peer()
        ref = rig.write(EPISODE)
        (answer,) = peer.fetch(ref)
        assert answer.status is Status.OK
        (answer,) = peer.fetch(ref, ends=[(peer.attempt, False)])
        assert answer.status is Status.OK
        (answer,) = peer.fetch(ref, ends=[(peer.attempt, True)])
        assert answer.status is Status.STALE
        assert rig.states(ref) == [SlotState.FREE]


def test_many_names_in_one_frame_are_answered_each_on_its_own(rig: PortRig) -> None:
    refs = [rig.write(bytes([number]) * (1 << (4 * number))) for number in range(4)]
    peer = rig.peer()
    answers = peer.fetch(refs[0], replace(refs[1], generation=7), refs[2], replace(refs[3], slot=70), refs[3])
    found = [answer.status for answer in answers]
    assert found == [Status.OK, Status.STALE, Status.OK, Status.BAD_REQUEST, Status.OK]
    assert [answers[index].body[:1] for index in (0, 2, 4)] == [b"\0", b"\2", b"\3"]
    assert rig.states(*refs) == [SlotState.READING, SlotState.READY, SlotState.READING, SlotState.READING]
    assert (rig.counts.requests, rig.counts.stale, rig.counts.bad_requests) == (5, 1, 1)


def test_small_answers_share_a_message_and_each_has_its_own_end(rig: PortRig) -> None:
    refs = [rig.write(bytes([65 + number]) * (30 * number)) for number in range(4)]
    named = [refs[0], refs[1], replace(refs[2], generation=9), refs[3]]
    peer = rig.peer()
    message, attempts = peer.fetch_packed(*named)
    offset, seen = 0, []
    for ref in named:
        header = decode_header(message[offset:])
        seen.append((header.status, message[offset + HEADER_BYTES :][: header.nbytes]))
        offset += message_bytes(ref.nbytes)
    assert [status for status, _ in seen] == [Status.OK, Status.OK, Status.STALE, Status.OK]
    assert [body for status, body in seen if status is Status.OK] == [b"", b"B" * 30, b"D" * 90]
    assert seen[2][1].startswith(b"stale slot")
    peer.end(attempts[0], attempts[3])
    peer.end(attempts[1], delivered=False)
    assert rig.states(*refs) == [SlotState.FREE, SlotState.READY, SlotState.READY, SlotState.FREE]
    assert (rig.counts.packed, rig.counts.delivered, rig.counts.released, rig.counts.stale) == (3, 2, 1, 1)


def test_shared_messages_may_be_asked_for_without_end(rig: PortRig) -> None:
    refs = [rig.write(b"x" * 30), rig.write(b"y" * 30)]
    peer = rig.peer()
    for _ in range(300):
        _, attempts = peer.fetch_packed(*refs)
        peer.end(*attempts, delivered=False)
    assert not peer.is_closed()
    assert rig.counts.packed == 600


def test_a_client_that_dies_with_a_shared_message_loses_nothing_of_it(rig: PortRig) -> None:
    refs = [rig.write(EPISODE) for _ in range(3)]
    peer = rig.peer()
    _, attempts = peer.fetch_packed(*refs)
    peer.end(attempts[0])
    peer.reset()
    assert rig.states(*refs) == [SlotState.FREE, SlotState.READY, SlotState.READY]


@pytest.mark.parametrize("slot", [4, 1 << 16, (1 << 32) - 1])
def test_a_slot_out_of_range_discloses_nothing(slot: int, rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    for nbytes in (0, 1, ref.nbytes, 1 << 20):
        (answer,) = peer.fetch(ref, slot=slot, nbytes=nbytes)
        assert answer.status is Status.BAD_REQUEST
        assert b"no such slot" in answer.body
    assert rig.ring.statistics().out_of_range == 4
    assert peer.fetch(ref)[0].status is Status.OK, "a refusal leaves the connection usable"


def test_another_length_than_the_payload_has_is_refused_and_changes_nothing(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    for nbytes in (0, ref.nbytes - 1, ref.nbytes + 1):
        (answer,) = peer.fetch(replace(ref, nbytes=nbytes))
        assert answer.status is Status.BAD_REQUEST
        assert EPISODE[:100] not in answer.body
        assert rig.states(ref) == [SlotState.READY]
    assert peer.fetch(ref)[0].body == EPISODE


def test_another_generation_is_stale_however_large(rig: PortRig) -> None:
    peer = rig.peer()
    for generation in (2, 3, 1 << 55, 1 << 56, (1 << 56) + 1, (1 << 64) - 1):
        with row(generation=generation):
            ref = rig.write(EPISODE)
            (answer,) = peer.fetch(ref, generation=generation if generation != ref.generation else generation + 1)
            assert answer.status is Status.STALE
            assert peer.fetch(ref)[0].status is Status.OK
            peer.end(peer.attempt)


def test_a_reader_id_the_ring_cannot_hold_is_refused(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    assert rig.connect().greet(reader=(1 << 64) - 1).status is Status.BAD_REQUEST
    assert rig.states(ref) == [SlotState.READY]
    assert still_serves(rig)


def test_as_many_attempts_as_a_slot_can_carry_and_then_busy(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    found = {rig.peer().fetch(ref)[0].status for _ in range(12)}  # each of the same reader
    assert found == {Status.OK, Status.BUSY}
    assert rig.states(ref) == [SlotState.READING]


def test_another_reader_is_busy_while_the_first_has_the_payload(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    first, second = rig.peer(reader=1), rig.peer(reader=2)
    assert first.fetch(ref)[0].status is Status.OK
    assert second.fetch(ref)[0].status is Status.BUSY
    first.end(first.attempt, delivered=False)
    assert second.fetch(ref)[0].body == EPISODE


def test_connections_above_the_limit_are_answered_busy_and_closed() -> None:
    with open_rig(max_connections=2) as rig:
        admitted = [rig.peer() for _ in range(2)]
        newcomer = rig.connect()
        assert newcomer.greet().status is Status.BUSY
        rig.advance(1.0 + SWEEP_S)
        assert newcomer.is_closed()
        assert rig.counts.refused == 1
        for peer in admitted:
            assert peer.ask(Kind.DESCRIBE, ring_id=rig.ring.ring_id).status is Status.OK


def test_connections_that_wait_to_be_refused_take_no_one_s_place() -> None:
    with open_rig(max_connections=2) as rig:
        admitted = [rig.peer() for _ in range(2)]
        lingering = [rig.connect() for _ in range(5)]  # above the limit, and silent
        admitted[0].reset()
        assert rig.connect().greet().status is Status.OK, "one of two places is free"
        assert not any(peer.is_closed() for peer in lingering)


def test_a_flood_of_connections_is_cut_off_and_those_admitted_go_on() -> None:
    with open_rig(max_connections=2) as rig:
        admitted = rig.peer()
        flood = [rig.connect() for _ in range(200)]
        assert sum(not peer.is_closed() for peer in flood) < 40
        assert admitted.ask(Kind.DESCRIBE, ring_id=rig.ring.ring_id).status is Status.OK
        rig.advance(6.0 + SWEEP_S)
        assert still_serves(rig)


def test_statistics_count_connections_as_they_come_and_go(rig: PortRig) -> None:
    peers = [rig.peer() for _ in range(3)]
    assert (rig.counts.accepted, rig.counts.connections) == (3, 3)
    for peer in peers:
        peer.reset()
    assert (rig.counts.accepted, rig.counts.connections) == (3, 0)


def test_a_goodbye_proves_that_everything_before_it_was_handled(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    peer.fetch(ref)
    peer.say(peer.frame(Kind.FETCH, ends=peer.ends([(peer.attempt, True)])))
    assert peer.ask(Kind.BYE).status is Status.OK
    assert rig.states(ref) == [SlotState.FREE]


def test_confirm_frees_what_is_still_there_and_says_stale_otherwise(rig: PortRig) -> None:
    refs = [rig.write(EPISODE) for _ in range(2)]
    peer = rig.peer()
    peer.fetch(*refs)
    peer.reset()
    peer, other = rig.peer(), rig.peer(reader=9)
    other.fetch(refs[1])
    names = tuple((ref.slot, 0, ref.generation, 0, 0) for ref in refs)
    for expected in ([Status.OK, Status.BUSY], [Status.STALE, Status.BUSY]):
        answer = peer.ask(Kind.CONFIRM, ring_id=rig.ring.ring_id, names=names)
        assert [Status(code) for code in answer.body] == expected
    assert rig.states(*refs) == [SlotState.FREE, SlotState.READING]
    assert rig.counts.confirms == 1


def test_one_connection_with_many_frames_leaves_room_for_the_others(rig: PortRig) -> None:
    greedy, modest = rig.peer(), rig.peer()
    ref = rig.write(EPISODE)
    stale = [greedy.begin_fetch(*[replace(ref, generation=99)] * 32) for _ in range(4)]
    (answer,) = modest.begin_fetch(ref)
    rig.turns_until(lambda: answer.has_come)
    assert answer.status is Status.OK
    assert rig.counts.stale <= 2 * 32, "of the greedy one's frames few have been handled"
    rig.settle()
    assert {one.status for answers in stale for one in answers} == {Status.STALE}


def test_a_peer_that_reads_no_answer_loses_its_connection_before_it_piles_up_answers(rig: PortRig) -> None:
    peer = rig.peer()
    for _ in range(300):
        if peer.is_closed():
            break
        peer.attempt += 1
        peer.say(peer.frame(Kind.DESCRIBE, attempt=peer.attempt, ring_id=rig.ring.ring_id))
    rig.advance(120.0 + SWEEP_S)
    assert peer.is_closed()
    assert still_serves(rig)


def test_a_peer_that_names_more_than_its_window_loses_its_connection_only() -> None:
    with open_rig(ring=replace(PortRig.RING, slots=80)) as rig:
        refs = [rig.write(bytes(100)) for _ in range(80)]
        peer, other = rig.peer(), rig.peer()
        peer.fetch(*refs[:64])
        peer.begin_fetch(refs[64])
        rig.settle()
        rig.advance(1.0 + SWEEP_S)
        assert peer.is_closed()
        assert set(rig.states(*refs)) == {SlotState.READY}
        assert other.fetch(refs[0])[0].status is Status.OK


def test_stopping_the_port_gives_every_slot_back(rig: PortRig) -> None:
    refs = [rig.write(bytes(20_000)) for _ in range(3)]
    for ref in refs:
        peer = rig.peer()
        peer.say(peer.frame(Kind.FETCH, ring_id=rig.ring.ring_id, names=peer.names([ref])))
    rig.settle()
    assert rig.states(*refs) == [SlotState.READING] * 3
    rig.stop()
    assert rig.states(*refs) == [SlotState.READY] * 3
    assert rig.counts.port == 0
    assert rig.counts.connections == 0


def test_the_reader_of_the_hello_is_the_one_who_reads(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    rig.peer(reader=READER).fetch(ref)
    with rig.ring.acquire(ref, reader=READER) as lease:
        assert bytes(lease.buffer) == EPISODE
