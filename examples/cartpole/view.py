"""The live view: a screen that is redrawn on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cartpole.books import Books, SeatBook
from cartpole.chart import block_chart, means_over_time
from cartpole.plan import DemoPlan
from ucxx_transport.units import format_bytes, format_duration

__all__ = ["LineView", "LiveView", "Scene", "View", "open_view"]

_CHART_HEIGHT = 6
_CHART_WIDTH = 72
_EVENTS_SHOWN = 5
_LINE_EVERY_S = 2.0
_STATE_STYLES = {"running": "green", "starting": "yellow", "killed": "bold red", "failed": "bold red"}


class Scene(Protocol):
    """What a view draws; the orchestrator is one."""

    @property
    def plan(self) -> DemoPlan: ...

    @property
    def books(self) -> Books: ...

    @property
    def elapsed_s(self) -> float: ...


class View(AbstractContextManager["View"], Protocol):
    """Draws a scene when told to."""

    def show(self, scene: Scene) -> None:
        """Draw it."""


def open_view(console: Console) -> View:
    """The view that fits the console."""
    return LiveView(console) if console.is_terminal else LineView(console)


class LiveView:
    """Redraws one screenful in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        """Take the terminal's lower part."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        self._live.stop()

    def show(self, scene: Scene) -> None:
        """Draw the scene."""
        self._live.update(_screen(scene), refresh=True)


class LineView:
    """Prints a line every two seconds, and each event as it happens."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_s = 0.0
        self._events = 0

    def __enter__(self) -> Self:
        """Nothing to take."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""

    def show(self, scene: Scene) -> None:
        """Print what is new."""
        books = scene.books
        for event in books.events[self._events :]:
            self._console.print(f"{event.at_s:6.1f} s  {event.text}", highlight=False)
        self._events = len(books.events)
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _LINE_EVERY_S
            self._console.print(f"{scene.elapsed_s:6.1f} s  {_progress(books)}", highlight=False)


def _progress(books: Books) -> str:
    mean = books.recent_mean
    episodes_per_s, bytes_per_s = books.rates()
    shown = "no episode yet" if mean is None else f"mean return {mean:.1f}"
    return f"{len(books.finished)} episodes, {shown}, {episodes_per_s:.3g} episodes/s, {format_bytes(bytes_per_s)}/s"


def _screen(scene: Scene) -> RenderableType:
    books = scene.books
    events = [Text(f"{event.at_s:6.1f} s  {event.text}", style="dim") for event in books.events[-_EVENTS_SHOWN:]]
    body = Group(_curve(scene), Text(), _numbers(books), Text(), _workers(books), *events)
    goal = f"goal {scene.plan.goal:.0f}" if scene.plan.goal is not None else "no goal"
    title = f"{scene.plan.facts.env_id}   {scene.elapsed_s:.0f} s of {scene.plan.seconds:.0f} s   {goal}"
    return Panel(body, title=title, title_align="left", expand=False, width=_CHART_WIDTH + 14)


def _curve(scene: Scene) -> Text:
    points = [(episode.at_s, episode.total_reward) for episode in scene.books.finished]
    goal = scene.plan.goal
    means = means_over_time(points, _CHART_WIDTH)
    low = min([0.0, *means])
    high = max([*means, goal or low + 1.0])
    rows = block_chart(means, height=_CHART_HEIGHT, low=low, high=high)
    text = Text()
    for index, row in enumerate(rows):
        label = f"{high:8.0f} " if index == 0 else f"{low:8.0f} " if index == len(rows) - 1 else " " * 9
        text.append(label, style="dim")
        text.append(row.ljust(_CHART_WIDTH), style="cyan")
        text.append("\n" if index < len(rows) - 1 else "")
    return text


def _numbers(books: Books) -> RenderableType:
    status = books.trainer
    if status is None:
        return Text("the trainer is starting …", style="yellow")
    episodes_per_s, bytes_per_s = books.rates()
    ring = books.ring_totals()
    mean, best = books.recent_mean, books.best_mean
    rows: list[list[tuple[str, object]]] = [
        [
            ("episodes", len(books.finished)),
            ("a second", f"{episodes_per_s:.3g}"),
            ("mean of 50", "-" if mean is None else f"{mean:.0f}"),
            ("best", "-" if best is None else f"{best:.0f}"),
        ],
        [
            ("moved", format_bytes(status.payload_bytes)),
            ("a second", format_bytes(bytes_per_s)),
            ("checksums ok", status.verified),
            ("wrong", status.mismatched),
        ],
        [
            ("updates", status.version),
            ("entropy", f"{status.entropy:.2f}"),
            ("lost", sum(status.lost.values())),
            ("retried", status.retried),
        ],
        [
            ("slot waits", ring["blocked"]),
            ("overwritten", ring["overwritten"]),
            *((f"p50 {way}", format_duration(numbers["p50_us"] / 1e6)) for way, numbers in sorted(status.ways.items())),
        ],
    ]
    grid = Table.grid(padding=(0, 2))
    for _ in range(8):
        grid.add_column(no_wrap=True)
    for row in rows:
        cells = [(Text(name, style="dim"), Text(str(value))) for name, value in row[:4]]
        grid.add_row(*(part for cell in cells for part in cell))
    return grid


def _workers(books: Books) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "pid", "state", "read", "episodes", "steps", "weights", "slots ready"):
        table.add_column(name, justify="left" if name in ("state", "read") else "right")
    newest = books.trainer.version if books.trainer is not None else 0
    for book in books.seats.values():
        table.add_row(*_worker_row(book, books, newest))
    return table


def _worker_row(book: SeatBook, books: Books, newest: int) -> list[str | Text]:
    status = book.status
    transports = books.trainer.seat_transports if books.trainer is not None else {}
    lag = f"{status.version - newest:+d}" if status is not None and book.state == "running" else ""
    return [
        str(book.worker),
        str(book.pid),
        Text(book.state, style=_STATE_STYLES.get(book.state, "dim")),
        transports.get(book.seat, book.way),
        str(book.delivered),
        str(status.steps if status is not None else 0),
        lag,
        str(status.ready) if status is not None and book.state == "running" else "",
    ]
