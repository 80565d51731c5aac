"""Results for people: one table a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.table import Table

from bench.core.results import Result, Spread, paired_ratio
from bench.core.subjects import Subject
from ucxx_transport.units import format_bytes, format_duration

__all__ = ["DISTURBED_CORES", "disturbance", "size_table"]

NO_BYTES: Final = "–"
DISTURBED_CORES: Final = 0.15
"""More than this used by others in the median turn makes figures not worth quoting."""


def size_table(results: Sequence[Result], subjects: Mapping[str, Subject], *, baseline: str | None = None) -> Table:
    """The results of one size.

    Args:
        results: of one size, in the order of the rows.
        subjects: by name.
        baseline: name of the subject that the others are compared with, where it is among them.
    """
    beside = next((result for result in results if result.subject == baseline), None)
    table = Table(title=f"{format_bytes(results[0].size_bytes)} payloads", title_justify="left")
    table.add_column("")
    headings = ["GB/s", "min … max", "p50", "p99", "reader CPU s/GB", "source CPU s/GB"]
    for heading in [*headings, "GB/s × baseline"] if beside is not None else headings:
        table.add_column(heading, justify="right")
    for result in results:
        subject = subjects[result.subject]
        rate, cost = _rate_cells(result), _cost_cells(result)
        if beside is not None:
            cost.append(f"{paired_ratio(result, beside, 'gb_per_s').median:.1f}")
        if not subject.brings_bytes:
            rate, cost = [NO_BYTES] * len(rate), [NO_BYTES] * len(cost)
        table.add_row(subject.label, *rate, *_latency_cells(result), *cost)
    return table


def disturbance(results: Sequence[Result]) -> str | None:
    """A warning when other processes used the machine meanwhile, else None."""
    load = Spread.of([cores for result in results for cores in result.values("foreign_cores")])
    if load.median <= DISTURBED_CORES:
        return None
    return (
        f"other processes used {load.median:.2f} cores in the median turn (up to {load.max:.2f}): "
        "these figures are of a busy machine, and subjects that poll suffer most"
    )


def _rate_cells(result: Result) -> list[str]:
    rate = result.spread("gb_per_s")
    return [f"{rate.median:.3g}", f"{rate.min:.3g} … {rate.max:.3g}"]


def _latency_cells(result: Result) -> list[str]:
    return [format_duration(result.spread(figure).median / 1e6) for figure in ("p50_us", "p99_us")]


def _cost_cells(result: Result) -> list[str]:
    return [f"{result.spread(figure).median:.3g}" for figure in ("reader_cpu_s_per_gb", "source_cpu_s_per_gb")]
