"""The verbs about rings of this host (`serve`, `inspect`, `top`, `clean`), and about a store's sources (`registry`)."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Annotated, Any, Literal

import typer

from ucxx_transport.cli.program import AsJson, Rows, console, logs_to_stderr, say
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.membership import SourceWatcher, Store, open_store
from ucxx_transport.membership.entries import SOURCES, source_key
from ucxx_transport.membership.sources import SourceChange, SourceView
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.segment import SegmentInfo, list_segments, sweep_orphans
from ucxx_transport.settings import gather
from ucxx_transport.teardown import exit_on_sigterm
from ucxx_transport.units import format_bytes, parse_bytes, parse_ports


def inspect(
    names: Annotated[list[str] | None, typer.Argument(help="Rings to show in full; without, all in a table.")] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show the rings on this host: creator, size, slots by state, address and counters."""
    segments = [_describe(info) for info in list_segments() if not names or info.name in names]
    missing = sorted(set(names or ()) - {segment["name"] for segment in segments})
    shown: list[str | Rows] = ["no rings on this host"]
    if names:
        shown = [json.dumps(segment, indent=2) for segment in segments]
    elif segments:
        shown = [_table_of(segments)]
    wrong = [f"error: no ring {name!r} on this host" for name in missing]
    say({"segments": segments, "missing": missing}, *shown, as_json=as_json, wrong=wrong)


