"""What the transport has to reach, as figures of one run. Ratios are taken round by round; the median is compared.

Microseconds of Python are scaled to a machine whose empty call takes 70 ns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from bench import batch, gpu, idle, lanes, local, ports, read, ring, sources, spinning, take
from bench.core.figures import Figures, Row, Spread
from bench.trainer import UCX_AHEAD, VIEW_AHEAD

__all__ = ["TARGETS", "Target", "Verdict", "judge"]

MANY: Final = 1 << 20
EVERY: Final = range(1, MANY)

BATCH_RATIO: Final = "reads/s of read_many over pyzmq's one by one"
PORTS_RATIO: Final = "reads/s of 4 clients and 4 ports over those of one of each"
SCALED: Final = "a view's p50 in µs at 70 ns a call"
ONCE: Final = "share of a ring's payloads that came to one of two takers, once"
WAITS: Final = "share of a computing trainer's time that it waits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound of one figure.

    Attributes:
        question: whose rows it needs.
        what: in words.
        rows: subject and case of each row; the second is what the first is divided by.
        figure: of each.
        sense: whether the bound is the least or the greatest that will do.
        bound: that number.
        scaled: microseconds, to be scaled to a call of 70 ns.
        cores: machines on which it holds.
        beside: peers whose figure in the same case is shown beside it.
    """

    question: str
    what: str
    rows: tuple[tuple[str, str], ...]
    figure: str
    sense: Literal["≥", "≤"]
    bound: float
    scaled: bool = False
    cores: range = EVERY
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A target with this run's figure.

    Attributes:
        target: which.
        figure: over the rounds; None where it was not measured.
        reason: why not.
        beside: the same figure of the target's peers, as far as they were measured.
    """

    target: Target
    figure: Spread | None
    reason: str = ""
    beside: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def word(self) -> Literal["met", "missed", "not measured here"]:
        """Whether the median keeps to the bound."""
        if self.figure is None:
            return "not measured here"
        value, bound = self.figure.median, self.target.bound
        met = value >= bound if self.target.sense == "≥" else value <= bound
        return "met" if met else "missed"

    @property
    def measured_over_bound(self) -> float | None:
        """The figure as a share of its bound."""
        return None if self.figure is None else self.figure.median / self.target.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        target = {key: value for key, value in asdict(self.target).items() if key != "cores"}
        figure = None if self.figure is None else asdict(self.figure)
        return {
            **target,
            "measured": figure,
            "measured_over_bound": self.measured_over_bound,
            "verdict": self.word,
            "reason": self.reason,
            "beside": {subject: asdict(figure) for subject, figure in self.beside.items()},
        }


def judge(
    rows: Iterable[Row],
    questions: Iterable[str],
    *,
    reasons: Mapping[str, str] = MappingProxyType({}),
    cores: int | None = None,
) -> list[Verdict]:
    """Every target of these questions, with this run's figure.

    Args:
        rows: what came out.
        questions: those that were asked.
        reasons: why some of them have no rows.
        cores: of the machine; by default those that this process may use.
    """
    figures, asked = Figures(rows, reasons), set(questions)
    cores = cores or len(os.sched_getaffinity(0))
    return [_verdict(target, figures, cores) for target in TARGETS if target.question in asked]


def _verdict(target: Target, figures: Figures, cores: int) -> Verdict:
    if cores not in target.cores:
        return Verdict(target=target, figure=None, reason=f"asked of other machines than one of {cores} cores")
    rows = [figures.find(target.question, subject, case) for subject, case in target.rows]
    for row in rows:
        if target.figure not in row.figures:
            return Verdict(target=target, figure=None, reason=f"{row.subject}: {row.skipped or 'without that figure'}")
    if target.scaled:
        return Verdict(target=target, figure=figures.scaled(rows[0], target.figure))
    if len(rows) == 1:
        peers = [figures.find(target.question, subject, rows[0].case) for subject in target.beside]
        beside = {peer.subject: peer.spread(target.figure) for peer in peers if target.figure in peer.figures}
        return Verdict(target=target, figure=rows[0].spread(target.figure), beside=beside)
    return Verdict(target=target, figure=figures.ratio(rows[0], rows[1], target.figure))


def _each(
    question: str,
    what: str,
    rows: Sequence[str],
    figure: str,
    *,
    at_least: Mapping[str, float] = MappingProxyType({}),
    at_most: Mapping[str, float] = MappingProxyType({}),
    scaled: bool = False,
    cores: range = EVERY,
    beside: Sequence[str] = (),
) -> list[Target]:
    """One target a case: the figure of one subject, or that of the first over the second's."""
    return [
        Target(
            question=question,
            what=f"{case}: {what}" if case else what,
            rows=tuple((subject, case) for subject in rows),
            figure=figure,
            sense="≥" if at_least else "≤",
            bound=bound,
            scaled=scaled,
            cores=cores,
            beside=tuple(beside),
        )
        for case, bound in (at_least or at_most).items()
    ]


def _of(cases: Iterable[str], bound: float) -> dict[str, float]:
    """The same bound in each of these cases."""
    return dict.fromkeys(cases, bound)


def _calls(bounds: Mapping[str, float]) -> list[Target]:
    return [
        target
        for call, bound in bounds.items()
        for target in _each("ring", f"{call}: µs at 70 ns a call", [call], "us", at_most={"": bound}, scaled=True)
    ]


