"""The reading process: opens one subject after the other, warms up by verifying, then times single reads.

| order  | what it does                                                                                         |
|--------|------------------------------------------------------------------------------------------------------|
| open   | make the subject's client; nothing is connected yet                                                  |
| verify | read the given references and compare every byte: also the warm-up (connections, buffers, pages)     |
| time   | read the given references, each one timed: from the call until its bytes were held and given back    |
| close  | close the client, so that nothing of one subject is there while another is measured                  |
"""

from __future__ import annotations

import array
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np

from bench.core.control import AsyncHandlers, Handlers, serve_orders, serve_orders_async
from bench.core.payloads import PayloadPattern

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = [
    "AsyncOpener",
    "AsyncReading",
    "Held",
    "Offer",
    "Opener",
    "ReaderSettings",
    "Reading",
    "run_async_reader",
    "run_reader",
]

Offer = tuple[int, Mapping[str, Any]]
"""Number of a payload, and the reference to it: plain values whose keys are the source's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderSettings:
    """How the next subject is read: see `Subject` for the first four.

    Attributes:
        local: the client's `local` setting.
        shm_lanes: its `shm_lanes` setting.
        touch: read every byte once, inside the timed part.
        size_bytes: length of every payload.
        slots: payloads that the source holds at once.
        in_flight: reads kept in flight by the async client.
        deadline_s: deadline of one read.
    """

    local: Literal["view", "copy", "off"] = "off"
    shm_lanes: bool = False
    touch: bool = False
    size_bytes: int
    slots: int
    in_flight: int = 1
    deadline_s: float = 60.0


class Held(Protocol):
    """The bytes of one read, until they are given back."""

    @property
    def buffer(self) -> memoryview:
        """The payload."""

    @property
    def transport(self) -> str:
        """The way it came."""

    def release(self) -> None:
        """Give it back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One subject's blocking client. What a reference resolves to is the subject's own affair, hence `Any`.

    Attributes:
        resolve: makes of plain values what `read` takes; not timed.
        read: reads one payload.
    """

    resolve: Callable[[Mapping[str, Any]], Any]
    read: Callable[[Any], Held]


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncReading:
    """One subject's client on an event loop: see `Reading`."""

    resolve: Callable[[Mapping[str, Any]], Any]
    read: Callable[[Any], Awaitable[Held]]


Opener = Callable[[ReaderSettings], AbstractContextManager[Reading]]
AsyncOpener = Callable[[ReaderSettings], AbstractAsyncContextManager[AsyncReading]]


def run_reader(connection: Connection, opener: Opener) -> None:
    """Be a reading process for blocking clients until the pipe closes."""
    with _Desk(opener) as desk:
        handlers: Handlers = {
            "open": desk.open,
            "verify": desk.verify,
            "time": desk.time_reads,
            "close": desk.close,
        }
        serve_orders(connection, handlers)


def run_async_reader(connection: Connection, opener: AsyncOpener) -> None:
    """Be a reading process for clients on one event loop until the pipe closes."""

    async def serve() -> None:
        async with _AsyncDesk(opener) as desk:
            handlers: AsyncHandlers = {
                "open": desk.open,
                "verify": desk.verify,
                "time": desk.time_reads,
                "close": desk.close,
            }
            await serve_orders_async(connection, handlers)

    asyncio.run(serve())