def top(
    *,
    interval_s: Annotated[float, typer.Option("--interval-s", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the rings on this host as they fill and empty, until interrupted."""
    before: dict[str, dict[str, Any]] = {}
    screen: AbstractContextManager[Any] = nullcontext()
    if not as_json and not once:
        from rich.live import Live

        screen = Live(console=console(), auto_refresh=False)
    with screen as live:
        while True:
            now = {info.name: _describe(info) for info in list_segments()}
            if live is None:
                say({"segments": list(now.values())}, _table_of(list(now.values())), as_json=as_json)
            else:
                rates = {name: _rate(before.get(name), segment, interval_s) for name, segment in now.items()}
                live.update(_table_of(list(now.values()), rates).table(), refresh=True)
            if once:
                return
            before = now
            time.sleep(interval_s)


def _rate(before: dict[str, Any] | None, now: dict[str, Any], interval_s: float) -> str:
    if before is None or "statistics" not in before or "statistics" not in now or before["ring_id"] != now["ring_id"]:
        return ""
    counts, old = now["statistics"], before["statistics"]
    payloads, nbytes = ((counts[name] - old[name]) / interval_s for name in ("committed", "committed_bytes"))
    return f"{payloads:.3g}/s  {format_bytes(nbytes)}/s"


def clean(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the segments of dead processes; those of living ones are never touched."""
    before = list_segments()
    orphans = {info.name: info.nbytes for info in before if not info.creator_alive}
    removed = list(orphans) if dry_run else sweep_orphans()
    left = [] if dry_run else [info.name for info in list_segments() if not info.creator_alive]
    freed = sum(orphans.get(name, 0) for name in removed)
    in_use = [info.name for info in before if info.creator_alive]
    document = {"dry_run": dry_run, "removed": removed, "freed_bytes": freed, "left": left, "in_use": in_use}
    verb, done = ("would remove", "to remove") if dry_run else ("removed", "removed")
    lines = [f"{verb} {name} ({format_bytes(orphans.get(name, 0))})" for name in removed]
    lines.append(f"{len(removed)} {done}, {format_bytes(freed)}; {len(in_use)} in use")
    wrong = [f"could not remove {name}: it belongs to another user" for name in left]
    say(document, *lines, as_json=as_json, wrong=wrong)


def _table_of(segments: Sequence[dict[str, Any]], rates: dict[str, str] | None = None) -> Rows:
    numbers = ("committed", "consumed", "lost", *(["rate"] if rates is not None else []))
    columns = ("segment", "creator", "size", "slots", "free", "writing", "ready", "reading", "address", *numbers)
    rows: list[Sequence[object]] = []
    for segment in segments:
        creator = f"{segment['creator_pid'] or '?'} {'alive' if segment['creator_alive'] else 'dead'}"
        row = [segment["name"], creator, format_bytes(segment["nbytes"])]
        rows.append(row)
        if segment["problem"]:
            row.append(segment["problem"])
            continue
        counts = segment["statistics"]
        row += [f"{segment['slots']} × {format_bytes(segment['slot_bytes'])}"]
        row += [counts[state] for state in ("free", "writing", "ready", "reading")]
        lost = [f"{counts[name]} {name}" for name in ("overwritten", "discarded", "stale", "full") if counts[name]]
        address = f"{segment['host']}:{','.join(map(str, segment['ports']))}" if segment["ports"] else "-"
        row += [address, counts["committed"], counts["consumed"], " ".join(lost) or "-"]
        row += [rates.get(segment["name"], "")] if rates is not None else []
    return Rows(columns, rows, numbers)


def _describe(info: SegmentInfo) -> dict[str, Any]:
    """A segment of this host as a JSON-safe document."""
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
    document |= {"ring_id": identity.ring_id.hex(), "fingerprint": f"{identity.fingerprint:016x}"}
    for name in ("slots", "slot_bytes", "readers", "envelope_bytes", "on_full"):
        document[name] = getattr(identity, name)
    try:
        # Not populated: a look must not map gigabytes.
        with SharedRingBuffer.attach(info.name, populate=False) as ring:
            host, ports = ring.address()
            schema = ring.schema
            return document | {
                "host": host,
                "ports": list(ports),
                "statistics": dataclasses.asdict(ring.statistics()),
                "holders": [holder._asdict() for holder in ring.holders()],
                "schema": schema.to_dict() if schema is not None else None,
            }
    except TransportError as error:
        return document | {"problem": error.message}


def _parsed(parse: Callable[[str], object], metavar: str, words: str) -> Any:
    """An option whose text `parse` reads; what that refuses is wrong use."""

    def checked(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return typer.Option(parser=checked, metavar=metavar, help=words)


def serve(
    *,
    slots: Annotated[int | None, typer.Option(min=1, max=65536, help="Slots of the ring; 16 unless set.")] = None,
    slot_bytes: Annotated[Any, _parsed(parse_bytes, "SIZE", "Largest payload, such as 64KiB; 1MiB unless set.")] = None,
    ports: Annotated[Any, _parsed(parse_ports, "PORTS", "How many ports, or their numbers: 5001,5002.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to publish; without it the best one of this host.")] = None,
    fill: Annotated[int, typer.Option(min=0, help="Payloads of random bytes to write, one slot each.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a ring, serve it until SIGTERM or Ctrl-C, and leave nothing behind.

    What is not given comes from UCXX_TRANSPORT_* (UCXX_TRANSPORT_RING__NAME=a) and ./ucxx_transport.toml. With --json
    the first line holds the references of the payloads written: SlotRef.from_dict(refs[0]) is what a client reads.
    """
    from ucxx_transport.server import UCXXServer

    logs_to_stderr("info")
    exit_on_sigterm(code=0)
    outside = gather("ring", {})
    defaults = {field: value for field, value in (("slots", 16), ("slot_bytes", "1MiB")) if field not in outside}
    settings = defaults | _given(slots=slots, slot_bytes=slot_bytes)
    with SharedRingBuffer.create(settings) as ring, UCXXServer(ring, _given(ports=ports, host=host)) as server:
        try:
            refs = [ring.write_raw(os.urandom(ring.slot_bytes)) for _ in range(min(fill, ring.slots))]
            document = {
                "event": "serving",
                "ring": ring.name,
                "slots": ring.slots,
                "slot_bytes": ring.slot_bytes,
                "host": server.address,
                "ports": list(server.ports),
                "pid": os.getpid(),
                "server_pids": server.statistics().pids,
                "refs": [ref.to_dict() for ref in refs],
            }
            words = (
                f"ring     {ring.name}: {ring.slots} slots of {format_bytes(ring.slot_bytes)}, {len(refs)} filled\n"
                f"serving  {server.address} ports {', '.join(map(str, server.ports))}; Ctrl-C ends it"
            )
            say(document, words, as_json=as_json)
            while True:
                time.sleep(3600)
        finally:
            counts = server.statistics()
            delivered, sent = counts.total("delivered"), format_bytes(counts.total("bytes_sent"))
            words = f"stopping: {delivered} payloads delivered, {sent}; {counts.restarts} restarts of its ports"
            say({"event": "stopping", "server": counts, "ring": ring.statistics()}, words, as_json=as_json)


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def registry(
    action: Annotated[
        Literal["ls", "watch", "reap"],
        typer.Argument(help="ls: list them. watch: each change, a line. reap: end sources' leases."),
    ],
    workers: Annotated[list[str] | None, typer.Argument(help="reap: the worker ids to end.")] = None,
    *,
    store: Annotated[
        str | None,
        typer.Option(help="local:///path or etcd://host:port; without it the setting store.url, or local://"),
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="The job's part of the store.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the sources of a store, follow them, or end some whose workers are beyond reach.

    A worker that lives after all notices that its lease has ended, and publishes itself again.
    """
    if workers and action != "reap":
        raise ConfigError(f"{action} takes no worker ids", field="workers")
    config = StoreConfig() if namespace is None else StoreConfig(namespace=namespace)
    with open_store(store or config.url or "local://", config) as opened:
        if action == "ls":
            _list(opened, as_json=as_json)
        elif action == "watch":
            _follow(opened, as_json=as_json)
        else:
            _reap(opened, workers or [], as_json=as_json)


def _list(store: Store, *, as_json: bool) -> None:
    view = SourceView()
    snapshot = store.snapshot(SOURCES)
    view.take_snapshot(snapshot, now=0.0)
    rows: list[Sequence[object]] = []
    for source in view.sources:
        where = (source.host or "–", ",".join(map(str, source.ports)) or "–", source.ring_name)
        rows.append((source.worker_id, source.epoch, source.status.value, *where, f"{source.ttl_s:g} s"))
    table = Rows(("worker", "epoch", "status", "host", "ports", "ring", "lease"), rows)
    sources = [source.to_dict() for source in view.sources]
    document = {"store": store.url, "revision": snapshot.revision, "sources": sources, "malformed": view.malformed}
    say(document, f"{len(sources)} source(s) in {store.url}", table, as_json=as_json)
    if view.malformed and not as_json:
        typer.echo(f"{view.malformed} record(s) of another version, or none of ours", err=True)


def _follow(store: Store, *, as_json: bool) -> None:
    changes: SimpleQueue[SourceChange] = SimpleQueue()
    with SourceWatcher(store) as watcher:
        watcher.report_to(changes.put)
        while True:  # until it is interrupted
            change, source = changes.get()
            where = f"{source.host}:{','.join(map(str, source.ports))}" if source.host else source.ring_name
            what = f"{change:<6} {source.worker_id} epoch {source.epoch} {source.status.value} {where}"
            document = {"change": change, "source": source.to_dict()}
            say(document, f"{time.strftime('%H:%M:%S')} {what}", as_json=as_json)


def _reap(store: Store, workers: Sequence[str], *, as_json: bool) -> None:
    if not workers:
        raise ConfigError("reap needs the ids of the workers to end; `registry ls` shows them", field="workers")
    reaped, missing = [], []
    for worker_id in workers:
        entry = store.get(source_key(worker_id))
        if entry is None:
            missing.append(worker_id)
            continue
        if entry.lease_id is not None:
            store.revoke(entry.lease_id)  # and the record with it
        else:
            store.delete(source_key(worker_id), expected=entry.revision)
        reaped.append(worker_id)
    lines = [f"reaped {worker_id}" for worker_id in reaped]
    wrong = [f"no source {worker_id!r} in {store.url}" for worker_id in missing]
    say({"reaped": reaped, "missing": missing}, *lines, as_json=as_json, wrong=wrong)
