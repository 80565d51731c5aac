"""What SQLite says, as this package's errors, by result code.

| result codes (https://www.sqlite.org/rescode.html) | raised                                           |
|----------------------------------------------------|--------------------------------------------------|
| BUSY, LOCKED, PROTOCOL                             | `StoreUnavailableError`, once the deadline is up |
| FULL, IOERR, NOMEM, CORRUPT …                      | `StoreUnavailableError`                          |
| PERM, AUTH, READONLY, CANTOPEN                     | `StorePermissionError`                           |
| NOTADB                                             | `ConfigError`                                    |
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError

__all__ = ["foreign_file", "is_busy", "translated"]

_PRIMARY: Final = 0xFF
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_FORBIDDEN: Final = frozenset(
    {sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
)
_REMEDIES: Final = {
    sqlite3.SQLITE_FULL: "the disk of the store is full: free space there, or name a file on another disk",
    sqlite3.SQLITE_CORRUPT: "the store's file is damaged: remove it; whoever uses it publishes anew",
}


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process has the file locked just now."""
    return _code(error) & _PRIMARY in _BUSY


def translated(error: sqlite3.Error, path: Path) -> TransportError:
    """The error that the caller gets."""
    primary = _code(error) & _PRIMARY
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    facts = {"path": str(path), "reason": name, "detail": str(error)}
    if primary == sqlite3.SQLITE_NOTADB:
        return foreign_file(path)
    if primary in _FORBIDDEN:
        return StorePermissionError(
            "this user may not write the store's file: give it the right to the file and its folder", **facts
        )
    if primary in _BUSY:
        return StoreUnavailableError("the store was locked until the deadline: see who is stopped", **facts)
    return StoreUnavailableError(_REMEDIES.get(primary, "the store's file cannot be used: see to its disk"), **facts)


def foreign_file(path: Path) -> ConfigError:
    """The error for a file that is no store of this version of the package."""
    return ConfigError(
        "the file is no store, or one of another version of this package: name another, or remove it", path=str(path)
    )


def _code(error: sqlite3.Error) -> int:
    """The extended result code; 0 for what Python's module itself says, which is no answer of SQLite."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0)
