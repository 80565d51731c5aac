"""The slot table on plain memory: every transition, every refusal, and that a cut at any store is repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import overload

import pytest

from tests.support.rows import row
from ucxx_transport.errors import BusyError, SlotError, StaleSlotError
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import CURSOR_WORD, IN_TRANSITION_WORD, Counter, Geometry
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.slot_headers import Hold, PayloadFacts
from ucxx_transport.ring.slot_table import SlotTable
from ucxx_transport.ring.states import SlotState, generation_of, state_of

ME = Owner(100, 5)
OTHER = Owner(200, 9)
SLOT = 1


class CutOffError(BaseException):
    """The process was killed, or its thread interrupted, instead of this store."""


class CuttableWords:
    """Plain memory that lets a given number of stores pass and then cuts the store off."""

    def __init__(self, content: Iterable[int]) -> None:
        self.content = list(content)
        self.stores = 0
        self.cut_after: int | None = None

    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[int]: ...
    def __getitem__(self, index: int | slice, /) -> int | list[int]:
        return self.content[index]

    def __setitem__(self, index: int, word: int, /) -> None:
        if self.stores == self.cut_after:
            raise CutOffError
        self.stores += 1
        self.content[index] = int(word)


@dataclass
class Memory:
    """A segment of three slots in plain memory."""

    words: CuttableWords
    table: SlotTable
    geometry: Geometry

    @classmethod
    def of(cls, content: Iterable[int] | None = None, *, readers: int = 3) -> Memory:
        geometry = Geometry(slots=3, slot_bytes=100, readers=readers, schema_bytes=0)
        words = CuttableWords(content or [0] * (geometry.header_bytes // 8))
        return cls(words, SlotTable(words, geometry), geometry)

    def copy(self) -> Memory:
        return Memory.of(self.words.content, readers=self.geometry.readers)

    @property
    def state(self) -> SlotState:
        return state_of(self.table.peek(SLOT))

    @property
    def generation(self) -> int:
        return generation_of(self.table.peek(SLOT))

    def write(self, lease_id: int, *, owner: Owner = ME, nbytes: int = 10, required: int = 1) -> int:
        generation = self.table.reserve(SLOT, lease_id, owner)
        self.table.commit(Hold(SLOT, generation, lease_id, owner, is_write=True), nbytes, 1000 + lease_id, required)
        return generation

    def read(self, lease_id: int, *, owner: Owner = ME, reader: int = 0) -> Hold:
        hold = Hold(SLOT, self.generation, lease_id, owner, is_write=False)
        self.table.acquire(hold, reader)
        return hold

    def drain(self) -> None:
        """End all that is going on in the slot, then take one payload through it."""
        for hold in self.table.holds(SLOT):
            if hold.is_write:
                assert self.table.abort(hold, Counter.RECLAIMED_WRITES)
            else:
                assert self.table.finalise(hold, Counter.RECLAIMED_READS)
        assert self.state in (SlotState.FREE, SlotState.READY)
        self.write(901)
        assert self.table.facts(SLOT) == PayloadFacts(10, 1901)
        assert self.table.finalise(self.read(902, owner=OTHER), Counter.CONSUMED)
        assert self.state is SlotState.FREE
        assert self.table.holds(SLOT) == []


def hold(memory: Memory, lease_id: int, owner: Owner = ME, *, is_write: bool = False) -> Hold:
    return Hold(SLOT, memory.generation, lease_id, owner, is_write=is_write)


def writing() -> Memory:
    memory = Memory.of()
    memory.write(1)
    memory.table.reserve(SLOT, 2, ME)
    return memory


def ready(required: int = 1) -> Memory:
    memory = Memory.of()
    memory.write(1, nbytes=40, required=required)
    return memory


def ready_after_one_read_of_three() -> Memory:
    memory = ready(required=3)
    assert memory.table.finalise(memory.read(2, reader=7), Counter.CONSUMED)
    return memory


def reading(required: int = 1) -> Memory:
    memory = ready(required=required)
    memory.read(3, reader=1)
    return memory


def read_twice_at_once(required: int = 1) -> Memory:
    memory = reading(required=required)
    memory.read(4, owner=OTHER, reader=2)
    return memory


def consumed_while_another_reads() -> Memory:
    memory = read_twice_at_once()
    assert memory.table.finalise(hold(memory, 3), Counter.CONSUMED)
    return memory


@dataclass(frozen=True)
class Step:
    """One transition, from a state that it can happen in."""

    start: Callable[[], Memory]
    act: Callable[[Memory], object]


STEPS = {
    "reserve a free slot": Step(Memory.of, lambda memory: memory.table.reserve(SLOT, 2, ME)),
    "overwrite": Step(ready, lambda memory: memory.table.reserve(SLOT, 2, ME)),
    "overwrite what one of three has read": Step(
        ready_after_one_read_of_three, lambda memory: memory.table.reserve(SLOT, 9, ME)
    ),
    "commit": Step(writing, lambda memory: memory.table.commit(hold(memory, 2, is_write=True), 77, 5, 2)),
    "commit without checksum": Step(
        writing, lambda memory: memory.table.commit(hold(memory, 2, is_write=True), 0, None, 1)
    ),
    "abort": Step(writing, lambda memory: memory.table.abort(hold(memory, 2, is_write=True), Counter.ABORTED)),
    "discard": Step(ready, lambda memory: memory.table.discard(SLOT, memory.generation)),
    "discard what one of three has read": Step(
        ready_after_one_read_of_three, lambda memory: memory.table.discard(SLOT, memory.generation)
    ),
    "acquire": Step(ready, lambda memory: memory.read(5)),
    "acquire as the second of three": Step(ready_after_one_read_of_three, lambda memory: memory.read(5, reader=8)),
    "join": Step(reading, lambda memory: memory.read(5, owner=OTHER)),
    "consume": Step(reading, lambda memory: memory.table.finalise(hold(memory, 3), Counter.CONSUMED)),
    "consume as the first of three": Step(
        lambda: reading(required=3), lambda memory: memory.table.finalise(hold(memory, 3), Counter.CONSUMED)
    ),
    "release": Step(reading, lambda memory: memory.table.finalise(hold(memory, 3), Counter.RELEASED)),
    "consume while another reads": Step(
        read_twice_at_once, lambda memory: memory.table.finalise(hold(memory, 3), Counter.CONSUMED)
    ),
    "release while another reads": Step(
        read_twice_at_once, lambda memory: memory.table.finalise(hold(memory, 4, OTHER), Counter.RELEASED)
    ),
    "release after another consumed": Step(
        consumed_while_another_reads, lambda memory: memory.table.finalise(hold(memory, 4, OTHER), Counter.RELEASED)
    ),
    "consume after another consumed": Step(
        consumed_while_another_reads, lambda memory: memory.table.finalise(hold(memory, 4, OTHER), Counter.CONSUMED)
    ),
}


def meaning(memory: Memory) -> tuple[object, ...]:
    """All of a slot that counts in its present state."""
    state = memory.state
    holds = sorted(memory.table.holds(SLOT))
    if state in (SlotState.FREE, SlotState.WRITING):
        return state, memory.generation, holds
    had = [entry[3] if entry[0] & 1 else None for entry in entries(memory) if entry[0] & 1]
    return state, memory.generation, holds, memory.table.facts(SLOT), had


def entries(memory: Memory) -> list[list[int]]:
    first = memory.geometry.first_slot_word + SLOT * memory.geometry.slot_words + layout.FIRST_ENTRY
    return [memory.words.content[first + 4 * index : first + 4 * index + 4] for index in range(memory.geometry.entries)]


def counters(memory: Memory) -> list[int]:
    return memory.words.content[layout.COUNTER_WORD : layout.COUNTER_WORD + len(Counter)]


def cut(memory: Memory, act: Callable[[Memory], object], after: int) -> bool:
    """Let `act` make `after` stores and cut it off at the next; False when it was done by then."""
    memory.words.stores = 0
    memory.words.cut_after = after
    try:
        act(memory)
    except CutOffError:
        return True
    finally:
        memory.words.cut_after = None
    return False


def test_a_transition_cut_off_at_any_store_has_happened_or_has_not() -> None:
    for name, step in STEPS.items():
        with row(step=name):
            start = step.start()
            done = start.copy()
            step.act(done)
            assert meaning(start) != meaning(done)
            cuts = 0
            while True:
                memory = start.copy()
                if not cut(memory, step.act, cuts):
                    break
                memory.table.repair()
                assert meaning(memory) in (meaning(start), meaning(done)), f"cut after {cuts} stores"
                assert memory.words.content[IN_TRANSITION_WORD] == 0
                if meaning(memory) == meaning(done):
                    # counted before it happens: one kill may count once too often, and never hides what happened
                    assert all(now >= then for now, then in zip(counters(memory), counters(done), strict=True))
                memory.drain()
                cuts += 1
            assert cuts >= 3


def test_a_repair_cut_off_at_any_store_is_completed_by_the_next() -> None:
    for name, step in STEPS.items():
        with row(step=name):
            start = step.start()
            cuts = 0
            while True:
                broken = start.copy()
                if not cut(broken, step.act, cuts):
                    break
                whole = broken.copy()
                whole.table.repair()
                repairs = 0
                while True:
                    memory = broken.copy()
                    if not cut(memory, lambda victim: victim.table.repair(), repairs):
                        break
                    memory.table.repair()
                    assert meaning(memory) == meaning(whole), f"cut after {cuts} stores, its repair after {repairs}"
                    memory.drain()
                    repairs += 1
                cuts += 1


def test_a_repair_leaves_the_other_slots_alone() -> None:
    memory = reading()
    memory.table.reserve(0, 50, OTHER)
    before = list(memory.words.content)
    memory.words.content[IN_TRANSITION_WORD] = 3
    memory.table.repair()
    changed = [index for index, word in enumerate(memory.words.content) if word != before[index]]
    assert changed == [layout.COUNTER_WORD + Counter.REPAIRED_SLOTS]


def test_a_damaged_mark_of_transition_is_cleared() -> None:
    memory = reading()
    memory.words.content[IN_TRANSITION_WORD] = 2**63
    memory.table.repair()
    assert memory.words.content[IN_TRANSITION_WORD] == 0
    assert memory.state is SlotState.READING


def test_a_generation_grows_by_one_at_every_write_and_never_otherwise() -> None:
    memory = Memory.of()
    for generation in range(1, 6):
        assert memory.table.reserve(SLOT, generation, ME) == generation
        memory.table.abort(hold(memory, generation, is_write=True), Counter.ABORTED)
        assert memory.generation == generation
    assert memory.write(9) == 6
    memory.table.finalise(memory.read(10), Counter.RELEASED)
    assert memory.generation == 6


def test_a_slot_in_use_cannot_be_reserved() -> None:
    rows: list[Callable[[], Memory]] = [writing, reading, read_twice_at_once, consumed_while_another_reads]
    for start in rows:
        with row(start=start):
            memory = start()
            before = list(memory.words.content)
            with pytest.raises(SlotError):
                memory.table.reserve(SLOT, 99, ME)
            assert memory.words.content == before


def test_a_finalise_by_anyone_but_the_attempt_changes_nothing() -> None:
    memory = read_twice_at_once()
    before = list(memory.words.content)
    mine = hold(memory, 3)
    for wrong in (
        mine._replace(lease_id=77),
        mine._replace(owner=OTHER),
        mine._replace(owner=Owner(ME.pid, ME.start + 1)),
        mine._replace(generation=mine.generation - 1),
        mine._replace(generation=mine.generation + 1),
    ):
        assert not memory.table.finalise(wrong, Counter.CONSUMED)
        assert not memory.table.finalise(wrong, Counter.RELEASED)
    assert memory.words.content == before


def test_an_abort_or_commit_by_anyone_but_the_writer_changes_nothing() -> None:
    memory = writing()
    mine = hold(memory, 2, is_write=True)
    state = memory.table.peek(SLOT)
    for wrong in (
        mine._replace(lease_id=77),
        mine._replace(owner=OTHER),
        mine._replace(owner=Owner(ME.pid, ME.start + 1)),
        mine._replace(generation=mine.generation - 1),
    ):
        assert not memory.table.abort(wrong, Counter.ABORTED)
        with pytest.raises(SlotError, match="nothing was committed"):
            memory.table.commit(wrong, 1, None, 1)
    assert memory.table.peek(SLOT) == state
    assert counters(memory)[Counter.LATE_FINALISE] == 4


def test_an_attempt_of_another_generation_is_stale() -> None:
    for start in (Memory.of, writing, ready, reading):
        memory = start()
        for generation in (0, memory.generation - 1, memory.generation + 1):
            with pytest.raises(StaleSlotError):
                memory.table.acquire(Hold(SLOT, generation, 50, ME, is_write=False), 0)


def test_a_payload_that_was_consumed_is_stale_while_another_attempt_is_in_flight() -> None:
    memory = consumed_while_another_reads()
    assert memory.state is SlotState.READING
    with pytest.raises(StaleSlotError, match="read already"):
        memory.read(60)


def test_a_named_reader_gets_a_payload_once_and_an_anonymous_one_as_often_as_it_is_due() -> None:
    memory = ready_after_one_read_of_three()
    with pytest.raises(StaleSlotError):
        memory.read(60, reader=7)
    for lease_id in (61, 62):
        assert memory.table.finalise(memory.read(lease_id), Counter.CONSUMED)
    assert memory.state is SlotState.FREE


def test_two_attempts_of_one_reader_count_as_one_read() -> None:
    memory = ready(required=2)
    first, second = memory.read(20, reader=5), memory.read(21, reader=5)
    assert memory.table.finalise(first, Counter.CONSUMED)
    assert memory.table.finalise(second, Counter.CONSUMED)
    assert [hold.is_write for hold in memory.table.holds(SLOT)] == []
    third = memory.read(22, reader=6)
    assert memory.table.finalise(third, Counter.CONSUMED)
    assert memory.state is SlotState.FREE


def test_a_slot_takes_no_more_attempts_than_it_has_room_for() -> None:
    memory = ready()
    for lease_id in range(memory.geometry.max_attempts):
        memory.read(100 + lease_id)
    with pytest.raises(BusyError):
        memory.read(500)
    assert counters(memory)[Counter.BUSY] == 1
    assert memory.table.finalise(hold(memory, 100), Counter.RELEASED)
    memory.read(501)


def test_room_for_attempts_remains_when_all_readers_but_one_have_had_the_payload() -> None:
    memory = Memory.of(readers=64)
    memory.write(1, required=64)
    for reader in range(1, 64):
        assert memory.table.finalise(memory.read(reader, reader=reader), Counter.CONSUMED)
    for lease_id in range(memory.geometry.max_attempts):
        memory.read(100 + lease_id, reader=64)
    with pytest.raises(BusyError):
        memory.read(500, reader=64)


def test_the_cursor_moves_behind_the_slot_that_was_reserved() -> None:
    memory = Memory.of()
    memory.table.reserve(SLOT, 1, ME)
    assert memory.words.content[CURSOR_WORD] == SLOT + 1
    memory.table.reserve(2, 2, ME)
    assert memory.words.content[CURSOR_WORD] == 0
