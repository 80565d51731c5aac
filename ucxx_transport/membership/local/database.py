"""The connection to the store's file: opened by its first use, shared by threads, closed before a fork.

| SQLite's result codes (https://www.sqlite.org/rescode.html) | raised                                           |
|-------------------------------------------------------------|--------------------------------------------------|
| BUSY, LOCKED, PROTOCOL                                      | `StoreUnavailableError`, once the deadline is up |
| FULL, IOERR, NOMEM, CORRUPT …                               | `StoreUnavailableError`                          |
| PERM, AUTH, READONLY, CANTOPEN                              | `StorePermissionError`                           |
| NOTADB                                                      | `ConfigError`                                    |

SQLite keeps one table of locks a process and file. A forked child inherits the table but none of the locks: what it
opens would take for held what is not, and it may not close what it has inherited
(https://www.sqlite.org/howtocorrupt.html, 2.6). So every connection is closed before a fork, and the next use, in
parent or child, opens another.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.local import tables
from ucxx_transport.membership.local.store_file import FileIdentity, file_identity, log_identity, make_file

ResultT = TypeVar("ResultT")

_log = get_logger(__name__)

_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.01
_FORK_WAIT_S: Final = 5.0
_WAL_BYTES: Final = 4 << 20

_PRIMARY: Final = 0xFF
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_FORBIDDEN: Final = frozenset(
    {sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
)
_REMEDIES: Final = {
    sqlite3.SQLITE_FULL: "the disk of the store is full: free space there, or name a file on another disk",
    sqlite3.SQLITE_CORRUPT: "the store's file is damaged: remove it; its users publish again",
}


class Database:
    """The store's file, used in transactions. Thread-safe: the lock is held for one of them, some 20 to 100 µs.

    Attributes:
        path: the file.
        store_id: the identity of the store in the file that was opened last; "" before.
    """

    def __init__(self, path: Path, *, boot_id: str) -> None:
        """Nothing is opened yet; leases of another boot than `boot_id` are over."""
        self.path = path
        self.store_id = ""
        self._boot_id = boot_id
        self._connection: sqlite3.Connection | None = None
        self._file: FileIdentity | None = None
        self._file_log: FileIdentity | None = None
        self._own_changes = 0
        self._closed = False
        self._lock = threading.Lock()
        self._paused = False
        self._forked_in_use = False
        with _registering:
            _databases.add(self)

    def read(self, body: Callable[[sqlite3.Connection], ResultT], *, until: float) -> ResultT:
        """What `body` returns, all of whose reading is of one moment. Raises by the module's table."""
        return self._run("DEFERRED", body, until)

    def write(self, body: Callable[[sqlite3.Connection], ResultT], *, until: float) -> ResultT:
        """What `body` returns; its changes are written all together, or none when it raises. Raises as `read`."""
        return self._run("IMMEDIATE", body, until)

    def version(self, *, until: float) -> tuple[int, int]:
        """A value that is another one whenever the file may have changed. Raises as `read`."""
        # SQLite counts what other connections have changed, from any number on.
        return self.read(lambda db: (self._own_changes, db.execute("PRAGMA data_version").fetchone()[0]), until=until)

    def check_open(self) -> None:
        """Raise a ConfigError once this is closed."""
        if self._closed:
            raise ConfigError("the store is closed: open another", path=str(self.path))

    def close(self, timeout_s: float) -> None:
        """Refuse from now on. Calls under way are waited for: a signal handler may have interrupted one. Idempotent."""
        self._closed = True
        if self._lock.acquire(timeout=timeout_s):
            try:
                self._disconnect()
            finally:
                self._lock.release()

    def pause(self, timeout_s: float) -> None:
        """Close the connection and allow no call until `resume`. A call under way is waited for, if it ends in time."""
        self._paused = self._lock.acquire(timeout=timeout_s)
        if self._paused:
            self._disconnect()

    def resume(self, *, in_child: bool) -> None:
        """Allow calls again, unless this is a forked child and the connection was in use when it was forked."""
        if self._paused:
            self._lock.release()
        elif in_child:
            self._forked_in_use = True
        self._paused = False

    def _run(self, mode: str, body: Callable[[sqlite3.Connection], ResultT], until: float) -> ResultT:
        """One transaction, tried again while others have the file locked.

        SQLite's own waiting sleeps up to 100 ms at a time, in step with others, and would keep other threads out.
        """
        attempt = 0
        while True:
            try:
                with self._connected(until) as connection:
                    try:
                        with _transaction(connection, mode):
                            return body(connection)
                    finally:
                        self._own_changes += mode == "IMMEDIATE"
            except sqlite3.Error as error:
                attempt += 1
                jitter = random.random()  # noqa: S311 - spreads those who wait
                wait_s = pause_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, jitter=jitter)
                if _primary_code(error) not in _BUSY or time.monotonic() + wait_s > until:
                    raise self._translated(error) from error
            time.sleep(wait_s)

    @contextmanager
    def _connected(self, until: float) -> Iterator[sqlite3.Connection]:
        """The connection to the file that is there now: another one when it was deleted or replaced."""
        if self._forked_in_use:
            raise StoreUnavailableError(
                "the fork came in the middle of a call: open the store again", path=str(self.path)
            )
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreUnavailableError("other threads' calls took until the deadline", path=str(self.path))
        try:
            self.check_open()
            if self._connection is None or file_identity(self.path) != self._file:
                self._reconnect(until)
            assert self._connection is not None
            yield self._connection
        finally:
            self._lock.release()

    def _reconnect(self, until: float) -> None:
        def fill(fresh: Path) -> None:
            _fill(fresh, self._boot_id)

        if self._connection is not None:
            _log.warning("store_replaced", path=str(self.path), store_id=self.store_id)
            make_file(self.path, fill, until=until, stale_log=self._file_log)
            self._disconnect()
        while True:
            identity = file_identity(self.path)
            if identity is None:
                make_file(self.path, fill, until=until)
                continue
            try:
                if self._connect(identity):
                    return
            except sqlite3.Error:
                if file_identity(self.path) == identity:
                    raise
            if time.monotonic() > until:
                raise StoreUnavailableError("the store's file is replaced again and again", path=str(self.path))

    def _connect(self, identity: FileIdentity) -> bool:
        """Open the file, if it is still this one."""
        connection = _opened(self.path)
        try:
            store_id = self._settled(connection)
            if file_identity(self.path) == identity:
                self._connection, self._file, self.store_id = connection, identity, store_id
                self._file_log = log_identity(self.path)
                self._own_changes += 1
        finally:
            if self._connection is not connection:
                connection.close()
        return self._connection is not None

    def _settled(self, connection: sqlite3.Connection) -> str:
        """See that it is a store of this version, end the leases of an earlier boot, and return its identity."""
        with _transaction(connection, "DEFERRED") as db:
            marks = (db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0])
            if marks != (tables.APPLICATION_ID, tables.FORMAT):
                raise self._foreign_file()
            found = tables.state(db)
        if found.boot_id != self._boot_id:
            with _transaction(connection, "IMMEDIATE") as db:
                tables.expire(db, 0.0, self._boot_id)
        return found.store_id

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _translated(self, error: sqlite3.Error) -> TransportError:
        code = _primary_code(error)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        facts = {"path": str(self.path), "reason": name, "detail": str(error)}
        if code == sqlite3.SQLITE_NOTADB:
            return self._foreign_file()
        if code in _FORBIDDEN:
            return StorePermissionError(
                "this user may not write the store's file: give it the right to the file and its folder", **facts
            )
        if code in _BUSY:
            return StoreUnavailableError("the store was locked until the deadline: see who is stopped", **facts)
        return StoreUnavailableError(_REMEDIES.get(code, "the store's file cannot be used: see to its disk"), **facts)

    def _foreign_file(self) -> ConfigError:
        return ConfigError(
            "the file is no store, or one of another version of this package: name another, or remove it",
            path=str(self.path),
        )


