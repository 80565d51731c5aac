"""A store in this process's memory, with the real one's meaning: revisions, leases, compare-and-swap, watches.

`MemoryData` is what all share; `MemoryStore` is one user's way to it, which a test can cut off (`reachable`), let hang
after the fact (`lose_answers`), or make lose races (`before_put`, `after_put`). Time is the clock's.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import CompactedError, ConfigError, StoreResetError, StoreUnavailableError
from ucxx_transport.membership.entries import Batch, Entry, Event, Lease, Namespace, Snapshot
from ucxx_transport.membership.store import Store, Watch, check_write, checked_ttl_s, lease_lost, revision_conflict

__all__ = ["FakeClock", "MemoryData", "MemoryStore", "MemoryWatch"]

_LOOK_S = 0.02
"""How often a watch that waits reads the clock, which notifies it of nothing."""


class FakeClock:
    """Seconds that pass when a test advances them."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass
class MemoryData:
    """What the store keeps."""

    clock: Callable[[], float] = time.monotonic
    changed: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))
    identity: str = field(default_factory=lambda: secrets.token_hex(16))
    revision: int = 0
    lease_ids: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    leases: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Lease → its TTL and its end."""

    history: list[Batch] = field(default_factory=list)
    compacted: int = 0
    writes: list[str] = field(default_factory=list)
    """The key of each write by hand, in order."""

    def expire(self) -> None:
        """End the leases whose time is over."""
        now = self.clock()
        with self.changed:
            for lease_id in [lease_id for lease_id, (_, end) in self.leases.items() if end <= now]:
                self.end(lease_id)

    def end(self, lease_id: int) -> None:
        self.leases.pop(lease_id, None)
        keys = sorted(key for key, entry in self.entries.items() if entry.lease_id == lease_id)
        if keys:
            self.change([Event(kind="delete", key=key, value=b"", revision=self.revision + 1) for key in keys])

    def change(self, events: list[Event]) -> None:
        self.revision += 1
        for event in events:
            if event.kind == "put":
                self.entries[event.key] = Entry(
                    key=event.key, value=event.value, revision=event.revision, lease_id=event.lease_id
                )
            else:
                self.entries.pop(event.key, None)
        self.history.append(Batch(revision=self.revision, events=tuple(events)))
        self.changed.notify_all()

    def wipe(self) -> None:
        """Lose everything, as a store does whose disk was replaced."""
        with self.changed:
            self.identity = secrets.token_hex(16)
            self.revision = self.compacted = 0
            for kept in (self.entries, self.leases, self.history):
                kept.clear()
            self.changed.notify_all()

    def compact(self) -> None:
        """Forget the changes up to now."""
        with self.changed:
            self.compacted = self.revision
            self.history.clear()

    def kill(self, lease_id: int) -> None:
        """End a lease as if its time were over."""
        with self.changed:
            self.end(lease_id)


class MemoryStore(Store):
    """A `Store` over shared data."""

    def __init__(self, data: MemoryData | None = None) -> None:
        self.data = MemoryData() if data is None else data
        self.reachable = True
        self.lose_answers = 0
        self.before_put: Callable[[str], None] = lambda _: None
        self.after_put: Callable[[str], object] = lambda _: None
        self.watches: set[MemoryWatch] = set()
        self.url, self.config = "memory://", StoreConfig()
        self._namespace = Namespace("memory")
        self._closed = False

    def beside(self) -> MemoryStore:
        """Another user's way to the same data."""
        return MemoryStore(self.data)

    def cut_off(self) -> None:
        """From now on nothing is answered, and watches break."""
        with self.data.changed:
            self.reachable = False
            self.data.changed.notify_all()

    def _enter(self) -> None:
        if self._closed:
            raise ConfigError("the store is closed: open another", url=self.url)
        if not self.reachable:
            raise StoreUnavailableError("the store does not answer", url=self.url)
        self.data.expire()

    def _leave(self) -> None:
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailableError("the answer was lost", url=self.url)

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        del timeout_s
        ttl_s = checked_ttl_s(ttl_s)
        with self.data.changed:
            self._enter()
            self.data.lease_ids += 1
            self.data.leases[self.data.lease_ids] = (ttl_s, self.data.clock() + ttl_s)
            return Lease(lease_id=self.data.lease_ids, ttl_s=ttl_s)

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        del timeout_s
        check_write(lease_id=lease_id)
        with self.data.changed:
            self._enter()
            ttl_s, _ = self._lease(lease_id)
            self.data.leases[lease_id] = (ttl_s, self.data.clock() + ttl_s)
            return ttl_s

    def _lease(self, lease_id: int) -> tuple[float, float]:
        if lease_id not in self.data.leases:
            raise lease_lost(lease_id)
        return self.data.leases[lease_id]

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        del timeout_s
        check_write(lease_id=lease_id)
        with self.data.changed:
            self._enter()
            self.data.end(lease_id)

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        del timeout_s
        self._namespace.stored(key)
        with self.data.changed:
            self._enter()
            return self.data.entries.get(key)

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        del timeout_s
        self._namespace.stored(key)
        check_write(value=value, lease_id=lease_id, expected=expected)
        self.before_put(key)
        with self.data.changed:
            self._enter()
            self._expect(key, expected)
            if lease_id is not None:
                self._lease(lease_id)
            revision = self.data.revision + 1
            self.data.change([Event(kind="put", key=key, value=value, revision=revision, lease_id=lease_id)])
            self.data.writes.append(key)
            self._leave()
        self.after_put(key)
        return revision

    def _expect(self, key: str, expected: int | None) -> None:
        entry = self.data.entries.get(key)
        found = 0 if entry is None else entry.revision
        if expected is not None and found != expected:
            raise revision_conflict(self._namespace.stored(key), expected, found)

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        del timeout_s
        self._namespace.stored(key)
        check_write(expected=expected)
        with self.data.changed:
            self._enter()
            if key not in self.data.entries:
                return False
            self._expect(key, expected)
            self.data.change([Event(kind="delete", key=key, value=b"", revision=self.data.revision + 1)])
            return True

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        del timeout_s
        self._namespace.bounds(prefix)
        with self.data.changed:
            self._enter()
            entries = [self.data.entries[key] for key in sorted(self.data.entries) if key.startswith(prefix)]
            return Snapshot(revision=self.data.revision, entries=tuple(entries), identity=self.data.identity)

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> MemoryWatch:
        self._namespace.bounds(prefix)
        with self.data.changed:
            self._enter()
            watch = MemoryWatch(self, prefix, after, identity or self.data.identity)
            self.watches.add(watch)
            return watch

    def close(self) -> None:
        self._closed = True
        for watch in tuple(self.watches):
            watch.close()


