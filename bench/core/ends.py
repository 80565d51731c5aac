"""The two ends of a measurement, each a process that takes orders: a source that holds payloads, a reader that reads.

| order  | the source                                  | the reader                                                   |
|--------|---------------------------------------------|--------------------------------------------------------------|
| open   | make room for payloads, and serve them      | make the client; nothing is connected yet                    |
| fill   | write so many payloads, into the next slots |                                                              |
| verify |                                             | read those, and compare every byte: also the warm-up         |
| time   |                                             | read those, each one timed; or in batches                    |
| close  | end what was opened                         | the same                                                     |

A read is timed from the call until its bytes are held, and an older payload is released in their place: the receiving
side rotates over as many payloads for every subject. Reads in place are released at once.
"""

from __future__ import annotations

import array
import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, runtime_checkable

from bench.core.control import serve_orders, serve_orders_async
from bench.core.host import call_ns
from bench.core.payloads import PayloadPattern

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["BatchReader", "Held", "Offer", "Reader", "run_async_reader", "run_reader", "run_source"]

IO_TIMEOUT_S: Final = 60.0

Offer = tuple[int, Any]
"""Number of a payload, and the reference to it: plain values that the subject's own reader understands."""


class Held(Protocol):
    """The bytes of one read, until they are given back."""

    @property
    def buffer(self) -> memoryview:
        """The payload."""

    def release(self) -> None:
        """Give it back."""


class Reader(Protocol):
    """A client in the reader's process; what a reference resolves to is its own affair, hence `Any`.

    `open(size_bytes, slots, **options)`, `read(reference) -> Held` and `close()` block, or all return awaitables.
    """

    @property
    def open(self) -> Callable[..., Awaitable[None] | None]: ...

    @property
    def read(self) -> Callable[[Any], Awaitable[Held] | Held]: ...

    @property
    def close(self) -> Callable[[], Awaitable[None] | None]: ...

    def resolve(self, reference: Any) -> Any:
        """What `read` takes; not timed."""


@runtime_checkable
class BatchReader(Protocol):
    """One that can also read many at once, and blocks."""

    def read_batch(self, references: Sequence[Any]) -> Sequence[Held]:
        """The payloads, in the order of the references."""


def run_source(connection: Connection, make: Callable[..., Any], *arguments: Any) -> None:
    """Be a source until the pipe closes; every public method of what `make` makes can be ordered."""
    source = make(*arguments)
    try:
        serve_orders(connection, lambda verb: getattr(source, verb), getattr(source, "before_order", None))
    finally:
        source.close()


def run_reader(connection: Connection, make: Callable[[], Reader]) -> None:
    """Be a reader with a blocking client until the pipe closes."""
    desk = _Desk(make(), blocks=True)

    def handler(verb: str) -> Callable[..., object]:
        def run(**arguments: Any) -> object:
            try:
                getattr(desk, verb)(**arguments).send(None)
            except StopIteration as ended:
                return ended.value
            raise AssertionError("a blocking client has nothing to be awaited")

        return run

    serve_orders(connection, handler)


def run_async_reader(connection: Connection, make: Callable[[], Reader]) -> None:
    """Be a reader with a client on an event loop until the pipe closes."""
    desk = _Desk(make(), blocks=False)
    asyncio.run(serve_orders_async(connection, lambda verb: getattr(desk, verb)))


class _Watch:
    """Times one order's reads, and keeps the last payloads held."""

    def __init__(self, hold: int) -> None:
        self.latencies_ns = array.array("q")
        self._held: list[Held | None] = [None] * hold
        self._turn = 0

    def __enter__(self) -> Self:
        self._cpu_ns = time.process_time_ns()
        self._wall_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_ns = time.perf_counter_ns() - self._wall_ns
        self._cpu_ns = time.process_time_ns() - self._cpu_ns
        self.release()

    def release(self) -> None:
        """Hold nothing any more."""
        for held in self._held:
            if held is not None:
                held.release()
        self._held = [None] * len(self._held)

    def hold(self, held: Held) -> None:
        """Hold this one, and release the oldest."""
        if not self._held:
            held.release()
            return
        place = self._turn = (self._turn + 1) % len(self._held)
        oldest = self._held[place]
        self._held[place] = held
        if oldest is not None:
            oldest.release()

    def answer(self) -> dict[str, Any]:
        return {
            "latencies_ns": self.latencies_ns.tobytes(),
            "wall_ns": self.wall_ns,
            "cpu_ns": self._cpu_ns,
            "call_ns": call_ns(),
        }


class _Desk:
    """Carries out the orders. Nothing of it suspends where the client blocks."""

    def __init__(self, reader: Reader, *, blocks: bool) -> None:
        self._reader = reader
        self._blocks = blocks

    async def open(self, *, size_bytes: int, slots: int, hold: int, **options: Any) -> None:
        self._pattern = PayloadPattern(size_bytes)
        self._hold = hold
        await _done(self._reader.open(size_bytes=size_bytes, slots=slots, **options))

    async def close(self) -> None:
        await _done(self._reader.close())

    async def verify(self, offers: Sequence[Offer], batch: int, *, compare: bool = True) -> int:
        """Holds as many as a timed order does, so that every receive buffer is there, and warm."""
        watch = _Watch(self._hold)
        for first in range(0, len(offers), batch or 1):
            group = offers[first : first + (batch or 1)]
            references = [self._reader.resolve(reference) for _, reference in group]
            came = self._read_batch(references) if batch else [await _done(self._reader.read(references[0]))]
            for (number, _), held in zip(group, came, strict=True):
                if compare:
                    self._pattern.check(number, held.buffer)
                watch.hold(held)
        watch.release()
        return len(offers)

    async def time(self, offers: Sequence[Offer], batch: int) -> dict[str, Any]:
        references = [self._reader.resolve(reference) for _, reference in offers]
        watch = _Watch(self._hold)
        with watch:
            if batch:
                self._time_batches(references, batch, watch)
            else:
                await self._time_reads(references, watch)
        return watch.answer()

    def _time_batches(self, references: Sequence[Any], batch: int, watch: _Watch) -> None:
        clock = time.perf_counter_ns
        for first in range(0, len(references), batch):
            group = references[first : first + batch]
            began_ns = clock()
            for held in self._read_batch(group):
                watch.hold(held)
            watch.latencies_ns.append((clock() - began_ns) // len(group))

    async def _time_reads(self, references: Sequence[Any], watch: _Watch) -> None:
        clock, read, add = time.perf_counter_ns, self._reader.read, watch.latencies_ns.append
        blocks = self._blocks
        for reference in references:
            began_ns = clock()
            came: Any = read(reference)
            held: Held = came if blocks else await came
            watch.hold(held)
            add(clock() - began_ns)

    def _read_batch(self, references: Sequence[Any]) -> Sequence[Held]:
        assert isinstance(self._reader, BatchReader), "only such a reader is lined up with a batch"
        return self._reader.read_batch(references)


async def _done(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result
