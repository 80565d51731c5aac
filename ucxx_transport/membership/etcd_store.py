"""`EtcdStore`: the Store protocol over etcd v3's JSON gateway; and its watch, read by the calls of `next` themselves.

A watch's stream is taken up again after the last whole batch, at another endpoint where one fails. etcd sends nothing
on a stream whose revision it will not reach for long, as after its data were wiped; nor does a dead machine. So every
`PROBE_S` the endpoint that serves the stream is asked for the store's identity. That reading is linearizable, which a
stream's own revision is not: a member that lags is no wiped store.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from contextlib import ExitStack, closing, suppress
from functools import partial
from typing import Final

from ucxx_transport.config import StoreConfig, checked_seconds
from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    ConflictError,
    LeaseLostError,
    StoreResetError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership import etcd_messages as messages
from ucxx_transport.membership.entries import Entry, Lease, Namespace, Snapshot
from ucxx_transport.membership.etcd_client import Connection, EtcdClient
from ucxx_transport.membership.etcd_messages import Json
from ucxx_transport.membership.store import Store, Watch, check_write, checked_ttl_s, lease_lost, revision_conflict
from ucxx_transport.units import Secret

PROBE_S: Final = 2.0
_PAUSE_S: Final = 0.2
"""Between two tries to take a stream up."""


class EtcdStore(Store):
    """A store in etcd: many machines, at one or several `host:port`. The first call connects.

    Calls go to the endpoint that answered last, and to the others when it fails, within the same deadline; a `put` or
    `delete` that may have been carried out is not sent again. A ConfigError: TLS is half turned on, or a file of it
    cannot be used.
    """

    def __init__(self, endpoints: tuple[str, ...], config: StoreConfig | None = None, *, tls: bool = False) -> None:
        config = config or StoreConfig()
        self._url = f"{'etcds' if tls else 'etcd'}://{','.join(endpoints)}"
        self.namespace, self.timeout_s = Namespace(config.namespace), config.timeout_s
        self._client = EtcdClient(endpoints, config, tls=tls)
        self._closed = False
        self._watches: weakref.WeakSet[EtcdWatch] = weakref.WeakSet()

    @property
    def url(self) -> str:
        return self._url

    @property
    def client(self) -> EtcdClient:
        """What calls are made by; a ConfigError once the store is closed."""
        if self._closed:
            raise ConfigError("the store is closed: open another", url=self.url)
        return self._client

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        whole = math.ceil(checked_ttl_s(ttl_s))  # etcd counts in seconds, from 1 on
        answer = self._call("lease/grant", {"TTL": str(whole)}, timeout_s)
        return Lease(lease_id=messages.number(answer, "ID"), ttl_s=float(messages.number(answer, "TTL")))

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        check_write(lease_id=lease_id)
        answer = self._call("lease/keepalive", {"ID": str(lease_id)}, timeout_s)
        if not (ttl_s := messages.number(answer, "TTL")):
            raise lease_lost(lease_id)
        return float(ttl_s)

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        check_write(lease_id=lease_id)
        with suppress(LeaseLostError):
            self._call("lease/revoke", {"ID": str(lease_id)}, timeout_s)

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        request = messages.range_request(self.namespace.stored(key))
        found = messages.kvs_of(self._call("kv/range", request, timeout_s))
        return messages.entry(found[0], self.namespace) if found else None

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        stored = self.namespace.stored(key)
        check_write(value=value, lease_id=lease_id, expected=expected)
        request = messages.put_request(stored, value, lease_id)
        if expected is None:
            return messages.revision_of(self._call("kv/put", request, timeout_s, repeatable=False))
        return messages.revision_of(self._change_expecting(stored, expected, "request_put", request, timeout_s))

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self.namespace.stored(key)
        check_write(expected=expected)
        request = messages.range_request(stored)
        if expected is None:
            return bool(messages.number(self._call("kv/deleterange", request, timeout_s, repeatable=False), "deleted"))
        try:
            self._change_expecting(stored, expected, "request_delete_range", request, timeout_s)
        except ConflictError as error:
            if error.facts["revision"] == 0:
                return False
            raise
        return expected != 0

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self.namespace.bounds(prefix)
        ask = partial(self.client.call, until=self._until(timeout_s))
        # First, so that a watch which follows knows this store from one that is wiped before it begins.
        identity, _ = messages.identity_of(ask, self.namespace)
        answer = ask("kv/range", messages.range_request(first, end))
        found = messages.entries(messages.kvs_of(answer), self.namespace)
        return Snapshot(revision=messages.revision_of(answer), entries=found, identity=identity)

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> EtcdWatch:
        watch = EtcdWatch(self, prefix, after=after, identity=identity)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        self._closed = True
        for watch in list(self._watches):
            watch.close()

    def _change_expecting(
        self, stored: bytes, expected: int, operation: str, request: Json, timeout_s: float | None
    ) -> Json:
        wanted = messages.if_revision(stored, expected, operation, request)
        answer = self._call("kv/txn", wanted, timeout_s, repeatable=False)
        if not answer.get("succeeded"):
            kvs = messages.kvs_of(answer)
            raise revision_conflict(stored, expected, messages.number(kvs[0], "mod_revision") if kvs else 0)
        return answer

    def _call(self, path: str, body: Json, timeout_s: float | None, *, repeatable: bool = True) -> Json:
        return self.client.call(path, body, until=self._until(timeout_s), repeatable=repeatable)

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.timeout_s if timeout_s is None else checked_seconds(timeout_s, "timeout_s"))


class EtcdWatch(Watch):
    """Changes below a prefix, as etcd streams them. The first `next` asks for them.

    Taking the stream up, and a probe, may each take the store's `timeout_s`: so much longer may `next` take.
    """

    def __init__(self, store: EtcdStore, prefix: str, *, after: int, identity: str) -> None:
        super().__init__(store.url)
        self._store, self._client = store, store.client
        self._first, self._last = store.namespace.bounds(prefix)
        self._after = self._revision = after
        self._identity = identity
        self._newest: Connection | None = None
        self._in_use = threading.Lock()
        self._stream: Connection | None = None
        self._pause_until_s = self._probe_s = 0.0

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # the connections are the parent's
        super().close()
        for connection in (self._stream, self._newest):
            if connection is not None:
                connection.abort()
        if self._in_use.acquire(blocking=False):  # else `_fetch` does this at its end
            self._drop()
            self._in_use.release()

    def _fetch(self, until: float) -> None:
        try:
            with self._in_use:
                self._follow(until)
        finally:
            if self._closing.is_set():
                self.close()

    def _follow(self, until: float) -> None:
        """Take the stream up, or what has come of it, or probe."""
        stream, now = self._stream, time.monotonic()
        try:
            if stream is not None:
                if not self._take(stream, min(until, self._probe_s)) and time.monotonic() >= self._probe_s:
                    self._probe(stream.endpoint)
            elif now < self._pause_until_s:
                self._closing.wait(max(0.0, min(until, self._pause_until_s) - now))
            else:
                self._client.first(self._begin_at, now + self._store.timeout_s)
        except TransportError as error:
            self._drop()
            if stream is None or not isinstance(error, StoreUnavailableError):
                raise
            self._client.failed(stream.endpoint)  # the stream was cut, or its endpoint is silent

    def _drop(self) -> None:
        """End the stream; another is asked for after a pause."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._pause_until_s = time.monotonic() + _PAUSE_S

    def _begin_at(self, endpoint: str, share: float) -> None:
        until = time.monotonic() + share
        request = messages.watch_request(self._first, self._last, after=self._after)

        def begin(token: Secret) -> None:
            with ExitStack() as failing:
                stream = failing.enter_context(closing(self._connect(endpoint)))
                stream.ask("watch", request, token, until=until, streams=True)
                self._probe(endpoint)
                self._stream = stream
                failing.pop_all()

        self._client.as_user(begin, until)

    def _ask(self, endpoint: str, path: str, body: Json) -> Json:
        until = time.monotonic() + self._store.timeout_s

        def ask(token: Secret) -> Json:
            with closing(self._connect(endpoint)) as connection:
                return connection.ask(path, body, token, until=until)

        return self._client.as_user(ask, until)

    def _connect(self, endpoint: str) -> Connection:
        """A connection that `close` ends, too: of two that are open the newest is the one that is waited for."""
        self._newest = connection = Connection(endpoint, self._client.tls)
        if self._closing.is_set():
            connection.abort()
        return connection

    def _take(self, stream: Connection, until: float) -> bool:
        found = stream.read(until)
        for message in found:
            for batch in messages.batches(message, self._store.namespace):
                if batch.revision > self._after:
                    self._batches.append(batch)
                    self._after = batch.revision
            if message.get("canceled"):
                self._raise_end(stream.endpoint, message)
        return bool(found)

    def _raise_end(self, endpoint: str, message: Json) -> None:
        """Raise why etcd has ended the watch: its text is for people, so what was watched is asked for once."""
        if compacted := messages.number(message, "compact_revision"):
            text = "etcd no longer keeps what followed this revision; take a snapshot"
            raise CompactedError(text, after=self._after, compacted=compacted)
        self._ask(endpoint, "kv/range", {**messages.range_request(self._first, self._last), "count_only": True})
        raise StoreUnavailableError("etcd has ended the watch", reason=message.get("cancel_reason"))

    def _probe(self, endpoint: str) -> None:
        """See that the store is the one it was."""
        identity, revision = messages.identity_of(partial(self._ask, endpoint), self._store.namespace)
        if revision < self._revision or (self._identity and identity != self._identity):
            text = "etcd's data are others than before: they were wiped or restored; start over"
            raise StoreResetError(text, revision=revision, seen=self._revision)
        self._revision, self._identity = revision, identity
        self._probe_s = time.monotonic() + PROBE_S
