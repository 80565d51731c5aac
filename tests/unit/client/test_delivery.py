"""Delivered means received: what becomes of a payload whose end, connection or reader is lost."""

from __future__ import annotations

import pytest

from tests.support.exchange_rig import ExchangeRig, RigClient, open_rig
from tests.support.links import endpoints_open
from ucxx_transport.client import Payload
from ucxx_transport.client.jobs import Job
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import (
    BusyError,
    ConfigError,
    DeadlineExceededError,
    PeerLostError,
    ProtocolError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.testing import Hold

EPISODE = bytes(range(256)) * 16
# Beyond the server's limit for an acknowledgement, and one sweep.
PAST_THE_ACK_LIMIT_S = 11.0


def paused_before_the_answer(rig: ExchangeRig, client: RigClient, *refs: SlotRef) -> Job:
    """A read whose request has reached the server and whose answer is on its way; `deliver_answer` delivers it."""
    rig.faults_of(1).hold = Hold()
    job = client.begin(*refs, deadline_s=60.0)
    assert rig.states(*refs) == [SlotState.READING] * len(refs)
    return job


def deliver_answer(rig: ExchangeRig) -> None:
    hold, rig.faults_of(1).hold = rig.faults_of(1).hold, None
    assert hold is not None
    hold.set()
    rig.settle()


def warm(rig: ExchangeRig, client: RigClient) -> None:
    """Have a connection, so that what follows is one read and nothing else."""
    client.consume(rig.write(EPISODE))
    rig.settle()


def unacknowledged(rig: ExchangeRig, *, reset: bool) -> tuple[RigClient, SlotRef]:
    """A client that got a payload whose end vanished, or the connection in its place; and the payload's reference."""
    client = rig.client()
    warm(rig, client)
    ref = rig.write(EPISODE)
    job = paused_before_the_answer(rig, client, ref)
    if reset:
        rig.faults.reset_after = 0
    else:
        rig.faults.drop = 1
    deliver_answer(rig)
    with client.result(job) as payload:
        assert bytes(payload.buffer) == EPISODE
    return client, ref


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "vanished"])
def test_a_lost_end_makes_the_slot_ready_and_a_confirm_frees_it(*, reset: bool) -> None:
    with open_rig(ports=1) as rig:
        client, ref = unacknowledged(rig, reset=reset)
        rig.advance(PAST_THE_ACK_LIMIT_S)
        assert rig.states(ref) == [SlotState.READY], "its end was never heard"
        client.consume(rig.write(EPISODE))
        rig.settle()
        assert rig.states(ref) == [SlotState.FREE]
        assert client.counts.confirms == 1
        assert rig.statistics(1).confirms == 1


def test_several_lost_ends_are_all_said_again() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        refs = [rig.write(EPISODE) for _ in range(3)]
        job = paused_before_the_answer(rig, client, *refs)
        rig.faults.reset_after = 0
        deliver_answer(rig)
        for outcome in client.outcomes(job):
            assert isinstance(outcome, Payload)
        rig.settle()
        assert rig.states(*refs) == [SlotState.READY] * 3
        client.consume(rig.write(EPISODE))
        rig.settle()
        assert rig.states(*refs) == [SlotState.FREE] * 3
        assert client.counts.confirms == 3


def test_reads_that_start_together_after_a_loss_all_succeed() -> None:
    with open_rig(ports=1) as rig:
        client, _ = unacknowledged(rig, reset=True)
        client.consume(*(rig.write(EPISODE) for _ in range(3)))
        rig.settle()
        assert client.counts.confirms == 1
        assert rig.ring.slot_states() == [SlotState.FREE] * 4


def test_a_confirm_that_is_lost_too_is_said_again() -> None:
    with open_rig(ports=1) as rig:
        client, ref = unacknowledged(rig, reset=True)
        rig.faults.reset_after = 1  # HELLO passes, CONFIRM breaks the connection
        client.consume(rig.write(EPISODE))
        rig.settle()
        assert rig.states(ref) == [SlotState.FREE]
        assert client.counts.confirms == 1


