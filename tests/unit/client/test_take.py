"""Payloads taken without their references: in order, once, with what their writers said; given back if not wanted."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import numpy as np
import pytest

from tests.support.exchange_rig import ExchangeRig, RigClient, cut_in_two_anywhere, open_rig
from tests.support.port_beside import port_beside
from tests.support.rows import row
from tests.support.source_records import record
from ucxx_transport.client import Payload
from ucxx_transport.client.errands import Take
from ucxx_transport.client.jobs import Takeable
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, PeerLostError
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import Schema, SlotRef, TensorSpec
from ucxx_transport.testing import Hold

RING = RingConfig(slots=16, slot_bytes=8192, prefault=False)


def begin(client: RigClient, source: Takeable, wait_s: Any = 0.0, **asked: Any) -> Take:
    values = {"max_payloads": 16, "max_bytes": 1 << 20, "selector": "oldest", **asked}
    take = client.core.take_call(source, wait_s, **values)
    client.core.reads.go_on(take)
    return take


def taken(rig: ExchangeRig, client: RigClient, source: Takeable, wait_s: Any = 0.0, **asked: Any) -> list[Payload]:
    take = begin(client, source, wait_s, **asked)
    rig.run_until(lambda: take.done)
    rig.settle()
    return take.result()


def contents(payloads: list[Payload]) -> list[bytes]:
    return [bytes(payload.buffer)[:1] for payload in payloads]


def write(rig: ExchangeRig, count: int, first: int = 0) -> list[SlotRef]:
    return [
        rig.ring.write_raw(bytes([number]) * 1000, meta={"number": number}) for number in range(first, first + count)
    ]


def test_a_take_does_not_wait_behind_the_reads_that_its_connection_has_no_room_for_yet() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=16, slot_bytes=1 << 20, prefault=False)) as rig:
        client = rig.client()
        reads = client.core.begin([rig.write(bytes(1 << 20)) for _ in range(12)], 60.0)
        newest = rig.write(b"x")
        take = begin(client, newest, max_payloads=1, selector="newest")
        rig.run_until(lambda: take.done)
        assert contents(take.result()) == [b"x"]
        assert reads.left > 6
        assert all(isinstance(outcome, Payload) for outcome in client.outcomes(reads))


def test_a_take_and_the_reads_beside_it_outlive_their_connection_together() -> None:
    with open_rig(ports=1, ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 6)
        client.consume(refs[0])
        take = begin(client, refs[0], wait_s=5.0, max_payloads=2)
        reads = [client.core.begin((ref,), 5.0) for ref in refs[3:5]]
        rig.stop_port(1)
        rig.start_port(1)
        rig.run_until(lambda: take.done and all(read.done for read in reads))
        assert contents(take.result()) == [b"\1", b"\2"]
        assert [bytes(client.result(each).buffer)[:1] for each in reads] == [b"\3", b"\4"]


def test_a_source_without_an_address_is_named_as_one() -> None:
    with open_rig(ring=RING) as rig:
        client = rig.client()
        (ref,) = write(rig, 1)
        source = record("w", ring_id=rig.ring.ring_id, host=None, ports=())
        with pytest.raises(ConfigError, match="this source has no address to ask; start its UCXXServer"):
            taken(rig, client, source)
        assert contents(taken(rig, client, ref)) == [b"\0"]


def test_what_is_there_comes_in_order_with_its_record_and_frees_its_slots() -> None:
    with open_rig(ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 5)
        payloads = taken(rig, client, refs[0], max_payloads=3)
        assert contents(payloads) == [b"\0", b"\1", b"\2"]
        assert [payload.record for payload in payloads] == [{"number": number} for number in range(3)]
        assert [payload.ref for payload in payloads] == refs[:3]
        assert [payload.transport for payload in payloads] == ["ucx"] * 3
        assert rig.states(*refs) == [SlotState.FREE] * 3 + [SlotState.READY] * 2
        assert contents(taken(rig, client, refs[0], selector="newest")) == [b"\4", b"\3"]
        assert taken(rig, client, refs[0]) == []
        assert client.counts.reads == 5


def test_a_watchers_record_names_a_source_too() -> None:
    with open_rig(ring=RING) as rig:
        write(rig, 2)
        ref = rig.ring.ready_refs()[0]
        source = record("w", ring_id=rig.ring.ring_id, host=ref.host, ports=ref.ports)
        assert contents(taken(rig, rig.client(), source)) == [b"\0", b"\1"]


def test_two_clients_that_take_from_one_ring_never_get_the_same() -> None:
    with open_rig(ring=RING) as rig:
        clients = [rig.client(), rig.client()]
        refs = write(rig, 16)
        takes = [begin(client, refs[0], max_payloads=5) for client in clients]
        rig.run_until(lambda: all(take.done for take in takes))
        found = contents([payload for take in takes for payload in take.result()])
        assert len(found) == len(set(found)) == 10


def test_a_take_waits_for_a_first_payload_and_no_longer_than_asked() -> None:
    with open_rig(ring=RING) as rig:
        client = rig.client()
        (ref,) = write(rig, 1)
        client.consume(ref)
        began_s = rig.now_s
        assert taken(rig, client, ref, wait_s=3.0) == []
        assert 2.9 < rig.now_s - began_s < 3.3
        take = begin(client, ref, wait_s=600.0)
        rig.advance(200.0)
        assert not take.done
        write(rig, 1, first=7)
        rig.run_until(lambda: take.done)
        assert contents(take.result()) == [b"\7"]
        assert client.counts.quarantined == 0


def test_a_payload_larger_than_max_bytes_is_an_error_that_says_so_and_stays() -> None:
    with open_rig(ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 3)
        assert contents(taken(rig, client, refs[0], max_bytes=2500)) == [b"\0", b"\1"]
        with pytest.raises(ConfigError, match="1000 bytes") as caught:
            taken(rig, client, refs[0], max_bytes=999)
        assert caught.value.facts["field"] == "max_bytes"
        assert rig.states(refs[2]) == [SlotState.READY]


def test_arguments_out_of_their_range_are_refused() -> None:
    with open_rig(ring=RING) as rig:
        client = rig.client()
        (ref,) = write(rig, 1)
        rows: list[tuple[str, Any]] = [
            ("max_payloads", 0),
            ("max_payloads", 65),
            ("max_payloads", 1.5),
            ("max_bytes", 0),
            ("max_bytes", True),
            ("selector", "random"),
            ("wait_s", -1),
            ("wait_s", float("nan")),
            ("wait_s", float("inf")),
            ("wait_s", "soon"),
        ]
        for field, value in rows:
            with row(field=field, value=value):
                with pytest.raises(ConfigError, match=field) as caught:
                    begin(client, ref, **{field: value})
                assert caught.value.facts["field"] == field
        assert contents(taken(rig, client, ref, wait_s="250ms")) == [b"\0"]


def test_what_was_picked_is_read_by_name_elsewhere_when_its_connection_is_lost() -> None:
    with open_rig(ports=2, ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 3)
        client.consume(refs[0])
        rig.faults_of(1).spare = rig.faults_of(2).spare = 0
        take = begin(client, refs[1])
        for number in (1, 2):
            rig.faults_of(number).reset_after = 2 + (number == 2)  # the offer and one payload pass, and a welcome
        rig.run_until(lambda: take.done)
        assert contents(take.result()) == [b"\1", b"\2"]
        rig.settle()
        assert client.counts.peers_lost >= 1


def test_a_port_that_is_dead_costs_a_rotation() -> None:
    with open_rig(ports=2, ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 2)
        rig.stop_port(1)
        assert contents(taken(rig, client, refs[0])) == [b"\0", b"\1"]


def test_a_take_goes_on_asking_while_every_port_restarts_for_as_long_as_it_waits() -> None:
    with open_rig(ports=2, ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 2)
        rig.stop_port(1)
        rig.stop_port(2)
        take = begin(client, refs[0], wait_s=10.0)
        rig.advance(2.0)
        assert not take.done
        rig.start_port(2)
        rig.run_until(lambda: take.done)
        assert contents(take.result()) == [b"\0", b"\1"]
        rig.stop_port(2)
        began_s = rig.now_s
        with pytest.raises(PeerLostError):
            taken(rig, client, refs[0])
        assert rig.now_s - began_s < 1.0, "without a wait it is not worth the whole deadline"


def test_a_take_that_waits_for_its_connection_s_turn_blames_no_port() -> None:
    with open_rig(ports=17, ring=RingConfig(slots=32, slot_bytes=8192, prefault=False)) as rig:
        client = rig.client(deadline_s=0.3)
        refs, hold = [], Hold()
        for number in range(1, 18):
            rig.publish(number)
            refs.append(rig.ring.write_raw(bytes([number])))
            rig.faults_of(number).hold = hold if number < 17 else None
        job = client.begin(*refs[:16], deadline_s=60.0)
        assert contents(taken(rig, client, refs[-1], selector="newest", max_payloads=1)) == [b"\x11"]
        assert client.counts.quarantined == 0
        client.abandon(job)
        hold.set()


def test_a_source_that_does_not_answer_costs_the_deadline_and_says_so() -> None:
    with open_rig(ports=1, ring=RING) as rig:
        client = rig.client(deadline_s=4.0)
        refs = write(rig, 2)
        client.consume(refs[0])
        rig.freeze_port(1)
        began_s = rig.now_s
        with pytest.raises((DeadlineExceededError, PeerLostError)):
            taken(rig, client, refs[1])
        assert rig.now_s - began_s <= 4.001


@pytest.mark.parametrize("is_offered", [False, True])
def test_an_abandoned_take_gives_back_what_was_picked_for_it(*, is_offered: bool) -> None:
    with open_rig(ports=1, ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 3)
        client.consume(refs[0])
        hold = Hold()
        if is_offered:
            rig.faults_of(1).spare, rig.faults_of(1).drop = 1, 2  # the offer passes
        else:
            rig.faults_of(1).hold = hold
        take = begin(client, refs[0])
        rig.settle()
        assert rig.states(*refs[1:]) == [SlotState.READING] * 2
        assert client.counts.lent_buffers == 2 * is_offered
        client.core.abandon(take)
        assert not client.core.reads.jobs
        hold.set()
        rig.faults_of(1).hold = None
        rig.advance(30.0 * is_offered)
        assert rig.states(*refs[1:]) == [SlotState.READY] * 2
        assert client.counts.lent_buffers == 0
        assert contents(taken(rig, client, refs[0])) == [b"\1", b"\2"]


def offered(rig: ExchangeRig, client: RigClient, count: int) -> Take:
    """A take for which a server has picked so many payloads, none of which comes."""
    refs = write(rig, count + 1)
    client.consume(refs[0])
    rig.faults_of(1).spare, rig.faults_of(1).drop = 1, count  # the offer passes
    take = begin(client, refs[0])
    rig.settle()
    assert rig.states(*refs[1:]) == [SlotState.READING] * count
    return take


def test_what_was_picked_for_a_take_comes_although_another_call_s_interrupt_has_cut_a_step_in_two() -> None:
    with open_rig(ports=1, ring=RING) as rig:
        client = rig.client()
        take = offered(rig, client, 3)
        client.repair()
        rig.run_until(lambda: take.done)
        assert contents(take.result()) == [b"\1", b"\2", b"\3"]
        rig.settle()
        assert not client.core.reads.jobs
        assert rig.ring.statistics().reading == rig.ring.statistics().ready == 0


def test_what_was_picked_for_a_take_that_was_interrupted_is_there_for_the_next() -> None:
    with open_rig(ports=1, ring=RING) as rig:
        client = rig.client()
        take = offered(rig, client, 3)
        take.done = True
        client.repair()
        rig.advance(30.0)
        assert rig.ring.statistics().ready == 3
        gc.collect()
        assert client.counts.lent_buffers == 0
        assert contents(taken(rig, client, take.source)) == [b"\1", b"\2", b"\3"]


def test_a_take_that_another_call_s_interrupt_has_cut_in_two_anywhere_still_ends_as_what_becomes_of_it() -> None:
    def take_one(rig: ExchangeRig, client: RigClient) -> Take:
        return begin(client, write(rig, 1)[0])

    points = []
    for _, take, where in cut_in_two_anywhere(take_one, ring=RING, refused=True):
        with row(where=where), contextlib.suppress(*([PeerLostError] if where else [])):
            assert contents(take.result()) == [b"\0"]
        points.append(where)
    assert len(points) > 50


def test_a_take_of_what_is_not_there_ends_although_another_call_s_interrupt_has_cut_it_in_two_anywhere() -> None:
    def take_what_is_gone(rig: ExchangeRig, client: RigClient) -> Take:
        gone = write(rig, 1)[0]
        client.consume(gone)
        rig.settle()
        return begin(client, gone)

    points = []
    for _, take, where in cut_in_two_anywhere(take_what_is_gone, ring=RING):
        with row(where=where):
            assert take.result() == []
        points.append(where)
    assert len(points) > 10


def test_a_duplicate_that_a_lost_end_allows_is_not_delivered_again() -> None:
    with open_rig(ports=1, ring=RING) as rig:
        client = rig.client()
        refs = write(rig, 2)
        rig.faults.spare, rig.faults.drop = 2, 1  # HELLO and TAKE pass, the ends do not
        assert contents(taken(rig, client, refs[0], max_payloads=1)) == [b"\0"]
        rig.advance(11.0)
        assert rig.states(refs[0]) == [SlotState.READY]
        assert contents(taken(rig, client, refs[0])) == [b"\1"]
        assert rig.states(*refs) == [SlotState.FREE] * 2


def test_payloads_of_a_schema_come_with_it() -> None:
    schema = Schema([TensorSpec("obs", (4,), "float32")])
    with open_rig(ports=1, ring=RingConfig(slots=4, schema=schema, prefault=False)) as rig:
        ref = rig.ring.write({"obs": np.arange(4, dtype=np.float32)})
        (payload,) = taken(rig, rig.client(), ref)
        assert isinstance(payload.arrays, dict)
        assert np.asarray(payload.arrays["obs"]).tolist() == [0, 1, 2, 3]


def test_a_ring_of_this_host_is_taken_from_in_place() -> None:
    config = RingConfig(slots=16, slot_bytes=8192, prefault=False)  # where this test's readers look
    with SharedRingBuffer.create(config) as ring, port_beside() as beside, beside.client(local="auto") as client:
        refs = [ring.write_raw(bytes([number]) * 1000, meta={"number": number}) for number in range(3)]
        payloads = client.take(refs[0], max_payloads=2)
        assert contents(payloads) == [b"\0", b"\1"]
        assert [payload.record for payload in payloads] == [{"number": 0}, {"number": 1}]
        assert [payload.transport for payload in payloads] == ["view"] * 2
        assert [ring.slot_state(ref.slot) for ref in refs] == [SlotState.READING] * 2 + [SlotState.READY]
        for payload in payloads:
            payload.release()
        del payload, payloads
        assert [ring.slot_state(ref.slot) for ref in refs[:2]] == [SlotState.FREE] * 2
        assert contents(client.take(refs[0], selector="newest")) == [b"\2"]
        assert client.take(refs[0], wait_s=0.01) == []
        assert beside.links_opened == 0


def test_the_blocking_client_takes_over_the_link_and_waits() -> None:
    with port_beside() as beside, beside.client() as client:
        ref = beside.ring.write_raw(b"first", meta={"number": 1})
        (payload,) = client.take(ref, wait_s=30.0)
        assert (bytes(payload.buffer), payload.record) == (b"first", {"number": 1})
        assert client.take(ref) == []
        assert client.take(ref, wait_s="20ms") == []
