"""Sources: what a rollout worker publishes of itself, and the view of all of them that a watcher keeps.

A record is JSON, which an operator can read in the store: the fields of `SourceRecord`, and the version of the form.

What a snapshot or a batch changes in a view:

| known before | the store has                | change                                     |
|--------------|------------------------------|--------------------------------------------|
| –            | a record                     | add                                        |
| a record     | the same                     | –                                          |
| a record     | same epoch, other words      | update                                     |
| a record     | another epoch, session, ring | remove of the old, add of the new          |
| a record     | deleted, not in a snapshot   | remove                                     |
| a record     | missing after a reset        | remove, unless it is back within `grace_s` |
| anything     | what is no record            | – (counted)                                |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from math import isfinite
from typing import Final, Literal, NamedTuple, TypeGuard

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.membership.entries import Batch, Snapshot, source_key
from ucxx_transport.schema.episode_record import MAX_WORKER_ID_CHARS
from ucxx_transport.schema.slot_ref import MAX_HOST_CHARS, MAX_HOST_ID_CHARS, MAX_RING_NAME_CHARS, are_ports
from ucxx_transport.schema.wire_form import (
    NO_META,
    WIRE_VERSION,
    check_version,
    checked_meta,
    describe,
    is_plain_text,
    is_unsigned,
    pack_json,
    take_fields,
    unpack_json,
    untrusted,
)

MAX_RECORD_BYTES: Final = 64 << 10

_HEX: Final = set("0123456789abcdef")


class SourceStatus(Enum):
    """What may be expected of a source."""

    STARTING = "starting"
    """It is there, and about to serve."""
    READY = "ready"
    """It serves."""
    STALE = "stale"
    """It is there, but does not serve: it is about to end, or its server is unwell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What can be read, and where.

    Attributes:
        ring_id: 16 bytes.
        ring_name: the segment's name on its host.
        host_id: which host and namespace that is; equal to a reader's own means: the ring can be read in place.
        host: the server's address, None without a server.
        ports: its ports.
    """

    ring_id: bytes
    ring_name: str
    host_id: str
    host: str | None = None
    ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord(Offer):
    """A rollout worker, as the store knows it.

    Attributes:
        worker_id: its name in the job, 1-128 printable characters.
        epoch: which publication of that name, from 1 on; larger is later.
        session: 32 hex digits, random, of one publisher's life: tells a worker from its double.
        status: what may be expected of it.
        ttl_s: how long the record lives without a renewal.
        meta: what else the worker publishes.
    """

    worker_id: str
    epoch: int
    session: str
    status: SourceStatus
    ttl_s: float = 0.0
    meta: Mapping[str, object] = field(default_factory=lambda: NO_META)

    def __post_init__(self) -> None:
        """Check every field; a ConfigError names the one that is out of its bounds."""
        for name, good in (
            ("worker_id", is_plain_text(self.worker_id, MAX_WORKER_ID_CHARS)),
            ("epoch", is_unsigned(self.epoch, 64) and self.epoch > 0),
            ("session", _is_hex(self.session)),
            ("status", isinstance(self.status, SourceStatus)),
            ("ring_id", type(self.ring_id) is bytes and len(self.ring_id) == 16),
            ("ring_name", is_plain_text(self.ring_name, MAX_RING_NAME_CHARS)),
            ("host_id", is_plain_text(self.host_id, MAX_HOST_ID_CHARS)),
            ("host", self.host is None or is_plain_text(self.host, MAX_HOST_CHARS)),
            ("ports", are_ports(self.ports)),
            ("ttl_s", type(self.ttl_s) is float and isfinite(self.ttl_s) and self.ttl_s >= 0),
        ):
            if not good:
                raise ConfigError(f"a source's {name} cannot be {describe(getattr(self, name))}", field=name)
        object.__setattr__(self, "ports", tuple(self.ports))
        object.__setattr__(self, "meta", checked_meta(self.meta)[0])

    @property
    def life(self) -> tuple[int, str, bytes]:
        """What another publication, or another worker of this id, differs in."""
        return self.epoch, self.session, self.ring_id

    def __hash__(self) -> int:
        """By its life: `meta` need not be hashable."""
        return hash((self.worker_id, self.life))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as its JSON form, which is checked on arrival."""
        return (SourceRecord.from_bytes, (self.to_bytes(),))

    def to_dict(self) -> dict[str, object]:
        """The record as plain JSON values."""
        return {
            "version": WIRE_VERSION,
            **{key: getattr(self, key) for key in _KEYS},
            "status": self.status.value,
            "ring_id": self.ring_id.hex(),
            "ports": list(self.ports),
            "meta": dict(self.meta),
        }

    def to_bytes(self) -> bytes:
        """The record as JSON.

        Raises:
            ConfigError: the record is larger than 64 KiB.
        """
        raw = pack_json(self.to_dict())
        if len(raw) > MAX_RECORD_BYTES:
            raise ConfigError(f"a source's record takes {len(raw)} bytes; at most {MAX_RECORD_BYTES}", field="meta")
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> SourceRecord:
        """Rebuild a record that anyone may have written.

        Raises:
            ProtocolError: it is malformed or of another version; the message names the field.
        """
        data = unpack_json(raw, "source record", max_bytes=MAX_RECORD_BYTES)
        form = dict(take_fields(data, "source record", required=("version", *_KEYS)))
        check_version(form.pop("version"), "source record")
        # what is not taken here stays as it is, for __post_init__ to refuse by its name
        ring_id, status, ttl_s = form["ring_id"], form["status"], form["ttl_s"]
        form["ring_id"] = bytes.fromhex(ring_id) if _is_hex(ring_id) else ring_id
        form["status"] = next((one for one in SourceStatus if one.value == status), status)
        form["ttl_s"] = float(ttl_s) if is_unsigned(ttl_s, 64) else ttl_s
        with untrusted():
            return cls(**form)