K4, K64, M1, M16, M64, M256 = "4 KiB", "64 KiB", "1 MiB", "16 MiB", "64 MiB", "256 MiB"
EACH: Final = (K4, K64, M1, M16, M64)
SMALL: Final = (K4, K64)
LARGE: Final = (M1, M16, M64)
EPISODES: Final = (K64, M1, M16)
ONE_OF_EACH: Final = sources.case(sources.SOURCES, sources.SOURCES)

TARGETS: Final = (
    *_each(
        *("read", "pyzmq's p50 over the blocking client's", [read.ZEROMQ, read.BLOCKING], "p50_us"),
        at_least={K4: 1.0, K64: 0.8, M1: 0.8, M16: 0.95, M64: 0.95},
    ),
    *_each(
        *("read", "the blocking client's p50 over the bare ping's", [read.BLOCKING, read.BARE], "p50_us"),
        at_most={K4: 2.5, K64: 1.7, **_of(LARGE, 1.3)},
    ),
    *_each(
        *("read", "the blocking client's GB/s over a TCP socket's", [read.BLOCKING, read.SOCKET], "gb_per_s"),
        at_least={M16: 0.95, M64: 0.95},
    ),
    *_each(
        *("read", "the asyncio client's p50 over the blocking one's", [read.ASYNCIO, read.BLOCKING], "p50_us"),
        at_most={**_of(SMALL, 1.5), **_of(LARGE, 1.1)},
    ),
    *_each("batch", BATCH_RATIO, [batch.READ_MANY, batch.ZEROMQ], "per_s", at_least={K4: 2.0, M1: 0.9}),
    *_each("batch", BATCH_RATIO, [batch.READ_MANY, batch.ZEROMQ], "per_s", at_least={K64: 1.0}, cores=range(1, 8)),
    *_each("batch", BATCH_RATIO, [batch.READ_MANY, batch.ZEROMQ], "per_s", at_least={K64: 2.0}, cores=range(8, MANY)),
    *_each("take", ONCE, [take.TAKERS], "once_share", at_least=_of(SMALL, 1.0)),
    *_each(
        *("lanes", "our p50 over TCP over that of shared-memory lanes", [lanes.TCP, lanes.LANES], "p50_us"),
        at_least={K64: 1.5, M1: 1.5},
    ),
    *_each(
        *("lanes", "NIXL's p50 over TCP over that of our shared-memory lanes", [lanes.NIXL_TCP, lanes.LANES]),
        "p50_us",
        at_least=_of((K4, K64, M1, M16), 1.0),
    ),
    *_each("local", f"blocking, {SCALED}", [local.VIEW_BLOCKING], "p50_us", at_most=_of(EACH, 15.0), scaled=True),
    *_each("local", f"asyncio, {SCALED}", [local.VIEW_ASYNCIO], "p50_us", at_most=_of(EACH, 25.0), scaled=True),
    *_calls({"write_raw of 4 KiB": 10.0, "write of 4 KiB, one field": 10.0, "acquire and mark_consumed": 6.0}),
    *_calls({"SlotRef.to_bytes": 3.0, "SlotRef.from_bytes": 5.0}),
    *_calls({"EpisodeRecord.to_dict": 3.0, "EpisodeRecord.from_dict": 5.0}),
    *_each("ring", f"{ring.FULL}, over that into 8", [ring.FULL, ring.FEW], "us", at_most={"": 1.5}),
    *_each("ring", f"{ring.SCATTERED}, over that into 8", [ring.SCATTERED, ring.FEW], "us", at_most={"": 1.5}),
    *_each("ports", PORTS_RATIO, [ports.FOUR, ports.ONE], "per_s", at_least={K64: 3.0}, cores=range(10, MANY)),
    *_each("ports", PORTS_RATIO, [ports.FOUR, ports.ONE], "per_s", at_least={K64: 1.0}, cores=range(1, 10)),
    *_each(
        *("sources", "reads/s over those from one source", [sources.OURS], "of_one"),
        at_least={ONE_OF_EACH: 0.8},
        beside=[sources.BARE, sources.ZEROMQ],
    ),
    *_each(
        *("sources", "share of all sources that are read", [sources.LIMITED], "read_share"),
        at_least={sources.DESCRIPTORS_CASE: 1.0},
    ),
    *_each(
        *("idle", "% of a core, all processes together", [idle.ALL], "percent"),
        at_most={idle.CASE: 1.0},
        beside=[idle.SLEEPERS],
    ),
    *_each("spinning", "added by a worker that spins, µs", [spinning.SUBJECT], "added_us", at_most={K64: 500.0}),
    *_each(
        *("gpu", "slot → device: GB/s over a page-locked copy's", [gpu.SLOT_TO_DEVICE, gpu.PINNED_UP], "gb_per_s"),
        at_least={M16: 0.8, M256: 0.9},
    ),
    *_each(
        *("gpu", "device → slot: GB/s over a page-locked copy's", [gpu.DEVICE_TO_SLOT, gpu.PINNED_DOWN]),
        "gb_per_s",
        at_least={M16: 0.8, M256: 0.9},
    ),
    *_each("trainer", f"{VIEW_AHEAD}: {WAITS}", [VIEW_AHEAD], "waiting_share", at_most=_of(EPISODES, 0.05)),
    *_each("trainer", f"{UCX_AHEAD}: {WAITS}", [UCX_AHEAD], "waiting_share", at_most=_of(EPISODES, 0.05)),
)
"""All of them, in the order of the questions."""
