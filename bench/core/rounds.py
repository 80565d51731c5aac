"""The order of measuring: for each size, all subjects in turn, round after round (A B C A B C …).

What disturbs a shared machine lasts longer than a turn, so it meets all subjects of a round alike: figures of one round
may be divided by each other, and the median of those ratios is what a comparison reports.
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from bench.core.control import ControlledProcess
from bench.core.cpu_time import ForeignLoad
from bench.core.reader import Offer, ReaderSettings
from bench.core.results import BYTES_PER_GB, Result, Round, percentile_us
from bench.core.subjects import Subject

__all__ = ["DEFAULT_MAX_SLOTS", "Lane", "Plan", "ProcessSource", "Source", "measure_size", "open_sources", "take_turn"]

MIN_SLOTS: Final = 4
DEFAULT_MAX_SLOTS: Final = 512

TURN_LIMIT_S: Final = 3.0
"""A turn begins no batch after this: a view of 256 MiB takes 60 us, and refilling its slots for the next one 0.3 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of every subject at every size.
        turn_s: how long one turn is timed at least, in batches of as many reads as there are slots; less where
            refilling the slots takes too long for that (`TURN_LIMIT_S`).
        in_flight: reads kept in flight by async clients.
        pool_bytes: payload bytes that a source holds at once, within 4 to `max_slots` slots.
        max_slots: slots of a source, at most; also the reads of one batch.
    """

    rounds: int
    turn_s: float
    in_flight: int = 1
    pool_bytes: int = 128 * 1024 * 1024
    max_slots: int = DEFAULT_MAX_SLOTS

    def slots(self, size_bytes: int) -> int:
        """Slots of a source at one size."""
        return max(MIN_SLOTS, min(self.max_slots, self.pool_bytes // size_bytes))


class Source(Protocol):
    """Where payloads come from."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far."""

    def open(self, *, size_bytes: int, slots: int) -> None:
        """Make room for `slots` payloads, and serve them."""

    def fill(self) -> Sequence[Offer]:
        """Write a payload into every slot; never inside a timed part."""

    def watch_cpu(self) -> None:
        """Take note of the processes whose CPU time counts."""


class ProcessSource:
    """A source that is a process."""

    def __init__(self, process: ControlledProcess) -> None:
        self.process = process

    @property
    def cpu_s(self) -> float:
        """See `Source`."""
        return self.process.cpu_s

    def open(self, *, size_bytes: int, slots: int) -> None:
        """See `Source`."""
        self.process.call("open", size_bytes=size_bytes, slots=slots)

    def fill(self) -> Sequence[Offer]:
        """See `Source`."""
        offers: Sequence[Offer] = self.process.call("fill")
        return offers

    def watch_cpu(self) -> None:
        """See `Source`."""
        self.process.watch_cpu()


@dataclass(frozen=True, slots=True)
class Lane:
    """A subject, with where its payloads come from and who reads them."""

    subject: Subject
    source: Source
    reader: ControlledProcess


def measure_size(
    lanes: Sequence[Lane], size_bytes: int, plan: Plan, *, on_round: Callable[[Round], None] | None = None
) -> list[Result]:
    """Measure every lane at one size.

    Args:
        lanes: what to measure, in the order of a round.
        size_bytes: length of every payload.
        plan: how much.
        on_round: called with each turn as it ends.

    Returns:
        One result a lane, in their order.
    """
    open_sources(lanes, size_bytes, plan)
    rounds: list[list[Round]] = [[] for _ in lanes]
    for number in range(plan.rounds):
        for lane, taken in zip(lanes, rounds, strict=True):
            entry = take_turn(lane, size_bytes, plan, number)
            taken.append(entry)
            if on_round is not None:
                on_round(entry)
    return [
        Result(subject=lane.subject.name, size_bytes=size_bytes, rounds=tuple(taken))
        for lane, taken in zip(lanes, rounds, strict=True)
    ]


def open_sources(lanes: Sequence[Lane], size_bytes: int, plan: Plan) -> None:
    """Let every source of the lanes hold payloads of this size."""
    for source in {id(lane.source): lane.source for lane in lanes}.values():
        source.open(size_bytes=size_bytes, slots=plan.slots(size_bytes))
        source.watch_cpu()


def take_turn(
    lane: Lane, size_bytes: int, plan: Plan, number: int, *, clock: Callable[[], float] = time.monotonic
) -> Round:
    """One turn of one lane, whose source is open: connect and verify (which warms up), then time batches."""
    settings = _reader_settings(lane.subject, size_bytes, plan)
    lane.reader.call("open", **asdict(settings))
    verified = int(lane.reader.call("verify", offers=lane.source.fill()))
    foreign_load = ForeignLoad()
    tally = _Tally()
    last_batch_s = clock() + TURN_LIMIT_S
    while not tally.latencies_ns or (tally.wall_ns < plan.turn_s * 1e9 and clock() < last_batch_s):
        offers = lane.source.fill()
        cpu_s = lane.source.cpu_s
        answer = lane.reader.call("time", offers=offers)
        tally.add(answer, source_cpu_s=lane.source.cpu_s - cpu_s)
    foreign_cores = foreign_load.cores()
    lane.reader.call("close")
    return tally.as_round(number=number, size_bytes=size_bytes, verified=verified, foreign_cores=foreign_cores)


def _reader_settings(subject: Subject, size_bytes: int, plan: Plan) -> ReaderSettings:
    return ReaderSettings(
        local=subject.local,
        shm_lanes=subject.shm_lanes,
        touch=subject.touch,
        size_bytes=size_bytes,
        slots=plan.slots(size_bytes),
        in_flight=plan.in_flight if subject.client == "async" else 1,
    )


class _Tally:
    """Batches of one turn, added up."""

    def __init__(self) -> None:
        self.latencies_ns = array.array("q")
        self.wall_ns = 0
        self.reader_cpu_s = 0.0
        self.source_cpu_s = 0.0
        self.transport = ""

    def add(self, answer: dict[str, Any], *, source_cpu_s: float) -> None:
        self.latencies_ns.frombytes(answer["latencies_ns"])
        self.wall_ns += answer["wall_ns"]
        self.reader_cpu_s += answer["cpu_ns"] / 1e9
        self.source_cpu_s += source_cpu_s
        self.transport = answer["transport"]

    def as_round(self, *, number: int, size_bytes: int, verified: int, foreign_cores: float) -> Round:
        reads = len(self.latencies_ns)
        gigabytes = reads * size_bytes / BYTES_PER_GB
        return Round(
            number=number,
            reads=reads,
            verified=verified,
            gb_per_s=gigabytes / (self.wall_ns / 1e9),
            p50_us=percentile_us(self.latencies_ns, 0.50),
            p99_us=percentile_us(self.latencies_ns, 0.99),
            reader_cpu_s_per_gb=self.reader_cpu_s / gigabytes,
            source_cpu_s_per_gb=self.source_cpu_s / gigabytes,
            reader_cpu_us_per_read=self.reader_cpu_s / reads * 1e6,
            source_cpu_us_per_read=self.source_cpu_s / reads * 1e6,
            foreign_cores=foreign_cores,
            transport=self.transport,
        )