class MemoryWatch(Watch):
    """A `Watch` of a `MemoryStore`."""

    def __init__(self, store: MemoryStore, prefix: str, after: int, identity: str) -> None:
        self._store, self._data = store, store.data
        self._prefix, self._after = prefix, after
        self._identity = identity
        self._closed = False

    def next(self, timeout_s: float) -> Batch | None:
        end = time.monotonic() + timeout_s
        with self._data.changed:
            while True:
                batch = self._look()
                left_s = end - time.monotonic()
                if batch is not None or left_s <= 0:
                    return batch
                self._data.changed.wait(min(left_s, _LOOK_S))

    def _look(self) -> Batch | None:
        if self._closed or not self._store.reachable:
            raise StoreUnavailableError("the watch has ended", url=self._store.url)
        self._data.expire()
        if self._identity != self._data.identity or self._after > self._data.revision:
            raise StoreResetError("the store was wiped", url=self._store.url)
        if self._after < self._data.compacted:
            raise CompactedError("the changes are no longer kept", revision=self._after)
        for whole in self._data.history:
            if whole.revision > self._after:
                self._after = whole.revision
                events = tuple(event for event in whole.events if event.key.startswith(self._prefix))
                if events:
                    return Batch(revision=whole.revision, events=events)
        return None

    def close(self) -> None:
        with self._data.changed:
            self._closed = True
            self._data.changed.notify_all()
        with suppress(KeyError):
            self._store.watches.remove(self)