def test_a_confirm_of_a_payload_that_was_overwritten_in_the_meantime_touches_nothing() -> None:
    with open_rig(ports=1) as rig:
        client, ref = unacknowledged(rig, reset=True)
        rig.settle()
        newer = [rig.write(EPISODE) for _ in range(4)]
        assert ref.slot in {other.slot for other in newer}
        client.consume(*newer)
        assert client.counts.confirms == 0
        rig.settle()
        assert rig.ring.slot_states() == [SlotState.FREE] * 4


def test_the_duplicate_that_a_lost_end_allows_is_dropped_by_name() -> None:
    with open_rig(ports=1) as rig:
        client, ref = unacknowledged(rig, reset=True)
        rig.settle()
        assert rig.states(ref) == [SlotState.READY]
        with pytest.raises(StaleSlotError, match="already received"):
            client.read(ref)
        assert client.counts.duplicates == 1


def test_another_client_may_still_have_what_was_not_acknowledged() -> None:
    with open_rig(ports=1) as rig:
        _, ref = unacknowledged(rig, reset=True)
        rig.settle()
        with rig.client().read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_the_end_has_left_when_the_call_returns() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        ref = rig.write(EPISODE)
        job = client.core.begin((ref,))
        rig.run_until(lambda: job.done)
        client.core.reactor.close()  # nothing is sent any more
        rig.settle()
        assert rig.states(ref) == [SlotState.FREE]


def test_ends_that_wait_for_another_request_have_left_too_when_the_call_returns() -> None:
    with open_rig(ports=2, ring=RingConfig(slots=4, slot_bytes=80 << 10, prefault=False)) as rig:
        client = rig.client()
        warm(rig, client)
        refs = [rig.write(bytes([number]) * (70 << 10)) for number in range(2)]  # a message each
        holds = [Hold(), Hold()]
        for number, hold in enumerate(holds, 1):
            rig.faults_of(number).hold = hold
        rig.faults_of(1).spare, rig.faults_of(1).drop = 1, 1  # its second answer is lost
        job = client.begin(*refs, deadline_s=8.0)
        rig.advance(4.5)  # half the time: both are to be asked of the second port
        for number, hold in enumerate(holds, 1):
            rig.faults_of(number).hold = None
            hold.set()
        rig.run_until(lambda: job.done)
        assert all(isinstance(outcome, Payload) for outcome in job.outcomes)
        rig.idle_alone = (client,)
        rig.settle()
        delivered = [rig.statistics(number).delivered for number in (1, 2)]
        rig.idle_alone = ()
        assert delivered == [2, 1]  # with the one that came first


def test_an_answer_that_breaks_its_connection_costs_those_that_had_come_behind_it_another_try_and_no_more() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=4, slot_bytes=80 << 10, prefault=False)) as rig:
        client = rig.client()
        warm(rig, client)
        refs = [rig.write(bytes([number]) * (70 << 10)) for number in range(3)]  # a message each
        rig.faults_of(1).flip_byte = 0  # of the magic
        job = client.core.begin(refs)
        broken, *others = client.outcomes(job)
        assert isinstance(broken, ProtocolError)
        assert [bytes(each.buffer[:1]) for each in others if isinstance(each, Payload)] == [b"\1", b"\2"]
        rig.settle()
        assert client.counts.lent_buffers == 2


def test_nothing_is_consumed_before_the_end() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        ref = rig.write(EPISODE)
        job = paused_before_the_answer(rig, client, ref)
        assert rig.statistics(1).delivered == 1
        client.abandon(job)
        deliver_answer(rig)
        assert rig.states(ref) == [SlotState.READY]
        assert rig.statistics(1).delivered == 1
        assert rig.statistics(1).released == 1


def test_an_abandoned_read_gives_everything_back_and_keeps_the_connection() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        ref = rig.write(EPISODE)
        job = paused_before_the_answer(rig, client, ref)
        assert client.counts.lent_buffers == 1
        client.abandon(job)
        del job
        deliver_answer(rig)
        statistics = client.counts
        assert (statistics.lent_buffers, statistics.connections, statistics.quarantined) == (0, 1, 0)
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
        assert client.counts.connections == 1


