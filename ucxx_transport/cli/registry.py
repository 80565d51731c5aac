"""`ucxx-transport registry ls|watch|reap`: the sources that a store knows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import typer

from ucxx_transport.cli.output import AsJson, console, print_json, say
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.membership import SourceRecord, SourceWatcher, Store, open_store
from ucxx_transport.membership.entries import SOURCES, source_key


def registry(
    action: Annotated[
        Literal["ls", "watch", "reap"],
        typer.Argument(help="ls: list once. watch: every change. reap: end sources' leases."),
    ],
    workers: Annotated[list[str] | None, typer.Argument(help="reap: the worker ids to end.")] = None,
    *,
    store: Annotated[
        str | None,
        typer.Option(
            help="URL: local://, local:///path, etcd://host:port. Default: the setting store.url, or local://"
        ),
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
    from ucxx_transport.membership.sources import SourceView

    view = SourceView()
    snapshot = store.snapshot(SOURCES)
    view.take_snapshot(snapshot, now=0.0)
    if as_json:
        sources = [source.to_dict() for source in view.sources]
        print_json({"store": store.url, "revision": snapshot.revision, "sources": sources, "malformed": view.malformed})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("worker", "epoch", "status", "host", "ports", "ring", "lease"):
        table.add_column(column)
    for source in view.sources:
        ports = ",".join(map(str, source.ports))
        row = (source.worker_id, str(source.epoch), source.status.value, source.host or "–", ports or "–")
        words = (*row, source.ring_name, f"{source.ttl_s:g} s")
        table.add_row(*map(Text, words))  # as they are: mark-up in a name is a name
    terminal = console()
    terminal.print(Text(f"{len(view.sources)} source(s) in {store.url}"), soft_wrap=True)
    terminal.print(table)
    if view.malformed:
        typer.echo(f"{view.malformed} record(s) of another version, or none of ours", err=True)


def _follow(store: Store, *, as_json: bool) -> None:
    def report(change: str, source: SourceRecord) -> None:
        now = datetime.now(UTC).astimezone().strftime("%H:%M:%S")
        where = f"{source.host}:{','.join(map(str, source.ports))}" if source.host else source.ring_name
        line = f"{now} {change:<6} {source.worker_id} epoch {source.epoch} {source.status.value} {where}"
        say({"change": change, "source": source.to_dict()}, line, as_json=as_json)

    callbacks: dict[str, Any] = {f"on_{change}": partial(report, change) for change in ("add", "update", "remove")}
    with SourceWatcher(store, **callbacks):
        threading.Event().wait()  # until it is interrupted


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
    say({"reaped": reaped, "missing": missing}, *(f"reaped {worker_id}" for worker_id in reaped), as_json=as_json)
    for worker_id in missing:
        typer.echo(f"no source {worker_id!r} in {store.url}", err=True)
    if missing:
        raise typer.Exit(1)
