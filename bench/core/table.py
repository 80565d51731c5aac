"""Results for people: one table a question, one of the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rich.table import Table

from bench.core.figures import Row, Spread
from bench.core.profile import ENDS, PARTS
from ucxx_transport.units import format_duration

if TYPE_CHECKING:
    from bench.targets import Verdict

__all__ = ["disturbance", "profile_table", "question_table", "verdict_table"]

DISTURBED_CORES: Final = 0.15
"""More than this used by others in the median turn makes figures not worth quoting."""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _duration(us: float) -> str:
    return format_duration(us / 1e6)


SHOWN: Final[Mapping[str, tuple[str, Callable[[float], str]]]] = {
    "us": ("µs", _number),
    "p50_us": ("p50", _duration),
    "p99_us": ("p99", _duration),
    "per_s": ("reads/s", _number),
    "of_one": ("of one source's", _number),
    "gb_per_s": ("GB/s", _number),
    "reader_cpu_us": ("reader CPU µs/read", _number),
    "source_cpu_us": ("source CPU µs/read", _number),
    "cpu_s_per_gb": ("CPU s/GB", _number),
    "quiet_us": ("worker quiet", _duration),
    "spinning_us": ("worker spinning", _duration),
    "added_us": ("added, µs", _number),
    "publish_per_s": ("published/s", _number),
    "renew_per_s": ("renewed/s", _number),
    "resync_s": ("a watcher knows all after, s", _number),
    "delay_us": ("a change is seen after", _duration),
    "gone_us": ("is seen to be gone after", _duration),
    "percent": ("% of a core", _number),
    "sources": ("sources", _number),
    "read": ("read", _number),
    "episodes_per_s": ("episodes/s", _number),
    "waiting_share": ("waits", lambda share: f"{share:.1%}"),
    "fetch_us": ("a batch is waited for", _duration),
    "collect_us": ("of it: collect", _duration),
    "queue_us": ("the records' queue", _duration),
    "start_us": ("start", _duration),
    "resolve_us": ("resolve", _duration),
    "compute_us": ("a step computes", _duration),
}
"""Figures that are shown, in this order; the document has all."""


def question_table(title: str, rows: Sequence[Row]) -> Table:
    """The rows of one question: medians, and the spread of the first figure."""
    shown = [figure for figure in SHOWN if any(figure in row.figures for row in rows)]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("")
    for place, figure in enumerate(shown):
        table.add_column(SHOWN[figure][0], justify="right")
        if place == 0:
            table.add_column("min … max", justify="right")
    for number, row in enumerate(rows):
        if number and row.case != rows[number - 1].case:
            table.add_section()
        table.add_row(row.case, row.subject, *(_cells(row, shown) if not row.skipped else [f"skipped: {row.skipped}"]))
    return table


def _cells(row: Row, shown: Sequence[str]) -> list[str]:
    cells = []
    for place, figure in enumerate(shown):
        spread = row.spread(figure) if figure in row.figures else None
        words = SHOWN[figure][1]
        cells.append("" if spread is None else words(spread.median))
        if place == 0:
            cells.append("" if spread is None else f"{words(spread.min)} … {words(spread.max)}")
    return cells


def profile_table(question: str, rows: Sequence[Row]) -> Table:
    """Where the time of both ends went: µs of CPU a read, and how often a thread was switched a read; medians."""
    table = Table(title=f"{question}: µs of CPU a read", title_justify="left")
    for heading in ("", "", ""):
        table.add_column(heading)
    for heading in (*PARTS, "together", "sleeps", "preempted"):
        table.add_column(heading, justify="right")
    for row in rows:
        for end in ENDS if f"reader_{PARTS[0]}_us" in row.figures else ():
            shown = [f"{end}_{part}_us" for part in PARTS]
            shown += [f"{end}_cpu_us", f"{end}_sleeps", f"{end}_preempted"]
            table.add_row(row.case, row.subject, end, *(_number(row.spread(figure).median) for figure in shown))
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Every target: measured, bound, their ratio, the verdict, and what peers reach."""
    table = Table(title="Targets", title_justify="left")
    for heading in ("", "", "measured", "min … max", "bound", "measured/bound", "", "beside it"):
        table.add_column(heading)
    colors = {"met": "green", "missed": "red", "not measured here": "yellow"}
    for verdict in verdicts:
        target, figure = verdict.target, verdict.figure
        ratio = verdict.measured_over_bound
        table.add_row(
            target.question,
            target.what,
            "" if figure is None else _number(figure.median),
            "" if figure is None else f"{_number(figure.min)} … {_number(figure.max)}",
            f"{target.sense} {target.bound:.4g}",
            "" if ratio is None else f"{ratio:.2f}",
            f"[{colors[verdict.word]}]{verdict.word}[/]{f': {verdict.reason}' if verdict.reason else ''}",
            ", ".join(f"{subject} {_number(of_peer.median)}" for subject, of_peer in verdict.beside.items()),
        )
    return table


def disturbance(rows: Sequence[Row]) -> str | None:
    """A warning when other processes used the machine meanwhile, else None."""
    cores = [value for row in rows for value in row.figures.get("foreign_cores", ())]
    if not cores:
        return None
    load = Spread.of(cores)
    if load.median <= DISTURBED_CORES:
        return None
    return (
        f"other processes used {load.median:.2f} cores in the median turn (up to {load.max:.2f}): "
        "these figures are of a busy machine, and subjects that poll suffer most"
    )
