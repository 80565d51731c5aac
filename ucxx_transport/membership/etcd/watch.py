"""The watch: etcd's stream, read by the calls of `next` themselves.

The stream is taken up again after the last whole batch, at another endpoint where one fails. etcd sends nothing on a
stream whose revision it will not reach for long, as after its data were wiped; nor does a dead machine. So every
`PROBE_S` the endpoint that serves the stream is asked for the store's identity. That reading is linearizable, which a
stream's own revision is not: a member that lags is no wiped store.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import CompactedError, StoreResetError, StoreUnavailableError, TransportError
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.client import Connection, EtcdClient
from ucxx_transport.membership.etcd.messages import Json
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.store import Batch, Watch
from ucxx_transport.units import Secret

PROBE_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0


class EtcdWatch(Watch):
    """Changes below a prefix, as etcd streams them. The first `next` asks for them.

    Args:
        client: knows the endpoints and the token.
        namespace: of the keys.
        prefix: of the keys.
        after: the revision after which changes are wanted.
        identity: of the store, when the watch was asked for; "" when it was not known.
        timeout_s: bound on taking the stream up, and on a probe: so much longer may `next` take.
        on_reset: called when the store turns out to be another one.
    """

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
        self._client, self._namespace = client, namespace
        self._first, self._last = namespace.bounds(prefix)
        self._timeout_s, self._on_reset = timeout_s, on_reset
        self._after = self._revision = after
        self._identity = identity
        self._batches: deque[Batch] = deque()
        self._end: TransportError | None = None
        self._connections: set[Connection] = set()
        self._closing, self._in_use = threading.Event(), threading.Lock()
        self._pid = os.getpid()
        self._stream: Connection | None = None
        self._held = ExitStack()  # the stream
        self._ask: Callable[[str, Json], Json]  # of the endpoint that serves it
        self._failures, self._began_s, self._pause_until_s, self._probe_s = 0, 0.0, 0.0, 0.0

    def next(self, timeout_s: float) -> Batch | None:
        if self._pid != os.getpid():
            raise StoreUnavailableError("the watch is another process's: watch again after a fork", pid=self._pid)
        until = time.monotonic() + max(0.0, timeout_s)
        try:
            with self._in_use:
                while True:
                    if self._closing.is_set():
                        raise StoreUnavailableError("the watch is closed")
                    if self._batches:
                        return self._batches.popleft()
                    if not self._step(until) and time.monotonic() >= until:
                        return None
        finally:
            if self._closing.is_set():
                self.close()

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # the connections are the parent's
        self._closing.set()
        for connection in tuple(self._connections):
            connection.abort()
        if self._in_use.acquire(blocking=False):  # else `next` does this at its end
            self._drop()
            self._in_use.release()

    def _step(self, until: float) -> bool:
        """`_follow`; a watch that has ended raises why."""
        if self._end is not None:
            raise self._end
        try:
            return self._follow(until)
        except TransportError as error:
            self._drop()
            if self._closing.is_set():
                return True
            if not isinstance(error, StoreUnavailableError):
                self._end = error
            if isinstance(error, StoreResetError):
                self._on_reset()
            raise

    def _follow(self, until: float) -> bool:
        """Take the stream up, or what has come of it, or probe; False: nothing came until then."""
        stream = self._stream
        if stream is None:
            if time.monotonic() < self._pause_until_s:
                self._closing.wait(min(until, self._pause_until_s) - time.monotonic())
                return False
            self._began_s = time.monotonic()
            self._client.first(self._begin_at, self._began_s + self._timeout_s)
            return True
        try:
            if stream.is_readable(min(until, self._probe_s)):
                self._take(stream.read())
                return True
            if time.monotonic() >= self._probe_s:
                self._probe()
        except StoreUnavailableError:  # the stream was cut, or its endpoint is silent
            self._client.failed(stream.endpoint)
            self._drop()
        return False

    def _drop(self) -> None:
        """End the stream; another is asked for after a pause, which grows while none lasts."""
        self._stream = None
        self._held.close()
        now = time.monotonic()
        self._failures = 1 if now - self._began_s > _LONGEST_PAUSE_S else self._failures + 1
        self._pause_until_s = now + pause_s(self._failures, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)

    def _begin_at(self, endpoint: str, share: float) -> None:
        self._client.as_user(lambda token: self._begin_as(token, endpoint, share), time.monotonic() + share)

    def _begin_as(self, token: Secret, endpoint: str, share: float) -> None:
        request = messages.watch_request(self._first, self._last, after=self._after)
        with ExitStack() as held:
            stream = held.enter_context(self._connected(endpoint))
            until = time.monotonic() + share
            first = stream.stream("watch", request, token, until=until, connect_s=share)
            self._ask = partial(self._asked, endpoint, token)
            self._probe()
            self._take(first)
            self._stream, self._held = stream, held.pop_all()

    def _asked(self, endpoint: str, token: Secret, path: str, body: Json) -> Json:
        until = time.monotonic() + self._timeout_s
        with self._connected(endpoint) as connection:
            return connection.ask(path, body, token, until=until, connect_s=self._timeout_s)

    @contextmanager
    def _connected(self, endpoint: str) -> Iterator[Connection]:
        """A connection that `close` ends, too."""
        connection = Connection(endpoint, self._client.tls)
        self._connections.add(connection)
        if self._closing.is_set():
            connection.abort()
        try:
            yield connection
        finally:
            self._connections.discard(connection)
            connection.close()

    def _take(self, received: list[Json]) -> None:
        for message in received:
            for batch in messages.batches(message, self._namespace):
                if batch.revision > self._after:
                    self._batches.append(batch)
                    self._after = batch.revision
            if message.get("canceled"):
                self._raise_end(message)

    def _raise_end(self, message: Json) -> None:
        """Raise why etcd has ended the watch: its text is for people, so what was watched is asked for once."""
        if compacted := messages.number(message, "compact_revision"):
            text = "etcd no longer keeps what followed this revision; take a snapshot"
            raise CompactedError(text, after=self._after, compacted=compacted)
        self._ask("kv/range", {**messages.range_request(self._first, self._last), "count_only": True})
        raise StoreUnavailableError("etcd has ended the watch", reason=message.get("cancel_reason"))

    def _probe(self) -> None:
        """See that the store is the one it was."""
        identity, revision = messages.identity_of(self._ask, self._namespace, required=False)
        if revision < self._revision or (self._identity and identity != self._identity):
            text = "etcd's data are others than before: they were wiped or restored; start over"
            raise StoreResetError(text, revision=revision, seen=self._revision)
        self._revision, self._identity = revision, identity
        self._probe_s = time.monotonic() + PROBE_S
