"""The store's file: where it lies, how it is made, and the connection that threads share and no fork inherits.

A file is known by its device and inode: one that was deleted, and made again by the next call, is another store. It is
made under another name and then renamed: whole when it is first seen. SQLite knows the log beside it (`-wal`, `-shm`)
by its name alone: what a deleted file has left there is removed before another is made.

SQLite keeps one table of locks a process and file. A forked child inherits the table but none of the locks: what it
opens would take for held what is not (https://www.sqlite.org/howtocorrupt.html, 2.6). So a process makes one call at a
time, a fork waits for its end and closes every connection, and the next use, in parent or child, opens another.

The default is a folder of this user's own beside the rings (`ring.folder`): processes that see the same rings see the
same store, nothing of it outlives the machine's boot, and it is never on a network. Its name does not begin as the
rings' do, which are swept by name.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from ucxx_transport.backoff import random_pause_s
from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import file_system
from ucxx_transport.ring.segment import segment_folder

ResultT = TypeVar("ResultT")

_log = get_logger(__name__)

APPLICATION_ID: Final = 0x75635374  # marks the file as a store of this package (`ucSt`)
FORMAT: Final = 2  # of the tables; another one is another package version's

_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.01
_FORK_WAIT_S: Final = 5.0
_WAL_BYTES: Final = 4 << 20
_BESIDE: Final = ("-wal", "-shm", "-journal")

_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_FORBIDDEN: Final = (sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_FULL: Final = "the store's disk is full: free space, or name a file on another disk"
_NO_STORE: Final = "the file is no store, or one of another version of this package: name another, or remove it"
_RIGHTS: Final = "this user may not use the store's file: give it the right to the file and its folder, or name another"
_FAILURES: Final[Mapping[int, tuple[type[TransportError], str]]] = {
    **dict.fromkeys(_BUSY, (StoreUnavailableError, "the store was locked until the deadline: see who is stopped")),
    **dict.fromkeys(_FORBIDDEN, (StorePermissionError, _RIGHTS)),
    sqlite3.SQLITE_NOTADB: (ConfigError, _NO_STORE),
    sqlite3.SQLITE_FULL: (StoreUnavailableError, _FULL),
    sqlite3.SQLITE_CORRUPT: (StoreUnavailableError, "the store's file is damaged: remove it; its users publish again"),
}
"""By SQLite's result code (https://www.sqlite.org/rescode.html)."""
_OTHER: Final = (StoreUnavailableError, "the store's file cannot be used: see to the folder and the space on its disk")
_NETWORK_FILE_SYSTEMS: Final = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "pvfs2"),
    *("smb3", "smbfs", "wekafs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"),
}
"""SQLite's wal-index is memory that all its users map: machines do not share it over these."""


def default_path() -> Path:
    """The file of this user on this machine; its folder is made where it is missing, refused where not private."""
    memory = segment_folder()
    memory_is_there = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    folder = (memory if memory_is_there else Path(tempfile.gettempdir())) / f"ucxx-stores-{os.geteuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        text = "the folder of the default store is not this user's alone: remove it, or name a file by local:///path"
        raise StorePermissionError(text, path=str(folder), uid=found.st_uid, mode=oct(found.st_mode))
    return folder / "default.sqlite"


def checked_path(path: Path) -> Path:
    """The file itself, without symbolic links; a ConfigError or StorePermissionError where no store can lie."""
    real = Path(os.path.realpath(path))
    try:
        parent = real.parent.stat()
        mode = real.stat().st_mode if real.exists() else stat.S_IFREG
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError("the store's folder does not exist: make it, or name another", path=str(real)) from None
    except PermissionError as error:
        raise _failed(sqlite3.SQLITE_PERM, real, error) from error
    if not stat.S_ISREG(mode) or not stat.S_ISDIR(parent.st_mode):
        raise ConfigError("a store is a file, and something else is there: name another", path=str(real))
    if (kind := file_system(parent.st_dev)) in _NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"the store would lie on a network file system ({kind}), where it would be damaged: name a local file, "
            "or use etcd:// for several machines",
            path=str(real),
        )
    return real


