"""`ucxx-transport bench`: what this machine gives, in half a minute."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import Progress

from bench.core.document import as_document
from bench.core.lineup import transport_lanes
from bench.core.results import Result, Round
from bench.core.ring_source import SourceSettings
from bench.core.rounds import DEFAULT_MAX_SLOTS, Lane, Plan, measure_size
from bench.core.table import disturbance, size_table
from ucxx_transport.cli.output import AsJson, console, print_json
from ucxx_transport.errors import ConfigError
from ucxx_transport.units import format_bytes, parse_bytes

__all__ = ["bench", "measure_sizes", "parse_sizes"]

DEFAULT_SIZES: Final = "64KiB,1MiB,16MiB"


def bench(
    *,
    sizes: Annotated[str, typer.Option(help="payload sizes, separated by commas")] = DEFAULT_SIZES,
    rounds: Annotated[int, typer.Option(min=1, help="turns of every subject at every size")] = 3,
    turn_s: Annotated[float, typer.Option("--turn-s", min=0.0, help="seconds timed in one turn, at least")] = 0.1,
    in_flight: Annotated[int, typer.Option(min=1, help="reads kept in flight by the async client")] = 1,
    ports: Annotated[int, typer.Option(min=1, max=64, help="ports of the server")] = 4,
    max_slots: Annotated[int, typer.Option(min=4, help="slots of a ring, and so reads of a batch")] = DEFAULT_MAX_SLOTS,
    as_json: AsJson = False,
) -> None:
    """Measure local reads and UCX between two processes of this machine, with memcpy beside them."""
    plan = Plan(rounds=rounds, turn_s=turn_s, in_flight=in_flight, max_slots=max_slots)
    settings = SourceSettings(ports=ports)
    chosen = parse_sizes(sizes)
    with ExitStack() as stack:
        lanes = transport_lanes(stack, settings)
        results = measure_sizes(lanes, chosen, plan, console(stderr=as_json))
    if as_json:
        print_json(as_document(results, [lane.subject for lane in lanes], plan, settings))


def parse_sizes(text: str) -> list[int]:
    """Sizes from text such as `"4KiB,1MiB"`, ascending, each once.

    Raises:
        ConfigError: one of them is not a size of at least one byte.
    """
    sizes = set()
    for word in text.split(","):
        try:
            size_bytes = parse_bytes(word)
        except ValueError as error:
            raise ConfigError(f"--sizes {word!r}: {error}", field="sizes", value=word) from None
        if size_bytes < 1:
            raise ConfigError("--sizes: a payload has at least one byte", field="sizes", value=word)
        sizes.add(size_bytes)
    return sorted(sizes)


def measure_sizes(
    lanes: list[Lane], sizes: list[int], plan: Plan, terminal: Console, *, baseline: str | None = None
) -> list[Result]:
    """Measure all sizes, showing progress and a table as each is done."""
    subjects = {lane.subject.name: lane.subject for lane in lanes}
    results: list[Result] = []
    with Progress(console=terminal, transient=True) as progress:
        task = progress.add_task("", total=len(sizes) * plan.rounds * len(lanes))

        for size_bytes in sizes:

            def show(entry: Round, size_bytes: int = size_bytes) -> None:
                progress.update(task, advance=1, description=f"{format_bytes(size_bytes)} · round {entry.number + 1}")

            of_size = measure_size(lanes, size_bytes, plan, on_round=show)
            results.extend(of_size)
            progress.console.print(size_table(of_size, subjects, baseline=baseline))
    warning = disturbance(results)
    if warning is not None:
        terminal.print(f"[yellow]{warning}[/yellow]")
    return results
