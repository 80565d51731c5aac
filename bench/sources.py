"""What does it cost a trainer that its payloads come from many workers? And does it run out of descriptors?

One client, whose batches have a payload of each of 64 sources, or 8 of each, beside batches of as many of one source.
The same of bare UCX and pyzmq: what it costs them that 64 ports and their threads share the machine. Then 500 small
sources under `ulimit -n 256`, which cannot hold a connection to each of them: every one has to be read.

The sources are threads of a few processes, a port each: their workers are not the question.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Final

import zmq

from bench.core.ends import Offer, Reader
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.ours import DEADLINE_S, BlockingReader, RingSource
from bench.core.rounds import Lane, Plan, measure_sizes
from bench.peers.bare_ucx import BareReader, BareSource
from bench.peers.zeromq import DealersReader, ZeromqSource
from ucxx_transport import ClientConfig, Payload, SlotRef, SyncUCXXClient

__all__ = ["BARE", "DESCRIPTORS_CASE", "LIMITED", "OURS", "SOURCES", "ZEROMQ", "case", "measure"]

SOURCES: Final = 64
WORKERS: Final = 4
SIZE_BYTES: Final = 64 << 10
BATCHES: Final = {SOURCES: 4, 8 * SOURCES: 2}
"""Payloads of a batch, and how many batches are read of one order."""

OURS: Final = "this package"
BARE: Final = "bare UCX"
ZEROMQ: Final = "pyzmq ROUTER and DEALER"
PORT: Final = {"mode": "thread", "ports": 1}
CONNECT_TIMEOUT_S: Final = 20.0
SUBJECTS: Final[dict[str, tuple[Callable[[], Reader], tuple[Any, ...]]]] = {
    OURS: (BlockingReader, (RingSource, PORT)),
    BARE: (BareReader, (BareSource,)),
    ZEROMQ: (DealersReader, (ZeromqSource, int(zmq.ROUTER))),
}
"""What reads, and what a source is made with."""

MANY_SOURCES: Final = 500
QUICK_SOURCES: Final = 152
SMALL_BYTES: Final = 1024
DESCRIPTORS: Final = 256
DESCRIPTORS_CASE: Final = f"ulimit -n {DESCRIPTORS}"
LIMITED: Final = "500 small sources"


def case(batch: int, sources: int) -> str:
    """Batches of so many payloads, of so many sources."""
    return f"batches of {batch}, {sources} source{'s' if sources > 1 else ''}"


class SourcesWorker:
    """Several sources of one process.

    Args:
        make: makes one.
        arguments: of `make`.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._make = partial(make, *arguments)
        self._sources: list[Any] = []
        self._open = ExitStack()

    def open(self, *, sources: int, **room: Any) -> None:
        """So many of them, each with that room for payloads: see a source's own `open`."""
        while len(self._sources) < sources:
            self._sources.append(self._make())
            self._open.callback(self._sources[-1].close)
        for source in self._sources:
            source.open(**room)

    def fill(self, *, count: int) -> list[list[Offer]]:
        """So many of each source, a list a source."""
        return [source.fill(count=count) for source in self._sources]

    def close(self) -> None:
        """End them."""
        self._open.close()


