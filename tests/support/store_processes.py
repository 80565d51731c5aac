"""What other processes do to a store in the tests: targets of a spawned `multiprocessing.Process`."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConflictError
from ucxx_transport.registry import open_store
from ucxx_transport.registry.store import Store

__all__ = ["elsewhere", "hold_lease", "increment", "increments", "take_once"]

Settings = Mapping[str, Any]
_spawn = multiprocessing.get_context("spawn")


@contextmanager
def elsewhere(
    target: Callable[..., None], url: str, settings: Settings, *words: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run `target(url, settings, pipe, *words)` in a process; killed at the end if it still runs."""
    near, far = _spawn.Pipe()
    process = _spawn.Process(target=target, args=(url, dict(settings), far, *words))
    process.start()
    far.close()
    try:
        yield process, near
    finally:
        process.kill()
        process.join()
        process.close()
        near.close()


def hold_lease(url: str, settings: Settings, pipe: Connection, ttl_s: float, keys: Sequence[str]) -> None:
    """Put the keys under one lease and say which; then do nothing until killed."""
    store = open_store(url, StoreConfig(**settings))
    lease = store.grant(ttl_s)
    for key in keys:
        store.put(key, b"held", lease_id=lease.lease_id)
    pipe.send(lease)
    signal.pause()


def increment(url: str, settings: Settings, pipe: Connection, key: str, times: int) -> None:
    """When told to, count a key up so often; say when done."""
    with open_store(url, StoreConfig(**settings)) as store:
        store.identity()
        pipe.send("ready")
        pipe.recv()
        increments(store, key, times)
        pipe.send("done")


def increments(store: Store, key: str, times: int) -> None:
    """Count a key up so often, each time by one who has seen the last count."""
    for _ in range(times):
        while True:
            found = store.get(key)
            count, revision = (int(found.value), found.revision) if found else (0, 0)
            try:
                store.put(key, str(count + 1).encode(), expected=revision)
                break
            except ConflictError:
                continue


def take_once(url: str, settings: Settings, pipe: Connection, keys: Sequence[str], name: str) -> None:
    """When told to, try to be the one who makes each key; say which were won."""
    with open_store(url, StoreConfig(**settings)) as store:
        store.identity()
        pipe.send("ready")
        pipe.recv()
        won: list[str] = []
        for key in keys:
            try:
                store.put(key, name.encode(), expected=0)
                won.append(key)
            except ConflictError:
                continue
        pipe.send(won)
