"""Two pictures over the payload size: GB/s and p50, with the spread of the rounds as a band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.core.results import Result
from bench.core.subjects import Subject
from ucxx_transport.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_results"]

INCHES: Final = (13.0, 6.5)
DOTS_PER_INCH: Final = 120
PANELS: Final = (
    ("gb_per_s", "GB/s (untouched views left out)"),
    ("p50_us", "p50 of one read, µs"),
)
COLORS: Final = {
    "view": "tab:blue",
    "view_read": "tab:cyan",
    "copy": "tab:orange",
    "ucx_shm": "tab:green",
    "ucx_tcp": "tab:red",
    "memcpy": "gray",
    "socket": "gray",
    "naive": "black",
}
LINES: Final = {"async": "-", "sync": ":", "memcpy": "--", "socket": "-."}


def plot_results(results: Sequence[Result], subjects: Sequence[Subject], path: Path) -> None:
    """Draw all subjects into a PNG.

    Args:
        results: of any number of subjects and sizes.
        subjects: what they are, in the legend's order.
        path: where the picture goes.
    """
    mpl.use("Agg")
    figure = Figure(figsize=INCHES, layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        shown = [subject for subject in subjects if subject.brings_bytes or quantity != "gb_per_s"]
        _panel(axes, results, shown, quantity)
        axes.set_title(title)
    handles, names = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _panel(axes: Axes, results: Sequence[Result], subjects: Sequence[Subject], quantity: str) -> None:
    for subject in subjects:
        rows = sorted((row for row in results if row.subject == subject.name), key=lambda row: row.size_bytes)
        sizes = [row.size_bytes for row in rows]
        spreads = [row.spread(quantity) for row in rows]
        color = COLORS[subject.name.removesuffix("_async").removesuffix("_sync")]
        line = LINES.get(subject.name, LINES[subject.client])
        axes.plot(sizes, [s.median for s in spreads], line, marker="o", markersize=3, color=color, label=subject.label)
        axes.fill_between(sizes, [s.min for s in spreads], [s.max for s in spreads], color=color, alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({result.size_bytes for result in results}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.set_xlabel("payload")
