"""The order of measuring: for each size, all subjects in turn, round after round (A B C A B C …).

What disturbs a shared machine lasts longer than a turn, so it meets all subjects of a round alike: figures of one round
may be divided by each other, and the median of those ratios is what a comparison reports.
"""

from __future__ import annotations

import array
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any, Final, Protocol

from bench.core.control import ControlledProcess
from bench.core.cpu_time import ForeignLoad
from bench.core.ends import Offer
from bench.core.figures import Row, percentile_us
from bench.core.host import pool_bytes
from bench.core.profile import ENDS, Sampler
from ucxx_transport.units import format_bytes

__all__ = ["Lane", "Plan", "Source", "Supply", "measure_sizes", "take_turn"]

TURN_LIMIT: Final = 3.0
"""A turn begins no batch after so many times `turn_s`: reads in place take no time, and refilling their slots does."""

QUICK_BYTES: Final = 1 << 20
"""Payloads of a first look are no larger."""

MOST_SLOTS: Final = 1 << 15
"""128 MiB of 4 KiB; a ring has no more than twice as many."""

MOST_HELD: Final = 1024
"""Payloads that a reader holds at most: each turn begins with as many reads, so that all their memory is warm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of every subject in every case.
        turn_s: how long one turn is timed at least, `reads` at a time; less where refilling their slots takes too long
            for that (`TURN_LIMIT`).
        quick: fewer cases, for a first look.
        reads: of one order, at most: their slots are filled again before the next, as the last to be read.
        pool_bytes: payload bytes that a source holds, but for `least_slots`: more than the caches do.
        least_slots: slots of a source, at least.
        profile: where the time of both ends goes is sampled, which makes everything slower.
        on_turn: called with words about what has just been measured.
    """

    rounds: int = 3
    turn_s: float = 0.2
    quick: bool = False
    reads: int = 64
    pool_bytes: int = field(default_factory=pool_bytes)
    least_slots: int = 4
    profile: bool = False
    on_turn: Callable[[str], None] = lambda _: None

    def slots(self, size_bytes: int) -> int:
        """Slots of a source at one size."""
        return max(self.least_slots, min(MOST_SLOTS, self.pool_bytes // size_bytes))

    def sizes(self, sizes: Sequence[int]) -> Sequence[int]:
        """These payload sizes; the small ones of them for a first look."""
        return [size for size in sizes if size <= QUICK_BYTES] if self.quick else sizes


class Source(Protocol):
    """Where payloads come from: a `ControlledProcess` that runs a source, or what stands in its place."""

    @property
    def cpu_s(self) -> float: ...

    @property
    def pids(self) -> tuple[int, ...]: ...

    def call(self, verb: str, **arguments: object) -> Any: ...

    def watch_cpu(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A subject, with where its payloads come from and who reads them.

    Attributes:
        subject: its name.
        source: where payloads come from; lanes may share one.
        reader: the process that reads.
        options: of the reader's `open`.
        batch: payloads of one call; 0: one by one.
        hold: whether the reader holds payloads, as many as the source has slots, or `MOST_HELD`; reads in place are
            released at once.
        polls: whether its processes poll while they have nothing to do: they are stopped while others are measured.
        most_bytes: the largest payload that it is measured with.
    """

    subject: str
    source: Source
    reader: ControlledProcess
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 0
    hold: bool = True
    polls: bool = False
    most_bytes: int = 1 << 40

    @contextmanager
    def running(self) -> Iterator[None]:
        """A turn."""
        if not self.polls:
            yield
            return
        assert isinstance(self.source, ControlledProcess)
        processes = (self.source, self.reader)
        for process in processes:
            process.resume()
        yield
        for process in processes:
            process.pause()


class Supply:
    """The payloads of a source, the oldest first: whatever is read has lain there while all others were written.

    Args:
        source: whose they are.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._ready: deque[Offer] = deque()
        self._free = 0

    def open(self, size_bytes: int, slots: int) -> None:
        """Make room for so many."""
        self.source.call("open", size_bytes=size_bytes, slots=slots)
        self.source.watch_cpu()
        self._ready.clear()
        self._free = slots

    def next(self, count: int) -> list[Offer]:
        """The oldest, which are read before this is called again; the slots of those before them are filled first."""
        if self._free:
            self._ready.extend(self.source.call("fill", count=self._free))
        self._free = count
        return [self._ready.popleft() for _ in range(count)]


def measure_sizes(
    question: str,
    lanes: Sequence[Lane],
    sizes: Sequence[int],
    plan: Plan,
    *,
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Measure every lane at every size.

    Args:
        question: its name, for the rows.
        lanes: what to measure, in the order of a round.
        sizes: lengths of payloads; each is a case.
        plan: how much.
        skipped: further subjects, and why they are not measured.
    """
    rows = []
    supplies = {id(lane.source): Supply(lane.source) for lane in lanes}
    for size_bytes in sizes:
        present = [lane for lane in lanes if size_bytes <= lane.most_bytes]
        for lane in {id(lane.source): lane for lane in present}.values():
            with lane.running():
                supplies[id(lane.source)].open(size_bytes, plan.slots(size_bytes))
        figures: list[dict[str, list[float]]] = [{} for _ in present]
        for number in range(plan.rounds):
            for lane, of_lane in zip(present, figures, strict=True):
                with lane.running():
                    values = take_turn(lane, supplies[id(lane.source)], size_bytes, plan, compare=not number)
                for figure, value in values.items():
                    of_lane.setdefault(figure, []).append(value)
            plan.on_turn(f"{question}: {format_bytes(size_bytes)}, round {number + 1} of {plan.rounds}")
        case = format_bytes(size_bytes)
        rows += [
            Row(question=question, case=case, subject=lane.subject, figures=of_lane)
            for lane, of_lane in zip(present, figures, strict=True)
        ]
        rows += [Row(question=question, case=case, subject=subject, skipped=why) for subject, why in skipped.items()]
    return rows


def take_turn(
    lane: Lane,
    supply: Supply,
    size_bytes: int,
    plan: Plan,
    *,
    compare: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """One turn of one lane, whose supply is open: connect, read what is held, or all, to warm up, then time reads."""
    slots = plan.slots(size_bytes)
    reads = min(plan.reads, slots)
    held = max(reads, min(slots, MOST_HELD - MOST_HELD % reads)) if lane.hold else 0
    options = dict(lane.options)
    lane.reader.call("open", size_bytes=size_bytes, slots=held or slots, hold=held, **options)
    lane.reader.call("verify", offers=supply.next(held or slots), batch=lane.batch, compare=compare)
    sampler = Sampler({"reader": lane.reader.pids, "source": lane.source.pids}) if plan.profile else None
    foreign_load = ForeignLoad()
    tally = _Tally()
    last_batch_s = clock() + TURN_LIMIT * plan.turn_s
    while not tally.reads or (tally.wall_ns < plan.turn_s * 1e9 and clock() < last_batch_s):
        offers: Sequence[Offer] = supply.next(reads)
        cpu_s = lane.source.cpu_s
        with sampler.on() if sampler else nullcontext():
            answer = lane.reader.call("time", offers=offers, batch=lane.batch)
        tally.add(answer, reads=len(offers), source_cpu_s=lane.source.cpu_s - cpu_s)
    foreign_cores = foreign_load.cores()
    lane.reader.call("close")
    figures = {**tally.figures(size_bytes), "foreign_cores": foreign_cores}
    if sampler:
        figures |= sampler.figures(tally.reads, {end: figures[f"{end}_cpu_us"] for end in ENDS})
    return figures


class _Tally:
    """Batches of one turn, added up."""

    def __init__(self) -> None:
        self.reads = 0
        self.wall_ns = 0
        self._latencies_ns = array.array("q")
        self._firsts_ns = array.array("q")
        self._reader_cpu_s = 0.0
        self._source_cpu_s = 0.0
        self._calls_ns: list[float] = []

    def add(self, answer: Mapping[str, Any], *, reads: int, source_cpu_s: float) -> None:
        came = len(self._latencies_ns)
        self._latencies_ns.frombytes(answer["latencies_ns"])
        self._firsts_ns.append(self._latencies_ns[came])
        self.reads += reads
        self.wall_ns += answer["wall_ns"]
        self._reader_cpu_s += answer["cpu_ns"] / 1e9
        self._source_cpu_s += source_cpu_s
        self._calls_ns.append(answer["call_ns"])

    def figures(self, size_bytes: int) -> dict[str, float]:
        wall_s, gigabytes = self.wall_ns / 1e9, self.reads * size_bytes / 1e9
        return {
            "p50_us": percentile_us(self._latencies_ns, 0.50),
            "p99_us": percentile_us(self._latencies_ns, 0.99),
            "first_us": percentile_us(self._firsts_ns, 0.50),
            "per_s": self.reads / wall_s,
            "gb_per_s": gigabytes / wall_s,
            "reader_cpu_us": self._reader_cpu_s / self.reads * 1e6,
            "source_cpu_us": self._source_cpu_s / self.reads * 1e6,
            "cpu_s_per_gb": (self._reader_cpu_s + self._source_cpu_s) / gigabytes,
            "call_ns": median(self._calls_ns),  # as the reads beside it: the machine's speed changes within a turn
        }