class SeveralSources:
    """The sources of some processes, in place of one source.

    Args:
        lineup: starts the processes.
        name: what failures call them.
        sources: how many.
        processes: of how many processes; as many sources in each.
        make: makes one source.
        arguments: of `make`.
    """

    def __init__(
        self, lineup: Lineup, name: str, sources: int, processes: int, make: Callable[..., Any], *arguments: Any
    ) -> None:
        self._each = sources // processes
        self._workers = [
            lineup.source(f"{name}, {sources}, {which + 1}", SourcesWorker, make, *arguments)
            for which in range(processes)
        ]

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all of them."""
        return tuple(pid for worker in self._workers for pid in worker.pids)

    @property
    def cpu_s(self) -> float:
        """Of all of them."""
        return sum(worker.cpu_s for worker in self._workers)

    def watch_cpu(self) -> None:
        """Of all of them."""
        for worker in self._workers:
            worker.watch_cpu()

    def call(self, verb: str, **arguments: Any) -> Any:
        """Open sources that have so many slots together, or fill so many: payloads of all sources by turns."""
        number = "slots" if verb == "open" else "count"
        arguments[number] //= self._each * len(self._workers)
        if verb == "open":
            arguments["sources"] = self._each
        for worker in self._workers:
            worker.order(verb, **arguments)
        answers = [worker.answer(verb) for worker in self._workers]
        if verb == "open":
            return None
        filled = [offers for answer in answers for offers in answer]
        return [offer for turn in zip(*filled, strict=True) for offer in turn]


class LimitedClient:
    """A client in a process that may have few descriptors."""

    def __init__(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        self._client = SyncUCXXClient(ClientConfig(local="off", deadline_s=DEADLINE_S))

    def read(self, references: Sequence[bytes]) -> dict[str, int]:
        """How many came, by outcome: "read", or the error's class."""
        outcomes: Counter[str] = Counter()
        try:
            came = self._client.read_many([SlotRef.from_bytes(reference) for reference in references])
        except Exception as error:  # noqa: BLE001 - what a client does that runs out is the question
            return {type(error).__name__: len(references)}
        for outcome in came:
            outcomes["read" if isinstance(outcome, Payload) else type(outcome).__name__] += 1
            if isinstance(outcome, Payload):
                outcome.release()
        return dict(outcomes)

    def close(self) -> None:
        """Close the client."""
        self._client.close()


def measure(question: str, plan: Plan) -> list[Row]:
    """The rates, and how many of 500 are read."""
    return [*_rates(question, plan), _limited(question, plan)]


def _rates(question: str, plan: Plan) -> list[Row]:
    each_bytes = SOURCES * SIZE_BYTES
    plan = replace(plan, pool_bytes=plan.pool_bytes // each_bytes * each_bytes)
    with Lineup() as lineup:
        lanes = []
        for subject, (make_reader, source) in SUBJECTS.items():
            reader = lineup.reader(subject, make_reader)
            # 64 connections at once may take a busy machine longer than the default, and they are not timed.
            options = {"local": "off", "connect_timeout_s": CONNECT_TIMEOUT_S} if subject == OURS else {}
            for sources, processes in ((1, 1), (SOURCES, WORKERS)):
                several = SeveralSources(lineup, subject, sources, processes, *source)
                lanes.append(Lane(subject=subject, source=several, reader=reader, options=options))
        rows = []
        for batch, batches in BATCHES.items():
            reads = batch * batches
            of_batch = [replace(lane, batch=batch) for lane in lanes]
            measured = measure_sizes(question, of_batch, [SIZE_BYTES], replace(plan, reads=reads, least_slots=reads))
            rows += [replace(row, case=case(batch, 1)) for row in measured[::2]]
            rows += [_of_many(one, many, batch) for one, many in zip(measured[::2], measured[1::2], strict=True)]
    return rows


def _of_many(one: Row, many: Row, batch: int) -> Row:
    """The row of many sources, with what they give as a share of what one gives."""
    of_one = [above / below for above, below in zip(many.figures["per_s"], one.figures["per_s"], strict=True)]
    return replace(many, case=case(batch, SOURCES), figures={**many.figures, "of_one": of_one})


def _limited(question: str, plan: Plan) -> Row:
    sources = QUICK_SOURCES if plan.quick else MANY_SOURCES
    figures: dict[str, list[float]] = {}
    with Lineup() as lineup:
        small = SeveralSources(lineup, LIMITED, sources, WORKERS, RingSource, PORT)
        small.call("open", size_bytes=SMALL_BYTES, slots=sources, on_full="overwrite")
        client = lineup.source("limited client", LimitedClient)
        for _ in range(2):  # the second time a connection is there for some of them
            offers = small.call("fill", count=sources)
            outcomes: dict[str, int] = client.call("read", references=[reference for _, reference in offers])
            came = outcomes.pop("read", 0)
            for figure, value in {"sources": sources, "read": came, "read_share": came / sources, **outcomes}.items():
                figures.setdefault(figure, []).append(value)
        plan.on_turn(f"{question}: {sources} sources")
    return Row(question=question, case=DESCRIPTORS_CASE, subject=LIMITED, figures=figures)