def test_an_abandoned_job_releases_the_payloads_that_had_come() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        first, second = rig.write(EPISODE), rig.write(bytes(60 << 10))
        rig.faults_of(1).spare, rig.faults_of(1).drop = 1, 1
        job = client.begin(first, second, deadline_s=60.0)
        assert [type(outcome) for outcome in job.outcomes] == [Payload, type(None)]
        client.abandon(job)
        job.outcomes.clear()
        rig.advance(120.0)
        assert client.counts.lent_buffers == 0


@pytest.mark.may_leave("descriptors", reason="a receive that never ends keeps its link for the life of the process")
def test_a_buffer_whose_receive_never_ends_is_not_handed_on() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        warm(rig, client)
        rig.faults.never_complete = True
        lost = rig.write(EPISODE)
        with pytest.raises(DeadlineExceededError):
            client.read(lost, deadline_s=1.0)
        rig.faults.never_complete = False
        rig.advance(4.0)
        statistics = client.counts
        assert (statistics.lent_buffers, statistics.leaked_buffers) == (1, 1)
        with client.read(rig.write(EPISODE)) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert client.counts.lent_buffers == 2


def test_a_late_answer_is_delivered_while_its_read_still_waits_elsewhere() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        warm(rig, client)
        ref = rig.write(EPISODE)
        hold = rig.faults_of(1).hold = Hold()
        rig.faults_of(2).hold = Hold()
        job = client.begin(ref, deadline_s=8.0)
        rig.advance(4.5)  # half the time: it is asked of the second port too
        assert not job.done
        hold.set()
        with client.result(job) as payload:
            assert bytes(payload.buffer) == EPISODE
        assert client.counts.timeouts == 1
        held = rig.faults_of(2).hold
        assert held is not None
        held.set()
        rig.settle()
        assert rig.states(ref) == [SlotState.FREE]
        assert client.counts.lent_buffers == 0


def test_the_first_attempts_late_end_does_not_touch_what_the_second_one_settled() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        warm(rig, client)
        ref = rig.write(EPISODE)
        hold = rig.faults_of(1).hold = Hold()  # port 1 holds its attempt, and its answer back
        with client.read(ref, deadline_s=8.0) as payload:
            assert bytes(payload.buffer) == EPISODE
        rig.settle()
        newer = [rig.write(b"new" * 100) for _ in range(3)]
        hold.set()
        rig.advance(PAST_THE_ACK_LIMIT_S)
        assert rig.states(*newer) == [SlotState.READY] * 3, "an orphan's end freed or released a newer payload"
        assert rig.states(ref) == [SlotState.FREE]
        client.consume(*newer)


def test_a_slot_being_read_by_two_attempts_is_not_written_until_both_have_ended() -> None:
    shared = RingConfig(slots=4, slot_bytes=64 << 10, readers=2, prefault=False)
    with open_rig(ports=1, ring=shared) as rig:
        client, other = rig.client(), rig.client()
        warm(rig, client)
        warm(rig, other)
        refs = [rig.write(EPISODE) for _ in range(4)]
        first = paused_before_the_answer(rig, client, refs[0])
        second = other.begin(refs[0], deadline_s=60.0)
        for _ in range(8):
            assert rig.write(b"newer").slot != refs[0].slot
        client.abandon(first)
        for _ in range(8):
            assert rig.write(b"newer").slot != refs[0].slot
        deliver_answer(rig)
        with other.result(second) as payload:
            assert bytes(payload.buffer) == EPISODE
        rig.settle()
        assert rig.states(refs[0]) == [SlotState.READY], "one of two reads"


def test_a_payload_that_another_reader_is_reading_is_busy_and_to_be_had_once_it_is_given_back() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        lease = rig.ring.acquire(ref, reader=7)
        with pytest.raises(BusyError) as refused:
            client.read(ref)
        assert refused.value.retryable
        lease.release_reading()
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_without_memory_for_an_answer_the_payload_stays_and_the_next_read_succeeds(
    monkeypatch: pytest.MonkeyPatch, *, together: bool
) -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        refs = [rig.write(bytes(60 << 10)) for _ in range(1 + together)]

        def allocate(*_: object, **_how: object) -> memoryview:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("ucxx_transport.client.payload.np.empty", allocate)
            errors = client.read_many(refs)
        assert [type(error) for error in errors] == [ConfigError] * len(refs)
        assert client.counts.lent_buffers == client.counts.quarantined == 0
        for ref in refs:
            with client.read(ref) as payload:
                assert payload.nbytes == 60 << 10


