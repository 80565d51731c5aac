from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

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
)
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch, LossReason, fetch_batch
from ucxx_transport.trainer.batch import ROUND_PAUSE_S
from ucxx_transport.trainer.loss_policy import discardable_of

pytestmark = pytest.mark.anyio

LOST = PeerLostError("gone")


def episode(number: int, **other: Any) -> EpisodeRecord:
    ref = SlotRef(ring_id=bytes(16), ring_name="r", slot=number, generation=1, nbytes=1, host_id="h")
    return EpisodeRecord(**{"worker_id": "w", "sequence": number, "ref": ref, **other})


class Reader:
    """Answers each slot with what its script says, try by try, and with the payload when that is at its end."""

    def __init__(self, script: dict[int, list[TransportError]] | None = None, *, takes_s: float = 0.0) -> None:
        self._script = script or {}
        self._takes_s = takes_s
        self.asked: list[list[int]] = []
        self.limits_s: list[float] = []

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
    ) -> list[Payload | TransportError]:
        assert deadline_s is not None
        self.asked.append([ref.slot for ref in refs])
        self.limits_s.append(deadline_s)
        await asyncio.sleep(min(self._takes_s, deadline_s))
        return [self._answer(ref) for ref in refs]

    def _answer(self, ref: SlotRef) -> Payload | TransportError:
        errors = self._script.get(ref.slot)
        return errors.pop(0) if errors else Payload(ref, np.zeros(1, np.uint8), None, "ucx")


def reasons(batch: Batch) -> dict[int, LossReason]:
    return {loss.index: loss.reason for loss in batch.losses}


async def test_every_episode_is_fetched_and_keeps_its_place() -> None:
    reader = Reader()
    records = [episode(number) for number in (3, 1, 2)]
    batch = await fetch_batch(reader, records, deadline_s=10)
    assert [payload.ref for payload in batch.payloads.values()] == [record.ref for record in records]
    assert (list(batch.payloads), batch.losses, batch.rounds) == ([0, 1, 2], (), 1)
    batch.release()
    assert all(payload.released for payload in batch.payloads.values())


async def test_an_empty_batch_asks_nobody() -> None:
    reader = Reader()
    batch = await fetch_batch(reader, [], deadline_s=10)
    assert (batch.payloads, batch.losses, batch.rounds, batch.retried, reader.asked) == ({}, (), 0, 0, [])


async def test_only_what_failed_retryably_is_asked_for_again() -> None:
    reader = Reader({0: [LOST], 1: [StaleSlotError("stale")], 2: [BusyError("busy"), ChecksumError("torn")]})
    batch = await fetch_batch(reader, [episode(number) for number in range(4)], deadline_s=10)
    assert reader.asked == [[0, 1, 2, 3], [0, 2], [2]]
    assert list(batch.payloads) == [0, 2, 3]
    assert (reasons(batch), batch.rounds, batch.retried) == ({1: LossReason.STALE}, 3, 3)
    assert batch.took_s == pytest.approx(2 * ROUND_PAUSE_S, abs=1e-3)


async def test_what_fails_in_every_round_is_lost_with_its_last_error() -> None:
    late = DeadlineExceededError("late")
    reader = Reader({0: [LOST] * 9, 1: [LOST, LOST, late], 2: [ProtocolError("lying")]})
    batch = await fetch_batch(reader, [episode(number) for number in range(4)], deadline_s=10)
    assert list(batch.payloads) == [3]
    assert reasons(batch) == {0: LossReason.UNREACHABLE, 1: LossReason.TIMEOUT, 2: LossReason.FAILED}
    assert [loss.error for loss in batch.losses[:2]] == [LOST, late]
    assert len(reader.asked) == 3


@pytest.mark.parametrize("rounds", [1, 2, 5])
async def test_rounds_are_counted(rounds: int) -> None:
    reader = Reader({0: [LOST] * 9})
    batch = await fetch_batch(reader, [episode(0)], deadline_s=10, max_fetch_rounds=rounds)
    assert (len(reader.asked), batch.rounds) == (rounds, rounds)


