"""The watch: a thread of its own follows etcd's stream, so that `next` waits exactly as long as its caller asks.

The stream is taken up again after the last whole batch, at another endpoint where one fails. etcd sends nothing on a
stream whose revision it will not reach for long, as after its data were wiped; nor does a dead machine. So every
`PROBE_S` the store's identity is asked for, on a connection of its own, of the endpoint that serves the stream. That
reading is linearizable, which a stream's own revision is not: a member that lags is no wiped store.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    StorePermissionError,
    StoreResetError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.client import EtcdClient, httpx_module, share_s, unreachable
from ucxx_transport.membership.etcd.messages import EtcdReply, Json
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.store import Batch, Watch
from ucxx_transport.settings.fields import Secret

if TYPE_CHECKING:
    import httpx

_log = get_logger(__name__)

PROBE_S: Final = 2.0
_ROOM_POLL_S: Final = 0.02
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_JOIN_S: Final = 2.0
_WAITING_BATCHES: Final = 1024


class EtcdWatch(Watch):
    """Changes below a prefix, as etcd streams them. The first `next` starts it."""

    def __init__(
        self,
        client: EtcdClient,
        namespace: Namespace,
        prefix: str,
        *,
        after: int,
        identity: str,
        timeout_s: float,
        on_reset: Callable[[], None],
    ) -> None:
        """Nothing is asked for yet.

        Args:
            client: knows the endpoints and the token.
            namespace: of the keys.
            prefix: of the keys.
            after: the revision after which changes are wanted.
            identity: of the store, when the watch was asked for; "" when it was not known.
            timeout_s: bound on connecting, and on a probe.
            on_reset: called when the store turns out to be another one.
        """
        self._client = client
        self._namespace = namespace
        self._first, self._last = namespace.bounds(prefix)
        self._timeout_s = timeout_s
        self._on_reset = on_reset
        self._pid = os.getpid()
        # Reentrant, as a condition's lock is: a signal handler may close the watch in the thread that is in `next`.
        self._changed = threading.Condition()
        self._batches: deque[Batch] = deque()
        self._outage: StoreUnavailableError | None = None
        self._end: TransportError | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        # The rest is the thread's.
        self._after = self._revision = after
        self._identity = identity

    def next(self, timeout_s: float) -> Batch | None:
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch again after a fork", pid=self._pid)
        until = time.monotonic() + max(0.0, timeout_s)
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="ucxx-etcd-watch", daemon=True)
                self._thread.start()
            while True:
                if self._closed:
                    raise StoreUnavailableError("the watch is closed")
                if self._batches:
                    return self._batches.popleft()
                if self._end is not None:
                    raise self._end
                if self._outage is not None:
                    outage, self._outage = self._outage, None
                    raise outage
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # a lock of the parent's may be held for ever here, and its thread is not here
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._loop is not None and self._task is not None:
                with suppress(RuntimeError):  # the loop has ended in the meantime
                    self._loop.call_soon_threadsafe(self._task.cancel)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)  # a login that is under way ends by its own deadline

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        except asyncio.CancelledError:
            return
        except Exception as error:  # noqa: BLE001 - the thread's edge
            _log.exception("etcd_watch_failed", reason=type(error).__name__)
            self._finish(StoreUnavailableError("the watch has failed: watch again", reason=type(error).__name__))

    async def _follow(self) -> None:
        """Follow the changes, one connection after another, each after the last whole batch, until cancelled."""
        with self._changed:
            if self._closed:
                return
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._follow_in_turn()
            except StoreUnavailableError as error:
                with self._changed:
                    self._outage = error
                    self._changed.notify_all()
            except TransportError as error:
                self._finish(error)
                return
            failures = 1 if time.monotonic() - began > _LONGEST_PAUSE_S else failures + 1
            await asyncio.sleep(pause_s(failures, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))

    def _finish(self, end: TransportError) -> None:
        if isinstance(end, StoreResetError):
            self._on_reset()
        with self._changed:
            self._end = end
            self._changed.notify_all()

    async def _follow_in_turn(self) -> None:
        """Follow at one endpoint until its stream is cut, which raises nothing."""
        until = time.monotonic() + self._timeout_s
        found: StoreUnavailableError | ConfigError | None = None
        for endpoint, others in self._client.endpoints.in_turn():
            try:
                return await self._follow_at(endpoint, share_s(until - time.monotonic(), others))
            except (StoreUnavailableError, ConfigError) as error:
                self._client.endpoints.failed(endpoint)
                if found is None or isinstance(error, StoreUnavailableError):
                    found = error
        assert found is not None  # there is an endpoint, and it has failed
        raise found

    async def _follow_at(self, endpoint: str, share: float) -> None:
        token = await asyncio.to_thread(self._client.token, time.monotonic() + share)
        try:
            return await self._follow_as(token, endpoint, share)
        except StorePermissionError as error:
            if not token.reveal() or not messages.is_not_logged_in(error):
                raise
        self._client.forget(token)  # it has run out, or etcd was started again
        token = await asyncio.to_thread(self._client.token, time.monotonic() + share)
        return await self._follow_as(token, endpoint, share)

    async def _follow_as(self, token: Secret, endpoint: str, share: float) -> None:
        request = messages.watch_request(self._first, self._last, after=self._after)
        async with AsyncExitStack() as stack:
            transport = httpx_module().AsyncHTTPTransport(verify=self._client.access.tls, trust_env=False)
            await stack.enter_async_context(transport)
            connection = _Connection(transport, self._client, endpoint, token, self._timeout_s)
            async with connection.within(share):
                lines = await stack.enter_async_context(connection.lines("watch", request))
                await self._begun(connection, await anext(lines, None))
            self._client.endpoints.answered(endpoint)
            with self._changed:
                self._outage = None
            await self._serve(connection, lines)

    async def _begun(self, connection: _Connection, line: Json | None) -> None:
        if line is None:
            raise StoreUnavailableError("the stream was cut before it began", endpoint=connection.endpoint)
        if "error" in line:
            raise messages.refusal(200, line, connection.endpoint)
        message = messages.watch_message(line, self._namespace)
        if message.canceled:
            await self._raise_why(connection, message)
        await self._probe(connection)

    async def _serve(self, connection: _Connection, lines: AsyncIterator[Json]) -> None:
        """Deliver what comes, and probe, until the stream is cut."""
        pending = asyncio.ensure_future(_next(lines))
        next_probe = time.monotonic() + PROBE_S
        try:
            while True:
                await asyncio.wait({pending}, timeout=max(0.0, next_probe - time.monotonic()))
                if not pending.done() or time.monotonic() >= next_probe:
                    await self._probe(connection)
                    next_probe = time.monotonic() + PROBE_S
                if pending.done() and len(self._batches) >= _WAITING_BATCHES:
                    await asyncio.sleep(_ROOM_POLL_S)
                elif pending.done():
                    line = pending.result()
                    if line is None or "error" in line:
                        return
                    await self._take(connection, messages.watch_message(line, self._namespace))
                    pending = asyncio.ensure_future(_next(lines))
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)

    async def _take(self, connection: _Connection, message: messages.WatchMessage) -> None:
        for batch in message.batches:
            if batch.revision > self._after:
                with self._changed:
                    self._batches.append(batch)
                    self._changed.notify_all()
                self._after = batch.revision
        if message.canceled:
            await self._raise_why(connection, message)

    async def _raise_why(self, connection: _Connection, message: messages.WatchMessage) -> None:
        """Raise why etcd has ended the watch: its text is for people, so what was watched is asked for once."""
        if message.compacted:
            raise CompactedError(
                "etcd no longer keeps what followed this revision; take a snapshot",
                after=self._after,
                compacted=message.compacted,
            )
        await connection.ask("kv/range", messages.range_request(self._first, self._last, count_only=True))
        raise StoreUnavailableError("etcd has ended the watch", endpoint=connection.endpoint, reason=message.reason)

    async def _probe(self, connection: _Connection) -> None:
        """See that the store is the one it was."""
        key = messages.identity_key(self._namespace)
        reply = await connection.ask("kv/range", messages.range_request(key))
        identity = messages.value_of(reply.kvs())
        if reply.revision < self._revision or (self._identity and identity != self._identity):
            raise StoreResetError(
                "etcd's data are others than before: they were wiped or restored; start over",
                endpoint=connection.endpoint,
                revision=reply.revision,
                seen=self._revision,
            )
        self._revision = reply.revision
        self._identity = identity or await self._made_identity(connection, key)

    async def _made_identity(self, connection: _Connection, key: bytes) -> str:
        """The identity that the store is given now; "" where this user may only read."""
        word, request = messages.new_identity(key)
        try:
            reply = await connection.ask("kv/txn", request)
        except StorePermissionError:
            return ""
        return word if reply.succeeded else messages.value_of(reply.ranges()[0].kvs())


class _Connection:
    """Requests to one endpoint in an event loop. How long they take is bounded by `within` alone."""

    def __init__(
        self, transport: httpx.AsyncHTTPTransport, client: EtcdClient, endpoint: str, token: Secret, timeout_s: float
    ) -> None:
        self.endpoint = endpoint
        self._transport = transport
        self._access = client.access
        self._token = token
        self._timeout_s = timeout_s

    async def ask(self, path: str, body: Json) -> EtcdReply:
        """The answer to one request, within the time limit; errors of `messages`."""
        async with self.within(self._timeout_s), self._response(path, body) as response:
            return messages.answer_of(response.status_code, await _whole(response), self.endpoint)

    @asynccontextmanager
    async def lines(self, path: str, body: Json) -> AsyncIterator[AsyncIterator[Json]]:
        """The objects that the answer streams, one a line, until it ends or is cut; errors of `messages`."""
        async with self._response(path, body) as response:
            if response.status_code != 200:
                messages.answer_of(response.status_code, await _whole(response), self.endpoint)
            yield self._objects(response)

    @asynccontextmanager
    async def within(self, timeout_s: float) -> AsyncIterator[None]:
        """Bound what is done in this block; a StoreUnavailableError where it takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise StoreUnavailableError(
                "etcd does not answer in time", endpoint=self.endpoint, timeout_s=round(timeout_s, 3)
            ) from error

    async def _objects(self, response: httpx.Response) -> AsyncIterator[Json]:
        pieces: list[bytes] = []
        async for piece in response.aiter_raw():
            pieces.append(piece)
            if b"\n" not in piece:
                continue
            *whole, rest = b"".join(pieces).split(b"\n")
            pieces = [rest]
            for line in whole:
                if line:
                    yield messages.parsed(line, self.endpoint)

    @asynccontextmanager
    async def _response(self, path: str, body: Json) -> AsyncIterator[httpx.Response]:
        unbounded = dict.fromkeys(("connect", "read", "write", "pool"))
        request = self._access.request(self.endpoint, path, body, token=self._token, timeouts=unbounded)
        library = httpx_module()
        try:
            response = await self._transport.handle_async_request(request)
            try:
                yield response
            finally:
                await response.aclose()
        except (library.TransportError, library.StreamError) as error:
            raise unreachable(error, self.endpoint) from error


async def _whole(response: httpx.Response) -> bytes:
    return b"".join([piece async for piece in response.aiter_raw()])


async def _next(lines: AsyncIterator[Json]) -> Json | None:
    """The next line; None when the stream was cut."""
    try:
        return await anext(lines, None)
    except StoreUnavailableError:
        return None
