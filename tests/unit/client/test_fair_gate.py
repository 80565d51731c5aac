"""The limit on reads in flight: never exceeded, fair across sources, no place lost."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

import pytest

from tests.support.virtual_time import settle
from ucxx_transport.client.remote import FairGate

pytestmark = pytest.mark.anyio


class Crowd:
    """Callers of one gate, and the order in which they got in."""

    def __init__(self, limit: int) -> None:
        self.gate = FairGate(limit)
        self.entered: list[str] = []
        self.inside = 0
        self.most_inside = 0
        self._leave: dict[str, asyncio.Event] = {}

    def come(self, source: Hashable, name: str) -> asyncio.Task[None]:
        self._leave[name] = asyncio.Event()
        return asyncio.get_running_loop().create_task(self._visit(source, name))

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await settle()

    async def _visit(self, source: Hashable, name: str) -> None:
        await self.gate.acquire(source)
        try:
            self.entered.append(name)
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            await self._leave[name].wait()
            self.inside -= 1
        finally:
            self.gate.release()


async def test_at_most_the_limit_is_inside() -> None:
    crowd = Crowd(limit=3)
    tasks = [crowd.come("a", f"a{number}") for number in range(10)]
    await settle()
    assert crowd.entered == ["a0", "a1", "a2"]
    for number in range(10):
        await crowd.leave(f"a{number}")
    await asyncio.gather(*tasks)
    assert crowd.most_inside == 3
    assert len(crowd.entered) == 10


async def test_a_source_with_many_waiting_reads_does_not_hold_up_the_others() -> None:
    crowd = Crowd(limit=1)
    tasks = [crowd.come("greedy", f"g{number}") for number in range(5)]
    await settle()
    tasks += [crowd.come("modest", "m0"), crowd.come("modest", "m1"), crowd.come("late", "l0")]
    await settle()
    for name in ["g0", "g1", "m0", "l0", "g2", "m1", "g3", "g4"]:
        await crowd.leave(name)
    await asyncio.gather(*tasks)
    assert crowd.entered == ["g0", "g1", "m0", "l0", "g2", "m1", "g3", "g4"]


async def test_one_source_is_served_in_the_order_it_asked() -> None:
    crowd = Crowd(limit=1)
    tasks = [crowd.come("a", f"a{number}") for number in range(4)]
    for number in range(4):
        await settle()
        await crowd.leave(f"a{number}")
    await asyncio.gather(*tasks)
    assert crowd.entered == ["a0", "a1", "a2", "a3"]


async def test_a_cancelled_waiter_takes_no_place_with_it() -> None:
    crowd = Crowd(limit=1)
    first = crowd.come("a", "first")
    await settle()
    given_up = [crowd.come("a", f"x{number}") for number in range(3)]
    last = crowd.come("a", "last")
    await settle()
    for task in given_up:
        task.cancel()
    await settle()
    await crowd.leave("first")
    assert crowd.entered == ["first", "last"]
    await crowd.leave("last")
    await asyncio.gather(first, last)
    again = crowd.come("b", "again")
    await settle()
    assert crowd.entered[-1] == "again"
    await crowd.leave("again")
    await again


async def test_a_waiter_cancelled_in_the_moment_of_its_turn_hands_the_place_on() -> None:
    crowd = Crowd(limit=1)
    await crowd.gate.acquire("a")
    unlucky = crowd.come("a", "unlucky")
    next_one = crowd.come("b", "next")
    await settle()
    crowd.gate.release()  # the turn is given …
    unlucky.cancel()  # … and given up before the task has run
    await settle()
    assert unlucky.cancelled()
    assert crowd.entered == ["next"]
    await crowd.leave("next")
    await next_one


async def test_a_waiter_that_runs_out_of_time_leaves_the_gate_whole() -> None:
    gate = FairGate(1)
    await gate.acquire("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await gate.acquire("b")
    gate.release()
    async with asyncio.timeout(5.0):
        await gate.acquire("c")
    gate.release()


async def test_when_everyone_gives_up_every_place_is_free_again() -> None:
    crowd = Crowd(limit=2)
    tasks = [crowd.come(f"source {number}", f"n{number}") for number in range(8)]
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    later = [crowd.come("later", f"later{number}") for number in range(3)]
    await settle()
    assert crowd.entered[-2:] == ["later0", "later1"]
    for task in later:
        task.cancel()
    await asyncio.gather(*later, return_exceptions=True)