class StoreFile:
    """The file, used in transactions: the first opens it, or makes it by the statements in `tables`. Thread-safe."""

    def __init__(self, path: Path, tables: str, timeout_s: float) -> None:
        self.path = path
        self.is_closed = False
        self._tables, self._timeout_s = tables, timeout_s
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def transact(self, mode: str, body: Callable[[sqlite3.Connection], ResultT], timeout_s: float | None) -> ResultT:
        """What `body` returns, in one transaction that is tried again while others have the file locked.

        SQLite's own waiting sleeps up to 100 ms at a time, in step with others, and would keep other threads out.
        """
        limit_s = self._timeout_s if timeout_s is None else checked_seconds(timeout_s, "timeout_s")
        until, pid, attempt = time.monotonic() + limit_s, os.getpid(), 0
        while True:
            attempt += 1
            begun: list[bool] = []
            try:
                _calls.begin(self.path, until, begun)
                return self._transact(mode, body, pid)
            except (sqlite3.Error, OSError) as error:
                if pid != os.getpid():
                    text = "this process was forked in the middle of a call, which its parent makes: call again"
                    raise StoreUnavailableError(text, path=str(self.path)) from error
                code = _code_of(error, self.path)
                wait_s = random_pause_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
                if code not in _BUSY or time.monotonic() + wait_s > until:
                    raise _failed(code, self.path, error) from error
            finally:
                if True in begun:  # not in a function, at whose start an interrupt may come
                    _calls.caller = None
                    _calls.lock.release()
            time.sleep(wait_s)

    def check_open(self) -> None:
        """Raise a ConfigError once this is closed."""
        if self.is_closed:
            raise ConfigError("the store is closed: open another", path=str(self.path))

    def close(self) -> None:
        """Refuse from now on. Calls under way are waited for. Idempotent."""
        self.is_closed = True
        with suppress(TransportError):  # the next call, which is this one, disconnects
            self.transact("DEFERRED", lambda _: None, None)

    def disconnect(self) -> None:
        """Close the connection, for the next call to open another."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _transact(self, mode: str, body: Callable[[sqlite3.Connection], ResultT], pid: int) -> ResultT:
        _calls.check(self.path)
        if self.is_closed:
            self.disconnect()
        self.check_open()
        db = self._connection
        if db is None or _identity(self.path) != self._file:  # it was deleted
            db = self._reconnect()
        db.rollback()  # of a call that was interrupted in the end of this function
        try:
            db.execute(f"BEGIN {mode}")
            result = body(db)
            if pid != os.getpid():  # a forked child has inherited no lock, and leaves the call to its parent
                raise sqlite3.ProgrammingError("forked in the middle of a call")
            db.commit()
        finally:
            with suppress(sqlite3.Error):  # a fork in `body` has closed it
                db.rollback()
        return result

    def _reconnect(self) -> sqlite3.Connection:
        """Open the file, and make it where none is; a BlockingIOError where another process does so just now."""
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder, which stays where files come and go
            if self._connection is not None:
                _log.warning("store_replaced", path=str(self.path))
            if _identity(self.path) is None:
                _make(self.path, self._tables)
            self.disconnect()  # not before: it writes the log into its file, which was emptied perhaps
            found, self._file = _identity(self.path), None
            _calls.files.add(self)  # before the first statement: it takes locks, and a fork has to close what has them
            try:
                db = self._connection = _opened(self.path)
                _settle(db, self.path)
            except BaseException:
                self.disconnect()
                raise
            self._file = found
        finally:
            os.close(fd)
        return db


class _Calls:
    """The calls of this process, one at a time, some 20 to 100 µs each; and its forks, which come in between.

    Attributes:
        files: those that have a connection.
        is_torn: this is a child with a connection that its parent had in use: it may use no store.
        lock: taken by `begin` for a call, which sets `caller` back, and releases it, at its end.
        caller: the thread whose call it is.
    """

    def __init__(self) -> None:
        self.files: weakref.WeakSet[StoreFile] = weakref.WeakSet()
        self.is_torn = False
        self.lock = threading.Lock()
        self.caller: int | None = None
        self._is_paused = self._are_closed = False
        os.register_at_fork(
            before=self._pause, after_in_parent=self._resume, after_in_child=partial(self._resume, in_child=True)
        )

    def begin(self, path: Path, until: float, begun: list[bool]) -> None:
        """Wait for the end of the others' calls; then `begun` has a True, and its owner ends this one."""
        self.check(path)
        # in one call of C: an interrupt comes before the lock is taken, or after `begun` says so
        begun.extend(map(self.lock.acquire, (True,), (max(0.0, until - time.monotonic()),)))
        if True not in begun:
            raise StoreUnavailableError("other threads' calls took until the deadline", path=str(path))
        self.caller = threading.get_ident()

    def check(self, path: Path) -> None:
        """Raise a StoreUnavailableError if this process can use no store."""
        if self.is_torn:
            text = "this process was forked in the middle of another's call: start such a process afresh, not by a fork"
            raise StoreUnavailableError(text, path=str(path))

    def _pause(self) -> None:
        in_a_call = self.caller == threading.get_ident()  # a signal handler forks: the parent makes it again
        self._is_paused = not in_a_call and self.lock.acquire(timeout=_FORK_WAIT_S)
        # Not where another thread's call takes longer, or this one's just begins or ends: it has its connection in use.
        self._are_closed = in_a_call or self._is_paused
        if self._are_closed:
            for file in self.files:
                file.disconnect()

    def _resume(self, *, in_child: bool = False) -> None:
        if self._is_paused:
            self.lock.release()
        if in_child and not self._are_closed:
            self.is_torn = True


