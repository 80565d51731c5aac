"""The stream of a watch, in an event loop: followed, probed, and taken up again at another endpoint when it is cut.

etcd says nothing on a stream whose revision it will not reach for long, as after its data were wiped; nor does a dead
machine. So every `PROBE_S` the store's identity is asked for, on a connection of its own, of the endpoint that serves
the stream. That reading is linearizable, which a stream's own revision is not: a member that lags is no wiped store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    StorePermissionError,
    StoreResetError,
    StoreUnavailableError,
)
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.calls import Caller, is_not_logged_in
from ucxx_transport.membership.etcd.endpoints import share_s
from ucxx_transport.membership.etcd.failures import refusal
from ucxx_transport.membership.etcd.link import Link, opened_link
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.store import Batch

__all__ = ["WatchStream", "Watched"]

PROBE_S: Final = 2.0
_ROOM_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What is watched.

    Attributes:
        namespace: of the keys.
        first: the first key.
        end: the key below which they lie.
        after: the revision after which changes are wanted.
        identity: of the store, as it was when the watch was asked for; "" when nobody had looked yet.
        timeout_s: bound on connecting, and on a probe.
    """

    namespace: Namespace
    first: bytes
    end: bytes
    after: int
    identity: str
    timeout_s: float


class WatchStream:
    """Follows the changes, one connection after another, each after the last whole batch."""

    def __init__(
        self, caller: Caller, watched: Watched, deliver: Callable[[Batch], None], has_room: Callable[[], bool]
    ) -> None:
        """Nothing is asked for yet.

        Args:
            caller: knows the endpoints and the token.
            watched: which changes.
            deliver: takes each batch.
            has_room: whether it may be given more; where not, etcd keeps what is to come.
        """
        self._caller = caller
        self._watched = watched
        self._deliver = deliver
        self._has_room = has_room
        self._after = watched.after
        self._identity = watched.identity
        self._revision = watched.after

    async def follow(self, connected: Callable[[], None]) -> None:
        """Deliver what changes until the stream is cut, which raises nothing: follow again.

        Args:
            connected: called once the stream is there.

        Raises:
            StoreUnavailableError: no endpoint gives one, or the one that did is silent.
            CompactedError, StoreResetError, StorePermissionError, ConfigError: there is no going on.
        """
        until = time.monotonic() + self._watched.timeout_s
        found: StoreUnavailableError | ConfigError | None = None
        for endpoint, others in self._caller.endpoints.in_turn():
            try:
                return await self._follow_at(endpoint, share_s(until - time.monotonic(), others), connected)
            except (StoreUnavailableError, ConfigError) as error:
                self._caller.endpoints.failed(endpoint)
                if found is None or isinstance(error, StoreUnavailableError):
                    found = error
        assert found is not None  # there is an endpoint, and it has failed
        raise found

    async def _follow_at(self, endpoint: str, share: float, connected: Callable[[], None]) -> None:
        for renewed in (False, True):
            token = await asyncio.to_thread(self._caller.token, time.monotonic() + share)
            try:
                return await self._follow_as(token, endpoint, share, connected)
            except StorePermissionError as error:
                if renewed or not token or not is_not_logged_in(error):
                    raise
            self._caller.forget(token)
        raise AssertionError("either way out of the loop above was taken")

    async def _follow_as(self, token: str, endpoint: str, share: float, connected: Callable[[], None]) -> None:
        watched = self._watched
        request = messages.watch_request(watched.first, watched.end, after=self._after)
        async with AsyncExitStack() as stack:
            link = await stack.enter_async_context(opened_link(self._caller.access, endpoint, token))
            async with link.within(share):
                lines = await stack.enter_async_context(link.lines("watch", request))
                await self._begun(link, await anext(lines, None))
            self._caller.endpoints.answered(endpoint)
            connected()
            await self._serve(link, lines)

    async def _begun(self, link: Link, line: messages.Json | None) -> None:
        if line is None:
            raise StoreUnavailableError("the stream was cut before it began", endpoint=link.endpoint)
        if "error" in line:
            raise refusal(200, line, link.endpoint)
        message = messages.watch_message(line, self._watched.namespace)
        if message.canceled:
            await self._raise_why(link, message)
        await self._probe(link)

    async def _serve(self, link: Link, lines: AsyncIterator[messages.Json]) -> None:
        """Deliver what comes, and probe, until the stream is cut."""
        pending = asyncio.ensure_future(_next(lines))
        next_probe = time.monotonic() + PROBE_S
        try:
            while True:
                await asyncio.wait({pending}, timeout=max(0.0, next_probe - time.monotonic()))
                if not pending.done() or time.monotonic() >= next_probe:
                    async with link.within(self._watched.timeout_s):
                        await self._probe(link)
                    next_probe = time.monotonic() + PROBE_S
                if pending.done() and not self._has_room():
                    await asyncio.sleep(_ROOM_POLL_S)
                elif pending.done():
                    line = pending.result()
                    if line is None or "error" in line:
                        return
                    await self._take(link, messages.watch_message(line, self._watched.namespace))
                    pending = asyncio.ensure_future(_next(lines))
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)

    async def _take(self, link: Link, message: messages.WatchMessage) -> None:
        for batch in message.batches:
            if batch.revision > self._after:
                self._deliver(batch)
                self._after = batch.revision
        if message.canceled:
            await self._raise_why(link, message)

    async def _raise_why(self, link: Link, message: messages.WatchMessage) -> None:
        """Say why etcd has ended the watch: its text is for people, so what was watched is asked for once."""
        if message.compacted:
            raise CompactedError(
                "etcd no longer keeps what followed this revision; take a snapshot",
                after=self._after,
                compacted=message.compacted,
            )
        watched = self._watched
        await link.ask("kv/range", messages.range_request(watched.first, watched.end, count_only=True))
        raise StoreUnavailableError("etcd has ended the watch", endpoint=link.endpoint, reason=message.reason)

    async def _probe(self, link: Link) -> None:
        """See that the store is the one it was."""
        key = messages.identity_key(self._watched.namespace)
        reply = await link.ask("kv/range", messages.range_request(key))
        identity = messages.value_of(reply.kvs())
        if reply.revision < self._revision or (self._identity and identity != self._identity):
            raise StoreResetError(
                "etcd's data are others than before: they were wiped or restored; start over",
                endpoint=link.endpoint,
                revision=reply.revision,
                seen=self._revision,
            )
        self._revision = reply.revision
        self._identity = identity or await self._made_identity(link, key)

    async def _made_identity(self, link: Link, key: bytes) -> str:
        """The identity that the store is given now; "" where this user may only read."""
        word, request = messages.new_identity(key)
        try:
            reply = await link.ask("kv/txn", request)
        except StorePermissionError:
            return ""
        return word if reply.succeeded else messages.value_of(reply.ranges()[0].kvs())


async def _next(lines: AsyncIterator[messages.Json]) -> messages.Json | None:
    """The next line; None when the stream was cut."""
    try:
        return await anext(lines, None)
    except StoreUnavailableError:
        return None
