"""What `inspect` and `top` show of the segments on this host, as plain values and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ucxx_transport.errors import TransportError
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.orphans import SegmentInfo, list_segments
from ucxx_transport.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["describe_segments", "segments_table"]


def describe_segments(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every segment of this host that this user may open, each as a JSON-safe document.

    Args:
        names: only these; all if empty.
    """
    return [_describe(info) for info in list_segments() if not names or info.name in names]


def segments_table(segments: Sequence[dict[str, Any]], rates: dict[str, str] | None = None) -> Table:
    """The documents of `describe_segments` as a table, a row a segment.

    Args:
        segments: the documents.
        rates: a last column, by name of the segment.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("segment", "creator", "size", "slots", "free", "writing", "ready", "reading", "address"):
        table.add_column(column)
    for column in ("committed", "consumed", "lost", *(["rate"] if rates is not None else [])):
        table.add_column(column, justify="right")
    for segment in segments:
        creator = f"{segment['creator_pid'] or '?'} {'alive' if segment['creator_alive'] else '[red]dead[/red]'}"
        row = [segment["name"], creator, format_bytes(segment["nbytes"])]
        if segment["problem"]:
            table.add_row(*row, f"[yellow]{segment['problem']}[/yellow]")
            continue
        counts = segment["statistics"]
        row += [f"{segment['slots']} × {format_bytes(segment['slot_bytes'])}"]
        row += [str(counts[state]) for state in ("free", "writing", "ready", "reading")]
        row += [_address_in_words(segment), str(counts["committed"]), str(counts["consumed"]), _lost_in_words(counts)]
        table.add_row(*row, *([rates.get(segment["name"], "")] if rates is not None else []))
    return table


def _describe(info: SegmentInfo) -> dict[str, Any]:
    identity = info.identity
    document: dict[str, Any] = {
        "name": info.name,
        "path": str(info.path),
        "nbytes": info.nbytes,
        "creator_pid": identity.creator_pid if identity else None,
        "creator_alive": info.creator_alive,
        "problem": info.problem,
    }
    if identity is None:
        return document
    document |= {
        "ring_id": identity.ring_id.hex(),
        "slots": identity.geometry.slots,
        "slot_bytes": identity.geometry.slot_bytes,
        "readers": identity.geometry.readers,
        "on_full": identity.on_full,
        "fingerprint": f"{identity.fingerprint:016x}",
    }
    try:
        # Not populated: a look must not map gigabytes.
        with SharedRingBuffer.attach(info.name, populate=False) as ring:
            host, ports = ring.address()
            schema = ring.schema
            return document | {
                "host": host,
                "ports": list(ports),
                "statistics": dataclasses.asdict(ring.statistics()),
                "schema": schema.to_dict() if schema is not None else None,
            }
    except TransportError as error:
        return document | {"problem": error.message}


def _address_in_words(segment: dict[str, Any]) -> str:
    ports = segment["ports"]
    if not ports:
        return "-"
    together = ports == list(range(ports[0], ports[0] + len(ports)))
    listed = f"{ports[0]}-{ports[-1]}" if together and len(ports) > 1 else ",".join(map(str, ports))
    return f"{segment['host']}:{listed}"


def _lost_in_words(counts: dict[str, int]) -> str:
    return (
        " ".join(f"{counts[name]} {name}" for name in ("overwritten", "discarded", "stale", "full") if counts[name])
        or "-"
    )