def _primary_code(error: sqlite3.Error) -> int:
    """The result code; 0 for an error of Python's module itself, which is no answer of SQLite."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & _PRIMARY


@contextmanager
def _transaction(connection: sqlite3.Connection, mode: str) -> Iterator[sqlite3.Connection]:
    if connection.in_transaction:  # of a call that was interrupted between two lines of this function
        connection.execute("ROLLBACK")
    connection.execute(f"BEGIN {mode}")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # it was rolled back already when the disk is full
            connection.execute("ROLLBACK")
        raise


def _opened(path: Path) -> sqlite3.Connection:
    """A connection that makes no file and waits for no lock."""
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=0, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut ends all leases anyway
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    except BaseException:
        connection.close()
        raise
    return connection


def _fill(path: Path, boot_id: str) -> None:
    connection = _opened(path)
    try:
        connection.execute(f"PRAGMA application_id = {tables.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {tables.FORMAT}")
        with _transaction(connection, "IMMEDIATE"):
            tables.create(connection, boot_id)
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_registering = threading.Lock()


def _before_fork() -> None:
    until = time.monotonic() + _FORK_WAIT_S
    _registering.acquire()
    for database in list(_databases):
        database.pause(max(0.0, until - time.monotonic()))


def _after_fork(*, in_child: bool) -> None:
    for database in list(_databases):
        database.resume(in_child=in_child)
    _registering.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _after_fork(in_child=False),
    after_in_child=lambda: _after_fork(in_child=True),
)
