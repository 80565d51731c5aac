from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.interrupts import signalled_when
from tests.support.local_worker import LocalWorker, silence
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    PeerLostError,
    RingConfig,
    SharedRingBuffer,
    SlotState,
    TransportError,
)
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.testing import Faults, MemoryNetwork
from ucxx_transport.trainer import Loss, LossReason, RolloutFeed

LOCAL = ClientConfig(local="view")


def number_in(tree: Any) -> int:
    return int.from_bytes(tree["data"].tobytes(), "little")


def numbers(feed: RolloutFeed, rollouts: list[Any] | None) -> list[int]:
    assert rollouts is not None
    return [number_in(feed.resolve(rollout)) for rollout in rollouts]


def test_the_next_rollouts_are_fetched_while_these_are_trained_on(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        assert (feed.is_cold_start, feed.buffer) == (True, None)
        with pytest.raises(ConfigError, match="start_prefetch"):
            feed.collect()
        feed.start(worker.play(2))
        assert (feed.is_cold_start, feed.buffer) == (False, None)
        trained = []
        for count in (3, 1):
            rollouts = feed.collect()
            feed.start(worker.play(count))
            trained.append(numbers(feed, rollouts))
            assert feed.buffer == rollouts
        trained.append(numbers(feed, feed.collect()))
        assert trained == [[0, 1], [2, 3, 4], [5]]
        assert feed.statistics().episodes == 6
        assert feed.statistics().losses == {}
    gc.collect()
    assert worker.ring.slot_states() == [SlotState.FREE] * 32


def test_rollouts_are_acknowledged_early_and_trained_on_one_iteration_later(worker: LocalWorker) -> None:
    """A framework's loop: what arrived is fetched and acknowledged at once, what arrived before is trained on."""
    with RolloutFeed(LOCAL) as feed:
        trained = []
        for count in (1, 2, 3):
            arrived = worker.play(count)
            before = None if feed.is_cold_start else feed.collect()
            feed.start(arrived)
            if before is None:
                assert feed.wait()
            feed.defer(arrived)  # the same rollouts: nothing is fetched twice
            if before is not None:
                trained.append(numbers(feed, before))
        trained.append(numbers(feed, feed.collect()))
        assert trained == [[0], [1, 2], [3, 4, 5]]
        assert feed.statistics().losses == {}


def test_a_time_limit_that_is_none_costs_no_batch(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        feed.start(worker.play(2))
        for wait in (feed.wait, feed.collect):
            with pytest.raises(ConfigError, match="timeout_s"):
                wait("soon")
        assert numbers(feed, feed.collect("60s")) == [0, 1]


def test_what_is_deferred_is_fetched_in_turn(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        for count in (1, 2, 3):
            feed.defer(worker.play(count))
        assert [numbers(feed, feed.collect()) for _ in range(3)] == [[0], [1, 2], [3, 4, 5]]
        assert numbers(feed, feed.collect()) == [3, 4, 5]  # nothing else is on its way


def test_references_to_the_same_payloads_in_other_objects_are_the_same_rollouts(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        records = worker.play(2)
        feed.start([record.to_dict() for record in records])
        feed.defer([record.to_dict() for record in records])
        assert len(feed.collect()) == 2
        feed.defer(records)
        assert numbers(feed, feed.collect()) == [0, 1]
        assert feed.statistics().losses == {}


def test_what_is_not_ours_keeps_its_place_and_is_never_fetched(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL, link_factory=silence) as feed:
        (record,) = worker.play(1)
        plain = SimpleNamespace(completion="text")
        ours = SimpleNamespace(completion=record.to_dict())
        feed.start([plain, ours, "more"])
        assert feed.collect() == [plain, ours, "more"]
        assert number_in(feed.resolve(ours.completion)) == 0
        feed.start([plain])
        assert feed.collect() == [plain]
        with pytest.raises(ConfigError, match="no episode record"):
            feed.resolve("text")


def test_the_output_of_a_rollout_may_be_anywhere(worker: LocalWorker) -> None:
    def output_of(rollout: Any) -> Any:
        return rollout["out"]

    with RolloutFeed(LOCAL, output_of=output_of) as feed:
        rollouts = [{"out": record.to_dict()} for record in worker.play(2)]
        feed.start(rollouts)
        assert [number_in(feed.resolve(output_of(rollout))) for rollout in feed.collect()] == [0, 1]
    with pytest.raises(ConfigError, match="output_of must be a function of a rollout, not 'out'"):
        RolloutFeed(LOCAL, output_of="out")  # type: ignore[arg-type]  # what is refused


def test_lost_episodes_leave_the_batch_each_told_of_once(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, max_staleness=1, on_loss=losses.append) as feed:
        old, *new = worker.play(1, policy_version=1) + worker.play(2, policy_version=5)
        assert new[1].ref is not None
        worker.ring.discard(new[1].ref)
        dropped = EpisodeRecord(worker_id="w", sequence=9, dropped="why").to_dict()
        malformed = {**new[0].to_dict(), "sequence": -1}
        rollouts = [old.to_dict(), new[0].to_dict(), new[1].to_dict(), new[0].to_dict(), dropped, malformed, "plain"]
        feed.start(rollouts, policy_version=5)
        assert feed.collect() == [rollouts[1], "plain"]
        told = [(loss.index, loss.reason) for loss in losses]
        assert told == [
            (0, LossReason.TOO_OLD),
            (2, LossReason.STALE),
            (3, LossReason.DUPLICATE),
            (4, LossReason.DROPPED),
            (5, LossReason.MALFORMED),
        ]
        assert [feed.resolve(rollout) for rollout in (rollouts[0], rollouts[2], dropped, malformed)] == [None] * 4
        assert len(losses) == len(told)
        assert sum(feed.statistics().losses.values()) == len(told)


def test_a_loss_that_is_asked_for_again_later_is_asked_for_as_a_batch_of_one(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    network = MemoryNetwork(faults=Faults(refuse=True))
    with RolloutFeed(
        max_staleness=1,
        max_fetch_rounds=1,
        discard_lost=False,
        unreachable_batches=None,
        on_loss=losses.append,
        link_factory=network.link,
    ) as feed:
        old, gone, there = worker.play(1, policy_version=1) + worker.play(2, policy_version=5)
        assert gone.ref is not None
        assert there.ref is not None
        worker.ring.discard(gone.ref)
        dropped = EpisodeRecord(worker_id="w", sequence=9, dropped="why").to_dict()
        malformed = {**there.to_dict(), "sequence": -1}
        away = replace(there, ref=replace(there.ref, host_id="elsewhere", host="192.0.2.1", ports=(1,)))
        lost = [old.to_dict(), gone.to_dict(), dropped, malformed, away]
        feed.start(lost, policy_version=5)
        assert feed.collect() == []
        counted = feed.statistics().losses
        assert counted == dict.fromkeys(("too_old", "stale", "dropped", "malformed", "unreachable"), 1)
        for _ in range(2):
            assert [feed.resolve(output) for output in lost] == [None] * 5  # of the batch in use
        assert feed.statistics().losses == counted
        losses.clear()
        feed.start(worker.play(1, policy_version=5), policy_version=5)
        assert len(feed.collect()) == 1
        for output in lost:
            with row(output=output):
                assert feed.resolve(output) is None
        assert [(loss.index, loss.reason.value) for loss in losses] == [(0, reason) for reason in counted]
        assert feed.statistics().losses == dict.fromkeys(counted, 2)
        assert number_in(feed.resolve(there)) == there.sequence


def test_what_ends_a_fetch_is_raised_and_its_episodes_are_losses(worker: LocalWorker) -> None:
    def broken(_: object) -> NoReturn:
        raise ZeroDivisionError

    losses: list[Loss] = []
    with RolloutFeed(on_loss=losses.append, link_factory=broken) as feed:
        for call in ("collect", "wait", "resolve"):
            losses.clear()
            away = worker.play_far_away(2)
            feed.start([*away, "text"])
            with row(call=call), pytest.raises(ZeroDivisionError):
                getattr(feed, call)(*away[1:] if call == "resolve" else ())
            assert feed.buffer == ["text"]
            assert list(feed.missing) == losses
            assert [(loss.index, loss.reason, loss.error is None) for loss in losses] == [
                (0, LossReason.FAILED, False),
                (1, LossReason.FAILED, False),
            ]
        with pytest.raises(ZeroDivisionError):
            feed.resolve(worker.play_far_away(1)[0])
        assert feed.statistics().losses == {"failed": 7}
        assert numbers(feed, worker.play(1)) == [7]


def test_what_is_too_old_makes_room_in_its_ring(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL, max_staleness=1) as feed:
        for version in range(10, 20):  # ten times as much as the ring has slots, which raises when it is full
            feed.start(
                worker.play(31, policy_version=1) + worker.play(1, policy_version=version), policy_version=version
            )
            rollouts = feed.collect()
            assert rollouts is not None
            assert len(rollouts) == 1
            feed.start([], policy_version=version)
            feed.collect()
            wait_until(lambda: worker.ring.slot_states().count(SlotState.FREE) == 32, what="all are discarded")
        assert feed.statistics().losses == {"too_old": 310}


def test_an_episode_that_was_not_fetched_ahead_is_fetched_when_it_is_asked_for(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, on_loss=losses.append) as feed:
        first, second = worker.play(2)
        feed.start([first])
        assert number_in(feed.resolve(second)) == 1
        assert numbers(feed, feed.collect()) == [0]
        third, fourth = worker.play(2)
        assert number_in(feed.resolve(third.ref)) == 2
        assert fourth.ref is not None
        worker.ring.discard(fourth.ref)
        assert feed.resolve(fourth) is None
        assert [loss.reason for loss in losses] == [LossReason.STALE]
        assert feed.resolve({**fourth.to_dict(), "sequence": "x"}) is None
        assert [loss.reason for loss in losses] == [LossReason.STALE, LossReason.MALFORMED]


def test_an_episode_that_is_asked_for_alone_is_judged_by_the_version_told_last(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, max_staleness=1, on_loss=losses.append) as feed:
        (old, new), (new_enough,) = worker.play(2, policy_version=3), worker.play(1, policy_version=4)
        with pytest.raises(ConfigError, match="policy_version"):
            feed.resolve(old)
        feed.defer([], policy_version=4)
        assert number_in(feed.resolve(new)) == 1
        feed.defer([], policy_version=5)
        assert feed.resolve(old) is None
        assert number_in(feed.resolve(new_enough)) == 2
        assert [loss.reason for loss in losses] == [LossReason.TOO_OLD]


def test_what_was_delivered_before_is_a_duplicate_when_asked_for_again(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, on_loss=losses.append) as feed:
        (record,) = worker.play(1)
        feed.start([record])
        feed.collect()
        feed.start(worker.play(1))
        feed.collect()
        feed.start([record])
        assert feed.collect() == []
        assert feed.resolve(record) is None
        assert [loss.reason for loss in losses] == [LossReason.DUPLICATE]


def test_an_episode_on_its_way_is_waited_for(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        first, second = worker.play(1), worker.play(2)
        feed.start(first)
        feed.defer(second)
        assert number_in(feed.resolve(second[1])) == 2
        assert feed.buffer == second


def test_threads_that_ask_for_one_batch_all_get_it(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        records = worker.play(8)
        feed.start(records)
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda record=record: found.append(number_in(feed.resolve(record))))
            for record in records
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == list(range(8))
        assert feed.statistics().losses == {}


def test_a_batch_that_does_not_come_in_time_is_lost_and_does_not_stall_the_next(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(deadline_s=600, on_loss=losses.append, link_factory=silence) as feed:
        late = [*worker.play_far_away(1), "plain"]
        feed.start(late)
        feed.defer(worker.play(1))
        assert feed.collect(0.05) == ["plain"]
        assert feed.resolve(late[0]) is None
        assert [loss.reason for loss in losses] == [LossReason.TIMEOUT]
        assert numbers(feed, feed.collect()) == [1]


def test_arrays_outlive_their_batch_and_hold_their_slot(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        feed.start(worker.play(1))
        rollouts = feed.collect()
        assert rollouts is not None
        tree = feed.resolve(rollouts[0])
        feed.start(worker.play(1))
        feed.collect()
        assert worker.ring.slot_states().count(SlotState.READING) == 2
        assert number_in(tree) == 0
        del tree
        assert worker.ring.slot_states().count(SlotState.READING) == 1


def test_what_is_released_makes_room_before_the_next_batch_and_is_a_duplicate_when_asked_for(
    worker: LocalWorker,
) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, on_loss=losses.append) as feed:
        feed.start(worker.play(2))
        rollouts = feed.collect()
        assert rollouts is not None
        tree = feed.resolve(rollouts[0])
        assert not feed.is_ready
        feed.release()
        feed.release()
        assert (feed.is_cold_start, feed.buffer) == (True, None)
        assert worker.ring.slot_states().count(SlotState.READING) == 1  # the array's
        assert number_in(tree) == 0
        assert feed.resolve(rollouts[1]) is None
        assert [loss.reason for loss in losses] == [LossReason.DUPLICATE]
        feed.start(worker.play(1))
        wait_until(lambda: feed.is_ready)
        assert numbers(feed, feed.collect()) == [2]
        assert feed.client_statistics().ways["view"].reads == 3


def test_a_hook_that_raises_or_asks_hurts_neither_this_batch_nor_the_next(worker: LocalWorker) -> None:
    def hook(loss: Loss) -> None:
        asked = threading.Thread(target=lambda: seen.append((feed.is_cold_start, feed.buffer is not None)))
        asked.start()
        asked.join()  # no lock is held that another thread would wait for
        raise ZeroDivisionError(loss.reason.value)

    seen: list[tuple[bool, bool]] = []
    with RolloutFeed(LOCAL, on_loss=hook) as feed:
        first, second = worker.play(2), worker.play(3)
        feed.start([*first, *first])
        feed.defer(second)
        with pytest.raises(ZeroDivisionError, match="duplicate"):
            feed.collect()
        assert len(seen) == 2
        assert len(feed.missing) == 2
        assert feed.buffer == first
        assert numbers(feed, feed.buffer) == [0, 1]
        assert numbers(feed, feed.collect()) == [2, 3, 4]
        assert seen == [(False, True)] * 2


def test_a_batch_that_is_given_up_is_not_taken_for_the_next_one_whatever_the_hook_does(worker: LocalWorker) -> None:
    def hook(_: Loss) -> None:
        raise ZeroDivisionError

    with RolloutFeed(deadline_s=600, on_loss=hook, link_factory=silence) as feed:
        late, next_one = worker.play_far_away(1), worker.play(1)
        feed.start(late)
        feed.defer(next_one)
        with pytest.raises(ZeroDivisionError):
            feed.collect(0.05)
        assert feed.resolve(late[0]) is None
        assert numbers(feed, feed.collect()) == [1]


def test_a_policy_version_that_is_no_number_is_refused_and_costs_nothing(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        feed.start(worker.play(1))
        rollouts = feed.collect()
        for take in (feed.start, feed.defer):
            with row(take=take.__name__), pytest.raises(ConfigError, match="policy_version"):
                take(rollouts, policy_version="x")  # type: ignore[arg-type]  # what is refused
        assert numbers(feed, feed.collect()) == [0]


def test_rollouts_that_were_started_with_a_policy_version_are_deferred_without_one(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL, max_staleness=1) as feed:
        rollouts = worker.play(1, policy_version=3)
        feed.start(rollouts, policy_version=3)
        feed.defer(rollouts)
        assert numbers(feed, feed.collect()) == [0]
        feed.defer(rollouts)
        with pytest.raises(ConfigError, match="max_staleness = 1 needs the trainer"):
            feed.defer(worker.play(1))
    with pytest.raises(ConfigError, match="the RolloutFeed is closed"):
        feed.start(rollouts)


def lossy(worker: LocalWorker) -> list[object]:
    """Four rollouts: a text, and three episodes of which the first and the last are lost."""
    gone, kept = worker.play(2)
    assert gone.ref is not None
    worker.ring.discard(gone.ref)
    return ["text", gone, kept, {**kept.to_dict(), "sequence": -1}]


def test_what_is_missing_of_the_batch_in_use_is_told_with_its_place(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with RolloutFeed(LOCAL, on_loss=losses.append) as feed:
        assert not feed.missing
        rollouts = lossy(worker)
        feed.start(rollouts)
        assert not feed.missing
        assert feed.collect() == [rollouts[0], rollouts[2]]
        assert [(loss.index, loss.reason) for loss in feed.missing] == [
            (1, LossReason.STALE),
            (3, LossReason.MALFORMED),
        ]
        assert losses == list(feed.missing)
        feed.start(worker.play(1))
        feed.collect()
        assert not feed.missing


def test_a_batch_is_filled_up_with_what_came_in_the_places_of_what_did_not(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL, on_missing="refill") as feed:
        rollouts = lossy(worker)
        feed.start(rollouts)
        found = feed.collect()
        assert found == ["text", "text", rollouts[2], rollouts[2]]
        assert feed.buffer == found
        assert feed.collect() == found
        assert [number_in(feed.resolve(rollout)) for rollout in found[2:]] == [1, 1]
        first, second, third = worker.play(3)
        feed.start([first, first, second, second, third])
        assert numbers(feed, feed.collect()) == [2, 2, 3, 3, 4]
        lost = [gone for gone in lossy(worker)[1:2] for _ in range(2)]
        feed.start(lost)
        for _ in range(2):
            with pytest.raises(TransportError, match=r"none of the batch's 2 episodes came: .* \(duplicate, stale\)"):
                feed.collect()
        assert len(feed.missing) == 2
        feed.start(worker.play(1))
        assert len(feed.collect()) == 1


def test_a_function_may_say_what_becomes_of_a_batch_with_losses(worker: LocalWorker) -> None:
    calls: list[tuple[list[object], list[int]]] = []

    def in_pairs(rollouts: list[object], losses: tuple[Loss, ...]) -> Iterator[object]:
        calls.append((rollouts, [loss.index for loss in losses]))
        if len(calls) == 2:
            raise ZeroDivisionError
        return iter(rollouts[: len(rollouts) // 2 * 2])

    with RolloutFeed(LOCAL, on_missing=in_pairs) as feed:
        whole = worker.play(3)
        feed.start(whole)
        assert feed.collect() == whole
        first, second = worker.play(2)
        feed.start([first, first, second, "text"])
        assert feed.collect() == feed.buffer == [first, second]
        feed.start([first, *worker.play(1)])
        with pytest.raises(ZeroDivisionError):
            feed.collect()
        assert feed.collect() == []
        feed.start([first, "a", "b"])
        feed.wait()
        assert feed.buffer == feed.buffer == ["a", "b"]
        assert calls[:3] == [([first, second, "text"], [1]), (calls[1][0], [0]), (calls[1][0], [0])]


def test_a_function_that_asks_for_the_batch_that_it_is_to_make_is_given_what_came(worker: LocalWorker) -> None:
    for ask in (RolloutFeed.collect, lambda feed: feed.buffer):
        calls: list[list[object]] = []

        def asking(
            rollouts: list[object], _: object, calls: list[list[object]] = calls, ask: Any = ask
        ) -> list[object]:
            calls.append(rollouts)
            assert ask(feed) == rollouts
            return [*rollouts, "more"]

        with row(ask=ask), RolloutFeed(LOCAL, on_missing=asking) as feed:
            (kept,) = worker.play(1)
            feed.start([kept, kept])
            assert feed.collect() == feed.buffer == [kept, "more"]
            assert calls == [[kept]]


def test_another_thread_never_gets_a_batch_that_on_missing_has_not_made(worker: LocalWorker) -> None:
    makes, go_on = threading.Event(), threading.Event()

    def made(rollouts: list[object], _: object) -> list[object]:
        if not makes.is_set():
            makes.set()
            assert go_on.wait(60)
        return [*rollouts, "more"]

    with RolloutFeed(LOCAL, on_missing=made) as feed, ThreadPoolExecutor(1) as pool:
        (kept,) = worker.play(1)
        feed.start([kept, kept])
        collected = pool.submit(feed.collect)
        try:
            assert makes.wait(60)
            assert feed.buffer == [kept, "more"]
        finally:
            go_on.set()
        assert collected.result(60) == [kept, "more"]


def test_a_batch_that_stops_the_trainer_is_in_use_and_the_next_one_on_its_way(worker: LocalWorker) -> None:
    network = MemoryNetwork(faults=Faults(refuse=True))
    losses: list[Loss] = []
    with RolloutFeed(
        deadline_s=5, max_fetch_rounds=1, unreachable_batches=2, on_loss=losses.append, link_factory=network.link
    ) as feed:
        for wait in (feed.collect, feed.wait):
            feed.start([*worker.play(1), *worker.play_far_away(2)])
            assert len(feed.collect()) == 1
            (kept,), away = worker.play(1), worker.play_far_away(1)
            feed.start([kept, *away])
            feed.defer(worker.play(1))
            losses.clear()
            with (
                row(wait=wait.__name__),
                pytest.raises(PeerLostError, match="nothing came in 2 batches in a row") as caught,
            ):
                wait()
            assert caught.value.facts["host"] == "192.0.2.1"
            assert "a firewall? both directions must be open" in caught.value.message
            assert [loss.index for loss in losses] == [1]
            assert feed.buffer == [kept]
            assert number_in(feed.resolve(kept)) == kept.sequence
            assert len(feed.collect()) == 1
        assert feed.statistics().losses == {"unreachable": 6}
    wait_until(lambda: SlotState.READING not in worker.ring.slot_states())


def test_a_source_that_does_not_answer_stops_who_asks_for_its_episodes_one_by_one_too(worker: LocalWorker) -> None:
    network = MemoryNetwork(faults=Faults(refuse=True))
    losses: list[Loss] = []
    with RolloutFeed(deadline_s=5, max_fetch_rounds=1, on_loss=losses.append, link_factory=network.link) as feed:
        feed.start([*worker.play(1), *worker.play_far_away(1)])
        feed.collect()
        for _ in range(2):  # once more, after as many again
            while len(losses) % 3 < 2:
                assert feed.resolve(worker.play_far_away(1)[0]) is None
                assert number_in(feed.resolve(worker.play(1)[0])) >= 0
            with pytest.raises(PeerLostError, match=r"nothing came in 3 batches in a row: worker 'w' at 192.0.2.1"):
                feed.resolve(worker.play_far_away(1)[0])
        assert feed.statistics().losses == {"unreachable": len(losses)} == {"unreachable": 6}


def test_what_is_out_of_turn_is_refused(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL, max_staleness=1) as feed:
        with pytest.raises(ConfigError, match="start_prefetch"):
            feed.wait()
        with pytest.raises(ConfigError, match="policy_version"):
            feed.start([])
        feed.start([], policy_version=1)
        with pytest.raises(ConfigError, match="defer_prefetch"):
            feed.start([], policy_version=1)
    feed.close()
    (record,) = worker.play(1)
    with pytest.raises(ConfigError, match="closed"):
        feed.start([], policy_version=1)
    with pytest.raises(ConfigError, match="closed"):
        feed.resolve(record)
    assert feed.statistics().batches == 0


def test_a_time_limit_may_be_longer_than_a_lock_can_wait(worker: LocalWorker) -> None:
    with RolloutFeed(LOCAL) as feed:
        feed.start(worker.play(2))
        assert numbers(feed, feed.collect(1e300)) == [0, 1]


def test_a_batch_whose_wait_is_interrupted_stays_on_its_way(worker: LocalWorker) -> None:
    losses: list[Loss] = []

    def waits() -> bool:
        return bool(feed.changed._waiters)  # type: ignore[attr-defined]  # noqa: SLF001 - not to be seen otherwise

    with RolloutFeed({"connect_timeout_s": 600}, deadline_s=600, on_loss=losses.append, link_factory=silence) as feed:
        feed.start(worker.play_far_away(2))
        feed.defer(worker.play(1))
        for wait in (feed.collect, feed.wait):
            with row(wait=wait.__name__), pytest.raises(KeyboardInterrupt), signalled_when(waits):
                wait()
            assert (feed.is_ready, feed.buffer, feed.missing, feed.statistics().losses) == (False, None, (), {})
        assert feed.collect(0.05) == []
        assert [loss.reason for loss in losses] == [LossReason.TIMEOUT] * 2
        assert numbers(feed, feed.collect()) == [2]


class Machine(RuleBasedStateMachine):
    """Every episode asked for is trained on once, in order, or lost with a reason; every slot comes back.

    What is on its way comes when it does, so no rule has a precondition: what is out of turn is refused.
    """

    @initialize()
    def begin(self) -> None:
        self.ring = SharedRingBuffer.create(RingConfig(slots=256, slot_bytes=8, on_full="raise"))
        self.worker = LocalWorker(self.ring)
        self.lost: list[int] = []
        self.collected: list[int] = []
        self.asked: deque[list[EpisodeRecord]] = deque()
        self.feed = RolloutFeed(LOCAL, on_loss=self.lose)

    def lose(self, loss: Loss) -> None:
        assert loss.record is not None
        assert loss.reason is LossReason.TIMEOUT
        self.lost.append(loss.record.sequence)

    @rule()
    def defer(self) -> None:
        self.asked.append(self.worker.play(2))
        self.feed.defer(self.asked[-1])

    @rule()
    def start(self) -> None:
        if self.asked:
            with pytest.raises(ConfigError, match="defer_prefetch"):
                self.feed.start([])
        else:
            self.asked.append(self.worker.play(1))
            self.feed.start(self.asked[-1])

    @rule()
    def give_up(self) -> None:
        if self.asked:
            before = len(self.lost)
            expected = self.asked.popleft()
            came = self.feed.wait(0)
            assert came == (len(self.lost) == before)
            assert self.feed.buffer == (expected if came else [])
            self.collected += numbers(self.feed, self.feed.buffer)

    @rule()
    def collect(self) -> None:
        if self.asked:
            expected = self.asked.popleft()
            assert self.feed.collect() == expected
            self.collected += numbers(self.feed, expected)
        elif self.feed.is_cold_start:
            with pytest.raises(ConfigError, match="start_prefetch"):
                self.feed.collect()
        else:
            assert self.feed.collect() == self.feed.buffer

    @rule()
    def release(self) -> None:
        self.feed.release()
        assert self.feed.buffer is None
        assert self.feed.is_cold_start == (not self.asked)

    @rule()
    def fetch_beside(self) -> None:
        (record,) = self.worker.play(1)
        assert number_in(self.feed.resolve(record)) == record.sequence

    @invariant()
    def nothing_is_given_twice_or_out_of_turn(self) -> None:
        assert self.collected == sorted(set(self.collected))
        assert not set(self.collected) & set(self.lost)

    def teardown(self) -> None:
        if not hasattr(self, "feed"):
            return
        found = self.feed.statistics()
        self.feed.close()
        closed = self.feed.statistics().losses.get("closed", 0)
        assert self.ring.statistics().written == found.episodes + len(self.lost) + closed
        wait_until(lambda: SlotState.READING not in self.ring.slot_states())
        self.ring.close()


TestRolloutFeed = Machine.TestCase
TestRolloutFeed.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
