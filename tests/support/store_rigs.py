"""A store of each kind, and what a test may do to it from outside: wipe it, stall it, start it again."""

from __future__ import annotations

import sqlite3
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.support.etcd_server import EtcdServer
from tests.support.memory_store import MemoryData, MemoryStore
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import StoreUnavailableError
from ucxx_transport.membership import open_store
from ucxx_transport.membership.entries import MAX_VALUE_BYTES
from ucxx_transport.membership.store import Store, Watch

__all__ = ["EtcdRig", "LocalRig", "MemoryRig", "StoreRig", "error_of"]

DEADLINE_S = 20.0


def error_of(watch: Watch) -> Exception:
    """The error that ends a watch, whatever batches and outages come before it."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            watch.next(1.0)
        except StoreUnavailableError:
            continue
        except Exception as error:  # noqa: BLE001 - the test judges it
            return error
    raise AssertionError("the watch goes on")


class StoreRig(ABC):
    """One place where data are kept.

    Attributes:
        kind: of the store.
        url: opens it.
        ttl_s: a short lease, for tests in which one must run out, though not while a busy machine uses it.
        settings: what `StoreConfig` needs to reach it; a namespace of the test's own among them.
    """

    kind: str
    url: str
    ttl_s: float

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"namespace": f"test-{uuid.uuid4().hex}", "timeout_s": 10.0}
        self.stack = ExitStack()

    def open(self, **settings: object) -> Store:
        """A store of its own connections; closed at the end."""
        return self.stack.enter_context(open_store(self.url, StoreConfig(**{**self.settings, **settings})))

    @abstractmethod
    def compact(self, store: Store, between: Callable[[], object] = int) -> None:
        """Let the store forget all revisions but the last few; `between` is called now and then."""

    @abstractmethod
    def wipe(self) -> None:
        """Take all data away."""

    @abstractmethod
    def restart(self) -> None:
        """End what serves the store, and start it again with its data."""

    @abstractmethod
    def stall(self) -> None:
        """Let no call be answered until `resume`."""

    @abstractmethod
    def resume(self) -> None:
        """Let calls be answered again."""


class MemoryRig(StoreRig):
    """This process's memory: nothing to restart, and nothing that could stall."""

    kind = "memory"
    url = "memory://"
    ttl_s = 1.5

    def __init__(self) -> None:
        super().__init__()
        self._namespaces: defaultdict[object, MemoryData] = defaultdict(MemoryData)

    def open(self, **settings: object) -> Store:
        chosen = {**self.settings, **settings}
        return self.stack.enter_context(MemoryStore(self._namespaces[chosen["namespace"]]))

    def compact(self, store: Store, between: Callable[[], object] = int) -> None:
        store.put("compact", b"")
        between()
        self._namespaces[self.settings["namespace"]].compact()

    def wipe(self) -> None:
        for data in self._namespaces.values():
            data.wipe()

    def restart(self) -> None:
        raise NotImplementedError

    def stall(self) -> None:
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError


class LocalRig(StoreRig):
    """A file."""

    kind = "local"
    ttl_s = 1.5

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "store"
        self.url = f"local://{self.path}"
        self._lock: sqlite3.Connection | None = None

    def compact(self, store: Store, between: Callable[[], object] = int) -> None:
        for _ in range(20):
            store.put("compact", bytes(MAX_VALUE_BYTES))
            between()

    def wipe(self) -> None:
        self.path.unlink()

    def restart(self) -> None:
        self.stack.close()

    def stall(self) -> None:
        self._lock = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._lock.execute("BEGIN IMMEDIATE")

    def resume(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


class EtcdRig(StoreRig):
    """A server, which the next test may use too: it has a namespace of its own."""

    kind = "etcd"
    ttl_s = 2.0

    def __init__(self, server: EtcdServer) -> None:
        super().__init__()
        self.server = server
        self.url = server.url

    def compact(self, store: Store, between: Callable[[], object] = int) -> None:
        store.put("compact", b"")
        between()
        self.server.compact()

    def wipe(self) -> None:
        self.server.wipe()
        self.server.start()

    def restart(self) -> None:
        self.server.kill()
        self.server.start()

    def stall(self) -> None:
        self.server.pause()

    def resume(self) -> None:
        self.server.resume()
