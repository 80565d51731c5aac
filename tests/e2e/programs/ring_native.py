"""Other builds of `ring.c` than the package's: `python -m tests.e2e.programs.ring_native cut|random LIBRARY [STEPS]`.

`cut`: a build with RING_CUT. Every transition is cut off before each of its stores, by a process that ends there; the
next to take the lock must find every slot before or after the transition, and nothing lost. `random`: a build with
sanitizers; random transitions, many at a time. Each says in a line of JSON how much it did, or fails.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ucxx_transport.config import RingConfig
from ucxx_transport.errors import BusyError, StaleSlotError
from ucxx_transport.native import Library, load
from ucxx_transport.ring import SlotState
from ucxx_transport.ring.layout import (
    ENTRY_WORDS,
    FIRST_ENTRY,
    FREE_FIRST_WORD,
    HELD_FIRST_WORD,
    HOLD_GENERATION,
    HOLD_NBYTES,
    HOLD_SLOT,
    NEXT,
    PREVIOUS,
    SEQUENCE,
    STATE,
    STATE_COUNT_WORD,
    Counter,
)
from ucxx_transport.ring.opening import create_ring
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.states import TRANSITIONS, SlotEvent, state_of
from ucxx_transport.ring.transitions import HoldWords, Transitions, Words

CUT = 97
"""The exit status of a process that RING_CUT ends."""

LIVING = Owner(1, 1)
DYING = Owner(2, 2)


class Bench:
    """A ring of three slots, and what its headers say of it."""

    def __init__(self, library: Library, *, slots: int = 3, readers: int = 2) -> None:
        config = RingConfig(slots=slots, slot_bytes=64, readers=readers, prefault=False)
        self.segment, self.identity, _ = create_ring(config)
        self.geometry = self.identity.geometry
        self.transitions = Transitions(self.segment, self.geometry, lock_wait_s=5.0, library=library)
        self.leases = 0

    def hold(self, owner: Owner, slot: int = 0, generation: int = 0, reader: int = 0) -> Words:
        self.leases += 1
        return HoldWords(slot, generation, self.leases, owner.pid, owner.start, reader)

    def base(self, slot: int) -> int:
        """Word of a slot's header."""
        return self.geometry.first_slot_word + slot * self.geometry.slot_words

    def state(self, slot: int) -> SlotState:
        return state_of(self.segment.words[self.base(slot) + STATE])

    def states(self) -> list[SlotState]:
        return [self.state(slot) for slot in range(self.geometry.slots)]

    def listed(self, first: int) -> list[int]:
        """The slots of a list, from its first to its last; checked against the same backwards."""
        words, forwards, before = self.segment.words, [], 0
        at = words[first]
        while at:
            base = self.base(at - 1)
            assert words[base + PREVIOUS] == before, "a list reads backwards as it does forwards"
            forwards.append(at - 1)
            assert len(forwards) <= self.geometry.slots, "a list ends"
            before, at = at, words[base + NEXT]
        assert words[first + 1] == before, "a list's last word is its last slot"
        return forwards

    def check(self) -> None:
        """Lists and counts say what the state words say."""
        words, states = self.segment.words, self.states()
        held = [slot for slot, state in enumerate(states) if state in (SlotState.READY, SlotState.READING)]
        by_age = sorted(held, key=lambda slot: words[self.base(slot) + SEQUENCE])
        assert self.listed(HELD_FIRST_WORD) == by_age
        free = [slot for slot, state in enumerate(states) if state is SlotState.FREE]
        assert sorted(self.listed(FREE_FIRST_WORD)) == free
        counts = [words[STATE_COUNT_WORD + state] for state in SlotState]
        assert counts == [states.count(state) for state in SlotState]
        for slot, state in enumerate(states):
            first = self.base(slot) + FIRST_ENTRY
            leases = [words[first + ENTRY_WORDS * index] for index in range(self.geometry.entries)]
            if state in (SlotState.FREE, SlotState.WRITING):
                assert not any(leases), "a slot without a payload has no reader"
            elif state is SlotState.READY:
                assert all(lease & 1 for lease in leases if lease), "nothing is in flight on a READY slot"
            else:
                assert any(lease and not lease & 1 for lease in leases), "something is in flight on a READING slot"

    # ways into a state

    def written(self, required: int = 1) -> Words:
        words = self.reserved(LIVING)
        words[HOLD_NBYTES] = 8
        self.transitions.commit(words, required)
        return words

    def reserved(self, owner: Owner) -> Words:
        words = self.hold(owner)
        assert self.transitions.reserve(words, overwrites=True)
        return words

    def reading(self, payload: Words, owner: Owner, reader: int = 0) -> Words:
        words = self.hold(owner, payload[HOLD_SLOT], payload[HOLD_GENERATION], reader)
        self.transitions.acquire(words)
        return words

    def reclaim(self, owner: Owner) -> None:
        for seen in list(self.transitions.holds()):
            if seen.owner == owner:
                if seen.is_write:
                    assert self.transitions.abort(seen.words, Counter.RECLAIMED_WRITES)
                else:
                    assert self.transitions.finalise(seen.words, Counter.RECLAIMED_READS)

    def drain(self) -> None:
        """Every slot can be written, read and freed, whatever has happened."""
        for _ in range(2 * self.geometry.slots):
            payload = self.written()
            assert self.transitions.finalise(self.reading(payload, LIVING), Counter.CONSUMED)
        self.check()
        assert SlotState.WRITING not in self.states()
        assert SlotState.READING not in self.states()


