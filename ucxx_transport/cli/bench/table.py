"""Results for people: one table a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ucxx_transport.cli.bench.results import Result, Spread, paired_ratio
from ucxx_transport.units import format_bytes, format_duration

__all__ = ["DISTURBED_CORES", "disturbance", "size_table"]

DISTURBED_CORES = 0.15
"""More than this used by others in the median turn makes figures not worth quoting."""


def size_table(results: Sequence[Result], labels: Mapping[str, str], *, baseline: str | None = None) -> Table:
    """The results of one size.

    Args:
        results: of one size, in the order of the rows.
        labels: subject names to what people read.
        baseline: name of the subject that the others are compared with, where it is among them.
    """
    beside = next((result for result in results if result.subject == baseline), None)
    table = Table(title=f"{format_bytes(results[0].size_bytes)} payloads", title_justify="left")
    table.add_column("")
    headings = ["GB/s", "min … max", "p50", "p99", "reader CPU s/GB", "source CPU s/GB"]
    for heading in [*headings, "GB/s × baseline"] if beside is not None else headings:
        table.add_column(heading, justify="right")
    for result in results:
        cells = _cells(result)
        if beside is not None:
            cells.append(f"{paired_ratio(result, beside, 'gb_per_s').median:.1f}")
        table.add_row(labels[result.subject], *cells)
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


def _cells(result: Result) -> list[str]:
    rate = result.spread("gb_per_s")
    return [
        f"{rate.median:.3g}",
        f"{rate.min:.3g} … {rate.max:.3g}",
        format_duration(result.spread("p50_us").median / 1e6),
        format_duration(result.spread("p99_us").median / 1e6),
        f"{result.spread('reader_cpu_s_per_gb').median:.3g}",
        f"{result.spread('source_cpu_s_per_gb').median:.3g}",
    ]
