"""`ucxx-transport clean`: remove the segments of dead processes."""

from __future__ import annotations

from typing import Annotated

import typer

from ucxx_transport.cli.output import AsJson, print_json
from ucxx_transport.units import format_bytes

__all__ = ["clean"]


def clean(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the segments of dead processes; those of living ones are never touched."""
    from ucxx_transport.ring.orphans import list_segments, sweep_orphans

    before = list_segments()
    orphans = {info.name: info.nbytes for info in before if not info.creator_alive}
    removed = list(orphans) if dry_run else sweep_orphans()
    left = [] if dry_run else [info.name for info in list_segments() if not info.creator_alive]
    freed = sum(orphans.get(name, 0) for name in removed)
    if as_json:
        in_use = [info.name for info in before if info.creator_alive]
        print_json({"dry_run": dry_run, "removed": removed, "freed_bytes": freed, "left": left, "in_use": in_use})
    else:
        for name in removed:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {name} ({format_bytes(orphans.get(name, 0))})")
        in_use_count = len(before) - len(orphans)
        typer.echo(
            f"{len(removed)} {'to remove' if dry_run else 'removed'}, {format_bytes(freed)}; {in_use_count} in use"
        )
        for name in left:
            typer.echo(f"could not remove {name}: it belongs to another user", err=True)
    if left:
        raise typer.Exit(1)