Call = Callable[[], object]


def reserve(bench: Bench) -> Call:
    return lambda: bench.reserved(DYING)


def overwrite(bench: Bench) -> Call:
    for _ in range(bench.geometry.slots):
        bench.written()
    return lambda: bench.reserved(DYING)


def commit(bench: Bench) -> Call:
    words = bench.reserved(DYING)
    return lambda: bench.transitions.commit(words, 1)


def abort(bench: Bench) -> Call:
    words = bench.reserved(DYING)
    return lambda: bench.transitions.abort(words)


def acquire(bench: Bench) -> Call:
    payload = bench.written()
    return lambda: bench.reading(payload, DYING)


def join(bench: Bench) -> Call:
    payload = bench.written(2)
    bench.reading(payload, LIVING, 1)
    return lambda: bench.reading(payload, DYING, 2)


def leave(bench: Bench) -> Call:
    payload = bench.written(2)
    bench.reading(payload, LIVING, 1)
    words = bench.reading(payload, DYING, 2)
    return lambda: bench.transitions.finalise(words, Counter.CONSUMED)


def consume(bench: Bench) -> Call:
    words = bench.reading(bench.written(), DYING)
    return lambda: bench.transitions.finalise(words, Counter.CONSUMED)


def release(bench: Bench) -> Call:
    words = bench.reading(bench.written(), DYING)
    return lambda: bench.transitions.finalise(words, Counter.RELEASED)


def discard(bench: Bench) -> Call:
    payload = bench.written()
    return lambda: bench.transitions.discard(payload[HOLD_SLOT], payload[HOLD_GENERATION])


TRANSITIONS_CUT = {
    SlotEvent.RESERVE: reserve,
    SlotEvent.OVERWRITE: overwrite,
    SlotEvent.COMMIT: commit,
    SlotEvent.ABORT: abort,
    SlotEvent.ACQUIRE: acquire,
    SlotEvent.JOIN: join,
    SlotEvent.LEAVE: leave,
    SlotEvent.CONSUME: consume,
    SlotEvent.RELEASE: release,
    SlotEvent.DISCARD: discard,
}


def cut(library: Library) -> dict[str, int]:
    """Cut each transition off before every one of its stores; how many those were, by event."""
    done = {}
    for event, prepare in TRANSITIONS_CUT.items():
        stores = 0
        while cut_once(library, event, prepare, stores):
            stores += 1
        done[event.name] = stores
    return done


def cut_once(library: Library, event: SlotEvent, prepare: Callable[[Bench], Call], stores: int) -> bool:
    """Cut one off after so many stores; False when it was over by then."""
    bench = Bench(library)
    call = prepare(bench)
    before = bench.states()
    child = os.fork()
    if child == 0:
        library.brief.library.ring_cut_after(ctypes.c_long(stores))
        call()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, CUT), status
    bench.transitions.count(Counter.STALE)  # takes the lock, and so repairs
    bench.check()
    changed = [(old, new) for old, new in zip(before, bench.states(), strict=True) if old is not new]
    allowed = {(source, target) for (source, what), target in TRANSITIONS.items() if what is event}
    # a transition of a reader that was cut off may be completed, or undone, or end its slot's reading altogether
    assert len(changed) <= 1, (event.name, stores, changed)
    assert set(changed) <= allowed | {(SlotState.READING, SlotState.READY), (SlotState.READY, SlotState.READING)}, (
        changed
    )
    counters, _ = bench.transitions.snapshot()
    assert counters[Counter.LOCK_RECOVERIES] == (status == CUT)
    bench.reclaim(DYING)
    bench.reclaim(LIVING)
    bench.check()
    bench.drain()
    bench.segment.unlink()
    return status == CUT


def drive(library: Library, steps: int) -> dict[str, int]:
    """Random transitions of random holds, live and stale ones; the lists and counts are checked now and then."""
    bench, choose = Bench(library, slots=17, readers=3), random.Random(steps)
    payloads: list[Words] = []
    attempts: list[Words] = []
    for step in range(steps):
        match choose.randrange(6):
            case 0 | 1:
                payloads = [*payloads[-40:], bench.written(choose.randint(1, 3))] if may_write(bench) else payloads
            case 2 | 3 if payloads:
                with suppress(BusyError, StaleSlotError):
                    attempts.append(bench.reading(choose.choice(payloads), LIVING, choose.randrange(4)))
            case 4 if attempts:
                words = attempts.pop(choose.randrange(len(attempts)))
                assert bench.transitions.finalise(words, choose.choice([Counter.CONSUMED, Counter.RELEASED]))
                assert not bench.transitions.finalise(words, Counter.CONSUMED)
            case 5 if payloads:
                payload = choose.choice(payloads)
                bench.transitions.discard(payload[HOLD_SLOT], payload[HOLD_GENERATION])
        if step % 50 == 0:
            bench.check()
            ready = bench.transitions.ready()
            assert len(ready) == bench.states().count(SlotState.READY)
    bench.reclaim(LIVING)
    bench.drain()
    bench.segment.unlink()
    return {"steps": steps}


def may_write(bench: Bench) -> bool:
    return bool({SlotState.FREE, SlotState.READY} & set(bench.states()))


def main() -> None:
    """Do it and say how much it was."""
    what, path, *rest = sys.argv[1:]
    library = load(Path(path))
    sys.stdout.write(json.dumps(cut(library) if what == "cut" else drive(library, int(rest[0]))))


if __name__ == "__main__":
    main()
