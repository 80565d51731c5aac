"""What the transport has to reach, as figures of one run.

| target                            | figure                                                | bound              |
|-----------------------------------|-------------------------------------------------------|--------------------|
| UCX over TCP, 1 MiB               | GB/s × naive                                          | ≥ 8                |
| UCX over TCP, 16 MiB              | GB/s × naive                                          | ≥ 6                |
| UCX over TCP, 64 KiB              | p50 of naive ÷ its own                                | ≥ 8                |
| UCX, shared-memory lanes, 16 MiB  | GB/s × naive                                          | ≥ 12               |
| local copy, each size from 16 MiB | GB/s × memcpy                                         | ≥ 0.7              |
| local view, any size              | p50                                                   | ≤ 100 µs; sync 30  |
| idle server                       | percent of one core, 4 ports, 16 idle connections     | ≤ 2                |
| worker whose main thread spins    | added p50 of a 64 KiB read, server in its own process | ≤ 1 ms             |

Ratios are taken round by round between neighbours in time, with the async client; the median of them is the figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from bench.busy_worker import BusyWorker
from bench.core.results import Result, Spread, paired_ratio
from bench.idle_cpu import IdleCpu
from ucxx_transport.units import format_bytes

__all__ = ["NAIVE", "Target", "check_targets"]

NAIVE: Final = "naive"
KIB: Final = 1024
MIB: Final = 1024 * KIB
LARGE_BYTES: Final = 16 * MIB

RATES_OVER_NAIVE: Final = (
    ("ucx_tcp_async", "UCX over TCP", 1 * MIB, 8.0),
    ("ucx_tcp_async", "UCX over TCP", 16 * MIB, 6.0),
    ("ucx_shm_async", "UCX, shared-memory lanes", 16 * MIB, 12.0),
)
TCP_P50_SIZE_BYTES: Final = 64 * KIB
TCP_P50_RATIO: Final = 8.0
COPY_OVER_MEMCPY: Final = 0.7
VIEW_P50_US: Final = (("view_async", "async", 100.0), ("view_sync", "sync", 30.0))
IDLE_PERCENT: Final = 2.0
BUSY_ADDED_US: Final = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One figure beside its bound.

    Attributes:
        what: in words.
        unit: of the figures.
        bound: the least or greatest that will do.
        sense: which of the two.
        figure: over the rounds; None when this run did not measure it, which does not meet it.
    """

    what: str
    unit: str
    sense: Literal["≥", "≤"]
    bound: float
    figure: Spread | None

    @property
    def met(self) -> bool:
        """Whether the median keeps to the bound."""
        if self.figure is None:
            return False
        return self.figure.median >= self.bound if self.sense == "≥" else self.figure.median <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "met": self.met}


def check_targets(
    results: Sequence[Result], idle: IdleCpu | None = None, busy: Sequence[BusyWorker] = ()
) -> list[Target]:
    """Every target with this run's figure."""
    by_name = {(result.subject, result.size_bytes): result for result in results}
    sizes = sorted({result.size_bytes for result in results})
    return [
        *_over_naive(by_name),
        *_copy_over_memcpy(by_name, [size for size in sizes if size >= LARGE_BYTES]),
        *_view_p50(by_name, sizes),
        *_whole_machine(idle, busy),
    ]


Results = dict[tuple[str, int], Result]


def _over_naive(results: Results) -> Iterator[Target]:
    for subject, label, size, bound in RATES_OVER_NAIVE:
        yield Target(
            what=f"{label}, {format_bytes(size)}: GB/s over the naive protocol's",
            unit="×",
            sense="≥",
            bound=bound,
            figure=_ratio(results, subject, NAIVE, "gb_per_s", size),
        )
    yield Target(
        what=f"UCX over TCP, {format_bytes(TCP_P50_SIZE_BYTES)}: p50 of the naive protocol over its own",
        unit="×",
        sense="≥",
        bound=TCP_P50_RATIO,
        figure=_ratio(results, NAIVE, "ucx_tcp_async", "p50_us", TCP_P50_SIZE_BYTES),
    )


def _copy_over_memcpy(results: Results, sizes: Sequence[int]) -> Iterator[Target]:
    for size in sizes or [LARGE_BYTES]:
        for client in ("async", "sync"):
            yield Target(
                what=f"local copy ({client}), {format_bytes(size)}: GB/s over memcpy's",
                unit="×",
                sense="≥",
                bound=COPY_OVER_MEMCPY,
                figure=_ratio(results, f"copy_{client}", "memcpy", "gb_per_s", size),
            )


def _view_p50(results: Results, sizes: Sequence[int]) -> Iterator[Target]:
    for subject, client, bound_us in VIEW_P50_US:
        spreads = [results[subject, size].spread("p50_us") for size in sizes if (subject, size) in results]
        yield Target(
            what=f"local view ({client}), slowest size: p50",
            unit="µs",
            sense="≤",
            bound=bound_us,
            figure=max(spreads, key=lambda spread: spread.median, default=None),
        )


def _whole_machine(idle: IdleCpu | None, busy: Sequence[BusyWorker]) -> Iterator[Target]:
    yield Target(
        what="idle server, 4 ports and 16 idle connections: CPU",
        unit="% of one core",
        sense="≤",
        bound=IDLE_PERCENT,
        figure=None if idle is None else Spread.of([idle.server_percent]),
    )
    in_process = next((entry for entry in busy if entry.mode == "process"), None)
    yield Target(
        what="worker whose main thread spins in Python: added p50 of a 64 KiB read",
        unit="µs",
        sense="≤",
        bound=BUSY_ADDED_US,
        figure=None if in_process is None else in_process.added_p50_us,
    )


def _ratio(results: Results, above: str, below: str, figure: str, size_bytes: int) -> Spread | None:
    if (above, size_bytes) not in results or (below, size_bytes) not in results:
        return None
    return paired_ratio(results[above, size_bytes], results[below, size_bytes], figure)
