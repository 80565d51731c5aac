"""`LocalStore`: the Store protocol over one file."""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import StoreResetError, StoreUnavailableError, TransportError
from ucxx_transport.membership.keys import Namespace, checked_expected, checked_lease_id, checked_ttl_s, checked_value
from ucxx_transport.membership.local.content import Content, Row, Step
from ucxx_transport.membership.local.log_file import LogFile, checked_path, default_path
from ucxx_transport.membership.store import Batch, Entry, Event, Lease, Snapshot, Store, Watch

ResultT = TypeVar("ResultT")

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_POLL_S: Final = 0.05


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LocalStore(Store):
    """A store for the processes of one machine, embedded: no server, no port.

    The first call of any process makes it. A lease that has run out is ended by the next call or watch of any process.
    """

    def __init__(
        self,
        path: Path | None = None,
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] = _boot_time,
        boot_id: str | None = None,
    ) -> None:
        """Name the file; it is opened, or made, by the first call.

        Args:
            path: of the file; None: this user's own on this machine (see `local.log_file`).
            config: namespace and time limit.
            clock: of the leases' deadlines: seconds that all processes count alike, and that sleep is part of.
            boot_id: changes when that clock begins again: the leases of another one are over.

        Raises:
            ConfigError: the path can hold no store.
            StorePermissionError: this user may not use it, or another user's folder is where the default lies.
        """
        self._config = config or StoreConfig()
        self._namespace = Namespace(self._config.namespace)
        self._clock = clock
        boot = boot_id or _BOOT_ID.read_text(encoding="ascii").strip()
        self._file = LogFile(checked_path(path or default_path()), boot, lambda content: content.due(clock(), boot))
        self._watches: weakref.WeakSet[LocalWatch] = weakref.WeakSet()

    @property
    def url(self) -> str:
        return self._file.path.as_uri().replace("file://", "local://", 1)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r}, namespace={self._config.namespace!r})"

    def identity(self, *, timeout_s: float | None = None) -> str:
        return self._read(lambda _: self._file.store_id, timeout_s)

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        lease = Lease(lease_id=secrets.randbelow((1 << 63) - 1) + 1, ttl_s=checked_ttl_s(ttl_s))
        self._write(lambda content: content.granting(lease.lease_id, lease.ttl_s, self._clock()), timeout_s)
        return lease

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        checked_lease_id(lease_id)
        return self._write(lambda content: content.renewing(lease_id, self._clock()), timeout_s)

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        checked_lease_id(lease_id)
        self._write(lambda content: content.ending(lease_id), timeout_s)

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        stored = self._namespace.stored(key)
        found = self._read(lambda content: content.entries.get(stored), timeout_s)
        return None if found is None else self._entry(found)

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        stored = self._namespace.stored(key)
        checked_value(value)
        checked_expected(expected)
        if lease_id is not None:
            checked_lease_id(lease_id)
        return self._write(lambda content: content.putting(stored, value, lease_id, expected), timeout_s)

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self._namespace.stored(key)
        checked_expected(expected)
        return self._write(lambda content: content.deleting(stored, expected), timeout_s)

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self._namespace.bounds(prefix)
        revision, rows = self._read(lambda content: (content.revision, content.rows(first, end)), timeout_s)
        return Snapshot(revision=revision, entries=tuple(map(self._entry, rows)))

    def watch(self, prefix: str = "", *, after: int) -> LocalWatch:
        self._file.check_open()
        watch = LocalWatch(self._file, self._namespace, prefix, after=after, timeout_s=self._config.timeout_s)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        for watch in list(self._watches):
            watch.close()
        self._file.close()

    def _entry(self, row: Row) -> Entry:
        return Entry(key=self._namespace.key(row.key), value=row.value, revision=row.revision, lease_id=row.lease_id)

    def _read(self, body: Callable[[Content], ResultT], timeout_s: float | None) -> ResultT:
        return self._file.read(body, until=self._until(timeout_s))

    def _write(self, decide: Callable[[Content], tuple[list[Step], ResultT]], timeout_s: float | None) -> ResultT:
        return self._file.write(decide, until=self._until(timeout_s))

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._config.timeout_s if timeout_s is None else timeout_s)


class LocalWatch(Watch):
    """Changes below a prefix: looks at the file 20 times a second, and ends leases that are over."""

    def __init__(self, file: LogFile, namespace: Namespace, prefix: str, *, after: int, timeout_s: float) -> None:
        """Nothing is read yet.

        Args:
            file: the store's; its identity now, where it is known, is the one that is watched.
            namespace: of the keys.
            prefix: of the keys.
            after: the revision after which changes are wanted.
            timeout_s: how long a locked file is tolerated.
        """
        self._file = file
        self._key = namespace.key
        self._first, self._end = namespace.bounds(prefix)
        self._after = after
        self._timeout_s = timeout_s
        self._store_id = file.store_id
        self._locked_since: float | None = None
        self._batches: deque[Batch] = deque()
        self._closing = threading.Event()
        self._pid = os.getpid()

    def next(self, timeout_s: float) -> Batch | None:
        until = time.monotonic() + max(0.0, timeout_s)
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch again after a fork", pid=self._pid)
        while True:
            self._check_open()
            if not self._batches:
                try:
                    self._fetch()
                except TransportError:
                    self._check_open()  # closed in the meantime: that is what its user should know
                    raise
            if self._batches:
                return self._batches.popleft()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return None
            self._closing.wait(min(left_s, _POLL_S))

    def close(self) -> None:
        self._closing.set()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the watch is closed", path=str(self._file.path))

    def _fetch(self) -> None:
        """Take what has changed, after what is due is done: at a later poll where the file is locked, if tolerated."""
        now = time.monotonic()
        try:
            self._file.read(self._take, until=now + _POLL_S)
        except StoreUnavailableError:
            self._locked_since = self._locked_since or now
            if now - self._locked_since > self._timeout_s:
                raise
        else:
            self._locked_since = None

    def _take(self, content: Content) -> None:
        if self._store_id not in {"", self._file.store_id}:
            raise StoreResetError("the store's file was deleted or replaced: start over", path=str(self._file.path))
        for revision, changes in content.changes(self._first, self._end, after=self._after):
            events = (
                Event(kind=one.kind, key=self._key(one.key), value=one.value, revision=revision, lease_id=one.lease_id)
                for one in changes
            )
            self._batches.append(Batch(revision=revision, events=tuple(events)))
        self._store_id, self._after = self._file.store_id, content.revision
