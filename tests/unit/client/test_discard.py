"""Payloads that a client lets go unread: locally, over the link, and when the server cannot be asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.exchange_rig import ExchangeRig, RigClient, cut_in_two_anywhere, open_rig
from tests.support.local_worker import LocalWorker
from tests.support.rows import row
from ucxx_transport import ClientConfig, ConfigError, RingConfig, SharedRingBuffer, SlotState, StaleSlotError
from ucxx_transport.client import SyncUCXXClient
from ucxx_transport.client.errands import Discard
from ucxx_transport.client.ports import PROBE_S
from ucxx_transport.testing import Hold

EPISODE = bytes(5000)


def test_their_slots_are_free_and_none_of_their_bytes_moved() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(3)]
        assert client.discard(refs[:2]) == 2
        rig.settle()
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.FREE, SlotState.FREE, SlotState.READY]
        assert sum(rig.statistics(port).bytes_sent for port in (1, 2)) == 0
        assert (client.counts.reads, client.counts.confirms) == (0, 0)
        with pytest.raises(StaleSlotError, match="already"):
            client.read(refs[0])
        client.consume(refs[2])
        assert client.discard([]) == 0


def test_those_that_are_gone_or_were_delivered_are_not_counted() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        first, second, third = (rig.write(EPISODE) for _ in range(3))
        client.consume(first)
        rig.ring.discard(second)
        assert client.discard([first, second, third, third]) == 1


def test_one_reader_of_several_lets_go_of_its_own_share() -> None:
    with open_rig(ring=RingConfig(slots=4, slot_bytes=8192, readers=2), ports=1) as rig:
        one, other = rig.client(), rig.client()
        ref = rig.write(EPISODE)
        assert one.discard([ref]) == 1
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        other.consume(ref)
        rig.settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


def test_a_server_that_cannot_be_asked_hears_of_it_with_the_next_read() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(4)]
        rig.stop_port(1)
        assert client.discard(refs[:3], deadline_s=1.0) == 0
        assert rig.ring.get_ready_count() == 4
        rig.start_port(1)
        client.consume(refs[3])
        rig.settle()
        assert rig.ring.slot_states().count(SlotState.FREE) == rig.ring.slots


def test_a_discard_is_over_when_its_client_is_closed() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        rig.faults_of(1).hold = hold = Hold()
        call = client.core.discard_call([ref], 600.0)
        client.core.reads.go_on(call)
        rig.settle()
        assert not call.done
        client.core.fail_all()
        assert (call.done, call.found) == (True, 0)
        rig.faults_of(1).hold = None
        hold.set()
        client.consume(rig.write(EPISODE))
        rig.settle()
        assert rig.states(ref) == [SlotState.FREE], "what was not heard has been said with the read"


def test_a_discard_goes_on_although_another_call_s_interrupt_has_cut_a_step_in_two() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(2)]
        client.consume(refs[0])
        rig.faults_of(1).drop = 1
        call = client.begin_discard(refs[1], deadline_s=600.0)
        client.repair()
        rig.run_until(lambda: call.done)
        assert rig.states(refs[1]) == [SlotState.FREE]


def test_a_discard_that_another_call_s_interrupt_has_cut_in_two_anywhere_still_frees_its_slots() -> None:
    def discard_two(rig: ExchangeRig, client: RigClient) -> Discard:
        return client.begin_discard(*(rig.write(EPISODE) for _ in range(2)), deadline_s=60.0)

    points = []
    for rig, call, where in cut_in_two_anywhere(discard_two):
        with row(where=where):
            assert rig.ring.statistics().free == rig.ring.slots
            assert where or call.found == 2
        points.append(where)
    assert len(points) > 20


def interrupt_in(owner: object, method: str, rig: ExchangeRig, client: RigClient, call: Discard) -> None:
    """Interrupt the discard in that method of the owner, as another thread's call is, and repair."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            rig.run_until(lambda: call.done)
    client.repair()


def test_what_a_discard_could_not_say_is_said_later_although_its_end_was_interrupted() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(2)]
        rig.stop_port(1)
        call = client.begin_discard(refs[0], deadline_s=1.0)
        interrupt_in(Discard, "finish", rig, client, call)
        assert (call.done, call.found) == (True, 0)
        rig.start_port(1)
        client.consume(refs[1])
        rig.settle()
        assert rig.states(refs[0]) == [SlotState.FREE]


def test_a_discard_whose_last_part_is_interrupted_is_over_all_the_same() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        call = client.begin_discard(ref, deadline_s=60.0)
        interrupt_in(call, "finish", rig, client, call)
        rig.run_until(lambda: call.done)
        assert (call.found, rig.states(ref)) == (1, [SlotState.FREE])


def test_a_discard_at_a_worker_that_is_gone_is_over_by_its_deadline() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        rig.stop_port(1)
        began_s = rig.now_s
        assert client.discard([ref], deadline_s=0.25) == 0
        assert rig.now_s - began_s == pytest.approx(0.25)


def test_a_worker_that_is_gone_does_not_hold_up_the_discard_of_another_s_payloads() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        gone = replace(ref, ring_id=b"G" * 16, host="10.9.9.9", ports=(9,))
        began_s = rig.now_s
        assert client.discard([gone, ref], deadline_s=60.0) == 1
        assert rig.now_s - began_s < PROBE_S
        assert rig.states(ref) == [SlotState.FREE]
        assert list(client.core.reads.connections.unsettled) == [gone.ring_id]


def test_a_discard_of_very_many_is_said_in_parts() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=300, slot_bytes=64, prefault=False)) as rig:
        client = rig.client()
        refs = [rig.write(b"x") for _ in range(300)]
        assert client.discard(refs) == 300
        assert rig.ring.slot_states().count(SlotState.FREE) == 300


@pytest.mark.parametrize("local", ["view", "copy"])
def test_rings_of_this_host_are_told_at_once(local: Any) -> None:
    with SharedRingBuffer.create(RingConfig(slots=8, slot_bytes=64)) as ring:
        first, second, third = LocalWorker(ring).play(3)
        assert first.ref is not None
        assert second.ref is not None
        assert third.ref is not None
        with SyncUCXXClient(ClientConfig(local=local)) as client:
            assert client.discard([first.ref, second.ref, second.ref]) == 2
            assert ring.get_ready_count() == 1
            with pytest.raises(StaleSlotError):
                client.read(first.ref)
            client.read(third.ref).release()
            assert client.discard([third.ref]) == 0
            statistics = client.statistics()
            assert (statistics.discarded, statistics.reads) == (2, 1)


def test_a_closed_client_refuses() -> None:
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64)) as ring:
        (record,) = LocalWorker(ring).play(1)
        client = SyncUCXXClient(ClientConfig(local="view"))
        client.close()
        assert record.ref is not None
        with pytest.raises(ConfigError, match="closed"):
            client.discard([record.ref])
