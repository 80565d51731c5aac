"""`ucxx-transport inspect`: the rings on this host, whose they are, and what their slots hold."""

from __future__ import annotations

from typing import Annotated

import typer

from ucxx_transport.cli.output import AsJson, console, print_json

__all__ = ["inspect"]


def inspect(
    names: Annotated[
        list[str] | None, typer.Argument(help="Rings to show in full; without any, all in a table.")
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show the rings on this host: creator, size, slots by state, address and counters."""
    from ucxx_transport.cli.segments import describe_segments, segments_table

    segments = describe_segments(names or ())
    missing = sorted(set(names or ()) - {segment["name"] for segment in segments})
    if as_json:
        print_json({"segments": segments, "missing": missing})
    elif names:
        for segment in segments:
            console().print_json(data=segment)
    elif segments:
        console().print(segments_table(segments))
    else:
        typer.echo("no rings on this host")
    for name in missing:
        typer.echo(f"error: no ring {name!r} on this host", err=True)
    if missing:
        raise typer.Exit(1)
