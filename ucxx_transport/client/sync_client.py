"""SyncUCXXClient: the same calls, blocking."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from ucxx_transport.client.core import ClientCore, Into, LinkFactory
from ucxx_transport.client.loop_thread import LoopThread
from ucxx_transport.client.results import gather_results
from ucxx_transport.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.client.payload import Payload
    from ucxx_transport.client.remote import RemoteReader
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.schema import SlotRef


class SyncUCXXClient:
    """Reads payloads from code without an event loop. Thread-safe; close it with `close()` or `with`.

    Rings of this host are read in the calling thread. A thread with an event loop is started by the first read that
    needs UCX, and serves all of them.

    Args:
        config: settings, as for `UCXXClient`.
        watcher: which sources there are; likewise.
        link_factory: opens the link when one is needed; the default is UCX.
    """

    def __init__(
        self,
        config: ClientConfig | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
    ) -> None:
        self._core = ClientCore(config, link_factory, watcher=watcher)
        self._starting = threading.Lock()
        self._loop: LoopThread | None = None
        self._remote: RemoteReader | None = None

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    @property
    def reader_id(self) -> int:
        """This client's random id, u64, as servers and rings see it."""
        return self._core.reader

    def read(self, ref: SlotRef, *, into: Into | None = None, deadline_s: float | None = None) -> Payload:
        """Read one payload; arguments, result and errors as `UCXXClient.read`."""
        core = self._core
        began_s = time.perf_counter()
        try:
            ring = core.admit(ref, into)
            limit_s = deadline_s if deadline_s is not None else core.config.deadline_s
            if ring is not None:
                return core.read_local(ring, ref, into, limit_s, began_s)
            loop, remote = self._started()
            return loop.call(lambda: self._read_remote(remote, ref, into, limit_s, began_s))
        except TransportError as error:
            core.count_failure(error)
            raise

    def read_many(self, refs: Sequence[SlotRef], *, deadline_s: float | None = None) -> list[Payload | TransportError]:
        """Read payloads, those over UCX concurrently; arguments and result as `UCXXClient.read_many`."""
        core = self._core
        began_s = time.perf_counter()
        until_s = time.monotonic() + (deadline_s if deadline_s is not None else core.config.deadline_s)
        outcomes: list[Payload | TransportError | None] = [None] * len(refs)
        remote: list[int] = []
        for index, ref in enumerate(refs):
            try:
                ring = core.admit(ref, None)
                if ring is None:
                    remote.append(index)
                else:
                    outcomes[index] = core.read_local(ring, ref, None, until_s - time.monotonic(), began_s)
            except TransportError as error:
                core.count_failure(error)
                outcomes[index] = error
        if remote:
            wanted = [refs[index] for index in remote]
            loop, reader = self._started()
            fetched = loop.call(lambda: self._fetch_all(reader, wanted, until_s, began_s))
            for index, outcome in zip(remote, fetched, strict=True):
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def discard(self, refs: Sequence[SlotRef], *, deadline_s: float | None = None) -> int:
        """Let payloads go unread; arguments and result as `UCXXClient.discard`."""
        core = self._core
        limit_s = deadline_s if deadline_s is not None else core.config.deadline_s
        monotonic_until_s = time.monotonic() + limit_s
        found, elsewhere = core.discard_here(refs, limit_s)
        if elsewhere:
            loop, remote = self._started()

            async def discard_all() -> int:
                until_s = asyncio.get_running_loop().time() + monotonic_until_s - time.monotonic()
                return await remote.discard(elsewhere, until_s)

            found += loop.call(discard_all)
        core.counters.add("discarded", found)
        return found

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        loop, remote = self._loop, self._remote
        if loop is None or remote is None:
            return self._core.statistics(remote)

        async def seen() -> ClientStatistics:
            return self._core.statistics(remote)

        try:
            return loop.call(seen)  # UCX's endpoints are that thread's alone
        except ConfigError:  # closed meanwhile
            return self._core.statistics(None)

    def close(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        if self._core.inherited:
            return  # a forked child's copy: thread and connections are its parent's
        atexit.unregister(self.close)
        self._core.close()
        with self._starting:
            loop, remote = self._loop, self._remote
            self._loop = None
        if loop is not None:
            if remote is not None:
                with suppress(ConfigError):  # at the interpreter's exit the thread may have ended before
                    loop.call(remote.connections.aclose)
            loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _started(self) -> tuple[LoopThread, RemoteReader]:
        with self._starting:
            if self._core.closed:
                raise ConfigError("the client is closed; make another")
            if self._loop is None:
                self._remote = self._core.remote()
                self._loop = LoopThread("ucxx-client")
                atexit.register(self.close)  # registered after the loop's own, so run before it
            assert self._remote is not None
            return self._loop, self._remote

    async def _read_remote(
        self, remote: RemoteReader, ref: SlotRef, into: Into | None, limit_s: float, began_s: float
    ) -> Payload:
        content, schema = await remote.read(ref, asyncio.get_running_loop().time() + limit_s)
        return self._core.deliver_remote(ref, content, schema, into, began_s)

    async def _fetch_all(
        self, remote: RemoteReader, refs: Sequence[SlotRef], until_s: float, began_s: float
    ) -> list[Payload | TransportError]:
        async def read(ref: SlotRef) -> Payload:
            try:
                return await self._read_remote(remote, ref, None, until_s - time.monotonic(), began_s)
            except TransportError as error:
                self._core.count_failure(error)
                raise

        return await gather_results(read, refs)
