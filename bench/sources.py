"""What does it cost a trainer that its payloads come from many workers? And does it run out of descriptors?

64 sources, read by one client in batches of one payload from each, beside batches of as many from one source. Then 500
small sources under `ulimit -n 256`, which cannot hold a connection to each of them: every one has to be read.

The sources are rings with a server of one port each, threads of a few processes: their workers are not the question.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

from bench.core.control import ControlledProcess
from bench.core.ends import Offer
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.ours import DEADLINE_S, RingSource
from bench.core.rounds import Plan
from ucxx_transport import ClientConfig, Payload, SlotRef, SyncUCXXClient

__all__ = ["CASE", "LIMITED", "MANY", "ONE", "SOURCES", "measure"]

SOURCES: Final = 64
WORKERS: Final = 4
SIZE_BYTES: Final = 64 << 10
BATCHES: Final = 4

MANY_SOURCES: Final = 500
QUICK_SOURCES: Final = 150
SMALL_BYTES: Final = 1024
DESCRIPTORS: Final = 256

ONE: Final = "1 source"
MANY: Final = "64 sources"
CASE: Final = f"ulimit -n {DESCRIPTORS}"
LIMITED: Final = "500 small sources"


class SourcesWorker:
    """Several sources of one process."""

    def __init__(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._sources: list[RingSource] = []
        self._open = ExitStack()

    def open(self, *, sources: int, **ring: Any) -> None:
        """So many of them: see `RingSource.open`."""
        for _ in range(sources):
            source = RingSource({"mode": "thread", "ports": 1})
            source.open(**ring)
            self._open.callback(source.close)
            self._sources.append(source)

    def fill(self) -> list[list[Offer]]:
        """A list a source."""
        return [source.fill() for source in self._sources]

    def close(self) -> None:
        """End them."""
        self._open.close()


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
    """Both."""
    return [*_rates(question, plan), _limited(question, plan)]


def _rates(question: str, plan: Plan) -> list[Row]:
    figures: dict[str, dict[str, list[float]]] = {subject: {"per_s": [], "sources_read": []} for subject in (ONE, MANY)}
    with Lineup() as lineup:
        one = lineup.source(ONE, SourcesWorker)
        one.call("open", sources=1, size_bytes=SIZE_BYTES, slots=SOURCES * BATCHES)
        workers = [lineup.source(f"{MANY}, {which + 1}", SourcesWorker) for which in range(WORKERS)]
        for worker in workers:
            worker.call("open", sources=SOURCES // WORKERS, size_bytes=SIZE_BYTES, slots=BATCHES)
        client = lineup.blocking()
        client.call("open", size_bytes=SIZE_BYTES, slots=SOURCES, hold=SOURCES, local="off")
        lanes = {ONE: [one], MANY: workers}
        for of in lanes.values():
            client.call("verify", offers=_interleaved(of)[0], batch=SOURCES)
        for number in range(plan.rounds):
            for subject, of in lanes.items():
                offers, sources = _interleaved(of)
                answer = client.call("time", offers=offers, batch=SOURCES)
                figures[subject]["per_s"].append(len(offers) / (answer["wall_ns"] / 1e9))
                figures[subject]["sources_read"].append(sources)
            plan.on_turn(f"{question}: round {number + 1} of {plan.rounds}")
        client.call("close")
    return [
        Row(question=question, case="64 KiB", subject=subject, figures=values) for subject, values in figures.items()
    ]


def _interleaved(workers: Sequence[ControlledProcess]) -> tuple[list[Offer], int]:
    """Payloads of all sources by turns, and how many sources there are."""
    filled = [offers for worker in workers for offers in worker.call("fill")]
    return [offer for turn in zip(*filled, strict=True) for offer in turn], len(filled)


def _limited(question: str, plan: Plan) -> Row:
    sources = QUICK_SOURCES if plan.quick else MANY_SOURCES
    figures: dict[str, list[float]] = {"sources": [], "read": [], "read_share": []}
    with Lineup() as lineup:
        workers = [lineup.source(f"{LIMITED}, {which + 1}", SourcesWorker) for which in range(WORKERS)]
        for worker in workers:
            worker.order("open", sources=sources // WORKERS, size_bytes=SMALL_BYTES, slots=1, on_full="overwrite")
        for worker in workers:
            worker.answer("open")
        client = lineup.source("limited client", LimitedClient)
        for _ in range(2):  # the second time a connection is there for some of them
            offers, number = _interleaved(workers)
            outcomes: dict[str, int] = client.call("read", references=[reference for _, reference in offers])
            came = outcomes.pop("read", 0)
            for name, value in {"sources": number, "read": came, "read_share": came / number, **outcomes}.items():
                figures.setdefault(name, []).append(value)
        plan.on_turn(f"{question}: {sources} sources")
    return Row(question=question, case=CASE, subject=LIMITED, figures=figures)
