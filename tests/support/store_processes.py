"""What other processes do to a store in the tests: targets of a `multiprocessing.Process`.

They are forked by a server that has imported this module and nothing that has threads: one starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConflictError, StoreUnavailableError
from ucxx_transport.membership import open_store
from ucxx_transport.membership.store import Store, Watch

__all__ = ["elsewhere", "fork", "hold_lease", "increment", "increments", "processes", "start_server", "take_once"]

Settings = Mapping[str, Any]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


def start_server() -> None:
    """Start what forks the processes, which stays until the tests end."""
    forkserver.ensure_running()


@contextmanager
def elsewhere(
    target: Callable[..., None], url: str, settings: Settings, *words: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run `target(url, settings, pipe, *words)` in a process; killed at the end if it still runs."""
    near, far = processes.Pipe()
    process = processes.Process(target=target, args=(url, dict(settings), far, *words))
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
    """Put the keys under one lease and send it; then do nothing until killed."""
    store = open_store(url, StoreConfig(**settings))
    lease = store.grant(ttl_s)
    for key in keys:
        store.put(key, b"held", lease_id=lease.lease_id)
    pipe.send(lease)
    signal.pause()


def increment(url: str, settings: Settings, pipe: Connection, key: str, times: int) -> None:
    """On a message, count a key up so often; send when done."""
    with open_store(url, StoreConfig(**settings)) as store:
        store.snapshot()
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
    """On a message, try to create each key first; send which ones were."""
    with open_store(url, StoreConfig(**settings)) as store:
        store.snapshot()
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


def fork(url: str, settings: Settings, pipe: Connection) -> None:
    """Use a store before, during and after a fork, in parent and child at once; send how the child ended."""
    with open_store(url, StoreConfig(**settings)) as store:
        store.put("before", b"")
        watch = store.watch(after=store.snapshot().revision)
        watch.next(0)
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                store.put("busy", b"")

        busy = threading.Thread(target=write)
        busy.start()  # so that a lock may be held in the moment of the fork
        child = os.fork()
        if child == 0:
            os._exit(_child(store, watch))
        increments(store, "count", 20)
        status = os.waitpid(child, 0)[1]
        stop.set()
        busy.join()
        watch.close()
        store.put("after", b"")
        pipe.send(os.waitstatus_to_exitcode(status))


def _child(store: Store, watch: Watch) -> int:
    """What a forked child does; 0 when all of it went well."""
    try:
        increments(store, "count", 20)
        with store.watch("own", after=store.snapshot().revision) as own:
            store.put("own", b"")
            assert own.next(10) is not None
        try:
            watch.next(1)
        except StoreUnavailableError:
            watch.close()
            store.close()
            return 0
    except BaseException:  # noqa: BLE001 - the edge of the process
        traceback.print_exc()
    return 1
