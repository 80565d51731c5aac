"""Sources: what a rollout worker publishes of itself, its life in the store, and a watcher's view of all of them.

A record is JSON: the fields of `SourceRecord`, and the version of the form. What the store changes in a view:

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
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from math import isfinite
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeGuard

from ucxx_transport.errors import ConfigError, ConflictError, LeaseLostError, ProtocolError, TransportError
from ucxx_transport.membership.entries import Batch, Snapshot, epoch_key, source_key
from ucxx_transport.membership.renewal import renew
from ucxx_transport.membership.store import Store
from ucxx_transport.ring.layout import AWAITED
from ucxx_transport.ring.segment import host_id
from ucxx_transport.schema import wire_form
from ucxx_transport.schema.episode_record import MAX_WORKER_ID_CHARS
from ucxx_transport.schema.slot_ref import MAX_HOST_CHARS, MAX_HOST_ID_CHARS, MAX_RING_NAME_CHARS, are_ports
from ucxx_transport.settings import check_can
from ucxx_transport.teardown import OfOneProcess

if TYPE_CHECKING:
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.sidecar.launch import Sidecar

MAX_RECORD_BYTES: Final = 64 << 10

_HEX: Final = set("0123456789abcdef")


class SourceStatus(Enum):
    """What may be expected of a source."""

    STARTING = "starting"  # it is there, and about to serve
    READY = "ready"  # it serves
    STALE = "stale"  # it is there, but does not serve: it is about to end, or its server is unwell


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


class RingSource(OfOneProcess):
    """A ring as it is published: trainers of this host read it in place; `UCXXServer` puts ports in front of it.

    The ring's creator keeps and closes it.
    """

    sidecar: Sidecar | None = None  # it may renew the lease beside its other work; a ring alone has none

    def __init__(self, ring: SharedRingBuffer) -> None:
        check_can(ring, "publish_address", "ring", "a SharedRingBuffer")
        self._ring = ring
        self._awaited = ring.server_words[AWAITED : AWAITED + 1]
        self._last_old: int | None = None
        self._was_bound = False

    def offer(self) -> Offer:
        """What can be read now, and where."""
        ring = self._ring
        host, ports = ring.address()
        return Offer(ring_id=ring.ring_id, ring_name=ring.name, host_id=host_id(ring.folder), host=host, ports=ports)

    def hold(self) -> None:
        """Answer NOT_READY until it is bound; what is written up to now belongs to the epoch that ended, if any."""
        self._awaited[0] = 1
        if self._was_bound:
            self._last_old = self._ring.write_sequence

    def bind(self) -> None:
        """Serve, without what was written under an epoch before; errors as `discard_old`, then it still holds."""
        self.discard_old()
        self._was_bound = True
        self._awaited[0] = 0

    def discard_old(self) -> None:
        """Drop what an epoch before has left and no one reads now. A DeadlineExceededError: the ring is locked."""
        if self._last_old is not None and self._ring.discard_until(self._last_old) == 0:
            self._last_old = None

    def release(self) -> None:
        """Published no longer: serve everyone who has a reference."""
        self._awaited[0] = 0

    def is_healthy(self, within_s: float) -> bool:
        """Whether it has shown, within the last `within_s` seconds, that it can be read."""
        del within_s
        return not self._ring.closed


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
    meta: Mapping[str, object] = field(default_factory=lambda: wire_form.NO_META)

    def __post_init__(self) -> None:
        """Check every field; a ConfigError names the one that is out of its bounds."""
        for name, good in (
            ("worker_id", wire_form.is_plain_text(self.worker_id, MAX_WORKER_ID_CHARS)),
            ("epoch", wire_form.is_unsigned(self.epoch, 64) and self.epoch > 0),
            ("session", _is_hex(self.session)),
            ("status", isinstance(self.status, SourceStatus)),
            ("ring_id", type(self.ring_id) is bytes and len(self.ring_id) == 16),
            ("ring_name", wire_form.is_plain_text(self.ring_name, MAX_RING_NAME_CHARS)),
            ("host_id", wire_form.is_plain_text(self.host_id, MAX_HOST_ID_CHARS)),
            ("host", self.host is None or wire_form.is_plain_text(self.host, MAX_HOST_CHARS)),
            ("ports", are_ports(self.ports)),
            ("ttl_s", type(self.ttl_s) is float and isfinite(self.ttl_s) and self.ttl_s >= 0),
        ):
            if not good:
                raise ConfigError(f"a source's {name} cannot be {wire_form.describe(getattr(self, name))}", field=name)
        object.__setattr__(self, "ports", tuple(self.ports))
        object.__setattr__(self, "meta", wire_form.checked_meta(self.meta)[0])

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
            "version": wire_form.WIRE_VERSION,
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
        raw = wire_form.pack_json(self.to_dict())
        if len(raw) > MAX_RECORD_BYTES:
            raise ConfigError(f"a source's record takes {len(raw)} bytes; at most {MAX_RECORD_BYTES}", field="meta")
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> SourceRecord:
        """Rebuild a record that anyone may have written.

        Raises:
            ProtocolError: it is malformed or of another version; the message names the field.
        """
        form = wire_form.take_json(raw, "source record", required=_KEYS, max_bytes=MAX_RECORD_BYTES)
        # what is not taken here stays as it is, for __post_init__ to refuse by its name
        ring_id, status, ttl_s = form["ring_id"], form["status"], form["ttl_s"]
        form["ring_id"] = bytes.fromhex(ring_id) if _is_hex(ring_id) else ring_id
        form["status"] = next((one for one in SourceStatus if one.value == status), status)
        form["ttl_s"] = float(ttl_s) if wire_form.is_unsigned(ttl_s, 64) else ttl_s
        with wire_form.untrusted():
            return cls(**form)


_KEYS: Final = tuple(spec.name for spec in fields(SourceRecord))


def _is_hex(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == 32 and set(value) <= _HEX


class Publication:
    """The record of one epoch, made visible: as it was written last, and its lease. For one thread.

    A ConflictError: there is a record of this worker id already. After any error no lease is left in a store that can
    be reached.
    """

    def __init__(self, store: Store, record: SourceRecord, *, ttl_s: float) -> None:
        self._store, self._key = store, source_key(record.worker_id)
        self.lease = lease = store.grant(ttl_s)
        self._call_s = lease.ttl_s / 3  # a call that takes longer would keep the next renewal waiting too long
        self.record = replace(record, status=SourceStatus.STARTING, ttl_s=float(lease.ttl_s))
        self._is_in_doubt = False  # whether a write that got no answer may still arrive
        try:
            self._revision = store.put(self._key, self.record.to_bytes(), lease_id=lease.lease_id, expected=0)
        except TransportError:
            with suppress(TransportError):
                store.revoke(lease.lease_id)  # it may have been written, the answer alone lost
            raise

    def renew(self) -> None:
        """Renew the lease; a LeaseLostError: it has ended."""
        renew(self._store, self.lease.lease_id, timeout_s=self._call_s)

    def update(self, status: SourceStatus, offer: Offer | None = None, *, timeout_s: float | None = None) -> bool:
        """Write the record where it has changed; returns whether it was written. Without an `offer`, that is as before.

        After a write that got no answer it is written in any case: should that arrive later, it is refused then.
        A ConflictError or LeaseLostError: the record is not ours any more.
        """
        record = replace(self.record, status=status, **({} if offer is None else asdict(offer)))
        if record == self.record and not self._is_in_doubt:
            return False
        raw, lease_id = record.to_bytes(), self.lease.lease_id
        timeout_s = self._call_s if timeout_s is None else timeout_s
        self._is_in_doubt = True
        try:
            revision = self._store.put(self._key, raw, lease_id=lease_id, expected=self._revision, timeout_s=timeout_s)
        except ConflictError:
            entry = self._store.get(self._key, timeout_s=timeout_s)
            if entry is None or entry.value != raw:
                raise
            revision = entry.revision  # an earlier try had arrived, its answer had not
        self._revision, self.record, self._is_in_doubt = revision, record, False
        return True

    def require_there(self) -> None:
        """Raise a LeaseLostError unless the store still has the record as it was written last."""
        entry = self._store.get(self._key, timeout_s=self._call_s)
        if entry is None or entry.value != self.record.to_bytes():
            raise LeaseLostError("the record is not in the store any more", key=self._key)

    def withdraw(self, timeout_s: float) -> None:
        """Write "stale", then end the lease, and the record with it, also where no write is taken."""
        try:
            with suppress(ConflictError, LeaseLostError):
                self.update(SourceStatus.STALE, timeout_s=timeout_s / 2)
        finally:
            self._store.revoke(self.lease.lease_id, timeout_s=timeout_s / 2)


def next_epoch(store: Store, worker_id: str, *, known: int) -> int:
    """A new epoch of a worker id, larger than any before; a ConflictError: another publisher was faster, look again."""
    key = epoch_key(worker_id)
    entry = store.get(key)
    last = int(entry.value) if entry is not None and entry.value.isdigit() else 0
    epoch = max(last, known) + 1  # a store that was wiped has forgotten the one that is known
    store.put(key, str(epoch).encode(), expected=0 if entry is None else entry.revision)
    return epoch


class SourceChange(NamedTuple):
    """One change of what is known: "add", "update" or "remove", for which `record` is as it was known."""

    kind: Literal["add", "update", "remove"]
    record: SourceRecord


class SourceView:
    """What is known of the sources of a store: see the module."""

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

        For `grace_s` a source that is not in it stays known: after a reset the store is empty, though its sources live
        and are about to say so again. One that has a grace already keeps that.
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
        record: SourceRecord | None = None
        with suppress(ProtocolError):
            record = SourceRecord.from_bytes(value)
        if record is None or source_key(record.worker_id) != key:
            self.malformed += 1
            return []
        self._missing_until_s.pop(key, None)
        before = self._known.get(key)
        if before is not None and before.life == record.life:
            changes = [] if before == record else [SourceChange("update", record)]
        else:
            changes = [*self._remove(key), SourceChange("add", record)]
        self._known[key] = record
        return changes

    def _remove(self, key: str) -> list[SourceChange]:
        self._missing_until_s.pop(key, None)
        before = self._known.pop(key, None)
        return [] if before is None else [SourceChange("remove", before)]
