from __future__ import annotations

import os
import threading
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.local_worker import LocalWorker, silence
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, ConfigError, ProtocolError, RingConfig, SharedRingBuffer, SlotState
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch, Loss, LossReason, Prefetcher

LOCAL = ClientConfig(local="view")


def sequences(batch: Batch) -> list[int]:
    return [int.from_bytes(payload.buffer, "little") for payload in batch.payloads.values()]


def test_the_next_batch_comes_while_this_one_is_trained_on(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        cold = [prefetcher.is_cold_start]
        prefetcher.start(worker.play(3))
        cold.append(prefetcher.is_cold_start)
        assert cold == [True, False]
        assert prefetcher.wait()
        ready = [prefetcher.is_ready]
        first = prefetcher.collect()
        ready.append(prefetcher.is_ready)
        assert ready == [True, False]
        assert prefetcher.batch is first
        prefetcher.start(worker.play(2))
        assert prefetcher.wait()
        assert prefetcher.wait()
        assert sequences(first) == [0, 1, 2]
        second = prefetcher.collect()
        assert all(payload.released for payload in first.payloads.values())
        assert sequences(second) == [3, 4]
        found = prefetcher.statistics()
        assert (found.batches, found.episodes, found.nbytes, found.losses, found.given_up) == (2, 5, 40, {}, 0)
        assert found.retried == 0
        assert found.fetch_s > 0
        client = prefetcher.client_statistics()
        assert (client.reads, client.ways["view"].reads, client.ways["view"].nbytes) == (5, 5, 40)
    assert prefetcher.client_statistics().reads == 5
    assert worker.ring.slot_states() == [SlotState.FREE] * 32


def test_what_is_deferred_is_on_its_way_once_the_batch_before_it_is_collected(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        for count in (1, 2, 3):
            prefetcher.defer(worker.play(count))
        found = []
        for _ in range(3):
            assert prefetcher.wait()
            found.append(sequences(prefetcher.collect()))
        assert found == [[0], [1, 2], [3, 4, 5]]
        assert prefetcher.is_cold_start


def test_episodes_may_be_given_by_a_call_that_the_background_thread_makes_once(worker: LocalWorker) -> None:
    threads: list[int] = []

    def given() -> list[EpisodeRecord]:
        threads.append(threading.get_ident())
        return worker.play(2)

    with Prefetcher(LOCAL) as prefetcher:
        for _ in range(3):  # the later ones are started by a trainer that had its batch in time
            prefetcher.start(given)
            wait_until(lambda: prefetcher.is_ready)
            assert prefetcher.wait()
            prefetcher.collect()
        assert prefetcher.statistics().episodes == 6
    assert len(threads) == 3
    assert threading.get_ident() not in threads


def test_every_loss_is_reported_to_who_collects(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with Prefetcher(LOCAL, max_staleness=1, on_loss=losses.append) as prefetcher:
        old, new = worker.play(1, policy_version=1), worker.play(2, policy_version=5)
        records = [*old, *new, new[0], EpisodeRecord(worker_id="w", sequence=9, dropped="why")]
        prefetcher.start(records, policy_version=5)
        assert prefetcher.wait()
        assert losses == []
        assert sequences(prefetcher.collect()) == [1, 2]
        assert [(loss.index, loss.reason) for loss in losses] == [
            (0, LossReason.TOO_OLD),
            (3, LossReason.DUPLICATE),
            (4, LossReason.DROPPED),
        ]
        assert prefetcher.statistics().losses == {"too_old": 1, "duplicate": 1, "dropped": 1}


def test_a_batch_that_does_not_come_in_time_is_given_up_and_the_next_one_comes(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with Prefetcher(
        ClientConfig(local="auto"), deadline_s=600, on_loss=losses.append, link_factory=silence
    ) as prefetcher:
        prefetcher.start([*worker.play_far_away(2), *worker.play(1)])
        prefetcher.defer(worker.play(1))
        assert not prefetcher.wait(0.05)
        assert [(loss.index, loss.reason) for loss in losses] == [(index, LossReason.TIMEOUT) for index in range(3)]
        assert prefetcher.wait()
        assert sequences(prefetcher.collect()) == [3]
        found = prefetcher.statistics()
        assert (found.given_up, found.losses, found.batches) == (1, {"timeout": 3}, 1)
    # what was far away was never read; what had been read of the batch that was given up came back
    wait_until(lambda: worker.ring.slot_states().count(SlotState.FREE) == 30, what="the payload is discarded")


@pytest.mark.parametrize(("discard_lost", "left"), [(True, SlotState.FREE), (False, SlotState.READY)])
def test_an_episode_that_is_given_up_makes_room_unless_it_is_another_trainer_s(
    *, discard_lost: bool, left: SlotState
) -> None:
    settings = RingConfig(slots=2, slot_bytes=64, checksum=True, on_full="raise")
    with SharedRingBuffer.create(settings) as ring, Prefetcher(LOCAL, discard_lost=discard_lost) as prefetcher:
        good, bad = LocalWorker(ring).play(2)
        assert bad.ref is not None
        slot, torn = bad.ref.slot, replace(bad, ref=replace(bad.ref, checksum=1))
        with prefetcher.fetch([torn, good]).payloads[1] as payload:
            assert int.from_bytes(payload.buffer, "little") == good.sequence
        assert prefetcher.statistics().losses == {"unreachable": 1}
        assert prefetcher.statistics().retried == 2
        prefetcher.start([])
        wait_until(lambda: ring.slot_state(slot) is left, what="it is discarded, or left")
        assert prefetcher.client_statistics().discarded == int(discard_lost)


def test_a_wrong_argument_is_refused_at_once() -> None:
    for wrong, field in (({"deadline_s": 0.0}, "deadline_s"), ({"max_fetch_rounds": 0}, "max_fetch_rounds")):
        with pytest.raises(ConfigError, match=field):
            Prefetcher(LOCAL, **wrong)
    with pytest.raises(ConfigError, match="max_staleness"):
        Prefetcher(LOCAL, max_staleness=-1)
    with Prefetcher(LOCAL, max_staleness=1) as prefetcher:
        for call in (prefetcher.start, prefetcher.defer, prefetcher.fetch):
            with pytest.raises(ConfigError, match="policy_version"):
                call([])
        assert prefetcher.is_cold_start


def test_what_ends_a_fetch_is_raised_to_who_collects_and_the_next_batch_is_fine(worker: LocalWorker) -> None:
    def broken(_: object) -> NoReturn:
        raise ZeroDivisionError

    with Prefetcher(link_factory=broken) as prefetcher:
        prefetcher.start(worker.play_far_away(1))
        assert prefetcher.wait()
        with pytest.raises(ZeroDivisionError):
            prefetcher.collect()
        prefetcher.start(worker.play(1))
        assert prefetcher.wait()
        assert sequences(prefetcher.collect()) == [1]


def test_a_batch_that_is_given_up_says_of_each_episode_why_it_is_lost(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with Prefetcher(deadline_s=600, on_loss=losses.append, link_factory=silence) as prefetcher:
        (away,) = worker.play_far_away(1)
        prefetcher.start([EpisodeRecord(worker_id="w", sequence=9, dropped="why"), away, away, ProtocolError("what?")])
        assert not prefetcher.wait(0.05)
    assert [(loss.index, loss.reason) for loss in losses] == [
        (0, LossReason.DROPPED),
        (1, LossReason.TIMEOUT),
        (2, LossReason.DUPLICATE),
        (3, LossReason.MALFORMED),
    ]
    assert [loss.record is None for loss in losses] == [False, False, False, True]


def test_a_batch_may_be_fetched_beside_the_one_on_its_way(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        prefetcher.start(worker.play(1))
        batch = prefetcher.fetch(worker.play(1))
        assert sequences(batch) == [1]
        batch.release()
        assert prefetcher.wait()
        assert sequences(prefetcher.collect()) == [0]


def test_what_is_out_of_turn_is_refused(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        with pytest.raises(ConfigError, match="start_prefetch"):
            prefetcher.wait()
        with pytest.raises(ConfigError, match="start_prefetch"):
            prefetcher.collect()
        prefetcher.start(worker.play(1))
        with pytest.raises(ConfigError, match="defer_prefetch"):
            prefetcher.start(worker.play(1))


def test_what_is_asked_for_and_not_taken_when_it_is_closed_is_counted_and_logged(
    worker: LocalWorker, log_events: list[MutableMapping[str, Any]]
) -> None:
    prefetcher = Prefetcher(ClientConfig(local="auto"), deadline_s=600, link_factory=silence, max_staleness=1)
    prefetcher.start(worker.play(1, policy_version=9), policy_version=9)
    assert prefetcher.wait()
    prefetcher.collect()
    prefetcher.start([*worker.play(2, policy_version=9), *worker.play(1, policy_version=1)], policy_version=9)
    assert prefetcher.wait()
    prefetcher.defer(worker.play(3, policy_version=9), policy_version=9)
    beside = prefetcher.begin(worker.play_far_away(1), policy_version=9)
    beside.cancel()
    prefetcher.close()
    assert prefetcher.statistics().losses == {"closed": 6, "too_old": 1}
    assert ("episodes_not_taken", 6) in [(event["event"], event.get("episodes")) for event in log_events]


def test_closing_ends_who_waits_and_what_is_on_its_way(worker: LocalWorker) -> None:
    prefetcher = Prefetcher(ClientConfig(local="off"), deadline_s=600, link_factory=silence)
    prefetcher.start(worker.play_far_away(1))
    told: list[str] = []

    def wait() -> None:
        try:
            prefetcher.wait()
        except ConfigError as error:
            told.append(error.message)

    waiting = threading.Thread(target=wait)
    waiting.start()
    prefetcher.close()
    prefetcher.close()
    waiting.join()
    assert told == ["the prefetcher is closed; make another"]
    for call in (prefetcher.wait, prefetcher.collect, lambda: prefetcher.start([]), lambda: prefetcher.fetch([])):
        with pytest.raises(ConfigError, match="closed"):
            call()


def test_a_forked_child_neither_uses_nor_ends_what_is_its_parent_s(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        prefetcher.start(worker.play(1))
        child = os.fork()
        if child == 0:
            calls = (prefetcher.wait, prefetcher.collect, lambda: prefetcher.start([]), lambda: prefetcher.fetch([]))
            refused = 0
            for call in calls:
                try:
                    call()
                except ConfigError as error:
                    refused += "forked" in error.message
            prefetcher.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        assert prefetcher.wait()
        assert sequences(prefetcher.collect()) == [0]


class Machine(RuleBasedStateMachine):
    """Every episode asked for is collected once, in order, or lost with a reason; every slot comes back.

    What is on its way comes when it does, so no rule has a precondition: what is out of turn is refused.
    """

    @initialize()
    def begin(self) -> None:
        self.ring = SharedRingBuffer.create(RingConfig(slots=256, slot_bytes=8, on_full="raise"))
        self.worker = LocalWorker(self.ring)
        self.lost: list[int] = []
        self.collected: list[int] = []
        self.prefetcher = Prefetcher(LOCAL, on_loss=self.lose)

    def lose(self, loss: Loss) -> None:
        assert loss.record is not None
        assert loss.reason is LossReason.TIMEOUT
        self.lost.append(loss.record.sequence)

    @rule()
    def defer(self) -> None:
        self.prefetcher.defer(self.worker.play(2))

    @rule()
    def start(self) -> None:
        if self.prefetcher.is_cold_start:
            self.prefetcher.start(self.worker.play(1))
        else:
            with pytest.raises(ConfigError, match="defer_prefetch"):
                self.prefetcher.start([])

    @rule()
    def give_up(self) -> None:
        if not self.prefetcher.is_cold_start:
            before = len(self.lost)
            assert self.prefetcher.wait(0) == (len(self.lost) == before)

    @rule()
    def wait_and_collect(self) -> None:
        if self.prefetcher.is_cold_start:
            with pytest.raises(ConfigError, match="start_prefetch"):
                self.prefetcher.collect()
            return
        before = self.prefetcher.batch
        assert self.prefetcher.wait()
        assert self.prefetcher.is_ready
        batch = self.prefetcher.collect()
        assert self.prefetcher.batch is batch
        assert before is None or all(payload.released for payload in before.payloads.values())
        self.collected += sequences(batch)

    @rule()
    def release(self) -> None:
        self.prefetcher.release()
        assert self.prefetcher.batch is None

    @rule()
    def fetch_beside(self) -> None:
        (record,) = self.worker.play(1)
        with self.prefetcher.fetch([record]).payloads[0] as payload:
            assert int.from_bytes(payload.buffer, "little") == record.sequence

    @rule()
    def cancel_one_beside(self) -> None:
        self.prefetcher.begin(self.worker.play(1)).cancel()

    @invariant()
    def nothing_is_given_twice_or_out_of_turn(self) -> None:
        assert self.collected == sorted(set(self.collected))
        assert not set(self.collected) & set(self.lost)

    def teardown(self) -> None:
        if not hasattr(self, "prefetcher"):
            return
        found = self.prefetcher.statistics()
        self.prefetcher.close()
        closed = self.prefetcher.statistics().losses.get("closed", 0)
        asked = self.ring.statistics().written
        assert asked == found.episodes + len(self.lost) + closed
        wait_until(lambda: SlotState.READING not in self.ring.slot_states())
        self.ring.close()


TestPrefetcher = Machine.TestCase
TestPrefetcher.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