async def test_a_round_takes_half_of_what_is_left_and_the_last_one_all_of_it() -> None:
    reader = Reader({0: [LOST] * 9}, takes_s=1.0)
    await fetch_batch(reader, [episode(0)], deadline_s=10)
    first = (10 - 1.0 - ROUND_PAUSE_S) / 2
    last = 10 - 2 * (1.0 + ROUND_PAUSE_S)
    assert reader.limits_s == pytest.approx([5.0, first, last], abs=1e-3)


async def test_silence_costs_the_deadline_and_no_more() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    silent = DeadlineExceededError("silence")
    reader = Reader({0: [silent] * 9}, takes_s=100.0)
    batch = await fetch_batch(reader, [episode(0), episode(1)], deadline_s=4)
    assert loop.time() - began <= 4 + 1e-3
    assert (list(batch.payloads), reasons(batch)) == ([1], {0: LossReason.TIMEOUT})


async def test_no_round_begins_when_there_is_no_time_for_it() -> None:
    reader = Reader({0: [LOST] * 9}, takes_s=100.0)
    batch = await fetch_batch(reader, [episode(0)], deadline_s=ROUND_PAUSE_S)
    assert (len(reader.asked), reasons(batch)) == (1, {0: LossReason.UNREACHABLE})


async def test_what_cannot_or_need_not_be_fetched_is_not_asked_for() -> None:
    reader = Reader()
    records = [
        episode(0, policy_version=7),
        episode(0, policy_version=7),
        episode(1, policy_version=5),
        episode(2, policy_version=6),
        episode(3),
        episode(4, policy_version=8),
        EpisodeRecord(worker_id="w", sequence=9, dropped="RingFullError: full", policy_version=7),
    ]
    batch = await fetch_batch(reader, records, deadline_s=10, policy_version=7, max_staleness=1)
    assert reader.asked == [[0, 2, 4]]
    assert reasons(batch) == {
        1: LossReason.DUPLICATE,
        2: LossReason.TOO_OLD,
        4: LossReason.TOO_OLD,
        6: LossReason.DROPPED,
    }
    assert sorted([*batch.payloads, *(loss.index for loss in batch.losses)]) == list(range(7))


async def test_without_a_bound_no_age_is_too_old() -> None:
    batch = await fetch_batch(Reader(), [episode(0, policy_version=-5), episode(1)], deadline_s=1, policy_version=9)
    assert list(batch.payloads) == [0, 1]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"max_fetch_rounds": 0}, "max_fetch_rounds"),
        ({"max_staleness": 1}, "policy_version"),
        ({"max_staleness": -1, "policy_version": 1}, "max_staleness"),
    ],
)
async def test_a_wrong_argument_is_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await fetch_batch(Reader(), [], **{"deadline_s": 1, **settings})
    assert caught.value.facts["field"] == field


async def test_a_cancelled_fetch_leaves_no_payload_behind() -> None:
    memory: list[weakref.ref[Any]] = []

    class Noting(Reader):
        async def read_many(
            self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
        ) -> list[Payload | TransportError]:
            outcomes = await super().read_many(refs, deadline_s=deadline_s)
            memory.extend(weakref.ref(found.arrays["data"]) for found in outcomes if isinstance(found, Payload))
            return outcomes

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(ROUND_PAUSE_S / 2):
            await fetch_batch(Noting({0: [LOST] * 9}), [episode(0), episode(1)], deadline_s=10)
    gc.collect()
    assert [reference() for reference in memory] == [None]


async def test_what_was_delivered_before_is_a_duplicate_and_what_was_overtaken_is_stale() -> None:
    errors: dict[int, list[TransportError]] = {
        0: [StaleSlotError("had it", delivered=1)],
        1: [StaleSlotError("had a newer one of its slot", delivered=2)],
    }
    batch = await fetch_batch(Reader(errors), [episode(0), episode(1)], deadline_s=10)
    assert reasons(batch) == {0: LossReason.DUPLICATE, 1: LossReason.STALE}
    assert batch.rounds == 1


async def test_what_may_still_lie_in_its_slot_is_unwanted() -> None:
    reader = Reader(
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
    batch = await fetch_batch(reader, records, deadline_s=10, policy_version=9, max_staleness=1)
    assert list(batch.payloads) == [5]
    assert [ref.slot for ref in discardable_of(batch.losses)] == [0, 1, 2, 3]
    assert [ref.slot for ref in discardable_of(batch.losses, discard_lost=False)] == [0]
