"""Delivered means received: what becomes of a payload whose acknowledgement, connection or reader is lost."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.exchange_rig import ExchangeRig, open_rig
from tests.support.virtual_time import settle
from ucxx_transport.client import Payload, UCXXClient
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import BusyError, DeadlineExceededError, StaleSlotError, TransportError
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import SlotRef

pytestmark = pytest.mark.anyio

EPISODE = bytes(range(256)) * 16
# Beyond the server's limit for an acknowledgement, and one sweep.
PAST_THE_ACK_LIMIT_S = 11.0


async def paused_before_the_answer(rig: ExchangeRig, client: UCXXClient, ref: SlotRef) -> asyncio.Task[Payload]:
    """A read whose request has reached the server and whose answer is on its way; `deliver_answer` delivers it."""
    rig.faults_of(1).hold = asyncio.Event()
    reading = asyncio.create_task(client.read(ref, deadline_s=60.0))
    await settle()
    assert rig.ring.slot_state(ref.slot) is SlotState.READING
    return reading


def deliver_answer(rig: ExchangeRig) -> None:
    hold, rig.faults_of(1).hold = rig.faults_of(1).hold, None
    assert hold is not None
    hold.set()


async def warm(rig: ExchangeRig, client: UCXXClient) -> None:
    """Have a connection, so that what follows is one read and nothing else."""
    (await client.read(rig.write(EPISODE))).release()
    await settle()


async def read_losing_the_ack(rig: ExchangeRig, client: UCXXClient, ref: SlotRef, *, reset: bool) -> None:
    """Deliver `ref`; its acknowledgement vanishes, or the connection breaks in its place."""
    reading = await paused_before_the_answer(rig, client, ref)
    if reset:
        rig.faults.reset_after = 0
    else:
        rig.faults.drop = 1
    deliver_answer(rig)
    with await reading as payload:
        assert bytes(payload.buffer) == EPISODE


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "vanished"])
async def test_a_lost_acknowledgement_makes_the_slot_ready_and_a_confirm_frees_it(*, reset: bool) -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        await read_losing_the_ack(rig, client, ref, reset=reset)
        await asyncio.sleep(PAST_THE_ACK_LIMIT_S)
        assert rig.ring.slot_state(ref.slot) is SlotState.READY, "nobody acknowledged it"
        (await client.read(rig.write(EPISODE))).release()
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        assert client.statistics().confirms == 1
        assert rig.statistics(1).confirms == 1


async def test_several_lost_acknowledgements_are_all_said_again() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client(max_concurrent_reads=3)
        refs = [rig.write(EPISODE) for _ in range(3)]
        rig.faults_of(1).hold = asyncio.Event()
        readings = [asyncio.create_task(client.read(ref, deadline_s=60.0)) for ref in refs]
        await settle()
        deliver_answer(rig)
        await settle()
        for ref in refs:
            assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        for reading in readings:
            (await reading).release()
        refs = [rig.write(EPISODE) for _ in range(3)]
        rig.faults_of(1).hold = asyncio.Event()
        readings = [asyncio.create_task(client.read(ref, deadline_s=60.0)) for ref in refs]
        await settle()
        rig.faults.drop = 3
        deliver_answer(rig)
        for reading in readings:
            (await reading).release()
        await asyncio.sleep(PAST_THE_ACK_LIMIT_S)
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.READY] * 3
        (await client.read(rig.write(EPISODE))).release()
        await settle()
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.FREE] * 3


async def test_reads_that_start_together_after_a_loss_all_succeed() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        await read_losing_the_ack(rig, client, ref, reset=True)
        others = [rig.write(EPISODE) for _ in range(3)]
        for payload in await asyncio.gather(*(client.read(other) for other in others)):
            payload.release()
        await settle()
        assert client.statistics().confirms == 1
        assert rig.ring.slot_states() == [SlotState.FREE] * 4


async def test_a_confirm_that_is_lost_too_is_said_again() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        await read_losing_the_ack(rig, client, ref, reset=True)
        rig.faults.reset_after = 1  # HELLO passes, CONFIRM breaks the connection
        (await client.read(rig.write(EPISODE))).release()
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        assert client.statistics().confirms == 1


async def test_a_confirm_of_a_payload_that_was_overwritten_in_the_meantime_touches_nothing() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        await read_losing_the_ack(rig, client, ref, reset=True)
        await settle()
        newer = [rig.write(EPISODE) for _ in range(4)]
        assert ref.slot in {other.slot for other in newer}
        for other in newer:
            (await client.read(other)).release()
        assert client.statistics().confirms == 0
        await settle()
        assert rig.ring.slot_states() == [SlotState.FREE] * 4


async def test_the_duplicate_that_a_lost_acknowledgement_allows_is_dropped_by_name() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        await read_losing_the_ack(rig, client, ref, reset=True)
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        with pytest.raises(StaleSlotError, match="already received"):
            await client.read(ref)
        assert client.statistics().duplicates == 1


async def test_another_client_may_still_have_what_was_not_acknowledged() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        await read_losing_the_ack(rig, client, ref, reset=True)
        await settle()
        with await rig.client().read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


async def test_nothing_is_consumed_before_the_acknowledgement() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        await warm(rig, client)
        ref = rig.write(EPISODE)
        reading = await paused_before_the_answer(rig, client, ref)
        assert rig.statistics(1).delivered == 1
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        deliver_answer(rig)
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        assert rig.statistics(1).delivered == 1
        assert rig.statistics(1).released == 1


async def test_a_cancelled_read_gives_everything_back() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client(max_concurrent_reads=1)
        await warm(rig, client)
        ref = rig.write(EPISODE)
        reading = await paused_before_the_answer(rig, client, ref)
        assert client.statistics().lent_buffers == 1
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        del reading
        deliver_answer(rig)
        statistics = client.statistics()
        assert (statistics.lent_buffers, statistics.pooled_endpoints) == (0, 0)
        assert rig.opened_links[0].statistics().in_flight == 0
        with await client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


async def test_a_buffer_whose_receive_never_ends_is_not_handed_on() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        await warm(rig, client)
        rig.faults.never_complete = True
        lost = rig.write(EPISODE)
        with pytest.raises(DeadlineExceededError):
            await client.read(lost, deadline_s=1.0)
        rig.faults.never_complete = False
        await settle()
        statistics = client.statistics()
        assert (statistics.lent_buffers, statistics.leaked_buffers) == (1, 1)
        with await client.read(rig.write(EPISODE)) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert client.statistics().lent_buffers == 2


async def test_the_first_attempts_late_end_does_not_touch_what_the_second_one_settled() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client(max_pooled_endpoints=1)
        for _ in range(2):
            await warm(rig, client)
        ref = rig.write(EPISODE)
        hold = rig.faults_of(1).hold = asyncio.Event()  # port 1 holds its attempt, and its answer back
        with await client.read(ref, deadline_s=8.0) as payload:
            assert bytes(payload.buffer) == EPISODE
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        newer = [rig.write(b"new" * 100) for _ in range(4)]
        hold.set()
        await asyncio.sleep(PAST_THE_ACK_LIMIT_S)
        assert rig.ring.slot_states() == [SlotState.READY] * 4, "an orphan's end freed or released a newer payload"
        for other in newer:
            with await client.read(other) as payload:
                assert bytes(payload.buffer) == b"new" * 100


async def test_a_slot_being_read_by_two_attempts_is_not_written_until_both_have_ended() -> None:
    shared = RingConfig(slots=4, slot_bytes=64 << 10, readers=2, prefault=False)
    async with open_rig(ports=1, ring=shared) as rig:
        client, other = rig.client(), rig.client()
        await warm(rig, client)
        await warm(rig, other)
        refs = [rig.write(EPISODE) for _ in range(4)]
        first = await paused_before_the_answer(rig, client, refs[0])
        second = asyncio.create_task(other.read(refs[0], deadline_s=60.0))
        await settle()
        for _ in range(8):
            assert rig.write(b"newer").slot != refs[0].slot
        first.cancel()
        await settle()
        for _ in range(8):
            assert rig.write(b"newer").slot != refs[0].slot
        deliver_answer(rig)
        with await second as payload:
            assert bytes(payload.buffer) == EPISODE
        await settle()
        assert rig.ring.slot_state(refs[0].slot) is SlotState.READY, "one of two reads"


async def test_a_payload_that_another_reader_is_reading_is_busy_and_to_be_had_once_it_is_given_back() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        lease = rig.ring.acquire(ref, reader=7)
        with pytest.raises(BusyError) as refused:
            await client.read(ref)
        assert refused.value.retryable
        lease.release_reading()
        with await client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


async def test_a_failed_read_kept_as_a_value_keeps_no_buffer() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(3)]
        rig.ring.discard(refs[0])
        rig.faults_of(1).drop = 1000
        errors = [*(await client.read_many(refs, deadline_s=1.0))]
        assert all(isinstance(error, Exception) for error in errors)
        assert client.statistics().lent_buffers == 0


async def test_closing_ends_reads_in_flight_and_opens_nothing_again() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        rig.faults_of(1).drop = rig.faults_of(2).drop = 1000
        reading = asyncio.create_task(client.read(ref, deadline_s=60.0))
        await settle()
        await client.aclose()
        rig.faults_of(1).drop = rig.faults_of(2).drop = 0
        with pytest.raises(TransportError):
            (await reading).release()
        assert len(rig.opened_links) == 1
        assert all(link.closed for link in rig.opened_links)


async def test_connections_to_sources_nobody_reads_any_more_are_closed_when_another_is_opened() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client(pool_endpoint_max_age_s=100.0)
        rig.publish(1)
        await warm(rig, client)
        rig.publish(2)
        await asyncio.sleep(101.0)
        await warm(rig, client)
        assert rig.opened_links[0].statistics().endpoints_open == 1


async def test_a_connection_idle_longer_than_its_age_is_replaced_before_the_server_drops_it() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client(pool_endpoint_max_age_s=100.0)
        await warm(rig, client)
        await asyncio.sleep(99.0)
        await warm(rig, client)
        assert client.statistics().connections == 1
        await asyncio.sleep(101.0)
        await warm(rig, client)
        statistics = client.statistics()
        assert (statistics.connections, statistics.aged_out, statistics.peers_lost) == (2, 1, 0)
        assert rig.statistics(1).idle_evictions == 0


async def test_a_connection_the_server_dropped_while_idle_costs_nothing() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client(pool_endpoint_max_age_s=1000.0)
        await warm(rig, client)
        await asyncio.sleep(121.0)
        assert rig.statistics(1).idle_evictions == 1
        await warm(rig, client)
        statistics = client.statistics()
        assert (statistics.connections, statistics.peers_lost, statistics.quarantined) == (2, 0, 0)


async def test_a_source_with_many_reads_waiting_does_not_hold_up_another() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client(max_concurrent_reads=1)
        rig.publish(1)
        greedy = [rig.write(EPISODE) for _ in range(3)]
        rig.publish(2)
        modest = rig.write(EPISODE)
        order: list[int] = []

        async def read(ref: SlotRef) -> None:
            (await client.read(ref)).release()
            order.append(ref.slot)

        await asyncio.gather(*(read(ref) for ref in (*greedy, modest)))
        assert order == [greedy[0].slot, greedy[1].slot, modest.slot, greedy[2].slot]
