"""The watch: a thread of its own follows etcd's stream, so that `next` waits exactly as long as its caller asks.

The stream is taken up again after the last whole batch, at another endpoint where one fails. etcd sends nothing on a
stream whose revision it will not reach for long, as after its data were wiped; nor does a dead machine. So a second
thread asks every `PROBE_S` for the store's identity, of the endpoint that serves the stream. That reading is
linearizable, which a stream's own revision is not: a member that lags is no wiped store.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import (
    CompactedError,
    StorePermissionError,
    StoreResetError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.client import Connection, EtcdClient
from ucxx_transport.membership.etcd.messages import EtcdReply, Json
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.store import Batch, Watch
from ucxx_transport.settings.fields import Secret

_log = get_logger(__name__)

PROBE_S: Final = 2.0
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
        self._connections: set[Connection] = set()
        self._thread: threading.Thread | None = None
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
                    self._changed.notify_all()  # there is room again
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
            connections, thread = tuple(self._connections), self._thread
        for connection in connections:
            connection.abort()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)  # a login that is under way ends by its own deadline

    def _run(self) -> None:
        """Follow the changes, one connection after another, each after the last whole batch, until closed."""
        failures = 0
        while not self._closed:
            began = time.monotonic()
            try:
                self._client.endpoints.first(self._follow_at, began + self._timeout_s)
            except StoreUnavailableError as error:
                self._set(outage=error)
            except TransportError as error:
                return self._set(end=error)
            except Exception as error:  # noqa: BLE001 - the thread's edge
                _log.exception("etcd_watch_failed", reason=type(error).__name__)
                failure = StoreUnavailableError("the watch has failed: watch again", reason=type(error).__name__)
                return self._set(end=failure)
            failures = 1 if time.monotonic() - began > _LONGEST_PAUSE_S else failures + 1
            with self._changed:
                pause = pause_s(failures, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
                self._changed.wait_for(lambda: self._closed, pause)
        return None

    def _set(self, *, outage: StoreUnavailableError | None = None, end: TransportError | None = None) -> None:
        if isinstance(end, StoreResetError):
            self._on_reset()
        with self._changed:
            self._outage, self._end = outage, end
            self._changed.notify_all()

    def _follow_at(self, endpoint: str, share: float) -> None:
        """Follow at one endpoint until its stream is cut, which raises nothing."""
        self._client.as_user(lambda token: self._follow_as(token, endpoint, share), time.monotonic() + share)

    def _follow_as(self, token: Secret, endpoint: str, share: float) -> None:
        request = messages.watch_request(self._first, self._last, after=self._after)
        until = time.monotonic() + share
        with self._connected(endpoint) as stream:
            lines = stream.stream("watch", request, token, until=until, connect_s=share)
            self._begun(next(lines, None), endpoint, partial(self._ask, endpoint, token, share))
            self._client.endpoints.answered(endpoint)
            self._set()
            stream.unbounded()
            self._serve(stream, lines, partial(self._ask, endpoint, token, self._timeout_s))

    def _ask(self, endpoint: str, token: Secret, timeout_s: float, path: str, body: Json) -> EtcdReply:
        with self._connected(endpoint) as connection:
            return connection.ask(path, body, token, until=time.monotonic() + timeout_s, connect_s=timeout_s)

    @contextmanager
    def _connected(self, endpoint: str) -> Iterator[Connection]:
        """A connection that `close` ends, too."""
        connection = Connection(endpoint, self._client.tls)
        with self._changed:
            if self._closed:
                raise StoreUnavailableError("the watch is closed")
            self._connections.add(connection)
        try:
            yield connection
        finally:
            self._connections.discard(connection)
            connection.close()

    def _begun(self, line: Json | None, endpoint: str, ask: messages.Ask) -> None:
        if line is None:
            raise StoreUnavailableError("the stream was cut before it began", endpoint=endpoint)
        if "error" in line:
            raise messages.refusal(200, line, endpoint)
        self._check_end(messages.watch_message(line, self._namespace), ask)
        self._probe(ask)

    def _serve(self, stream: Connection, lines: Iterator[Json], ask: messages.Ask) -> None:
        """Deliver what comes, and probe beside that, until the stream is cut or a probe fails."""
        ended = threading.Event()
        found: list[TransportError] = []

        def probe() -> None:
            try:
                while not ended.wait(PROBE_S):
                    self._probe(ask)
            except TransportError as error:
                found.append(error)
                stream.abort()

        prober = threading.Thread(target=probe, name="ucxx-etcd-probe", daemon=True)
        prober.start()
        try:
            with suppress(StoreUnavailableError):  # the stream was cut
                for line in lines:
                    if "error" in line:
                        break
                    self._take(messages.watch_message(line, self._namespace), ask)
        finally:
            ended.set()
            prober.join()
        if found:
            raise found[0]

    def _take(self, message: messages.WatchMessage, ask: messages.Ask) -> None:
        with self._changed:
            for batch in message.batches:
                if batch.revision > self._after:
                    self._batches.append(batch)
                    self._after = batch.revision
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or len(self._batches) < _WAITING_BATCHES)
        self._check_end(message, ask)

    def _check_end(self, message: messages.WatchMessage, ask: messages.Ask) -> None:
        """Raise why etcd has ended the watch: its text is for people, so what was watched is asked for once."""
        if not message.canceled:
            return
        if message.compacted:
            text = "etcd no longer keeps what followed this revision; take a snapshot"
            raise CompactedError(text, after=self._after, compacted=message.compacted)
        ask("kv/range", messages.range_request(self._first, self._last, count_only=True))
        raise StoreUnavailableError("etcd has ended the watch", reason=message.reason)

    def _probe(self, ask: messages.Ask) -> None:
        """See that the store is the one it was."""
        reply = ask("kv/range", messages.range_request(messages.identity_key(self._namespace)))
        identity = messages.value_of(reply.kvs())
        if reply.revision < self._revision or (self._identity and identity != self._identity):
            text = "etcd's data are others than before: they were wiped or restored; start over"
            raise StoreResetError(text, revision=reply.revision, seen=self._revision)
        self._revision = reply.revision
        if not identity:
            with suppress(StorePermissionError):  # this user may only read
                identity = messages.given_identity(ask, self._namespace)
        self._identity = identity
