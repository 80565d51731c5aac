"""Stores that a test can take away, bring back and wipe: the embedded one as a file, etcd as a process."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Protocol

from ucxx_transport import open_store

__all__ = ["LocalStoreHost", "StoreHost"]


class StoreHost(Protocol):
    """Where a store lives."""

    url: str

    def down(self) -> None:
        """From now on it answers nobody."""

    def up(self) -> None:
        """It answers again, with the data it had."""

    def wipe(self) -> None:
        """It answers, and has lost all its data."""

    def close(self) -> None:
        """Leave nothing behind."""


class LocalStoreHost:
    """A file. What takes it away is somebody who holds its lock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "store.db"
        self.url = f"local://{self._path}"
        self._holder: sqlite3.Connection | None = None
        with open_store(self.url) as store:
            store.identity()

    def down(self) -> None:
        self._holder = sqlite3.connect(self._path, isolation_level=None)
        self._holder.execute("BEGIN IMMEDIATE")

    def up(self) -> None:
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.execute("ROLLBACK")
            holder.close()

    def wipe(self) -> None:
        for file in self._path.parent.glob(f"{self._path.name}*"):
            file.unlink()

    def close(self) -> None:
        self.up()
