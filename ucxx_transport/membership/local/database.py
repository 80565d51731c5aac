"""One connection to the store's file: opened, known for the file that stands there, and used in transactions."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from ucxx_transport.errors import StoreUnavailableError
from ucxx_transport.membership.local import tables
from ucxx_transport.membership.local.failures import foreign_file, is_busy, translated
from ucxx_transport.membership.local.place import FileIdentity, adopt_file, file_identity, is_known, make_file

__all__ = ["Database"]

ResultT = TypeVar("ResultT")

_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.01
_WAL_BYTES: Final = 4 << 20
_MAKING_ATTEMPTS: Final = 10


class Database:
    """A connection. Not thread-safe, and of no use to a forked child: its owner sees to both."""

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: FileIdentity, store_id: str) -> None:
        self.path = path
        self.identity = identity
        self.store_id = store_id
        self._connection = connection

    @classmethod
    def open(cls, path: Path, *, boot_id: str, until: float, make: bool = True) -> Database | None:
        """Open the store at `path`.

        Args:
            path: its file.
            boot_id: names the boot of the machine: leases of another one are over.
            until: on the monotonic clock, when to give up.
            make: whether to put a fresh store there when none is.

        Returns:
            None when none is there, and none was to be made.

        Raises:
            ConfigError: the file is no store.
            StorePermissionError, StoreUnavailableError: see `failures`.
        """
        for _attempt in range(_MAKING_ATTEMPTS):
            identity = file_identity(path)
            if identity is None:
                if not make:
                    return None
                _make(path, boot_id, until)
                continue
            if not is_known(path, identity):
                _adopt(path, identity, until)
                continue
            connection = _patiently(lambda: _connected(path), path, until)
            try:
                if file_identity(path) == identity:  # so it is that file, not one that has taken its place meanwhile
                    store_id = _settle(connection, path, boot_id, until)
                    return cls(path, connection, identity, store_id)
            except BaseException:
                connection.close()
                raise
            connection.close()
        raise StoreUnavailableError("the store's file is replaced again and again: end who does it", path=str(path))

    def is_current(self) -> bool:
        """Whether the file that stands there is the one that is open here."""
        return file_identity(self.path) == self.identity

    def version(self) -> int:
        """A number that is another one whenever another connection has changed the file."""
        try:
            number: int = self._connection.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error as error:
            raise translated(error, self.path) from error
        return number

    def read(self, body: Callable[[sqlite3.Connection], ResultT], *, until: float) -> ResultT:
        """What `body` returns, all of whose reading is of one moment."""
        return self._run("DEFERRED", body, until)

    def write(self, body: Callable[[sqlite3.Connection], ResultT], *, until: float) -> ResultT:
        """What `body` returns; its changes are written all together, or none when it raises."""
        return self._run("IMMEDIATE", body, until)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with suppress(sqlite3.Error):
            self._connection.close()

    def _run(self, mode: str, body: Callable[[sqlite3.Connection], ResultT], until: float) -> ResultT:
        def once() -> ResultT:
            with _transaction(self._connection, mode) as connection:
                return body(connection)

        return _patiently(once, self.path, until)


def _make(path: Path, boot_id: str, until: float) -> None:
    try:
        make_file(path, lambda fresh: _fill(fresh, boot_id), until=until)
    except sqlite3.Error as error:
        raise translated(error, path) from error


def _adopt(path: Path, identity: FileIdentity, until: float) -> None:
    try:
        if not adopt_file(path, identity, tables.APPLICATION_ID, _renew, until=until):
            raise foreign_file(path)
    except sqlite3.Error as error:
        raise translated(error, path) from error


def _settle(connection: sqlite3.Connection, path: Path, boot_id: str, until: float) -> str:
    """See that it is a store of this version, end the leases of an earlier boot, and return its identity."""

    def look() -> tables.State:
        with _transaction(connection, "DEFERRED") as db:
            marks = (db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0])
            if marks != (tables.APPLICATION_ID, tables.FORMAT):
                raise foreign_file(path)
            return tables.state(db)

    def end_leases() -> None:
        with _transaction(connection, "IMMEDIATE") as db:
            tables.expire(db, 0.0, boot_id)

    found = _patiently(look, path, until)
    if found.boot_id != boot_id:
        _patiently(end_leases, path, until)
    return found.store_id


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


def _patiently(once: Callable[[], ResultT], path: Path, until: float) -> ResultT:
    """What `once` returns, tried again while others have the file locked.

    SQLite's own waiting sleeps up to 100 ms at a time, and in step with others.
    """
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return once()
        except sqlite3.Error as error:
            wait_s = random.uniform(0.5, 1.0) * pause_s  # noqa: S311 - spreads those who wait
            if not is_busy(error) or time.monotonic() + wait_s > until:
                raise translated(error, path) from error
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _connected(path: Path) -> sqlite3.Connection:
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
    connection = _connected(path)
    try:
        connection.execute(f"PRAGMA application_id = {tables.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {tables.FORMAT}")
        with _transaction(connection, "IMMEDIATE"):
            tables.create(connection, boot_id)
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _renew(path: Path) -> None:
    connection = _connected(path)
    try:
        with _transaction(connection, "IMMEDIATE"):
            tables.renew_identity(connection)
    finally:
        connection.close()
