"""Two pictures over the payload size: GB/s and p50, with the spread of the rounds as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ucxx_transport.cli.bench.results import Result
from ucxx_transport.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_results"]

INCHES: Final = (13.0, 6.5)
DOTS_PER_INCH: Final = 120
PANELS: Final = (("gb_per_s", "GB/s, one process reading from another"), ("p50_us", "p50 of one read, µs"))
DASHED: Final = frozenset({"memcpy", "socket"})


def plot_results(results: Sequence[Result], labels: Mapping[str, str], path: Path) -> None:
    """Draw all subjects into a PNG.

    Args:
        results: of any number of subjects and sizes.
        labels: subject names to what the legend says; their order is the legend's.
        path: where the picture goes.
    """
    mpl.use("Agg")
    figure = Figure(figsize=INCHES, layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        _panel(axes, results, labels, quantity)
        axes.set_title(title)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _panel(axes: Axes, results: Sequence[Result], labels: Mapping[str, str], quantity: str) -> None:
    for position, (subject, label) in enumerate(labels.items()):
        rows = sorted((result for result in results if result.subject == subject), key=lambda row: row.size_bytes)
        if not rows:
            continue
        sizes = [row.size_bytes for row in rows]
        spreads = [row.spread(quantity) for row in rows]
        style = "--" if subject in DASHED else "-"
        color = f"C{position % 10}" if position < 10 else "black"
        axes.plot(sizes, [s.median for s in spreads], style, marker="o", markersize=3, color=color, label=label)
        axes.fill_between(sizes, [s.min for s in spreads], [s.max for s in spreads], color=color, alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({result.size_bytes for result in results}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.set_xlabel("payload")
