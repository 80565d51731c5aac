"""The rounds of a batch, in virtual time: driven by a core's jobs and timers, and by an asynchronous client."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import pytest

from tests.support.rows import row
from tests.unit.trainer.fake_core import FakeCore
from ucxx_transport import (
    BusyError,
    ChecksumError,
    ConfigError,
    DeadlineExceededError,
    Payload,
    PeerLostError,
    ProtocolError,
    SlotRef,
    StaleSlotError,
    TransportError,
    UCXXClient,
)
from ucxx_transport.client.core import ClientCore
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch, LossReason, PendingBatch, fetch_batch
from ucxx_transport.trainer.batch import ROUND_PAUSE_S, FetchLimits
from ucxx_transport.trainer.loss_policy import AskedFor, discardable_of
from ucxx_transport.trainer.pending import Fetches

LOST = PeerLostError("gone")


def episode(number: int, **other: Any) -> EpisodeRecord:
    ref = SlotRef(ring_id=bytes(16), ring_name="r", slot=number, generation=1, nbytes=1, host_id="h")
    return EpisodeRecord(**{"worker_id": "w", "sequence": number, "ref": ref, **other})


class Fetch(PendingBatch):
    """A fetch that keeps what it ended with."""

    def __init__(
        self, core: FakeCore, records: Sequence[AskedFor], uploader: Any, policy_version: int | None, **limits: Any
    ) -> None:
        bounds = FetchLimits(**{"deadline_s": 10, "unreachable_batches": None, **limits})
        fetches = Fetches(cast("ClientCore", core), bounds, uploader)
        super().__init__(fetches, dict(enumerate(records)), policy_version)
        self.outcomes: list[Batch | Exception] = []
        fetches.add(self)

    def ended(self, outcome: Batch | Exception) -> None:
        self.outcomes.append(outcome)


def begun(
    core: FakeCore,
    records: Sequence[AskedFor],
    *,
    policy_version: int | None = None,
    uploader: Any = None,
    after_s: float = 0.0,
    **limits: Any,
) -> tuple[Fetch, list[Batch | Exception]]:
    """A fetch, and where its outcome will be."""
    fetch = Fetch(core, records, uploader, policy_version, **limits)
    fetch.start(after_s)
    return fetch, fetch.outcomes


def fetched(core: FakeCore, records: Sequence[AskedFor], **settings: Any) -> Batch:
    _, outcomes = begun(core, records, **settings)
    core.run()
    (batch,) = outcomes
    assert isinstance(batch, Batch)
    return batch


def reasons(batch: Batch) -> dict[int, LossReason]:
    return {loss.index: loss.reason for loss in batch.losses}


def test_every_episode_is_fetched_and_keeps_its_place() -> None:
    core = FakeCore()
    records = [episode(number) for number in (3, 1, 2)]
    batch = fetched(core, records)
    assert [payload.ref for payload in batch.payloads.values()] == [record.ref for record in records]
    assert (list(batch.payloads), batch.losses, batch.retried) == ([0, 1, 2], (), 0)
    batch.release()
    assert all(payload.released for payload in batch.payloads.values())


def test_an_empty_batch_asks_nobody() -> None:
    core = FakeCore()
    batch = fetched(core, [])
    assert (batch.payloads, batch.losses, batch.retried, core.asked) == ({}, (), 0, [])


def test_only_what_failed_retryably_is_asked_for_again() -> None:
    core = FakeCore({0: [LOST], 1: [StaleSlotError("stale")], 2: [BusyError("busy"), ChecksumError("torn")]})
    batch = fetched(core, [episode(number) for number in range(4)])
    assert core.asked == [[0, 1, 2, 3], [0, 2], [2]]
    assert list(batch.payloads) == [0, 2, 3]
    assert (reasons(batch), len(core.asked), batch.retried) == ({1: LossReason.STALE}, 3, 3)
    assert batch.took_s == pytest.approx(2 * ROUND_PAUSE_S, abs=1e-3)


def test_what_is_no_record_yet_is_read_as_one() -> None:
    given: Any = [episode(0).to_dict(), episode(1).ref, "text"]
    fetch, (batch,) = begun(FakeCore(), given)
    assert isinstance(batch, Batch)
    assert fetch.records[0] == episode(0)
    assert (list(batch.payloads), reasons(batch)) == ([0, 1], {2: LossReason.MALFORMED})


def test_what_fails_in_every_round_is_lost_with_its_last_error() -> None:
    late = DeadlineExceededError("late")
    core = FakeCore({0: [LOST] * 9, 1: [LOST, LOST, late], 2: [ProtocolError("lying")]})
    batch = fetched(core, [episode(number) for number in range(4)])
    assert list(batch.payloads) == [3]
    assert reasons(batch) == {0: LossReason.UNREACHABLE, 1: LossReason.TIMEOUT, 2: LossReason.FAILED}
    assert [loss.error for loss in batch.losses[:2]] == [LOST, late]
    assert len(core.asked) == 3


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_are_counted(rounds: int) -> None:
    core = FakeCore({0: [LOST] * 9})
    batch = fetched(core, [episode(0)], deadline_s=10, max_fetch_rounds=rounds)
    assert (len(core.asked), batch.retried) == (rounds, rounds - 1)


@pytest.mark.parametrize("rounds", [1, 3, 9])
def test_a_round_takes_half_of_what_is_left_and_the_last_one_all_of_it(rounds: int) -> None:
    core = FakeCore({0: [LOST] * 9}, takes_s=1.0)
    fetched(core, [episode(0)], max_fetch_rounds=rounds)
    *others, last = [10 - number * (1.0 + ROUND_PAUSE_S) for number in range(rounds)]
    assert core.limits_s == pytest.approx([*(left_s / 2 for left_s in others), last], abs=1e-3)


def test_silence_costs_the_deadline_and_no_more() -> None:
    silent = DeadlineExceededError("silence")
    core = FakeCore({0: [silent] * 9}, takes_s=100.0)
    batch = fetched(core, [episode(0), episode(1)], deadline_s=4)
    assert core.now_s - 1000 <= 4 + 1e-9
    assert (list(batch.payloads), reasons(batch)) == ([1], {0: LossReason.TIMEOUT})


def test_no_round_begins_when_there_is_no_time_for_it() -> None:
    core = FakeCore({0: [LOST] * 9}, takes_s=100.0)
    batch = fetched(core, [episode(0)], deadline_s=ROUND_PAUSE_S)
    assert (len(core.asked), reasons(batch)) == (1, {0: LossReason.UNREACHABLE})


def test_what_cannot_or_need_not_be_fetched_is_not_asked_for() -> None:
    core = FakeCore()
    records = [
        episode(0, policy_version=7),
        episode(0, policy_version=7),
        episode(1, policy_version=5),
        episode(2, policy_version=6),
        episode(3),
        episode(4, policy_version=8),
        EpisodeRecord(worker_id="w", sequence=9, dropped="RingFullError: full", policy_version=7),
    ]
    batch = fetched(core, records, deadline_s=10, policy_version=7, max_staleness=1)
    assert core.asked == [[0, 2, 4]]
    assert reasons(batch) == {
        1: LossReason.DUPLICATE,
        2: LossReason.TOO_OLD,
        4: LossReason.TOO_OLD,
        6: LossReason.DROPPED,
    }
    assert sorted([*batch.payloads, *(loss.index for loss in batch.losses)]) == list(range(7))


def test_without_a_bound_no_age_is_too_old() -> None:
    batch = fetched(FakeCore(), [episode(0, policy_version=-5), episode(1)], deadline_s=1, policy_version=9)
    assert list(batch.payloads) == [0, 1]


def test_a_wrong_argument_is_named() -> None:
    for settings, field in (
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"max_fetch_rounds": 0}, "max_fetch_rounds"),
        ({"max_staleness": 1}, "policy_version"),
        ({"max_staleness": -1, "policy_version": 1}, "max_staleness"),
    ):
        with row(**settings), pytest.raises(ConfigError) as caught:
            begun(FakeCore(), [], **settings)
        assert caught.value.facts["field"] == field


def test_rounds_of_several_batches_go_on_side_by_side() -> None:
    core = FakeCore({0: [LOST]}, takes_s=1.0)
    outcomes = [begun(core, [episode(number)])[1] for number in (0, 1)]
    core.run(1.5)
    assert [len(outcome) for outcome in outcomes] == [0, 1]
    core.run()
    assert [batch.retried for (batch,) in outcomes if isinstance(batch, Batch)] == [1, 0]
    assert core.began_s == pytest.approx([1000, 1000, 1001 + ROUND_PAUSE_S])


def test_a_fetch_that_begins_later_has_its_whole_deadline() -> None:
    core = FakeCore()
    _, outcomes = begun(core, [episode(0)], deadline_s=4, max_fetch_rounds=1, after_s=3)
    assert core.asked == []
    core.run()
    assert (core.began_s, core.limits_s, len(outcomes)) == ([1003.0], [4.0], 1)


def test_an_abandoned_fetch_leaves_no_payload_behind_wherever_it_was() -> None:
    for where, until_s in (("before the first round", 0.0), ("between two", 2 + ROUND_PAUSE_S / 2), ("in one", 2.5)):
        with row(where=where):
            core = FakeCore({0: [LOST] * 9}, takes_s=2.0)
            fetch, outcomes = begun(core, [episode(0), episode(1)])
            core.run(until_s)
            fetch.abandon()
            fetch.abandon()
            assert len(core.abandoned) == (where != "between two")
            jobs = len(core.asked)
            core.run()
            assert (outcomes, len(core.asked)) == ([], jobs)
            assert all(payload.released for payload in core.delivered)
    core = FakeCore()
    fetch, outcomes = begun(core, [episode(0)], after_s=1)
    fetch.abandon()
    core.run()
    assert (core.asked, outcomes) == ([], [])


def test_what_a_fetch_meets_beside_errors_of_episodes_ends_it_and_releases_what_came() -> None:
    core = FakeCore({0: [LOST]})
    _, outcomes = begun(core, [episode(0), episode(1)])
    core.raises = ZeroDivisionError("at the second round")
    core.run()
    assert outcomes == [core.raises]
    assert [payload.released for payload in core.delivered] == [True]

    class NoRecord:
        @property
        def completion(self) -> NoReturn:
            raise ZeroDivisionError("no record")

    given: Any = [episode(0), NoRecord()]
    _, outcomes = begun(core, given)
    assert str(outcomes[0]) == "no record"


def test_what_takes_payloads_may_refuse_one_and_breaks_the_batch_with_anything_else() -> None:
    class Uploader:
        def upload(self, payload: Payload, _: object) -> Payload:
            if payload.ref.slot in refused:
                payload.release()
                raise refused[payload.ref.slot]
            return Payload(payload.ref, payload.arrays["data"], None, "copy")

    refused: dict[int, Exception] = {1: ConfigError("no room")}
    batch = fetched(FakeCore(), [episode(number) for number in range(3)], uploader=Uploader())
    assert [payload.transport for payload in batch.payloads.values()] == ["copy"] * 2
    assert [(loss.index, loss.reason, loss.error) for loss in batch.losses] == [(1, LossReason.FAILED, refused[1])]
    refused[2] = ZeroDivisionError()
    _, outcomes = begun(FakeCore(), [episode(number) for number in range(3)], uploader=Uploader())
    assert outcomes == [refused[2]]


def test_what_was_delivered_before_is_a_duplicate_and_what_was_overtaken_is_stale() -> None:
    errors: dict[int, list[TransportError]] = {
        0: [StaleSlotError("had it", delivered=1)],
        1: [StaleSlotError("had a newer one of its slot", delivered=2)],
    }
    batch = fetched(FakeCore(errors), [episode(0), episode(1)])
    assert reasons(batch) == {0: LossReason.DUPLICATE, 1: LossReason.STALE}
    assert batch.retried == 0


def test_what_may_still_lie_in_its_slot_is_unwanted() -> None:
    core = FakeCore(
        {
            1: [LOST] * 9,
            2: [DeadlineExceededError("late")] * 9,
            3: [ProtocolError("lying")],
            4: [StaleSlotError("stale")],
        }
    )
    records: list[EpisodeRecord | TransportError] = [
        episode(0, policy_version=1),
        *(episode(number, policy_version=9) for number in (1, 2, 3, 4, 5, 5)),
        EpisodeRecord(worker_id="w", sequence=3, dropped="why"),
        ProtocolError("what?"),
    ]
    batch = fetched(core, records, deadline_s=10, policy_version=9, max_staleness=1)
    assert list(batch.payloads) == [5]
    assert [ref.slot for ref in discardable_of(batch.losses)] == [0, 1, 2, 3]
    assert [ref.slot for ref in discardable_of(batch.losses, discard_lost=False)] == [0]


class Reader:
    """An asynchronous client on a core's script."""

    def __init__(self, script: dict[int, list[TransportError]]) -> None:
        self.core = FakeCore(script)
        self.memory: list[weakref.ref[Any]] = []

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
    ) -> list[Payload | TransportError]:
        assert deadline_s is not None
        job = self.core.begin(refs, deadline_s, on_done=lambda _: None)
        outcomes = [outcome for outcome in job.outcomes if outcome is not None]
        self.memory.extend(weakref.ref(found.arrays["data"]) for found in outcomes if isinstance(found, Payload))
        self.core.delivered.clear()
        return outcomes


@pytest.mark.anyio
async def test_an_asynchronous_client_is_asked_round_by_round_too() -> None:
    reader = Reader({0: [LOST], 1: [StaleSlotError("stale")]})
    batch = await fetch_batch(cast("UCXXClient", reader), [episode(number) for number in range(3)], deadline_s=10)
    assert reader.core.asked == [[0, 1, 2], [0]]
    assert (list(batch.payloads), reasons(batch)) == ([0, 2], {1: LossReason.STALE})
    assert batch.took_s == pytest.approx(ROUND_PAUSE_S, abs=1e-3)
    assert reader.core.limits_s == pytest.approx([5.0, (10 - ROUND_PAUSE_S) / 2], abs=1e-3)
    with pytest.raises(ConfigError, match="deadline_s"):
        await fetch_batch(cast("UCXXClient", reader), [], deadline_s=0)


@pytest.mark.anyio
async def test_a_cancelled_fetch_leaves_no_payload_behind() -> None:
    reader = Reader({0: [LOST] * 9})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(ROUND_PAUSE_S / 2):
            await fetch_batch(cast("UCXXClient", reader), [episode(0), episode(1)], deadline_s=10)
    gc.collect()
    assert [reference() for reference in reader.memory] == [None]
