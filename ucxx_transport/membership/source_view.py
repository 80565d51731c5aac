"""The source view: the sources a watcher knows, and what a snapshot or a batch changes in them.

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

from dataclasses import dataclass
from typing import Literal

from ucxx_transport.errors import ProtocolError
from ucxx_transport.membership.keys import source_key, worker_id_of
from ucxx_transport.membership.source_record import SourceRecord
from ucxx_transport.membership.store import Batch, Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceChange:
    """One change of what is known: "add", "update" or "remove", for which `record` is as it was known."""

    kind: Literal["add", "update", "remove"]
    record: SourceRecord


class SourceView:
    """What is known of the sources of a store, by worker id. Keys lie below `SOURCES`."""

    def __init__(self) -> None:
        self._known: dict[str, SourceRecord] = {}
        self._missing_until_s: dict[str, float] = {}
        self.malformed = 0

    @property
    def sources(self) -> tuple[SourceRecord, ...]:
        """All known, by worker id."""
        return tuple(self._known[worker_id] for worker_id in sorted(self._known))

    def get(self, worker_id: str) -> SourceRecord | None:
        """One source, or None."""
        return self._known.get(worker_id)

    def take_snapshot(self, snapshot: Snapshot, *, now: float, grace_s: float = 0.0) -> list[SourceChange]:
        """What a whole picture of the store changes.

        Args:
            snapshot: of all sources.
            now: seconds.
            grace_s: how long a source that is not in it is still taken for known: after a reset the store is empty,
                though its sources live and are about to say so again. One that has a grace already keeps that.
        """
        changes: list[SourceChange] = []
        there: set[str] = set()
        for entry in snapshot:
            there.add(entry.key)
            changes += self._put(entry.key, entry.value)
        for worker_id in sorted(self._known):
            if source_key(worker_id) in there:
                continue
            if grace_s > 0:
                self._missing_until_s.setdefault(worker_id, now + grace_s)
            elif worker_id not in self._missing_until_s:
                changes += self._remove(worker_id)
        return changes

    def take_batch(self, batch: Batch) -> list[SourceChange]:
        """What the changes of one revision change."""
        changes: list[SourceChange] = []
        for event in batch.events:
            if event.kind == "put":
                changes += self._put(event.key, event.value)
            elif source_key(worker_id := worker_id_of(event.key)) == event.key:
                changes += self._remove(worker_id)
        return changes

    def expire(self, now: float) -> list[SourceChange]:
        """Removes those that are missing since a reset and have not come back in time."""
        late = sorted(worker_id for worker_id, until_s in self._missing_until_s.items() if now >= until_s)
        return [change for worker_id in late for change in self._remove(worker_id)]

    def _put(self, key: str, value: bytes) -> list[SourceChange]:
        try:
            record = SourceRecord.from_bytes(value)
        except ProtocolError:
            self.malformed += 1
            return []
        worker_id = record.worker_id
        if source_key(worker_id) != key:
            self.malformed += 1
            return []
        self._missing_until_s.pop(worker_id, None)
        before = self._known.get(worker_id)
        if before == record:
            return []
        self._known[worker_id] = record
        if before is None:
            return [SourceChange(kind="add", record=record)]
        if _life(before) == _life(record):
            return [SourceChange(kind="update", record=record)]
        return [SourceChange(kind="remove", record=before), SourceChange(kind="add", record=record)]

    def _remove(self, worker_id: str) -> list[SourceChange]:
        self._missing_until_s.pop(worker_id, None)
        before = self._known.pop(worker_id, None)
        return [] if before is None else [SourceChange(kind="remove", record=before)]


def _life(record: SourceRecord) -> tuple[int, str, bytes]:
    return record.epoch, record.session, record.ring_id