def test_a_failed_read_kept_as_a_value_keeps_no_buffer() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(3)]
        rig.ring.discard(refs[0])
        rig.faults_of(1).spare, rig.faults_of(1).drop = 1, 1000
        errors = client.read_many(refs, deadline_s=1.0)
        assert all(isinstance(error, Exception) for error in errors)
        rig.advance(3.0)
        assert client.counts.lent_buffers == 0


def test_closing_ends_reads_in_flight_and_opens_nothing_again() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        rig.faults_of(1).drop = rig.faults_of(2).drop = 1000
        job = client.begin(ref, deadline_s=60.0)
        client.close()
        rig.faults_of(1).drop = rig.faults_of(2).drop = 0
        assert isinstance(job.outcomes[0], PeerLostError)
        assert rig.opened_links == 1
        assert client.counts.lent_buffers == 0


def test_closing_takes_at_most_a_moment_where_a_server_does_not_answer() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        warm(rig, client)
        rig.faults_of(1).drop = 1000
        began_s = rig.now_s
        client.close()
        assert 0.4 < rig.now_s - began_s < 0.6


def test_connections_to_sources_that_are_not_read_any_more_are_closed_when_another_is_opened() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client(pool_endpoint_max_age_s=100.0)
        rig.publish(1)
        warm(rig, client)
        rig.publish(2)
        rig.advance(101.0)
        warm(rig, client)
        assert endpoints_open(client.link) == 1


def test_a_connection_idle_longer_than_its_age_is_replaced_before_the_server_drops_it() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(pool_endpoint_max_age_s=100.0)
        warm(rig, client)
        rig.advance(99.0)
        warm(rig, client)
        assert client.counts.connections == 1
        rig.advance(101.0)
        warm(rig, client)
        statistics = client.counts
        assert (statistics.connections, statistics.aged_out, statistics.peers_lost) == (2, 1, 0)
        assert rig.statistics(1).idle_evictions == 0


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_connection_that_the_server_dropped_while_idle_costs_nothing(*, is_noticed: bool) -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(pool_endpoint_max_age_s=1000.0)
        warm(rig, client)
        rig.idle_alone = () if is_noticed else (client,)
        rig.advance(121.0)
        rig.idle_alone = ()
        assert rig.statistics(1).idle_evictions == 1
        warm(rig, client)
        statistics = client.counts
        assert (statistics.connections, statistics.peers_lost, statistics.quarantined) == (2, 0, 0)


def test_a_source_with_many_reads_waiting_does_not_hold_up_another() -> None:
    with open_rig(ports=2, ring=RingConfig(slots=64, slot_bytes=1 << 20, prefault=False)) as rig:
        client = rig.client()
        rig.publish(1)
        greedy = [rig.write(bytes(1 << 20)) for _ in range(32)]
        rig.publish(2)
        modest = rig.write(EPISODE)
        hold = rig.faults_of(1).hold = Hold()
        many = client.core.begin(greedy, 60.0)
        one = client.core.begin((modest,), 60.0)
        rig.run_until(lambda: one.done)
        assert many.left == 32
        hold.set()
        rig.run_until(lambda: many.done)
        assert all(isinstance(outcome, Payload) for outcome in many.outcomes)


def test_large_payloads_of_one_connection_come_a_few_at_a_time() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=16, slot_bytes=1 << 20, prefault=False)) as rig:
        client = rig.client()
        refs = [rig.write(bytes(1 << 20)) for _ in range(16)]
        job = client.core.begin(refs, 60.0)
        most = 0
        for _ in range(10_000):
            if job.done:
                break
            most = max(most, client.counts.lent_buffers - sum(outcome is not None for outcome in job.outcomes))
            rig.turn()
        assert most == 2


