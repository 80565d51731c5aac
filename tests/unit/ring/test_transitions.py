"""The transitions: every refusal, and what each leaves alone. What cuts them off is in `test_native.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.ring_bench import DYING, LIVING, RingBench
from tests.support.rows import row
from ucxx_transport.errors import BusyError, SlotError, StaleSlotError
from ucxx_transport.machine import Owner
from ucxx_transport.ring.layout import (
    CONSUMED,
    HOLD_GENERATION,
    HOLD_LEASE,
    HOLD_NBYTES,
    HOLD_PID,
    HOLD_SLOT,
    HOLD_START,
    HOLD_STATE,
    NBYTES,
    RELEASED,
    REQUIRED_READS,
    TAKE_NEXT,
    TAKE_NUMBER,
    TAKE_RETURNS,
    TAKE_SEQUENCE,
    TAKE_SLOT,
    TAKE_STEPS,
)
from ucxx_transport.ring.states import SlotState, state_of
from ucxx_transport.ring.transitions import HoldWords, TakeWords, Words


@pytest.fixture
def bench() -> Iterator[RingBench]:
    bench = RingBench()
    yield bench
    bench.check()
    bench.transitions.creation()


def contents(bench: RingBench) -> bytes:
    return bytes(bench.transitions.memory[: bench.identity.header_bytes])


def changed(words: Words, index: int, by: int) -> Words:
    wrong = HoldWords(*words)
    wrong[index] = (wrong[index] + by) % 2**64
    return wrong


def wrong_hands(words: Words) -> list[Words]:
    """The hold as others would name it: another attempt, process, earlier process of that pid, or generation."""
    return [
        changed(words, HOLD_LEASE, 70),
        changed(words, HOLD_PID, 1),
        changed(words, HOLD_START, 1),
        changed(words, HOLD_GENERATION, 1),
        changed(words, HOLD_GENERATION, -1),
    ]


def test_a_generation_grows_by_one_at_every_write_and_never_otherwise() -> None:
    bench = RingBench(slots=1)
    for generation in range(1, 6):
        words = bench.reserved()
        assert words[HOLD_GENERATION] == generation
        assert bench.abort(words)
        assert bench.generation(0) == generation
    payload = bench.written()
    assert payload[HOLD_GENERATION] == 6
    bench.transitions.finalise(bench.reading(payload), RELEASED)
    assert bench.generation(0) == 6
    bench.transitions.creation()


def test_a_slot_in_use_cannot_be_reserved() -> None:
    def writing(bench: RingBench) -> object:
        return bench.reserved()

    def reading(bench: RingBench) -> object:
        return bench.reading(bench.written())

    def reading_though_consumed(bench: RingBench) -> object:
        payload = bench.written()
        first, second = bench.reading(payload, LIVING, 1), bench.reading(payload, LIVING, 1)
        assert bench.transitions.finalise(first, CONSUMED)
        return second

    rows: list[Callable[[RingBench], object]] = [writing, reading, reading_though_consumed]
    for start in rows:
        with row(start=start.__name__):
            bench = RingBench(slots=1)
            start(bench)
            before = contents(bench)
            for overwrites in (False, True):
                assert not bench.transitions.reserve(bench.hold(DYING), overwrites=overwrites)
            assert contents(bench) == before
            bench.transitions.creation()


def test_the_free_slots_are_written_in_the_order_in_which_they_became_free(bench: RingBench) -> None:
    written = [bench.written() for _ in range(3)]
    for index in (1, 2, 0):
        bench.discard(written[index])
    assert [bench.written()[HOLD_SLOT] for _ in range(3)] == [1, 2, 0]


def test_the_oldest_unread_payload_is_overwritten_first_whatever_its_slot(bench: RingBench) -> None:
    written = [bench.written() for _ in range(3)]
    held = bench.reading(written[0])
    assert bench.written()[HOLD_SLOT] == 1
    assert bench.transitions.finalise(held, RELEASED)
    assert [bench.written()[HOLD_SLOT] for _ in range(3)] == [0, 2, 1]


def test_a_finalise_by_anyone_but_the_attempt_changes_nothing(bench: RingBench) -> None:
    payload = bench.written(2)
    mine = bench.reading(payload, LIVING, 1)
    bench.reading(payload, DYING, 2)
    before = contents(bench)
    for wrong in [*wrong_hands(mine), changed(mine, HOLD_SLOT, 1), changed(mine, HOLD_SLOT, 2**40)]:
        assert not bench.transitions.finalise(wrong, CONSUMED)
        assert not bench.transitions.finalise(wrong, RELEASED)
    assert contents(bench) == before


def test_an_abort_or_commit_by_anyone_but_the_writer_changes_nothing(bench: RingBench) -> None:
    mine = bench.reserved()
    before = bench.meaning(mine[HOLD_SLOT])
    for wrong in wrong_hands(mine):
        assert not bench.abort(wrong)
        with pytest.raises(SlotError, match="nothing was committed"):
            bench.transitions.commit(wrong, 1)
    assert bench.meaning(mine[HOLD_SLOT]) == before
    assert bench.counted("late_finalise") == 5


def test_an_attempt_of_another_generation_is_stale(bench: RingBench) -> None:
    payload = bench.written()
    for state in (SlotState.READY, SlotState.READING):
        for wrong in wrong_hands(payload)[3:]:
            with row(state=state, generation=wrong[HOLD_GENERATION]), pytest.raises(StaleSlotError):
                bench.reading(wrong)
        if state is SlotState.READY:
            bench.reading(payload)
    for words in (bench.reserved(), HoldWords(2, 0)):
        with pytest.raises(StaleSlotError, match="never written"):
            bench.reading(words)


def test_a_payload_that_was_consumed_is_stale_while_another_attempt_is_in_flight(bench: RingBench) -> None:
    payload = bench.written()
    first = bench.reading(payload, LIVING, 1)
    bench.reading(payload, LIVING, 1)
    assert bench.transitions.finalise(first, CONSUMED)
    assert bench.state(payload[HOLD_SLOT]) is SlotState.READING
    for reader in (0, 1, 2):
        with row(reader=reader), pytest.raises(StaleSlotError, match="read already"):
            bench.reading(payload, DYING, reader)


def test_a_named_reader_gets_a_payload_once_and_an_unnamed_one_as_often_as_it_is_due(bench: RingBench) -> None:
    payload = bench.written(3)
    assert bench.transitions.finalise(bench.reading(payload, LIVING, 7), CONSUMED)
    with pytest.raises(StaleSlotError):
        bench.reading(payload, LIVING, 7)
    for _ in range(2):
        assert bench.transitions.finalise(bench.reading(payload), CONSUMED)
    assert bench.state(payload[HOLD_SLOT]) is SlotState.FREE


def test_two_attempts_of_one_reader_count_as_one_read(bench: RingBench) -> None:
    payload = bench.written(2)
    for words in [bench.reading(payload, LIVING, 5), bench.reading(payload, LIVING, 5)]:
        assert bench.transitions.finalise(words, CONSUMED)
    assert bench.state(payload[HOLD_SLOT]) is SlotState.READY
    assert bench.transitions.finalise(bench.reading(payload, LIVING, 6), CONSUMED)
    assert bench.state(payload[HOLD_SLOT]) is SlotState.FREE


def test_a_reader_is_busy_while_others_attempts_have_every_read_and_never_by_its_own(bench: RingBench) -> None:
    payload = bench.written(2)
    first, second = bench.reading(payload, LIVING, 1), bench.reading(payload, LIVING, 2)
    for reader in (1, 2, 0):  # the same again, or nobody in particular
        assert bench.transitions.finalise(bench.reading(payload, DYING, reader), RELEASED)
    for end in (CONSUMED, RELEASED):
        with pytest.raises(BusyError, match="other readers"):
            bench.reading(payload, DYING, 3)
        assert bench.transitions.finalise(first if end is CONSUMED else second, end)
    bench.reading(payload, DYING, 3)


def test_a_slot_takes_no_more_attempts_than_it_has_room_for(bench: RingBench) -> None:
    payload = bench.written()
    attempts = [bench.reading(payload) for _ in range(bench.identity.max_attempts)]
    with pytest.raises(BusyError, match="as many read attempts"):
        bench.reading(payload)
    assert bench.counted("busy") == 1
    assert bench.transitions.finalise(attempts[0], RELEASED)
    bench.reading(payload)


def test_room_for_attempts_remains_when_all_readers_but_one_have_had_the_payload() -> None:
    bench = RingBench(slots=1, readers=64)
    payload = bench.written(64)
    for reader in range(1, 64):
        assert bench.transitions.finalise(bench.reading(payload, LIVING, reader), CONSUMED)
    for _ in range(bench.identity.max_attempts):
        bench.reading(payload, LIVING, 64)
    with pytest.raises(BusyError):
        bench.reading(payload, LIVING, 64)
    bench.transitions.creation()


def test_a_payload_longer_than_its_slot_is_damage_and_gives_no_memory(bench: RingBench) -> None:
    payload = bench.written()
    length = bench.base(payload[HOLD_SLOT]) + NBYTES
    bench.words[length] = bench.identity.slot_bytes + 1
    for required in (1, 2):
        bench.words[bench.base(payload[HOLD_SLOT]) + REQUIRED_READS] = required
        with row(required=required), pytest.raises(SlotError, match="damaged"):
            bench.reading(payload)
    bench.words[length] = bench.identity.slot_bytes
    assert bench.reading(payload)[HOLD_NBYTES] == bench.identity.slot_bytes


def test_holds_of_many_slots_are_listed_in_several_critical_sections() -> None:
    bench = RingBench(slots=700)
    payloads = [bench.written() for _ in range(600)]
    expected = {bench.reading(payload, Owner(9, index))[HOLD_LEASE] for index, payload in enumerate(payloads)}
    expected |= {bench.reserved()[HOLD_LEASE] for _ in range(100)}
    seen = list(bench.holds())
    assert {words[HOLD_LEASE] for words in seen} == expected
    assert sum(state_of(words[HOLD_STATE]) is SlotState.WRITING for words in seen) == 100
    bench.transitions.creation()


def test_a_take_looks_at_a_bounded_number_of_slots_at_a_time_and_finds_what_there_is() -> None:
    """Of two readers one is far ahead of the other, and its place no longer counts: an attempt has ended unread."""
    slots = 5000
    for newest, wanted in ((False, slots - 1), (True, 0)):
        with row(newest=newest):
            bench = RingBench(slots=slots, readers=2)
            payloads = [bench.written(2) for _ in range(slots)]
            for index, payload in enumerate(payloads):
                if index != wanted:
                    bench.transitions.finalise(bench.reading(payload, LIVING, 1), CONSUMED)
            hold, asked = bench.hold(LIVING, reader=1), TakeWords(1, 2**64 - 1, newest)
            steps: list[int] = []
            while not steps or asked[TAKE_NEXT]:
                bench.take([hold], asked)
                steps.append(asked[TAKE_STEPS])
            assert sum(steps) == slots
            assert max(steps) <= 1024
            assert (asked[TAKE_NUMBER], hold[HOLD_SLOT]) == (1, payloads[wanted][HOLD_SLOT])
            bench.check()
            bench.transitions.creation()


def test_a_take_looks_at_nothing_again_that_its_reader_has_had() -> None:
    for newest in (False, True):
        with row(newest=newest):
            bench = RingBench(slots=40, readers=2)
            place = (0, 0, 0)
            for count in (30, 1, 0):
                payloads = [bench.written(2)[HOLD_SLOT] for _ in range(count)]
                holds = [bench.hold(LIVING, reader=1) for _ in range(40)]
                asked = TakeWords(40, 2**64 - 1, newest, *place)
                bench.take(holds, asked)
                found = [hold[HOLD_SLOT] for hold in holds[: asked[TAKE_NUMBER]]]
                assert found == (payloads[::-1] if newest else payloads)
                assert asked[TAKE_STEPS] == count
                for hold in holds[:count]:
                    bench.transitions.finalise(hold, CONSUMED)
                place = (asked[TAKE_SLOT], asked[TAKE_SEQUENCE], asked[TAKE_RETURNS])
            bench.check()
            bench.transitions.creation()


def test_a_walk_whose_place_is_gone_begins_again() -> None:
    slots = 2000
    bench = RingBench(slots=slots, readers=2)
    payloads = [bench.written(2) for _ in range(slots)]
    for payload in payloads[:-1]:
        bench.transitions.finalise(bench.reading(payload, LIVING, 1), CONSUMED)
    hold, asked = bench.hold(LIVING, reader=1), TakeWords(1, 2**64 - 1)
    bench.take([hold], asked)
    gone = asked[TAKE_NEXT] - 1
    assert bench.discard(payloads[gone])
    bench.take([hold], asked)
    assert 0 < asked[TAKE_NEXT] - 1 <= gone + 1
    while asked[TAKE_NEXT]:
        bench.take([hold], asked)
    assert (asked[TAKE_NUMBER], hold[HOLD_SLOT]) == (1, payloads[-1][HOLD_SLOT])
    bench.transitions.creation()
