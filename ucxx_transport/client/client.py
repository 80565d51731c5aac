"""UCXXClient: payloads by reference, from this host's rings in place and from other hosts over UCX."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from ucxx_transport.client.core import ClientCore, Into, LinkFactory
from ucxx_transport.client.results import gather_results
from ucxx_transport.errors import DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import PageLocker
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.client.payload import Payload
    from ucxx_transport.client.remote import RemoteReader
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.schema import SlotRef

_log = get_logger(__name__)

# Copies and checksums of more than this run in a thread: below it the hop costs more than it frees the loop.
INLINE_BYTES = 1 << 20
# So is a wait for a ring's lock that takes longer than this: a transition takes some microseconds.
INLINE_WAIT_S = 0.005


class UCXXClient:
    """Reads payloads. Belongs to the event loop it is first used in; close it with `aclose()` or `async with`.

    One client is one reader: of a payload meant for several readers (`RingConfig(readers=N)`) it gets one share, and a
    payload it has delivered once is `StaleSlotError` ever after.

    Args:
        config: settings; the default reads local rings in place and everything else over UCX.
        watcher: a `SourceWatcher`: reads over UCX from a source that it says is gone fail at once, and the ports of one
            that it says is there are worth a try again. Its owner stops it.
        link_factory: opens the link on the first read that needs one; the default is UCX.
        page_locker: page-locks the memory that payloads are received in, for a GPU that copies them from there. Rings
            of this host are then copied out of too.

    Raises:
        ConfigError: page-locked, and `local="view"`.
    """

    def __init__(
        self,
        config: ClientConfig | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
        page_locker: PageLocker | None = None,
    ) -> None:
        self._core = ClientCore(config, link_factory, watcher=watcher, page_locker=page_locker)
        self._remote: RemoteReader | None = None

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    @property
    def reader_id(self) -> int:
        """This client's random id, u64, as servers and rings see it."""
        return self._core.reader

    async def read(self, ref: SlotRef, *, into: Into | None = None, deadline_s: float | None = None) -> Payload:
        """Read one payload.

        Args:
            ref: names it and says where it is.
            into: writable contiguous buffer of at least `ref.nbytes` bytes to copy the payload into; by default it
                stays in a pooled buffer, or in the slot itself.
            deadline_s: seconds this call may take in all, retries included; default `ClientConfig.deadline_s`.

        Returns:
            The payload. Release it when its data is used up.

        Raises:
            StaleSlotError: it is gone (recycled, overwritten, its ring closed) or was delivered to this client before.
            DeadlineExceededError: not in time. PeerLostError, BusyError, NotReadyError: not after all retries.
            ChecksumError: the bytes differ from what was written. ProtocolError, AuthenticationError: the peer.
            ConfigError: the reference has no address, is too large, or `into` is unfit.
        """
        core = self._core
        began_s = time.perf_counter()
        try:
            ring = core.admit(ref, into)
            limit_s = deadline_s if deadline_s is not None else core.config.deadline_s
            if ring is None:
                return await self._read_remote(ref, into, limit_s, began_s)
            if ref.nbytes > INLINE_BYTES and core.local.copies(ref):
                return await core.read_local_aside(ring, ref, into, limit_s, began_s)
            try:
                return core.read_local(ring, ref, into, min(limit_s, INLINE_WAIT_S), began_s)
            except DeadlineExceededError:  # the ring's lock is held
                return await core.read_local_aside(ring, ref, into, limit_s, began_s)
        except TransportError as error:
            core.count_failure(error)
            raise

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
    ) -> list[Payload | TransportError]:
        """Read payloads concurrently, fairly across sources; one that fails costs none of the others.

        Args:
            refs: what to read.
            deadline_s: seconds for all of them together.

        Returns:
            A list as long as `refs`: the payload, or the error that `read` would have raised.
        """
        return await gather_results(lambda ref: self.read(ref, deadline_s=deadline_s), refs)

    async def discard(self, refs: Sequence[SlotRef], *, deadline_s: float | None = None) -> int:
        """Let payloads go unread: each counts as this client's read of it, and none of its bytes is moved.

        Args:
            refs: payloads that this trainer will not read; without it they would stay in their slots.
            deadline_s: seconds for all of them together; default `ClientConfig.deadline_s`.

        Returns:
            How many were still there. Never raises for one that is not, nor for a worker that does not answer: it is
            notified with the next read from it (of the last 1024 payloads a ring).

        Raises:
            ConfigError: the client is closed, or belongs to another event loop.
        """
        core = self._core
        limit_s = deadline_s if deadline_s is not None else core.config.deadline_s
        until_s = asyncio.get_running_loop().time() + limit_s
        found, elsewhere = await asyncio.to_thread(core.discard_here, refs, limit_s)  # it may wait for rings' locks
        if elsewhere:
            if self._remote is None:
                self._remote = self._core.remote()
            found += await self._remote.discard(elsewhere, until_s)
        core.counters.add("discarded", found)
        return found

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        return self._core.statistics(self._remote)

    async def aclose(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        remote = self._remote
        if remote is not None:
            await remote.connections.aclose()
        self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _read_remote(self, ref: SlotRef, into: Into | None, limit_s: float, began_s: float) -> Payload:
        if self._remote is None:
            self._remote = self._core.remote()
        content, schema = await self._remote.read(ref, asyncio.get_running_loop().time() + limit_s)
        return self._core.deliver_remote(ref, content, schema, into, began_s)