def test_one_slow_payload_costs_the_others_of_its_connection_nothing() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=8, slot_bytes=64 << 10, prefault=False)) as rig:
        client = rig.client(read_attempts=1)
        warm(rig, client)
        refs = [rig.write(bytes(60 << 10)) for _ in range(5)]
        rig.faults_of(1).drop = 1  # the answer to the first one
        began_s = rig.now_s
        job = client.begin(*refs, deadline_s=2.0)
        assert [type(outcome) for outcome in job.outcomes] == [type(None), *[Payload] * 4]
        rig.advance(0.01)
        assert rig.states(*refs[1:]) == [SlotState.FREE] * 4, "their ends did not wait either"
        outcomes = client.outcomes(job)
        assert isinstance(outcomes[0], DeadlineExceededError)
        assert rig.now_s - began_s <= 2.001


def test_reads_of_other_jobs_wait_for_a_slow_connection_only_until_it_is_closed() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        warm(rig, client)
        rig.faults_of(1).drop = 1
        with pytest.raises(DeadlineExceededError):
            client.read(rig.write(EPISODE), deadline_s=2.0)
        began_s = rig.now_s
        with client.read(rig.write(EPISODE), deadline_s=5.0) as payload:
            assert bytes(payload.buffer) == EPISODE
        assert 0.9 < rig.now_s - began_s < 1.1
        assert client.counts.connections == 2


def test_a_connection_is_whole_again_once_the_late_answer_has_come() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        warm(rig, client)
        ref = rig.write(EPISODE)
        hold = rig.faults_of(1).hold = Hold()
        with pytest.raises(DeadlineExceededError):
            client.read(ref, deadline_s=2.0)
        rig.faults_of(1).hold = None
        hold.set()
        rig.settle()
        assert rig.states(ref) == [SlotState.READY]
        client.consume(ref, rig.write(EPISODE))
        statistics = client.counts
        assert (statistics.connections, statistics.lent_buffers) == (1, 0)


def test_errors_of_a_batch_are_each_their_own() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        refs = [rig.write(EPISODE) for _ in range(3)]
        rig.stop_port(1)
        errors = client.read_many(refs)
        assert all(isinstance(error, TransportError) for error in errors)
        assert len(set(map(id, errors))) == 3


def test_a_payload_that_an_interrupt_has_kept_from_its_call_is_delivered_after_all() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        interrupts = [KeyboardInterrupt]

        def on_payload(_index: int, payload: Payload) -> Payload:
            if interrupts:
                raise interrupts.pop()
            return payload

        job = client.core.begin((ref,), on_payload=on_payload)
        with pytest.raises(KeyboardInterrupt):
            rig.settle()
        client.core.repair()
        [outcome] = client.outcomes(job)
        assert isinstance(outcome, Payload)
        assert bytes(outcome.buffer) == EPISODE
        with pytest.raises(StaleSlotError):
            client.read(ref)


def test_a_second_interrupt_during_the_repair_costs_no_other_call_either() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=16, slot_bytes=8192, prefault=False)) as rig:
        client = rig.client()
        warm(rig, client)
        hold = rig.faults_of(1).hold = Hold()

        def interrupt(_job: Job) -> None:
            raise KeyboardInterrupt

        client.core.begin((rig.write(EPISODE),), 1.0, on_done=interrupt)
        others = [client.core.begin((rig.write(EPISODE),), 60.0) for _ in range(10)]
        rig.settle()
        rig.now_s += 2.0
        client.core.damaged = True
        with pytest.raises(KeyboardInterrupt):
            client.core.repair()
        assert client.core.damaged
        rig.faults_of(1).hold = None
        hold.set()
        client.core.repair()
        assert [type(outcome) for outcome in client.outcomes(*others)] == [Payload] * 10


def test_payloads_that_wait_to_be_delivered_hold_up_what_waits_behind_them_no_longer_than_that() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=4, slot_bytes=2 << 20, prefault=False)) as rig:
        client = rig.client()
        client.consume(rig.write(EPISODE))
        jobs = [Job([rig.write(bytes(2 << 20))], rig.now_s + 60.0) for _ in range(3)]
        for job in jobs:
            job.is_held = True
            client.core.reads.start_one(job)
        rig.settle()
        assert [job.done for job in jobs] == [True, True, False]
        for job in jobs[:2]:
            client.core.reads.deliver(job)
        rig.settle()
        assert jobs[2].done
        client.core.reads.deliver(jobs[2])
        assert all(isinstance(job.outcomes[0], Payload) for job in jobs)
