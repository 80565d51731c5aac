"""Source records and a store's entries and events of them, made up: for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ucxx_transport.membership import Entry, Event, SourceRecord, SourceStatus
from ucxx_transport.membership.entries import source_key

__all__ = ["delete_event", "entry_of", "put_event", "record"]


def record(worker_id: str = "w", epoch: int = 1, **fields: Any) -> SourceRecord:
    """A record that is ready, of a session and a ring of its own for each worker id; `fields` say otherwise."""
    values: Mapping[str, Any] = {
        "session": worker_id.encode().hex()[:32].rjust(32, "0"),
        "status": SourceStatus.READY,
        "ring_id": worker_id.encode()[:16].rjust(16, b"\0"),
        "ring_name": f"ucxx_transport-{worker_id.encode().hex()[:32]}",
        "host_id": "another host",
        "host": "10.0.0.1",
        "ports": (5001, 5002),
        "ttl_s": 6.0,
        **fields,
    }
    return SourceRecord(worker_id=worker_id, epoch=epoch, **values)


def entry_of(source: SourceRecord | bytes, key: str | None = None, revision: int = 1) -> Entry:
    """A key of a snapshot."""
    value = source if isinstance(source, bytes) else source.to_bytes()
    return Entry(key=key or _key(source), value=value, revision=revision, lease_id=1)


def put_event(source: SourceRecord | bytes, key: str | None = None, revision: int = 1) -> Event:
    """A change of a batch."""
    value = source if isinstance(source, bytes) else source.to_bytes()
    return Event(kind="put", key=key or _key(source), value=value, revision=revision, lease_id=1)


def delete_event(worker_id: str, revision: int = 1) -> Event:
    """The end of a key, in a batch."""
    return Event(kind="delete", key=source_key(worker_id), value=b"", revision=revision)


def _key(source: SourceRecord | bytes) -> str:
    assert isinstance(source, SourceRecord), "bytes have no key of their own"
    return source_key(source.worker_id)
