"""Other builds of `ring.c` than the package's: `python -m tests.e2e.programs.ring_native WHAT LIBRARY [NUMBER]`.

`cut`: a build with RING_CUT. Every transition is cut off before each of its stores, before it releases the lock, and
before each wake-up, by a process that ends there; the next to take the lock must find that it has happened or has not,
and the ring as usable as before; who sleeps then must see at a next look what there is for it. `repair`: the same,
and the repair is cut off too, before every NUMBER-th of its stores. `random`: a build with sanitizers; NUMBER random
transitions. `visits`: a build with RING_CUT; how many slots' words one write looks for, in rings of few and of many
slots. Each says in a line of JSON how much it did, or fails.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.support.ring_bench import DYING, LIVING, RingBench
from ucxx_transport.errors import BusyError, StaleSlotError
from ucxx_transport.native import Library, load
from ucxx_transport.ring import SlotState
from ucxx_transport.ring.layout import (
    CONSUMED,
    FREED_WORD,
    HOLD_ENVELOPE_BYTES,
    HOLD_HAS_CHECKSUM,
    HOLD_NBYTES,
    READIED_WORD,
    RELEASED,
)
from ucxx_transport.ring.transitions import Words

CUT = 97
"""The exit status of a process that RING_CUT ends."""

FEW, MANY = 8, 65_536
"""Slots."""

WRITES = 4

Call = Callable[[], object]


def reserve(bench: RingBench) -> Call:
    return lambda: bench.reserved(DYING)


def overwrite(bench: RingBench) -> Call:
    for _ in range(bench.identity.slots):
        bench.written()
    return lambda: bench.reserved(DYING)


def overwrite_what_one_of_three_has_read(bench: RingBench) -> Call:
    consume_as(bench, bench.written(3), 7)
    bench.written()
    bench.written()
    return lambda: bench.reserved(DYING)


def publish(bench: RingBench) -> Call:
    bench.publish(1)
    return lambda: bench.publish(2)


def commit_while_a_take_sleeps(bench: RingBench) -> Call:
    call = commit(bench)
    bench.fall_asleep()
    return call


def consume_while_a_write_sleeps(bench: RingBench) -> Call:
    for _ in range(bench.identity.slots - 1):
        bench.reserved()
    call = consume(bench)
    bench.fall_asleep()
    return call


def release_while_both_sleep(bench: RingBench) -> Call:
    call = release(bench)
    bench.fall_asleep()
    return call


def commit(bench: RingBench) -> Call:
    words = bench.reserved(DYING)
    return lambda: bench.transitions.commit(words, 2)


def abort(bench: RingBench) -> Call:
    words = bench.reserved(DYING)
    return lambda: bench.abort(words)


def commit_of_odd_size_with_too_large_an_envelope(bench: RingBench) -> Call:
    words = bench.reserved(DYING)
    words[HOLD_NBYTES], words[HOLD_ENVELOPE_BYTES], words[HOLD_HAS_CHECKSUM] = 61, 2**40, 1
    return lambda: bench.transitions.commit(words, 2)


def take(bench: RingBench) -> Call:
    bench.written()
    consume_as(bench, bench.written(3), 7)
    return lambda: bench.taking(DYING, 8)


def take_the_newest_of_those_that_another_reads(bench: RingBench) -> Call:
    bench.reading(bench.written(), LIVING, 1)
    bench.reading(bench.written(2), LIVING, 1)
    return lambda: bench.taking(DYING, 2, newest=True)


def release_between_two_that_are_read(bench: RingBench) -> Call:
    first, second, third = [bench.reading(bench.written(), DYING) for _ in range(3)]
    assert bench.transitions.finalise(first, RELEASED)
    assert bench.transitions.finalise(third, RELEASED)
    return ending(bench, second, RELEASED)


def discard(bench: RingBench) -> Call:
    payload = bench.written()
    return lambda: bench.discard(payload)


def discard_what_one_of_three_has_read(bench: RingBench) -> Call:
    payload = bench.written(3)
    consume_as(bench, payload, 7)
    return lambda: bench.discard(payload)


def acquire(bench: RingBench) -> Call:
    payload = bench.written()
    return lambda: bench.reading(payload, DYING)


def acquire_as_the_second_of_three(bench: RingBench) -> Call:
    payload = bench.written(3)
    consume_as(bench, payload, 7)
    return lambda: bench.reading(payload, DYING, 8)


def join(bench: RingBench) -> Call:
    payload = bench.written(2)
    bench.reading(payload, LIVING, 1)
    return lambda: bench.reading(payload, DYING, 2)


def consume(bench: RingBench) -> Call:
    return ending(bench, bench.reading(bench.written(), DYING), CONSUMED)


def consume_as_the_first_of_three(bench: RingBench) -> Call:
    return ending(bench, bench.reading(bench.written(3), DYING, 1), CONSUMED)


def release(bench: RingBench) -> Call:
    return ending(bench, bench.reading(bench.written(), DYING), RELEASED)


def consume_while_another_reads(bench: RingBench) -> Call:
    payload = bench.written(2)
    bench.reading(payload, LIVING, 1)
    return ending(bench, bench.reading(payload, DYING, 2), CONSUMED)


def release_while_another_reads(bench: RingBench) -> Call:
    payload = bench.written(2)
    bench.reading(payload, LIVING, 1)
    return ending(bench, bench.reading(payload, DYING, 2), RELEASED)


def release_after_another_consumed(bench: RingBench) -> Call:
    return ending(bench, left_by_another(bench), RELEASED)


def consume_after_another_consumed(bench: RingBench) -> Call:
    return ending(bench, left_by_another(bench), CONSUMED)


def left_by_another(bench: RingBench) -> Words:
    """An attempt in flight whose like, of the same reader, has consumed the payload."""
    payload = bench.written()
    first, second = bench.reading(payload, LIVING, 1), bench.reading(payload, DYING, 1)
    assert bench.transitions.finalise(first, CONSUMED)
    return second


def consume_as(bench: RingBench, payload: Words, reader: int) -> None:
    assert bench.transitions.finalise(bench.reading(payload, LIVING, reader), CONSUMED)


def ending(bench: RingBench, words: Words, reason: int) -> Call:
    return lambda: bench.transitions.finalise(words, reason)


STEPS = (
    *(reserve, overwrite, overwrite_what_one_of_three_has_read, commit, abort, discard),
    *(discard_what_one_of_three_has_read, acquire, acquire_as_the_second_of_three, join, consume),
    *(consume_as_the_first_of_three, release, consume_while_another_reads, release_while_another_reads),
    *(release_after_another_consumed, consume_after_another_consumed, release_between_two_that_are_read),
    *(commit_of_odd_size_with_too_large_an_envelope, take, take_the_newest_of_those_that_another_reads, publish),
    *(commit_while_a_take_sleeps, consume_while_a_write_sleeps, release_while_both_sleep),
)


def cut(library: Library) -> dict[str, int]:
    """Cut each step off at every one of its points; how many those were."""
    done = {}
    for step in STEPS:
        stores = 0
        while cut_once(library, step, stores):
            stores += 1
        done[step.__name__] = stores
    return done


def cut_repairs(library: Library, every: int) -> dict[str, int]:
    """Cut each step off, and then its repair before every `every`-th of its stores; how many repairs were cut off."""
    done = {}
    for step in STEPS:
        cuts = stores = 0
        while cut_once(library, step, stores):
            repair = stores % every
            while cut_once(library, step, stores, repair):
                repair += every
                cuts += 1
            stores += 1
        done[step.__name__] = cuts
    return done


def cut_once(library: Library, step: Callable[[RingBench], Call], stores: int, repair: int | None = None) -> bool:
    """Cut a step off after so many stores, and its repair likewise.

    Returns:
        Whether the last of the two was really cut off, and not over by then.
    """
    bench = RingBench(library)
    call = step(bench)
    before, freed, readied = meanings(bench), bench.words[FREED_WORD], bench.words[READIED_WORD]
    was_cut = dies_in(library, stores, call)
    if repair is not None and was_cut:
        was_cut = dies_in(library, repair, lambda: bench.transitions.count("stale"))
    bench.transitions.count("stale")  # takes the lock, and so repairs
    bench.check()
    after, whole = meanings(bench), step_done(library, step)
    assert len(before) == len(after) == len(whole)
    for place, found in enumerate(after):
        assert found in (before[place], whole[place]), (step.__name__, stores, repair, found)
    for state, word, seen in ((SlotState.FREE, FREED_WORD, freed), (SlotState.READY, READIED_WORD, readied)):
        became_so = any(new[0] is state and old[0] is not state for old, new in zip(before, after, strict=True))
        assert not became_so or bench.words[word] != seen, (step.__name__, stores, "a sleeper does not see it")
    bench.reclaim(DYING)
    bench.reclaim(LIVING)
    bench.check()
    bench.drain()
    bench.transitions.creation()
    return was_cut


def dies_in(library: Library, stores: int, call: Call) -> bool:
    """Call it in a process that ends after so many stores; whether it did."""
    child = os.fork()
    if child == 0:
        library.brief.ring_cut_after(ctypes.c_long(stores))
        call()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, CUT), status
    return status == CUT


def meanings(bench: RingBench) -> list[tuple[object, ...]]:
    """What every slot means, and what is published."""
    return [*map(bench.meaning, range(bench.identity.slots)), ("published", bench.address())]


def step_done(library: Library, step: Callable[[RingBench], Call]) -> list[tuple[object, ...]]:
    """What every slot means once the step has happened."""
    if step not in _done:
        bench = RingBench(library)
        step(bench)()
        _done[step] = meanings(bench)
        bench.transitions.creation()
    return _done[step]


_done: dict[Callable[[RingBench], Call], list[tuple[object, ...]]] = {}


def visits(library: Library) -> dict[str, int]:
    """How often a slot is looked for in `WRITES` writes into each ring, full or with free slots here and there."""
    visits_of = library.brief.ring_visits
    visits_of.restype = ctypes.c_uint64
    done = {}
    for slots in (FEW, MANY):
        bench, choose = RingBench(library, slots=slots), random.Random(slots)
        payloads = [bench.written() for _ in range(slots)]
        for freed in (0, WRITES):
            for payload in choose.sample(payloads[WRITES:], freed):  # the oldest have been overwritten before
                assert bench.discard(payload)
            began = visits_of()
            for _ in range(WRITES):
                bench.written()
            done[f"{slots} slots, {freed} free"] = visits_of() - began
        bench.transitions.creation()
    return done


def drive(library: Library, steps: int) -> dict[str, int]:
    """Random transitions of random holds, live and stale ones; the lists and counts are checked now and then."""
    bench, choose = RingBench(library, slots=17), random.Random(steps)
    payloads: list[Words] = []
    attempts: list[Words] = []
    for step in range(steps):
        match choose.randrange(7):
            case 0 | 1:
                payloads = [*payloads[-40:], bench.written(choose.randint(1, 3))] if may_write(bench) else payloads
            case 2 | 3 if payloads:
                with suppress(BusyError, StaleSlotError):
                    attempts.append(bench.reading(choose.choice(payloads), LIVING, choose.randrange(4)))
            case 4 if attempts:
                words = attempts.pop(choose.randrange(len(attempts)))
                assert bench.transitions.finalise(words, choose.choice([CONSUMED, RELEASED]))
                assert not bench.transitions.finalise(words, CONSUMED)
            case 5 if payloads:
                payload = choose.choice(payloads)
                bench.discard(payload)
            case 6:
                attempts += bench.taking(
                    LIVING, choose.randrange(4), choose.randint(1, 9), newest=choose.random() < 0.5
                )
        if step % 50 == 0:
            bench.check()
            ready = list(bench.transitions.holds(SlotState.READY))
            assert len(ready) == bench.states().count(SlotState.READY)
    bench.reclaim(LIVING)
    bench.drain()
    bench.transitions.creation()
    return {"steps": steps}


def may_write(bench: RingBench) -> bool:
    return bool({SlotState.FREE, SlotState.READY} & set(bench.states()))


def main() -> None:
    """Do it and say how much it was."""
    what, path, *rest = sys.argv[1:]
    library = load(Path(path))
    number = int(rest[0]) if rest else 1
    ways = {
        "cut": partial(cut, library),
        "repair": partial(cut_repairs, library, number),
        "visits": partial(visits, library),
        "random": partial(drive, library, number),
    }
    done = ways[what]()
    sys.stdout.write(json.dumps(done))


if __name__ == "__main__":
    main()
