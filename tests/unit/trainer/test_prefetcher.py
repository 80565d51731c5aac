from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.local_worker import LocalWorker, silence
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    ProtocolError,
    RingConfig,
    SharedRingBuffer,
    SlotState,
    TransportError,
)
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch, EpisodeStream, Loss, LossReason, PendingBatch, Prefetcher
from ucxx_transport.trainer.batch import FetchLimits, FetchSettings, LimitSettings

LOCAL = ClientConfig(local="view")

PLACES = strategies.integers(0, 7)


def sequences(batch: Batch) -> list[int]:
    return [int.from_bytes(payload.buffer, "little") for payload in batch.payloads.values()]


def test_the_next_batch_comes_while_this_one_is_trained_on(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        pending = prefetcher.begin(worker.play(3))
        wait_until(lambda: pending.is_ready)
        for count, expected in ((2, [0, 1, 2]), (1, [3, 4])):
            batch = pending.result()
            pending = prefetcher.begin(worker.play(count))
            assert sequences(batch) == expected
            batch.release()
        pending.result().release()
        found = prefetcher.statistics()
        assert (found.batches, found.episodes, found.nbytes, found.losses) == (3, 6, 48, {})
        assert found.retried == 0
        assert found.fetch_s > 0
        client = prefetcher.client_statistics()
        assert (client.reads, client.ways["view"].reads, client.ways["view"].nbytes) == (6, 6, 48)
    assert prefetcher.client_statistics().reads == 6
    assert worker.ring.slot_states() == [SlotState.FREE] * 32


def prepared(
    prefetcher: Prefetcher, records: Sequence[EpisodeRecord], policy_version: int | None = None
) -> PendingBatch:
    return prefetcher.add(PendingBatch(prefetcher, dict(enumerate(records)), policy_version))


def test_what_is_prepared_is_fetched_once_it_is_begun(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        later, now = prepared(prefetcher, worker.play(1)), prefetcher.begin(worker.play(1))
        assert sequences(now.result()) == [1]
        assert prefetcher.client_statistics().reads == 1
        assert not later.is_ready
        later.begin(after_s=1e-3)
        assert sequences(later.result()) == [0]
        assert sequences(prepared(prefetcher, worker.play(1)).result()) == [2]


def test_every_loss_is_reported_to_who_collects(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with Prefetcher(LOCAL, max_staleness=1, on_loss=losses.append) as prefetcher:
        old, new = worker.play(1, policy_version=1), worker.play(2, policy_version=5)
        records = [*old, *new, new[0], EpisodeRecord(worker_id="w", sequence=9, dropped="why")]
        pending = prefetcher.begin(records, policy_version=5)
        wait_until(lambda: pending.is_ready)
        assert losses == []
        assert sequences(pending.result()) == [1, 2]
        assert [(loss.index, loss.reason) for loss in losses] == [
            (0, LossReason.TOO_OLD),
            (3, LossReason.DUPLICATE),
            (4, LossReason.DROPPED),
        ]
        counted = {"too_old": 1, "duplicate": 1, "dropped": 1}
        for _ in range(2):  # what a caller changes is its own
            found: Any = prefetcher.statistics().losses
            assert found == counted
            assert repr(found).startswith("{")
            found["dropped"] = 9


def test_a_batch_that_does_not_come_in_time_is_given_up_and_the_next_one_comes(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with Prefetcher(
        ClientConfig(local="auto"), deadline_s=600, on_loss=losses.append, link_factory=silence
    ) as prefetcher:
        late = prefetcher.begin([*worker.play_far_away(2), *worker.play(1)])
        batch = late.result(0.05)
        assert (batch.in_time, batch.payloads) == (False, {})
        assert [(loss.index, loss.reason) for loss in losses] == [(index, LossReason.TIMEOUT) for index in range(3)]
        with pytest.raises(ConfigError, match="cancelled"):
            late.result()
        late.cancel()  # counted once
        assert sequences(prefetcher.fetch(worker.play(1))) == [3]
        found = prefetcher.statistics()
        assert (found.losses, found.batches) == ({"timeout": 3}, 1)
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
        wait_until(lambda: ring.slot_state(slot) is left, what="it is discarded, or left")
        assert prefetcher.client_statistics().discarded == int(discard_lost)


def test_a_wrong_argument_is_refused_at_once() -> None:
    for wrong, field in (({"deadline_s": 0.0}, "deadline_s"), ({"max_fetch_rounds": 0}, "max_fetch_rounds")):
        with pytest.raises(ConfigError, match=field):
            Prefetcher(LOCAL, **wrong)
    with pytest.raises(ConfigError, match="max_staleness"):
        Prefetcher(LOCAL, max_staleness=-1)
    with Prefetcher(LOCAL, max_staleness=1) as prefetcher:
        for call in (prefetcher.begin, prefetcher.fetch):
            with pytest.raises(ConfigError, match="policy_version"):
                call([])


def test_a_setting_of_another_type_is_refused_with_what_is_permitted() -> None:
    rows: tuple[tuple[str, Any, str], ...] = (
        ("max_fetch_rounds", "3", "max_fetch_rounds must be a whole number, at least 1, not '3'"),
        ("max_fetch_rounds", True, "max_fetch_rounds must be a whole number, at least 1, not True"),
        ("max_fetch_rounds", None, "max_fetch_rounds must be a whole number, at least 1, not None"),
        ("max_staleness", "3", "max_staleness must be a whole number, at least 0, or None for any, not '3'"),
        ("max_staleness", -1, "max_staleness must be a whole number, at least 0, or None for any, not -1"),
        ("unreachable_batches", "3", "unreachable_batches must be a whole number, at least 1, or None for never"),
        (
            "unreachable_batches",
            -1,
            "unreachable_batches must be a whole number, at least 1, or None for never, not -1",
        ),
        ("deadline_s", 0, "deadline_s must be more than 0, not 0"),
        ("on_loss", "x", "on_loss must be a function of a Loss, or None, not 'x'"),
        ("discard_lost", "no", "discard_lost must be True or False, not 'no'"),
    )
    for name, wrong, message in rows:
        makers: tuple[Callable[..., object], ...] = (partial(Prefetcher, LOCAL), partial(EpisodeStream, [], LOCAL))
        for make in makers:
            with row(name=name, wrong=wrong, make=make), pytest.raises(ConfigError, match=re.escape(message)) as caught:
                make(**{name: wrong})
            assert (caught.value.facts["field"], caught.value.facts["value"]) == (name, wrong)
    with Prefetcher(LOCAL) as prefetcher, pytest.raises(ConfigError, match="policy_version"):
        prefetcher.begin([], policy_version="x")  # type: ignore[arg-type]  # what is refused


def test_the_keywords_of_what_is_built_on_one_are_its_own() -> None:
    own, limits = (
        {one.name for one in inspect.signature(made.__init__).parameters.values() if one.kind is one.KEYWORD_ONLY}
        for made in (Prefetcher, FetchLimits)
    )
    assert limits == {"on_loss", *LimitSettings.__annotations__}
    assert own | limits == {"on_loss", *FetchSettings.__annotations__}


def test_where_its_thread_cannot_start_nothing_is_left_behind() -> None:
    program = """
import threading
from ucxx_transport import BusyError
from ucxx_transport.trainer import Prefetcher
class NoThread(threading.Thread):
    def start(self):
        raise RuntimeError("can't start new thread")
class Watcher:
    reports = []
    def report_to(self, on_change):
        self.reports.append(on_change)
        return lambda: self.reports.remove(on_change)
threading.Thread = NoThread
try:
    Prefetcher(watcher=Watcher())
except BusyError:
    print(len(Watcher.reports), "reports")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0 reports\n", "")


def test_what_ends_a_fetch_is_raised_to_who_takes_it_and_the_next_batch_is_fine(worker: LocalWorker) -> None:
    def broken(_: object) -> NoReturn:
        raise ZeroDivisionError

    losses: list[Loss] = []
    with Prefetcher(link_factory=broken, on_loss=losses.append) as prefetcher:
        pending = prefetcher.begin(worker.play_far_away(1))
        with pytest.raises(ZeroDivisionError):
            pending.result()
        ((reason, error),) = [(loss.reason, loss.error) for loss in losses]
        assert reason is LossReason.FAILED
        assert isinstance(error, TransportError)
        assert isinstance(error.__cause__, ZeroDivisionError)
        assert prefetcher.statistics().losses == {"failed": 1}
        assert sequences(prefetcher.fetch(worker.play(1))) == [1]


def test_a_batch_that_is_given_up_says_of_each_episode_why_it_is_lost(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    with Prefetcher(deadline_s=600, on_loss=losses.append, link_factory=silence) as prefetcher:
        (away,) = worker.play_far_away(1)
        dropped = EpisodeRecord(worker_id="w", sequence=9, dropped="why")
        assert not prefetcher.begin([dropped, away, away, ProtocolError("what?")]).result(0.05).in_time
    assert [(loss.index, loss.reason) for loss in losses] == [
        (0, LossReason.DROPPED),
        (1, LossReason.TIMEOUT),
        (2, LossReason.DUPLICATE),
        (3, LossReason.MALFORMED),
    ]
    assert [loss.record is None for loss in losses] == [False, False, False, True]


def test_a_hook_that_raises_costs_neither_a_loss_nor_the_batch(worker: LocalWorker) -> None:
    lost: list[int] = []

    def hook(loss: Loss) -> None:
        lost.append(loss.index)
        raise ZeroDivisionError(loss.index)

    with Prefetcher(LOCAL, on_loss=hook) as prefetcher:
        first, second = worker.play(2)
        pending = prefetcher.begin([first, first, second, second])
        with pytest.raises(ZeroDivisionError, match="1"):
            pending.result()
        assert lost == [1, 3]
        batch = pending.result()
        assert sequences(batch) == [0, 1]
        batch.release()
        with pytest.raises(ConfigError, match="taken"):
            pending.result()
        assert prefetcher.statistics().losses == {"duplicate": 2}
        assert prefetcher.statistics().episodes == 2
        with pytest.raises(ZeroDivisionError):  # nothing of it is held any more
            prefetcher.fetch([*worker.play(1), first])
        kept = prefetcher.begin([*worker.play(1), first])
        with pytest.raises(ZeroDivisionError):
            kept.result()
    assert prefetcher.statistics().losses == {"duplicate": 4}
    wait_until(lambda: SlotState.READING not in worker.ring.slot_states())


def test_every_failure_of_a_hook_but_the_first_is_logged(
    worker: LocalWorker, log_events: list[MutableMapping[str, Any]]
) -> None:
    def hook(loss: Loss) -> None:
        raise ZeroDivisionError(loss.index)

    with Prefetcher(LOCAL, on_loss=hook) as prefetcher:
        (record,) = worker.play(1)
        with pytest.raises(ZeroDivisionError, match="1"):
            prefetcher.fetch([record, record, record])
    (event,) = [event for event in log_events if event["event"] == "loss_hook_failed"]
    assert (event["worker"], event["sequence"]) == ("w", 0)
    assert "ZeroDivisionError: 2" in event["exception"]


def test_a_batch_that_is_given_up_is_not_held_against_its_source(worker: LocalWorker) -> None:
    with Prefetcher(deadline_s=600, unreachable_batches=1, link_factory=silence) as prefetcher:
        for _ in range(3):
            assert not prefetcher.begin(worker.play_far_away(1)).result(0).in_time


def test_batches_are_fetched_side_by_side(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        first = prefetcher.begin(worker.play(1))
        assert sequences(prefetcher.fetch(worker.play(1))) == [1]
        assert sequences(first.result()) == [0]
        with pytest.raises(ConfigError, match="taken"):
            first.result()
        assert prefetcher.statistics().batches == 2


def test_what_is_asked_for_and_not_taken_when_it_is_closed_is_counted_and_logged(
    worker: LocalWorker, log_events: list[MutableMapping[str, Any]]
) -> None:
    prefetcher = Prefetcher(ClientConfig(local="auto"), deadline_s=600, link_factory=silence, max_staleness=1)
    prefetcher.fetch(worker.play(1, policy_version=9), policy_version=9).release()
    come = prefetcher.begin([*worker.play(2, policy_version=9), *worker.play(1, policy_version=1)], policy_version=9)
    wait_until(lambda: come.is_ready)
    prepared(prefetcher, worker.play(3, policy_version=9), policy_version=9)
    beside = prefetcher.begin(worker.play_far_away(1, policy_version=9), policy_version=9)
    beside.cancel()
    beside.cancel()
    prefetcher.begin(worker.play_far_away(1, policy_version=9), policy_version=9)
    prefetcher.close()
    assert prefetcher.statistics().losses == {"closed": 7, "too_old": 1}
    assert [
        (event["log_level"], event["episodes"]) for event in log_events if event["event"] == "episodes_not_taken"
    ] == [("info", 7)]
    assert SlotState.READING not in worker.ring.slot_states()


def test_closing_ends_who_waits_and_what_is_on_its_way(worker: LocalWorker) -> None:
    prefetcher = Prefetcher(ClientConfig(local="off"), deadline_s=600, link_factory=silence)
    pending = prefetcher.begin(worker.play_far_away(1))
    heard: list[str] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except ConfigError as error:
            heard.append(error.message)

    waiting = [threading.Thread(target=wait, args=(call,)) for call in (pending.result, partial(pending.result, 500))]
    for thread in waiting:
        thread.start()
    prefetcher.close()
    prefetcher.close()
    for thread in waiting:
        thread.join()
    assert heard == ["the Prefetcher is closed; make another"] * 2
    for call in (pending.result, lambda: prefetcher.begin([]), lambda: prefetcher.fetch([])):
        with pytest.raises(ConfigError, match="closed"):
            call()


def test_a_forked_child_neither_uses_nor_ends_what_is_its_parent_s(worker: LocalWorker) -> None:
    with Prefetcher(LOCAL) as prefetcher:
        pending = prefetcher.begin(worker.play(1))
        child = os.fork()
        if child == 0:
            calls = (pending.result, lambda: prefetcher.begin([]), lambda: prefetcher.fetch([]))
            refused = 0
            for call in calls:
                try:
                    call()
                except ConfigError as error:
                    refused += "forked" in error.message
            prefetcher.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert sequences(pending.result()) == [0]


class Machine(RuleBasedStateMachine):
    """Every episode asked for is taken once or lost with a reason; every slot comes back.

    What is on its way comes when it does, so no rule has a precondition.
    """

    @initialize()
    def begin_all(self) -> None:
        self.ring = SharedRingBuffer.create(RingConfig(slots=256, slot_bytes=8, on_full="raise"))
        self.worker = LocalWorker(self.ring)
        self.lost: list[int] = []
        self.taken: list[int] = []
        self.pending: list[PendingBatch] = []
        self.prefetcher = Prefetcher(LOCAL, on_loss=self.lose)

    def lose(self, loss: Loss) -> None:
        assert loss.record is not None
        assert loss.reason is LossReason.TIMEOUT
        self.lost.append(loss.record.sequence)

    @rule()
    def prepare(self) -> None:
        self.pending.append(prepared(self.prefetcher, self.worker.play(1)))

    @rule()
    def begin(self) -> None:
        self.pending.append(self.prefetcher.begin(self.worker.play(2)))

    @rule(place=PLACES)
    def give_up(self, place: int) -> None:
        if self.pending:
            before = len(self.lost)
            batch = self.pending.pop(place % len(self.pending)).result(0)
            assert batch.in_time == (len(self.lost) == before)
            self.taken += sequences(batch)
            batch.release()

    @rule(place=PLACES)
    def take(self, place: int) -> None:
        if self.pending:
            pending = self.pending.pop(place % len(self.pending))
            pending.begin()  # once more, or for the first time
            batch = pending.result()
            self.taken += sequences(batch)
            batch.release()

    @rule(place=PLACES)
    def cancel(self, place: int) -> None:
        if self.pending:
            self.pending.pop(place % len(self.pending)).cancel()

    @invariant()
    def nothing_is_given_twice(self) -> None:
        assert len(self.taken) == len(set(self.taken))
        assert not set(self.taken) & set(self.lost)

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
