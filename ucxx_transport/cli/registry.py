"""`ucxx-transport registry ls|reap`: the sources that a store knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from ucxx_transport.cli.output import AsJson, say
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.membership import Store, open_store
from ucxx_transport.membership.entries import SOURCES, source_key
from ucxx_transport.membership.sources import SourceView


def registry(
    action: Annotated[
        Literal["ls", "reap"],
        typer.Argument(help="ls: list them. reap: end sources' leases."),
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
    """Show the sources of a store, or end some whose workers are beyond reach.

    A worker that lives after all notices that its lease has ended, and publishes itself again.
    """
    if workers and action != "reap":
        raise ConfigError(f"{action} takes no worker ids", field="workers")
    config = StoreConfig() if namespace is None else StoreConfig(namespace=namespace)
    with open_store(store or config.url or "local://", config) as opened:
        if action == "ls":
            _list(opened, as_json=as_json)
        else:
            _reap(opened, workers or [], as_json=as_json)


def _list(store: Store, *, as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    view = SourceView()
    snapshot = store.snapshot(SOURCES)
    view.take_snapshot(snapshot, now=0.0)
    table = Table("worker", "epoch", "status", "host", "ports", "ring", "lease")
    for source in view.sources:
        ports = ",".join(map(str, source.ports))
        row = (source.worker_id, str(source.epoch), source.status.value, source.host or "–", ports or "–")
        table.add_row(*map(Text, (*row, source.ring_name, f"{source.ttl_s:g} s")))  # mark-up in a name is a name
    sources = [source.to_dict() for source in view.sources]
    document = {"store": store.url, "revision": snapshot.revision, "sources": sources, "malformed": view.malformed}
    say(document, f"{len(sources)} source(s) in {store.url}", table, as_json=as_json)
    if view.malformed and not as_json:
        typer.echo(f"{view.malformed} record(s) of another version, or none of ours", err=True)


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
