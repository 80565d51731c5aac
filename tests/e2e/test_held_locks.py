"""A process that is stopped while it holds a ring's lock, and clients that read other rings beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest
from anyio.lowlevel import checkpoint

from tests.support.held_lock import held_lock
from tests.support.interrupts import Interrupter
from tests.support.local_worker import LocalWorker
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    DeadlineExceededError,
    Payload,
    RingConfig,
    SharedRingBuffer,
    SlotRef,
    SlotState,
    SyncUCXXClient,
    UCXXClient,
)
from ucxx_transport.client.core import ClientCore
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Prefetcher

LOCAL = ClientConfig(local="view")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def worker() -> Iterator[LocalWorker]:
    """One whose ring's lock is free."""
    with SharedRingBuffer.create(RingConfig(slots=8, slot_bytes=64, on_full="raise")) as ring:
        yield LocalWorker(ring)


@pytest.fixture
def other() -> Iterator[LocalWorker]:
    """One whose ring's lock is held."""
    with SharedRingBuffer.create(RingConfig(slots=8, slot_bytes=64, on_full="raise")) as ring:
        yield LocalWorker(ring)


def refs_of(*records: EpisodeRecord) -> list[SlotRef]:
    return [record.ref for record in records if record.ref is not None]


def test_a_held_lock_delays_the_reads_of_its_own_ring_alone(worker: LocalWorker, other: LocalWorker) -> None:
    mixed = [*other.play(2), *worker.play(2)]
    # in one round: where the reads of one ring held up the thread, this batch would be over before the next one is read
    with Prefetcher(LOCAL, deadline_s=60, max_fetch_rounds=1) as prefetcher, held_lock(other.ring) as release:
        pending = prefetcher.begin(mixed)
        prefetcher.fetch(worker.play(1)).release()
        assert worker.ring.slot_states()[:3] == [SlotState.READING, SlotState.READING, SlotState.FREE]
        assert not pending.is_ready
        release()
        batch = pending.result()
        assert list(batch.payloads) == [0, 1, 2, 3]
        batch.release()


def test_a_held_lock_delays_the_discards_of_its_own_ring_alone(worker: LocalWorker, other: LocalWorker) -> None:
    old = [*other.play(1, policy_version=0), *worker.play(1, policy_version=0)]
    with Prefetcher(LOCAL, deadline_s=60, max_staleness=1) as prefetcher, held_lock(other.ring) as release:
        assert not prefetcher.fetch(old, policy_version=9).payloads
        prefetcher.fetch(worker.play(1, policy_version=9), policy_version=9).release()
        assert worker.ring.slot_states()[:2] == [SlotState.FREE, SlotState.FREE]
        assert other.ring.slot_state(0) is SlotState.READY
        release()
        wait_until(lambda: prefetcher.client_statistics().discarded == 2, what="both are discarded")
        assert other.ring.slot_state(0) is SlotState.FREE


@contextmanager
def waiting_discard(other: LocalWorker) -> Iterator[ClientCore]:
    """A discard begins, finds the lock held during the block, and ends behind it."""
    core, refs = ClientCore(LOCAL, None), refs_of(*other.play(1))
    with held_lock(other.ring) as release:
        call = core.discard_call(refs, 60.0)
        core.reads.go_on(call)
        yield core
        release()
        wait_until(lambda: call.done or (core.reactor.poll() and call.done), what="it is discarded")
    assert call.found == 1
    assert other.ring.slot_state(0) is SlotState.FREE
    core.close()


def test_a_discard_that_waits_for_a_held_lock_goes_on_though_another_call_s_interrupt_has_cut_a_step_in_two(
    other: LocalWorker,
) -> None:
    with waiting_discard(other) as core:
        core.damaged = True
        core.repair()


def test_a_discard_goes_on_though_it_is_interrupted_itself_while_it_waits_for_a_held_lock(other: LocalWorker) -> None:
    with waiting_discard(other) as core:
        interrupter = Interrupter(0, ("client/local.py",))
        with pytest.raises(KeyboardInterrupt), interrupter:
            wait_until(core.reactor.poll, what="another look at the lock")
        core.damaged = True  # as it is when another call's thread has run that
        core.repair()


def test_a_prefetcher_is_closed_while_a_read_waits_for_a_held_lock(other: LocalWorker) -> None:
    episodes = other.play(2)
    with held_lock(other.ring) as release:
        with Prefetcher(LOCAL, deadline_s=60) as prefetcher:
            prefetcher.begin(episodes)
        assert prefetcher.statistics().losses == {"closed": 2}
        release()
    assert other.ring.slot_states()[:2] == [SlotState.READY, SlotState.READY]


def test_a_call_ends_at_its_deadline_with_what_lies_in_other_rings(worker: LocalWorker, other: LocalWorker) -> None:
    far, near = refs_of(*other.play(2)), refs_of(*worker.play(2))
    with SyncUCXXClient(LOCAL) as client, held_lock(other.ring) as release:
        late, read = client.read_many([far[0], near[0]], deadline_s=0.05)
        assert isinstance(late, DeadlineExceededError)
        assert isinstance(read, Payload)
        assert client.discard([far[1], near[1]], deadline_s=0.05) == 1
        release()
        assert client.discard(far) == 2


@pytest.mark.anyio
async def test_an_event_loop_s_call_does_the_same(worker: LocalWorker, other: LocalWorker) -> None:
    far, near = refs_of(*other.play(2)), refs_of(*worker.play(2))
    async with UCXXClient(LOCAL) as client:
        with held_lock(other.ring) as release:
            late, read = await client.read_many([far[0], near[0]], deadline_s=0.05)
            assert isinstance(late, DeadlineExceededError)
            assert isinstance(read, Payload)
            assert await client.discard([far[1], near[1]], deadline_s=0.05) == 1
            release()
            assert await client.discard(far) == 2


@pytest.mark.anyio
async def test_an_event_loop_goes_on_while_a_take_waits_for_a_held_lock(other: LocalWorker) -> None:
    refs = refs_of(*other.play(1))
    taken: list[SlotRef] = []
    async with UCXXClient(LOCAL) as client:

        async def take() -> None:
            taken.extend(payload.ref for payload in await client.take(refs[0]))

        with held_lock(other.ring) as release:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take)
                await checkpoint()
                release()
    assert [ref.name for ref in taken] == [ref.name for ref in refs]
