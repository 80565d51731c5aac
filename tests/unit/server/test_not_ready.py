"""A source that waits for its epoch: reads are answered NOT_READY, what was delivered before still settles."""

from __future__ import annotations

from tests.unit.server.port_rig import PortRig
from ucxx_transport.ring import SlotState
from ucxx_transport.server import RingSource
from ucxx_transport.wire.frames import Kind, Status

EPISODE = bytes(range(256)) * 16


def test_a_read_before_there_is_an_epoch_is_not_ready_and_counted(rig: PortRig) -> None:
    source = RingSource(rig.ring)
    source.hold()
    ref = rig.write(EPISODE)
    peer = rig.peer()
    for _ in range(2):
        (answer,) = peer.fetch(ref)
        assert (answer.status, answer.body) == (Status.NOT_READY, b"the worker has no epoch yet")
    assert rig.states(ref) == [SlotState.READY]
    assert (rig.counts.not_ready, rig.counts.requests) == (2, 2)
    source.bind()
    (answer,) = peer.fetch(ref)  # over the connection of before
    assert answer.body == EPISODE
    assert rig.counts.not_ready == 2


def test_each_part_of_a_shared_message_is_not_ready(rig: PortRig) -> None:
    RingSource(rig.ring).hold()
    refs = [rig.write(b"x" * 30) for _ in range(3)]
    rig.peer().fetch_packed(*refs)
    assert rig.states(*refs) == [SlotState.READY] * 3
    assert (rig.counts.not_ready, rig.counts.packed) == (3, 0)


def test_what_is_no_read_is_answered_as_ever(rig: PortRig) -> None:
    RingSource(rig.ring).hold()
    assert rig.peer().ask(Kind.DESCRIBE, ring_id=rig.ring.ring_id).status is Status.OK
    assert rig.counts.not_ready == 0


def test_a_payload_delivered_before_is_freed_by_its_confirmation(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    peer.fetch(ref)
    peer.reset()  # what it has got it cannot acknowledge here
    assert rig.states(ref) == [SlotState.READY]
    RingSource(rig.ring).hold()
    names = ((ref.slot, 0, ref.generation, 0, 0),)
    answer = rig.peer().ask(Kind.CONFIRM, ring_id=rig.ring.ring_id, names=names)
    assert answer.body == bytes([Status.OK])
    assert rig.states(ref) == [SlotState.FREE]


def test_a_send_on_its_way_when_the_epoch_ends_is_delivered(rig: PortRig) -> None:
    ref = rig.write(EPISODE)
    peer = rig.peer()
    (answer,) = peer.fetch(ref)
    RingSource(rig.ring).hold()
    assert answer.body == EPISODE
    peer.end(peer.attempt)
    assert rig.states(ref) == [SlotState.FREE]
    assert rig.counts.delivered == 1
