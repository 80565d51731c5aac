"""Batches from several rollout workers over real UCX, with somebody killed meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.e2e.programs.rollout_worker import play
from tests.support.programs import Program, program
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, UCXXClient
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch, LossReason, Prefetcher, fetch_batch

pytestmark = pytest.mark.anyio

CONFIG = ClientConfig(local="off", connect_timeout_s=1.0, deadline_s=10.0)


def episodes_of(worker: Program, lengths: tuple[int, ...]) -> list[EpisodeRecord]:
    return [EpisodeRecord.from_dict(worker.ask(steps=steps, version=3)["record"]) for steps in lengths]


def check_and_release(batch: Batch, records: list[EpisodeRecord]) -> None:
    for index, payload in batch.payloads.items():
        expected = play(records[index].episode_length or 0)
        assert payload.ref == records[index].ref
        assert (payload.arrays["obs"]["image"] == expected["obs"]["image"]).all()
        assert (payload.arrays["obs"]["speed"] == expected["obs"]["speed"]).all()
    batch.release()
    assert sorted([*batch.payloads, *(loss.index for loss in batch.losses)]) == list(range(len(records)))


async def test_killed_worker_costs_the_batch_its_own_episodes_only() -> None:
    with program("rollout_worker", "worker-0") as victim, program("rollout_worker", "worker-1") as other:
        async with UCXXClient(CONFIG) as client:
            warm = [*episodes_of(victim, (10,)), *episodes_of(other, (10,))]
            check_and_release(await fetch_batch(client, warm, deadline_s=60), warm)
            doomed, kept = episodes_of(victim, (20, 30)), episodes_of(other, (40, 50, 60))
            records = [doomed[0], kept[0], doomed[1], *kept[1:]]
            victim.signal(signal.SIGKILL)
            victim.wait()
            batch = await fetch_batch(client, records, deadline_s=6)
            check_and_release(batch, records)
            # the dead worker's server may serve an episode of it before it has noticed
            assert set(batch.payloads) >= {1, 3, 4}
            lost = {loss.index: loss.reason for loss in batch.losses}
            assert set(lost) == {0, 2} - set(batch.payloads)
            assert set(lost.values()) <= {LossReason.UNREACHABLE, LossReason.TIMEOUT}
            again = await fetch_batch(client, records, deadline_s=2, max_fetch_rounds=1)
            assert again.payloads == {}
            assert {loss.reason for loss in again.losses if loss.index in {1, 3, 4}} == {LossReason.DUPLICATE}
        other.end_input()
        assert other.wait() == 0


@pytest.mark.exhaustive
async def test_killed_server_process_costs_the_batch_nothing() -> None:
    with program("rollout_worker", "worker-0") as worker:
        async with UCXXClient(CONFIG) as client:
            for _ in range(2):
                records = episodes_of(worker, (10, 200, 300))
                os.kill(worker.ask(server=True)["server"], signal.SIGKILL)
                batch = await fetch_batch(client, records, deadline_s=60, max_fetch_rounds=100)
                assert batch.losses == ()
                check_and_release(batch, records)
        worker.end_input()
        assert worker.wait() == 0


def test_what_was_given_up_while_its_server_hung_makes_room_once_that_goes_on() -> None:
    with program("rollout_worker", "worker-0") as worker, Prefetcher(CONFIG, deadline_s=60) as prefetcher:
        prefetcher.fetch(episodes_of(worker, (10,))).release()
        server = worker.ask(server=True)["server"]
        stop_process(server)
        late = prefetcher.begin(
            episodes_of(worker, (20, 30, 40))
        )  # all slots but one, of a ring that overwrites nothing
        assert not late.result(0.5).in_time
        assert prefetcher.statistics().losses == {"timeout": 3}
        os.kill(server, signal.SIGCONT)
        wait_until(lambda: worker.ask(ring=True)["ring"]["free"] == 4, 60, what="their slots are free")
        worker.end_input()
        assert worker.wait() == 0


def test_a_prefetcher_sleeps_while_nothing_is_on_its_way_although_its_connection_is_open() -> None:
    with program("rollout_worker", "worker-0") as worker, Prefetcher(CONFIG, deadline_s=60) as prefetcher:
        prefetcher.fetch(episodes_of(worker, (10,))).release()
        assert prefetcher.client_statistics().pooled_endpoints == 1
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "ucxx-prefetch"]
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        began_s, used_s = time.monotonic(), time.clock_gettime(clock)
        wait_until(lambda: time.monotonic() > began_s + 1.5)
        used_s = time.clock_gettime(clock) - used_s
        assert used_s < 0.02 * (time.monotonic() - began_s)
        worker.end_input()
        assert worker.wait() == 0