_calls = _Calls()


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file that is there; None: none, or an empty one, which no store is."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.stat(path)
        return (found.st_dev, found.st_ino) if found.st_size else None
    return None


def _make(path: Path, tables: str) -> None:
    fresh = path.with_name(f".{path.name}.fresh")
    _remove(path, *_BESIDE)
    try:
        _remove(fresh, "", *_BESIDE)  # of a maker that was killed
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        with closing(_opened(fresh)) as db:
            marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}"
            db.executescript(f"{marks}; BEGIN; {tables}; COMMIT; PRAGMA journal_mode = WAL")
        fresh.rename(path)
    finally:
        _remove(fresh, "", *_BESIDE)


def _opened(path: Path) -> sqlite3.Connection:
    """A connection that makes no file and waits for no lock; nothing is read yet."""
    url = f"file:{quote(str(path))}?mode=rw"
    return sqlite3.connect(url, uri=True, timeout=0, isolation_level=None, check_same_thread=False)


def _settle(db: sqlite3.Connection, path: Path) -> None:
    """Prepare a file that was opened; a ConfigError: it is no store of this version."""
    db.execute("PRAGMA synchronous = NORMAL")  # a power cut ends all leases anyway
    db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    marks = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if marks != [APPLICATION_ID, FORMAT]:
        raise _failed(sqlite3.SQLITE_NOTADB, path)


def _remove(path: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _code_of(error: sqlite3.Error | OSError, path: Path) -> int:
    """SQLite's result code, or the one that means the same as an error of the system's; 0: neither."""
    if isinstance(error, PermissionError):
        return sqlite3.SQLITE_PERM
    if isinstance(error, BlockingIOError | sqlite3.ProgrammingError):  # the latter: a fork has closed the connection
        return sqlite3.SQLITE_BUSY
    code = int(getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    return 0 if code == sqlite3.SQLITE_CANTOPEN and not path.exists() else code


def _failed(code: int, path: Path, reason: object = "") -> TransportError:
    kind, text = _FAILURES.get(code, _OTHER)
    return kind(text, path=str(path), reason=str(reason))
