"""TAKE: a client gets payloads that it has not named, in one answer, or waits for them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.raw_peer import Answer, RawPeer
from tests.unit.server.port_rig import PortRig, open_rig
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError
from ucxx_transport.ring import ReadLease, SharedRingBuffer, SlotState
from ucxx_transport.schema.wire_form import record_and_meta
from ucxx_transport.server import RingSource
from ucxx_transport.server.slots import MAX_SPARE
from ucxx_transport.wire.codec import decode_offer
from ucxx_transport.wire.frames import FLAG_NEWEST, MAX_NAMES, Kind, Status, receive_bytes

MiB = 1 << 20
ROOM_BYTES = receive_bytes(MAX_NAMES * 1100)


@pytest.fixture
def rig() -> Iterator[PortRig]:
    with open_rig(ring=RingConfig(slots=8, slot_bytes=64 << 10, prefault=False), before=LockedRing) as made:
        yield made


def begin_take(peer: RawPeer, count: int = 16, *, nbytes: int = MiB, wait_ms: int = 0, flags: int = 0) -> Answer:
    """Send a TAKE; room for its payloads is posted too."""
    peer.attempt += 1
    answer = peer.expect(peer.attempt, ROOM_BYTES)
    peer.say(
        peer.frame(
            Kind.TAKE,
            attempt=peer.attempt,
            ring_id=peer.ring_id,
            word=nbytes,
            max_payloads=count,
            wait_ms=wait_ms,
            flags=flags,
        )
    )
    peer.attempt += count  # the numbers of what it may get
    peer.wait_for()
    return answer


def taken(peer: RawPeer, answer: Answer) -> list[bytes]:
    """The payloads of an offer, in its order; their attempts are numbered from its own on."""
    contents = []
    for number, offered in enumerate(decode_offer(answer.body), 1):
        payload = peer.expect(answer.channel + number)
        peer.wait_for()
        assert payload.header.generation == offered.generation
        assert len(payload.body) == offered.nbytes
        contents.append(payload.body)
    return contents


def test_the_oldest_payloads_come_first_and_each_is_ended_like_a_named_one(rig: PortRig) -> None:
    refs = [rig.write(bytes([65 + number]) * 10) for number in range(5)]
    peer = rig.peer()
    answer = begin_take(peer, 3)
    assert taken(peer, answer) == [b"A" * 10, b"B" * 10, b"C" * 10]
    assert rig.states(*refs) == [SlotState.READING] * 3 + [SlotState.READY] * 2
    peer.end(answer.channel + 1, answer.channel + 3)
    peer.end(answer.channel + 2, delivered=False)
    assert rig.states(*refs[:3]) == [SlotState.FREE, SlotState.READY, SlotState.FREE]
    assert (rig.counts.takes, rig.counts.delivered, rig.counts.released, rig.counts.requests) == (3, 2, 1, 0)


def test_the_newest_come_first_where_that_is_asked(rig: PortRig) -> None:
    for number in range(5):
        rig.write(bytes([65 + number]))
    peer = rig.peer()
    assert taken(peer, begin_take(peer, 2, flags=FLAG_NEWEST)) == [b"E", b"D"]


def test_what_its_writer_said_comes_with_each(rig: PortRig) -> None:
    rig.ring.write_raw(b"one", meta={"policy": 7})
    (offered,) = decode_offer(begin_take(rig.peer()).body)
    assert record_and_meta(offered.envelope)[0] == {"policy": 7}
    assert offered.commit_time_ns > 0


def test_two_clients_never_get_the_same(rig: PortRig) -> None:
    for number in range(6):
        rig.write(bytes([number]))
    one, two = rig.peer(reader=1), rig.peer(reader=2)
    first, second = begin_take(one, 4), begin_take(two, 4)
    assert taken(one, first) + taken(two, second) == [bytes([number]) for number in range(6)]


def test_an_empty_ring_is_answered_at_once_where_nothing_is_to_be_waited_for(rig: PortRig) -> None:
    answer = begin_take(rig.peer())
    assert answer.status is Status.EMPTY
    assert rig.counts.takes == 0


def test_a_payload_that_is_written_meanwhile_ends_the_wait(rig: PortRig) -> None:
    peer = rig.peer()
    answer = begin_take(peer, wait_ms=60_000)
    rig.advance(59.0)
    assert not answer.has_come
    assert peer.ask(Kind.DESCRIBE, ring_id=rig.ring.ring_id).status is Status.OK, "other frames are served meanwhile"
    rig.write(b"late")
    rig.advance(0.01)
    assert [offered.nbytes for offered in decode_offer(answer.body)] == [4]


def test_a_wait_ends_when_its_time_is_up(rig: PortRig) -> None:
    peer = rig.peer()
    answer = begin_take(peer, wait_ms=250)
    rig.advance(0.24)
    assert not answer.has_come
    rig.advance(0.02)
    assert answer.status is Status.EMPTY
    assert not peer.is_closed()


def test_clients_that_wait_are_served_in_turn(rig: PortRig) -> None:
    peers = [rig.peer(reader=number) for number in (1, 2)]
    answers = [begin_take(peer, 1, wait_ms=10_000) for peer in peers]
    rig.write(b"first")
    rig.advance(0.01)
    assert [answer.has_come for answer in answers] == [True, False]
    rig.write(b"second")
    rig.advance(0.01)
    assert [answer.has_come for answer in answers] == [True, True]


def test_a_client_that_dies_waiting_takes_nothing_along(rig: PortRig) -> None:
    peer = rig.peer()
    begin_take(peer, wait_ms=10_000)
    peer.reset()
    ref = rig.write(b"mine")
    rig.advance(1.0)
    assert rig.states(ref) == [SlotState.READY]


def test_a_client_that_dies_with_what_it_took_gives_it_back(rig: PortRig) -> None:
    refs = [rig.write(b"x" * 100) for _ in range(3)]
    peer = rig.peer()
    begin_take(peer, 2)
    assert rig.states(*refs) == [SlotState.READING, SlotState.READING, SlotState.READY]
    peer.reset()
    assert rig.states(*refs) == [SlotState.READY] * 3


def test_no_more_bytes_are_picked_than_were_asked_for(rig: PortRig) -> None:
    for _ in range(4):
        rig.write(bytes(100))
    peer = rig.peer()
    assert len(taken(peer, begin_take(peer, nbytes=250))) == 2


def test_a_payload_larger_than_all_that_was_asked_for_is_named_in_the_answer(rig: PortRig) -> None:
    ref = rig.write(bytes(1000))
    answer = begin_take(rig.peer(), nbytes=999, wait_ms=10_000)
    assert answer.status is Status.EMPTY
    assert b"1000" in answer.body
    assert rig.states(ref) == [SlotState.READY]


def test_before_there_is_an_epoch_nothing_is_picked(rig: PortRig) -> None:
    source = RingSource(rig.ring)
    source.hold()
    ref = rig.write(b"early")
    peer = rig.peer()
    assert begin_take(peer, wait_ms=10_000).status is Status.NOT_READY
    assert rig.states(ref) == [SlotState.READY]
    source.bind()
    assert taken(peer, begin_take(peer)) == [b"early"]
    assert rig.counts.not_ready == 1


def test_an_epoch_that_ends_while_a_client_waits_ends_the_wait(rig: PortRig) -> None:
    answer = begin_take(rig.peer(), wait_ms=10_000)
    RingSource(rig.ring).hold()
    rig.advance(0.01)
    assert answer.status is Status.NOT_READY


def test_a_lock_that_is_not_to_be_had_is_waited_for_once_a_turn_and_costs_no_connection(rig: PortRig) -> None:
    ref = rig.write(b"x")
    rig.before.is_locked = True
    peers = [rig.peer() for _ in range(3)]
    answers = [begin_take(peer, wait_ms=10_000) for peer in peers]
    rig.advance(0.1)
    assert not any(answer.has_come for answer in answers)
    rig.before.is_locked = False
    rig.advance(0.1)
    assert [answer.has_come for answer in answers] == [True, False, False]
    assert rig.states(ref) == [SlotState.READING]


def test_a_payload_that_the_window_has_no_room_for_now_is_waited_for(rig: PortRig) -> None:
    first = rig.write(b"small")
    peer = rig.peer()
    answer = begin_take(peer, 1)
    second = rig.write(b"huge")
    rig.before.least_bytes = 256 * MiB  # as many as the window has
    later = begin_take(peer, nbytes=1 << 40, wait_ms=10_000)
    rig.advance(1.0)
    assert not later.has_come
    peer.end(answer.channel + 1)
    rig.advance(0.01)
    assert taken(peer, later) == [b"huge"]
    assert rig.states(first, second) == [SlotState.FREE, SlotState.READING]


def test_leases_of_what_is_over_serve_further_attempts_and_do_not_pile_up(rig: PortRig) -> None:
    peer = rig.peer()
    for _ in range(MAX_SPARE // 8 + 8):
        for number in range(8):
            rig.write(bytes([number]))
        answer = begin_take(peer, 8)
        assert taken(peer, answer) == [bytes([number]) for number in range(8)]
        peer.end(*[answer.channel + number for number in range(1, 9)])
    assert leases(rig.ring) <= MAX_SPARE
    ref = rig.write(b"by name")
    [answer] = peer.fetch(ref)
    assert answer.body == b"by name"
    assert rig.states(ref) == [SlotState.READING]
    assert rig.ring.statistics().late_finalise == 0


def leases(ring: SharedRingBuffer) -> int:
    """Those of a handle; of others there may be any number, made and dropped by threads of earlier tests."""
    gc.collect()
    # by its type alone: what else there is may raise where `isinstance` asks for its class, as a proxy of what is gone
    made = [one for one in gc.get_objects() if type(one) is ReadLease]
    return sum(getattr(one, "transitions", None) is ring.transitions for one in made)


class LockedRing:
    """A ring whose lock is held, or whose payloads are said to be large, while the test says so."""

    def __init__(self, ring: SharedRingBuffer) -> None:
        self._ring = ring
        self.is_locked = False
        self.least_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def take(self, max_payloads: int, *, max_bytes: int, newest: bool, reader: int) -> list[ReadLease]:
        if self.is_locked:
            raise DeadlineExceededError("the ring's lock is held")
        if max_bytes < self.least_bytes:
            raise ConfigError("the next payload is larger than max_bytes", nbytes=self.least_bytes)
        return self._ring.take(max_payloads, max_bytes=max_bytes, newest=newest, reader=reader)