_KEYS: Final = tuple(spec.name for spec in fields(SourceRecord))


def _is_hex(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == 32 and set(value) <= _HEX


class SourceChange(NamedTuple):
    """One change of what is known: "add", "update" or "remove", for which `record` is as it was known."""

    kind: Literal["add", "update", "remove"]
    record: SourceRecord


class SourceView:
    """What is known of the sources of a store, by their keys below `SOURCES`."""

    def __init__(self) -> None:
        self._known: dict[str, SourceRecord] = {}
        self._missing_until_s: dict[str, float] = {}
        self.malformed = 0

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """All known, by worker id."""
        return tuple(sorted(self._known.values(), key=lambda record: record.worker_id))

    def take_snapshot(self, snapshot: Snapshot, *, now: float, grace_s: float = 0.0) -> list[SourceChange]:
        """What a whole picture of the store changes.

        For `grace_s` a source that is not in it is still taken for known: after a reset the store is empty, though its
        sources live and are about to say so again. One that has a grace already keeps that.
        """
        changes = [change for entry in snapshot for change in self._put(entry.key, entry.value)]
        for key in sorted(self._known.keys() - {entry.key for entry in snapshot}):
            if grace_s > 0:
                self._missing_until_s.setdefault(key, now + grace_s)
            elif key not in self._missing_until_s:
                changes += self._remove(key)
        return changes

    def take_batch(self, batch: Batch) -> list[SourceChange]:
        """What the changes of one revision change."""
        changes: list[SourceChange] = []
        for event in batch.events:
            changes += self._put(event.key, event.value) if event.kind == "put" else self._remove(event.key)
        return changes

    def expire(self, now: float) -> list[SourceChange]:
        """Removes those that are missing since a reset and have not come back in time."""
        late = sorted(key for key, until_s in self._missing_until_s.items() if now >= until_s)
        return [change for key in late for change in self._remove(key)]

    def _put(self, key: str, value: bytes) -> list[SourceChange]:
        try:
            record = SourceRecord.from_bytes(value)
        except ProtocolError:
            record = None
        if record is None or source_key(record.worker_id) != key:
            self.malformed += 1
            return []
        self._missing_until_s.pop(key, None)
        before = self._known.get(key)
        if before == record:
            return []
        if before is not None and before.life == record.life:
            self._known[key] = record
            return [SourceChange("update", record)]
        changes = self._remove(key)
        self._known[key] = record
        return [*changes, SourceChange("add", record)]

    def _remove(self, key: str) -> list[SourceChange]:
        self._missing_until_s.pop(key, None)
        before = self._known.pop(key, None)
        return [] if before is None else [SourceChange("remove", before)]
