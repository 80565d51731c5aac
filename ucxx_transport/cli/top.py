"""`ucxx-transport top`: the rings on this host, live."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from ucxx_transport.cli.output import AsJson, console, print_json
from ucxx_transport.units import format_bytes

__all__ = ["top"]


def top(
    *,
    interval_s: Annotated[float, typer.Option("--interval-s", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the rings on this host as they fill and empty, until interrupted."""
    from ucxx_transport.cli.segments import describe_segments, segments_table

    if once and not as_json:
        console().print(segments_table(describe_segments()))
    elif as_json:
        print_json({"segments": describe_segments()})
        while not once:
            time.sleep(interval_s)
            print_json({"segments": describe_segments()})
    else:
        _watch(interval_s)


def _watch(interval_s: float) -> None:
    from rich.live import Live

    from ucxx_transport.cli.segments import describe_segments, segments_table

    before: dict[str, dict[str, Any]] = {}
    with Live(console=console(), auto_refresh=False) as live:
        while True:
            now = {segment["name"]: segment for segment in describe_segments()}
            rates = {name: _rate(before.get(name), segment, interval_s) for name, segment in now.items()}
            live.update(segments_table(list(now.values()), rates), refresh=True)
            before = now
            time.sleep(interval_s)


def _rate(before: dict[str, Any] | None, now: dict[str, Any], interval_s: float) -> str:
    if before is None or "statistics" not in before or "statistics" not in now or before["ring_id"] != now["ring_id"]:
        return ""
    payloads = (now["statistics"]["committed"] - before["statistics"]["committed"]) / interval_s
    nbytes = (now["statistics"]["committed_bytes"] - before["statistics"]["committed_bytes"]) / interval_s
    return f"{payloads:.3g}/s  {format_bytes(nbytes)}/s"
