"""A client over UCX where something is slow, stopped, interrupted, forked, cancelled, or short of descriptors."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from tests.support.exhaustive import exhaustive
from tests.support.interrupts import signalled_when
from tests.support.programs import program
from tests.support.served_ring import ServedRing, client_of, served_ring
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    DeadlineExceededError,
    Payload,
    PeerLostError,
    SlotRef,
    SlotState,
    UCXXClient,
)

EPISODE = bytes(range(256)) * 16


def are_free(served: ServedRing, refs: list[SlotRef]) -> bool:
    return all(served.ring.slot_state(ref.slot) is SlotState.FREE for ref in refs)


def test_a_stopped_source_costs_the_others_of_its_batch_nothing() -> None:
    with (
        served_ring(mode="process", stall_timeout_s=600.0) as stopped,
        served_ring(mode="thread") as healthy,
        client_of(deadline_s=4.0) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        for served in (stopped, healthy):
            client.read(served.ring.write_raw(EPISODE)).release()
        (pid,) = stopped.server.statistics().pids
        assert pid is not None
        stop_process(pid)
        try:
            for _ in range(2):  # the second time its port is in quarantine
                lost = [stopped.ring.write_raw(EPISODE) for _ in range(2)]
                had = [healthy.ring.write_raw(EPISODE) for _ in range(4)]
                reading = threads.submit(client.read_many, [*lost, *had])
                wait_until(partial(are_free, healthy, had), 60, what="the others are read")
                outcomes = reading.result(timeout=60)
                assert [isinstance(outcome, DeadlineExceededError | PeerLostError) for outcome in outcomes[:2]] == [
                    True,
                    True,
                ]
                assert all(isinstance(outcome, Payload) for outcome in outcomes[2:])
        finally:
            os.kill(pid, signal.SIGCONT)


def test_reads_with_hardly_any_time_succeed_in_the_end() -> None:
    with served_ring(mode="thread", ring={"slots": 256, "slot_bytes": 4096}) as served, client_of() as client:
        reads = 0

        def one_more() -> bool:
            nonlocal reads
            reads += 1
            outcome = client.read_many([served.ring.write_raw(EPISODE)], deadline_s=0.0004 * (1 + reads % 4))[0]
            return isinstance(outcome, Payload)

        wait_until(one_more, 60, what="a read with hardly any time succeeds")
        assert client.statistics().connections == 1


def test_threads_share_a_client_over_ucx_and_one_is_interrupted() -> None:
    with served_ring(mode="thread", ring={"slots": 64, "slot_bytes": 4096}) as served, client_of() as client:
        writing = threading.Lock()

        def read(times: int) -> int:
            for _ in range(times):
                with writing:
                    ref = served.ring.write_raw(EPISODE)
                with client.read(ref) as payload:
                    assert bytes(payload.buffer) == EPISODE
            return times

        with ThreadPoolExecutor(3) as threads:
            readings = [threads.submit(read, 100) for _ in range(3)]
            with pytest.raises(KeyboardInterrupt), signalled_when(lambda: client.statistics().reads > 50):
                read(1_000_000)
            assert [reading.result(timeout=60) for reading in readings] == [100] * 3
        read(10)


def test_a_forked_child_uses_nothing_of_its_parents_client() -> None:
    with served_ring(mode="process") as served, client_of() as client:
        client.read(served.ring.write_raw(EPISODE)).release()
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(ConfigError, match="forked"):
                    client.read(served.ring.write_raw(EPISODE))
                client.close()
            except BaseException:  # noqa: BLE001 - the child's only way to say so
                os._exit(1)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with client.read(served.ring.write_raw(EPISODE)) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_cancelled_reads_keep_nothing_and_lose_nothing() -> None:
    async def main(served: ServedRing) -> None:
        config = ClientConfig(local="off", deadline_s=60.0, connect_timeout_s=20.0)
        async with UCXXClient(config) as client:
            (await client.read(served.ring.write_raw(EPISODE))).release()
            for steps in range(30):
                ref = served.ring.write_raw(EPISODE)
                reading = asyncio.create_task(client.read(ref))
                for _ in range(steps):
                    await asyncio.sleep(0)
                reading.cancel()
                try:
                    payload = await reading
                except asyncio.CancelledError:
                    payload = await client.read(ref)
                assert bytes(payload.buffer) == EPISODE
                del payload, reading
            statistics = client.statistics()
            assert (statistics.reads, statistics.lent_buffers, statistics.connections) == (31, 0, 1)

    with served_ring(mode="thread", ring={"slots": 64, "slot_bytes": 4096}) as served:
        asyncio.run(main(served))


def test_payloads_are_taken_over_ucx_each_by_one_client() -> None:
    with served_ring(mode="process", ring={"slots": 64, "slot_bytes": 4096}) as served, client_of() as one:
        refs = [served.ring.write_raw(EPISODE, meta={"number": number}) for number in range(40)]
        with client_of() as other:
            taken = [client.take(refs[0], max_payloads=20) for client in (one, other)]
            numbers = [payload.record["number"] for payloads in taken for payload in payloads if payload.record]
            assert sorted(map(int, map(str, numbers))) == list(range(40))
            assert one.take(refs[0]) == []


@pytest.mark.parametrize(("workers", "rings", "descriptors"), [(1, 140, 128), exhaustive(4, 125, 256)])
def test_many_small_sources_are_read_with_few_descriptors(workers: int, rings: int, descriptors: int) -> None:
    with ExitStack() as stack:
        sources = [stack.enter_context(program("many_sources", "worker")) for _ in range(workers)]
        client = stack.enter_context(program("many_sources", "client"))
        assert client.ask(descriptors=descriptors) == {"limit": descriptors}
        for source in sources:
            source.tell(rings=rings)
        for local in ("off", "off", "view", "copy", "auto"):
            refs = [ref for source in sources for ref in source.hear()["refs"]]
            assert len(refs) == workers * rings
            heard = client.ask(refs=refs, local=local)
            assert heard["errors"] == [], local
            assert heard["read"] == len(refs)
            for source in sources:
                source.tell(rings=0)
        for source in sources:
            source.hear()
        for each in (client, *sources):
            each.end_input()
        assert [each.wait() for each in (client, *sources)] == [0] * (1 + workers)


def test_a_reference_of_a_source_that_is_gone_is_said_to_be_unreachable() -> None:
    with served_ring(mode="thread") as served:
        ref = served.ring.write_raw(EPISODE)
    with (
        client_of(deadline_s=5.0, connect_timeout_s=1.0) as client,
        pytest.raises((PeerLostError, DeadlineExceededError)),
    ):
        client.read(SlotRef.from_bytes(ref.to_bytes()))
