"""KeyboardInterrupt at every bytecode at which CPython can raise it, in the calls of a trainer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest

from tests.support.interrupts import every_point
from tests.support.local_worker import LocalWorker
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, SlotState
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch, EpisodeStream, Loss, LossReason, PendingBatch, Prefetcher, RolloutFeed

LOCAL = ClientConfig(local="view")
TRAINER = ("ucxx_transport/trainer/",)


def number_in(tree: Any) -> int:
    return int.from_bytes(tree["data"].tobytes(), "little")


def with_a_loss(worker: LocalWorker) -> list[EpisodeRecord]:
    """Three episodes, of which the first is lost."""
    gone, *there = worker.play(3)
    assert gone.ref is not None
    worker.ring.discard(gone.ref)
    return [gone, *there]


class Rounds:
    """Two batches of a feed, of which the first has come, and what they have become."""

    def __init__(self, feed: RolloutFeed, worker: LocalWorker) -> None:
        self.feed, self.worker, self.number = feed, worker, 0

    def start(self) -> None:
        self.number += 1
        self.first, self.second = with_a_loss(self.worker), with_a_loss(self.worker)
        self.feed.start(self.first)
        self.feed.defer(self.second)
        wait_until(lambda: self.feed.is_ready)

    def check(self) -> None:
        if self.feed.buffer != self.first[1:]:
            assert self.feed.collect() == self.first[1:]
        self._check_in_use(self.first)
        assert self.feed.collect() == self.second[1:]
        self._check_in_use(self.second)
        self.feed.release()

    def _check_in_use(self, asked: list[EpisodeRecord]) -> None:
        assert [number_in(self.feed.resolve(each)) for each in asked[1:]] == [each.sequence for each in asked[1:]]
        assert [loss.record for loss in self.feed.missing] == asked[:1]


def test_an_interrupt_anywhere_in_a_wait_loses_no_batch(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        rounds = Rounds(feed, worker)
        for name, call in (
            ("collect", feed.collect),
            ("wait", feed.wait),
            ("resolve", lambda: feed.resolve(rounds.first[1])),
        ):
            rounds.start()
            for where in every_point(call, TRAINER):
                with row(call=name, where=where):
                    rounds.check()
                rounds.start()
            rounds.check()
        assert rounds.number > 200
        found = feed.statistics()
        assert (found.batches, found.episodes) == (2 * rounds.number, 4 * rounds.number)
        assert found.losses == {"stale": 2 * rounds.number}
    gc.collect()
    assert worker.ring.slot_states() == [SlotState.FREE] * 32


def test_an_interrupt_anywhere_in_a_report_reports_each_loss_once(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, on_loss=losses.append) as feed:
        (kept,) = worker.play(1)
        dropped = [EpisodeRecord(worker_id="w", sequence=number, dropped="why") for number in range(3)]
        feed.start([kept, *dropped])
        wait_until(lambda: feed.is_ready)
        for where in every_point(feed.collect, TRAINER):
            with row(where=where):
                assert feed.collect() == [kept]
                assert [loss.record for loss in losses] == dropped
            losses.clear()
            (kept,) = worker.play(1)
            feed.start([kept, *dropped])
            wait_until(lambda: feed.is_ready)


@pytest.mark.parametrize("start_of", [attrgetter("start"), attrgetter("defer")], ids=["start", "defer"])
def test_an_interrupt_anywhere_in_a_start_leaves_it_begun_or_to_be_made_again(
    worker: LocalWorker, start_of: Callable[[RolloutFeed], Callable[[list[EpisodeRecord]], None]]
) -> None:
    with RolloutFeed(LOCAL) as feed:
        start, batches = start_of(feed), [worker.play(2)]
        for where in every_point(lambda: start(batches[-1]), TRAINER):
            asked = batches[-1]
            with row(where=where):
                if feed.is_cold_start:
                    start(asked)
                assert feed.collect() == asked
                assert [number_in(feed.resolve(each)) for each in asked] == [each.sequence for each in asked]
            feed.release()
            batches.append(worker.play(2))
        assert feed.collect() == batches[-1]


def test_an_interrupt_anywhere_in_a_result_leaves_it_to_be_taken(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    taken: list[Batch] = []
    with Prefetcher(LOCAL, on_loss=losses.append) as prefetcher:

        def begin() -> None:
            asked.append(with_a_loss(worker))
            pending.append(prefetcher.begin(asked[-1]))
            wait_until(lambda: pending[-1].is_ready)

        asked: list[list[EpisodeRecord]] = []
        pending: list[PendingBatch] = []
        begin()
        for where in every_point(lambda: taken.append(pending[-1].result()), TRAINER):
            with row(where=where):
                batch = taken.pop() if taken else pending[-1].result()
                found = [number_in(payload.arrays) for payload in batch.payloads.values()]
                assert found == [record.sequence for record in asked[-1][1:]]
                assert [loss.reason for loss in losses] == [LossReason.STALE]
            batch.release()
            losses.clear()
            begin()
        taken.pop().release()
        assert prefetcher.statistics().episodes == 2 * len(asked)
        assert prefetcher.statistics().losses == {"stale": len(asked)}


def test_an_interrupt_anywhere_in_a_stream_passes_over_no_episode(worker: LocalWorker) -> None:
    found: list[int] = []
    records = iter(lambda: worker.play(1)[0], None)
    with EpisodeStream(records, LOCAL, ahead=3) as stream:
        points = [*every_point(lambda: found.append(number_in(next(stream).arrays)), TRAINER)]
    assert len(points) > 30
    assert found == [*range(len(found))]
