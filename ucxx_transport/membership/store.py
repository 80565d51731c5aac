"""The Store protocol: what membership needs of a key-value store, and what each answer means.

A store keeps keys with values, under leases or for ever. Every change of its content has a revision, which only grows;
a key's own revision is that of its last change. Keys are text below the store's namespace, without a leading "/".

| what went wrong                                      | raised                  | the caller                          |
|------------------------------------------------------|-------------------------|-------------------------------------|
| no answer, refused, no leader, the deadline passed   | `StoreUnavailableError` | tries again                         |
| the lease has run out or was revoked                 | `LeaseLostError`        | asks for another and puts again     |
| `expected` is not the key's revision                 | `ConflictError`         | reads again                         |
| the watch's revision is no longer kept               | `CompactedError`        | takes a snapshot, watches from it   |
| the store's data are others than before (wiped)      | `StoreResetError`       | starts over                         |
| the store refuses this user                          | `StorePermissionError`  | gives up: fix the store's rights    |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What keeps keys alive as long as it is renewed every `ttl_s` seconds: not less than asked for, maybe more."""

    lease_id: int
    ttl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key, with the revision of its last change, and the lease it dies with; None: it stays."""

    key: str
    value: bytes
    revision: int
    lease_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys below a prefix, in order, at one moment.

    Attributes:
        revision: the store's, then: a watch after it misses nothing and repeats nothing.
        entries: the keys.
        identity: a random word that the store's data keep: another one later means that the data were wiped. "" in a
            store that has none yet, and to which this user may give none.
    """

    revision: int
    entries: tuple[Entry, ...]
    identity: str

    def __iter__(self) -> Iterator[Entry]:
        """The entries."""
        return iter(self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Entry):
    """One change of one key; deleted, by hand or with its lease, it has no value and no lease from then on."""

    kind: Literal["put", "delete"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All changes of one revision below a watch's prefix: a watch after it goes on where this one was cut off."""

    revision: int
    events: tuple[Event, ...]


class Watch(Protocol):
    """Changes below a prefix, in order, none left out. Used by one thread; close it, or use `with`."""

    def next(self, timeout_s: float) -> Batch | None:
        """The next batch.

        Returns:
            None when none came within `timeout_s`.

        Raises:
            StoreUnavailableError: the store cannot be reached. Call again: the watch goes on after its last batch, as a
                new one after that batch's revision would. Or it is closed, or another process's: then for good.
            CompactedError, StoreResetError, StorePermissionError: see the module's table; for good. A wiped store is
                noticed within about two seconds while `next` is being called, even when nothing changes in it.
        """

    def close(self) -> None:
        """End the watch. Idempotent; callable from another thread, whose `next` then raises `StoreUnavailableError`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Store(Protocol):
    """A key-value store with leases, revisions and watches. Thread-safe; close it, or use `with`.

    Every call ends within `timeout_s` (None: the store's configured one), by an answer or an error of that table; or by
    a `ConfigError`, which names what no call can mend: an argument, or what is found where the store should be. A
    forked child may go on using a store, but not a watch.
    """

    @property
    def url(self) -> str:
        """Where it is, without secrets."""

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        """A new lease that lives at least `ttl_s` seconds unless it is renewed."""

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        """Renew a lease; returns the seconds that it now has.

        Raises:
            LeaseLostError: it has ended, or the store never knew it.
        """

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        """End a lease, and with it its keys, in one revision. One that has ended already is no error."""

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        """One key, or None."""

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Write a key; returns the revision of this change.

        Args:
            key: below the store's namespace.
            value: its bytes, 1 MiB at most.
            lease_id: the lease it dies with; None: it stays.
            expected: the revision the key must have now; 0: it must not exist; None: any.
            timeout_s: see the class. After a `StoreUnavailableError` it may have been written or not: read it.

        Raises:
            ConflictError: the key has another revision; nothing was written.
            LeaseLostError: the lease has ended; nothing was written.
        """

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        """Remove a key; returns whether it was there.

        Raises:
            ConflictError: the key exists with another revision than `expected`.
        """

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        """All keys that begin with `prefix`, at one revision."""

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> Watch:
        """Changes below `prefix` whose revision is larger than `after`. Its `next` raises what is wrong with it.

        Args:
            prefix: of the keys.
            after: the revision of a snapshot or of the last batch. Larger than the store's own: the store was reset.
            identity: of the snapshot; "": the store is taken as it is.
        """

    def close(self) -> None:
        """Close connections and files, and end the watches. Leases live on. Idempotent.

        Every later call is a `ConfigError`.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