class _Desk(ExitStack):
    """Carries out the orders with blocking clients; its `close` ends a subject, and it can be filled again."""

    def __init__(self, opener: Opener) -> None:
        super().__init__()
        self._opener = opener

    def open(self, **settings: Any) -> None:
        """See the module's table."""
        self._settings = ReaderSettings(**settings)
        self._pattern = PayloadPattern(self._settings.size_bytes)
        self._reading = self.enter_context(self._opener(self._settings))

    def verify(self, offers: Sequence[Offer]) -> int:
        """See the module's table; the number of payloads compared."""
        for number, reference in offers:
            held = self._reading.read(self._reading.resolve(reference))
            self._pattern.check(number, held.buffer)
            held.release()
        return len(offers)

    def time_reads(self, offers: Sequence[Offer]) -> dict[str, Any]:
        """See the module's table; figures as `_Stopwatch.answer` has them."""
        read, touch, clock = self._reading.read, _toucher(self._settings), time.perf_counter_ns
        references = [self._reading.resolve(reference) for _, reference in offers]
        held: Held | None = None
        with _Stopwatch() as stopwatch:
            latencies_ns = stopwatch.latencies_ns
            for reference in references:
                began_ns = clock()
                held = read(reference)
                if touch is not None:
                    touch(held.buffer)
                held.release()
                latencies_ns.append(clock() - began_ns)
        return stopwatch.answer(held)


class _AsyncDesk(AsyncExitStack):
    """Carries out the orders with clients on this event loop."""

    def __init__(self, opener: AsyncOpener) -> None:
        super().__init__()
        self._opener = opener

    async def open(self, **settings: Any) -> None:
        """See the module's table."""
        self._settings = ReaderSettings(**settings)
        self._pattern = PayloadPattern(self._settings.size_bytes)
        self._reading = await self.enter_async_context(self._opener(self._settings))

    async def close(self) -> None:
        """See the module's table."""
        await self.aclose()

    async def verify(self, offers: Sequence[Offer]) -> int:
        """See the module's table; the number of payloads compared."""
        waiting = iter(offers)

        async def take() -> None:
            for number, reference in waiting:
                held = await self._reading.read(self._reading.resolve(reference))
                self._pattern.check(number, held.buffer)
                held.release()

        await asyncio.gather(*(take() for _ in range(self._settings.in_flight)))
        return len(offers)

    async def time_reads(self, offers: Sequence[Offer]) -> dict[str, Any]:
        """See the module's table; figures as `_Stopwatch.answer` has them."""
        waiting = iter([self._reading.resolve(reference) for _, reference in offers])
        with _Stopwatch() as stopwatch:
            if self._settings.in_flight == 1:  # no second task, so that no switch between tasks is measured
                last = await self._take_timed(waiting, stopwatch.latencies_ns)
            else:
                takers = (self._take_timed(waiting, stopwatch.latencies_ns) for _ in range(self._settings.in_flight))
                last = next(held for held in await asyncio.gather(*takers) if held is not None)
        return stopwatch.answer(last)

    async def _take_timed(self, waiting: Iterator[Any], latencies_ns: array.array[int]) -> Held | None:
        read, touch, clock = self._reading.read, _toucher(self._settings), time.perf_counter_ns
        held: Held | None = None
        for reference in waiting:
            began_ns = clock()
            held = await read(reference)
            if touch is not None:
                touch(held.buffer)
            held.release()
            latencies_ns.append(clock() - began_ns)
        return held


class _Stopwatch:
    """Wall and CPU time of one batch."""

    def __init__(self) -> None:
        self.latencies_ns = array.array("q")

    def __enter__(self) -> Self:
        self._cpu_ns = time.process_time_ns()
        self._wall_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self._wall_ns = time.perf_counter_ns() - self._wall_ns
        self._cpu_ns = time.process_time_ns() - self._cpu_ns

    def answer(self, held: Held | None) -> dict[str, Any]:
        assert held is not None, "a batch has at least one offer"
        return {
            "latencies_ns": self.latencies_ns.tobytes(),
            "wall_ns": self._wall_ns,
            "cpu_ns": self._cpu_ns,
            "transport": held.transport,
        }


def _toucher(settings: ReaderSettings) -> Callable[[memoryview], object] | None:
    """Something that reads every byte once at memory speed, where the subject wants it."""
    if not settings.touch:
        return None
    whole_words_bytes = settings.size_bytes // 8 * 8

    def touch(buffer: memoryview) -> object:
        words = np.frombuffer(buffer[:whole_words_bytes], dtype=np.uint64)
        return np.bitwise_xor.reduce(words)

    return touch
