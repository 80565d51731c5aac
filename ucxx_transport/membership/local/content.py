"""What a local store holds, replayed from its log: entries, leases, and the newest changes, for watches.

A frame of the log is a list of steps that are done together:

| step                             | does                                                      | revisions        |
|----------------------------------|-----------------------------------------------------------|------------------|
| `["lease", id, ttl_s, deadline]` | grants or renews a lease, until a time on CLOCK_BOOTTIME  | –                |
| `["end", id]`                    | ends a lease and removes its entries                      | one, if any had  |
| `["put", key, value, id]`        | writes an entry; the id is nil for one that stays         | one              |
| `["delete", key]`                | removes an entry                                          | one              |
| `["boot", boot_id]`              | from here on deadlines are of that boot; no lease is left | –                |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, Literal, NamedTuple

from ucxx_transport.errors import CompactedError, StoreResetError
from ucxx_transport.membership.store import lease_lost, revision_conflict

KEPT_REVISIONS: Final = 10_000
KEPT_BYTES: Final = 16 << 20
"""Of keys and values of past changes: a store of small records never meets it."""

Step = Sequence[Any]
"""A row of the module's table; `Any` since each kind has values of its own."""


class Row(NamedTuple):
    """An entry as it is stored."""

    key: bytes
    value: bytes
    revision: int
    lease_id: int | None


class Change(NamedTuple):
    """One change of one key; a deleted one has no value and no lease."""

    kind: Literal["put", "delete"]
    key: bytes
    value: bytes = b""
    lease_id: int | None = None


class Content:
    """The store's content. Every process that replays the same log has the same.

    Methods but `apply` change nothing: those named "-ing" refuse a change, or give its steps and what its caller gets.

    Attributes:
        boot_id: of the boot that the deadlines are of.
        revision: of the last change.
        entries: by key.
    """

    def __init__(self, form: Mapping[str, Any]) -> None:
        """As `form` describes it, which is `to_form`'s, or of a store without anything: `{"boot_id": …}`."""
        self.boot_id: str = form["boot_id"]
        self.revision: int = form.get("revision", 0)
        self.entries = {row[0]: Row(*row) for row in form.get("entries", ())}
        self._leases = {lease_id: (ttl_s, deadline_s) for lease_id, ttl_s, deadline_s in form.get("leases", ())}
        self._past = deque([Change(*change) for change in batch] for batch in form.get("past", ()))
        self._past_bytes = sum(map(_nbytes, self._past))

    def to_form(self) -> dict[str, object]:
        """All of it, as msgpack can write it: what a log begins with."""
        return {
            "boot_id": self.boot_id,
            "revision": self.revision,
            "entries": list(self.entries.values()),
            "leases": [(lease_id, *lease) for lease_id, lease in self._leases.items()],
            "past": list(self._past),
        }

    def apply(self, steps: Iterable[Step]) -> None:
        """Do these steps, which were decided by another process perhaps."""
        for kind, *values in steps:
            match kind:
                case "lease":
                    self._leases[values[0]] = (values[1], values[2])
                case "end":
                    self._leases.pop(values[0], None)
                    self._record([Change("delete", row.key) for row in self._rows_of(values[0])])
                case "boot":
                    self.boot_id = values[0]
                case _:
                    self._record([Change(kind, *values)])

    def _record(self, changes: list[Change]) -> None:
        """Make these changes in one revision, and keep them among the past ones."""
        if not changes:
            return
        self.revision += 1
        for kind, key, value, lease_id in changes:
            if kind == "put":
                self.entries[key] = Row(key, value, self.revision, lease_id)
            else:
                del self.entries[key]
        self._past.append(changes)
        self._past_bytes += _nbytes(changes)
        while len(self._past) > 1 and (len(self._past) > KEPT_REVISIONS or self._past_bytes > KEPT_BYTES):
            self._past_bytes -= _nbytes(self._past.popleft())

    def _rows_of(self, lease_id: int) -> list[Row]:
        return sorted(row for row in self.entries.values() if row.lease_id == lease_id)

    # reading

    @property
    def first_deadline(self) -> float | None:
        """When the next lease ends, seconds of CLOCK_BOOTTIME; None: there is no lease."""
        return min((deadline_s for _, deadline_s in self._leases.values()), default=None)

    def rows(self, first: bytes, end: bytes) -> list[Row]:
        """The entries from `first` on, below `end`, in order."""
        return sorted(row for row in self.entries.values() if first <= row.key < end)

    def changes(self, first: bytes, end: bytes, *, after: int) -> Iterator[tuple[int, list[Change]]]:
        """The revisions after `after` that changed keys from `first` on, below `end`, with those changes.

        Raises:
            StoreResetError: the store has not got as far as `after`.
            CompactedError: what is kept begins later than just after `after`.
        """
        compacted = self.revision - len(self._past)
        if after > self.revision:
            text = "the store has a lower revision than was seen before: it was wiped"
            raise StoreResetError(text, after=after, revision=self.revision)
        if after < compacted:
            text = "the store no longer keeps what followed this revision; take a snapshot"
            raise CompactedError(text, after=after, compacted=compacted)
        for revision, batch in enumerate(islice(self._past, after - compacted, None), start=after + 1):
            found = [change for change in batch if first <= change.key < end]
            if found:
                yield revision, found

    # what a change would be

    def due(self, now: float, boot_id: str) -> list[Step]:
        """End the leases that are over, in the order of their deadlines; after a reboot all of them are."""
        is_rebooted = self.boot_id != boot_id
        leases = ((deadline_s, lease_id) for lease_id, (_, deadline_s) in self._leases.items())
        over = sorted(lease for lease in leases if is_rebooted or lease[0] <= now)
        return [*(["end", lease_id] for _, lease_id in over), *([["boot", boot_id]] if is_rebooted else [])]

    def granting(self, lease_id: int, ttl_s: float, now: float) -> tuple[list[Step], None]:
        """A new lease."""
        return [["lease", lease_id, ttl_s, now + ttl_s]], None

    def renewing(self, lease_id: int, now: float) -> tuple[list[Step], float]:
        """Move a lease's deadline; its time to live. A LeaseLostError: there is no such lease."""
        if lease_id not in self._leases:
            raise lease_lost(lease_id)
        ttl_s, _ = self._leases[lease_id]
        return [["lease", lease_id, ttl_s, now + ttl_s]], ttl_s

    def ending(self, lease_id: int) -> tuple[list[Step], None]:
        """End a lease, if there is such a lease."""
        return [["end", lease_id]] if lease_id in self._leases else [], None

    def putting(self, key: bytes, value: bytes, lease_id: int | None, expected: int | None) -> tuple[list[Step], int]:
        """Write an entry; its revision.

        Raises:
            ConflictError: the key's revision is not the expected one.
            LeaseLostError: there is no such lease.
        """
        self._check(key, expected, 0)
        if lease_id is not None and lease_id not in self._leases:
            raise lease_lost(lease_id)
        return [["put", key, value, lease_id]], self.revision + 1

    def deleting(self, key: bytes, expected: int | None) -> tuple[list[Step], bool]:
        """Remove an entry; whether it is there. A ConflictError: it has another revision than expected."""
        self._check(key, expected, expected)
        is_there = key in self.entries
        return [["delete", key]] if is_there else [], is_there

    def _check(self, key: bytes, expected: int | None, absent: int | None) -> None:
        revision = self.entries[key].revision if key in self.entries else absent
        if expected is not None and revision != expected:
            raise revision_conflict(key, expected, revision or 0)


def _nbytes(changes: Iterable[Change]) -> int:
    return sum(len(change.key) + len(change.value) for change in changes)
