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
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import count
from typing import Final, TypeVar

from ucxx_transport import errors
from ucxx_transport.backoff import pause_s
from ucxx_transport.config import StoreConfig, checked_seconds
from ucxx_transport.membership import etcd_messages as messages
from ucxx_transport.membership.entries import Entry, Lease, Namespace, Snapshot
from ucxx_transport.membership.etcd_connection import NO_TOKEN, Connection, tls_context
from ucxx_transport.membership.etcd_messages import Json
from ucxx_transport.membership.store import Store, Watch, check_write, checked_ttl_s, lease_lost, revision_conflict
from ucxx_transport.units import Secret

T = TypeVar("T")

PROBE_S: Final = 2.0
_PAUSE_S: Final = 0.2  # between two tries to take a stream up
_FIRST_PAUSE_S: Final = 0.05  # between two tries with a new token


class EtcdStore(Store):
    """A store in etcd: many machines, at one or several `host:port`. The first call connects.

    Calls go to the endpoint that answered last, and to the others when it fails, within the same deadline; a `put` or
    `delete` that may have been carried out is not sent again.
    """

    def __init__(self, endpoints: tuple[str, ...], config: StoreConfig | None = None, *, tls: bool = False) -> None:
        self.config = config = config or StoreConfig()
        self.url = f"{'etcds' if tls else 'etcd'}://{','.join(endpoints)}"
        self._endpoints = endpoints
        self.namespace, self.timeout_s = Namespace(config.namespace), config.timeout_s
        self.tls = tls_context(config, is_wanted=tls)
        self._token: Secret | None = None if config.user else NO_TOKEN
        self._is_closed = False
        self._watches: weakref.WeakSet[EtcdWatch] = weakref.WeakSet()

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        whole = math.ceil(checked_ttl_s(ttl_s))  # etcd counts in seconds, from 1 on
        answer = self._call("lease/grant", {"TTL": str(whole)}, self._until(timeout_s))
        return Lease(lease_id=messages.number(answer, "ID"), ttl_s=float(messages.number(answer, "TTL")))

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        check_write(lease_id=lease_id)
        answer = self._call("lease/keepalive", {"ID": str(lease_id)}, self._until(timeout_s))
        if not (ttl_s := messages.number(answer, "TTL")):
            raise lease_lost(lease_id)
        return float(ttl_s)

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        check_write(lease_id=lease_id)
        with suppress(errors.LeaseLostError):
            self._call("lease/revoke", {"ID": str(lease_id)}, self._until(timeout_s))

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        request = messages.range_request(self.namespace.stored(key))
        found = messages.kvs_of(self._call("kv/range", request, self._until(timeout_s)))
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
        answer = self._change("kv/put", "request_put", stored, request, expected=expected, timeout_s=timeout_s)
        return messages.revision_of(answer)

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self.namespace.stored(key)
        check_write(expected=expected)
        path, operation, request = "kv/deleterange", "request_delete_range", messages.range_request(stored)
        try:
            answer = self._change(path, operation, stored, request, expected=expected, timeout_s=timeout_s)
        except errors.ConflictError as error:
            if error.facts["revision"] == 0:
                return False
            raise
        return bool(messages.number(answer, "deleted") if expected is None else expected)

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self.namespace.bounds(prefix)
        ask = partial(self._call, until=self._until(timeout_s))
        # First, so that a watch which follows knows this store from one that is wiped before it begins.
        identity, _ = messages.identity_of(ask, self.namespace)
        answer = ask("kv/range", messages.range_request(first, end))
        found = messages.entries(messages.kvs_of(answer), self.namespace)
        return Snapshot(revision=messages.revision_of(answer), entries=found, identity=identity)

    def watch(self, prefix: str = "", *, after: int, identity: str = "") -> EtcdWatch:
        self._check_open()
        watch = EtcdWatch(self, prefix, after=after, identity=identity)
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        self._is_closed = True
        for watch in list(self._watches):
            watch.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise errors.ConfigError("the store is closed: open another", url=self.url)

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.timeout_s if timeout_s is None else checked_seconds(timeout_s, "timeout_s"))

    def _change(
        self, path: str, operation: str, stored: bytes, request: Json, *, expected: int | None, timeout_s: float | None
    ) -> Json:
        """The answer to a change of a key, alone or where that has the revision; sent once, if it may have arrived."""
        if expected is not None:
            path, request = "kv/txn", messages.if_revision(stored, expected, operation, request)
        answer = self._call(path, request, self._until(timeout_s), is_repeatable=False)
        if expected is not None and not answer.get("succeeded"):
            kvs = messages.kvs_of(answer)
            raise revision_conflict(stored, expected, messages.number(kvs[0], "mod_revision") if kvs else 0)
        return answer

    def _call(self, path: str, body: Json, until: float, *, is_repeatable: bool = True) -> Json:
        """The answer by `until` (monotonic). What may have been carried out is sent again only if `is_repeatable`."""
        self._check_open()
        return self.as_user(partial(self._ask, path, body, until, is_repeatable=is_repeatable), until)

    def _ask(self, path: str, body: Json, until: float, token: Secret, *, is_repeatable: bool = True) -> Json:
        def ask(endpoint: str, share: float) -> Json:
            """One endpoint's answer, within its share, or, once connected, all of the time for what is sent once."""
            end = min(until, time.monotonic() + share) if is_repeatable else until
            with closing(Connection(endpoint, self.tls)) as connection:
                return connection.ask(path, body, token, until=end, connect_s=share)

        return self.first(ask, until, is_repeatable=is_repeatable)

    def first(self, ask: Callable[[str, float], T], until: float, *, is_repeatable: bool = True) -> T:
        """What `ask` returns for the first endpoint that does not fail, given its share in seconds of the time left."""
        found: errors.TransportError | None = None
        for step, endpoint in enumerate(endpoints := self._endpoints):
            try:
                return ask(endpoint, max(0.0, until - time.monotonic()) / (len(endpoints) - step))
            except (errors.StoreUnavailableError, errors.ConfigError) as error:
                self.failed(endpoint)
                if found is None or isinstance(error, errors.StoreUnavailableError):
                    found = error  # rather than one that is never tried again: the endpoint may come back
                if not (is_repeatable or error.facts.get("sent") is False) or time.monotonic() >= until:
                    break
        assert found is not None  # there is an endpoint, and it has not answered
        raise found

    def failed(self, endpoint: str) -> None:
        """Ask another one first from now on."""
        first, *others = self._endpoints
        if first == endpoint:
            self._endpoints = (*others, first)

    def as_user(self, work: Callable[[Secret], T], until: float) -> T:
        """What `work` does with the user's token; done again with a new one while etcd does not know that any more.

        A token ends when its time has run out, when etcd is started again or forgets it, and, in a JWT, with every
        change of users and rights; nothing was carried out then. It is empty without a user, and where etcd asks for
        none. A StorePermissionError: etcd does not know this user with this password.
        """
        facts: Mapping[str, object] = {}
        for attempt in count():
            token = self._token
            if token is None:
                token = self._token = self._logged_in(until)
            try:
                return work(token)
            except errors.StorePermissionError as error:
                if not self.config.user or error.message not in messages.NO_LOGIN:
                    raise
                facts = error.facts
            if self._token is token:
                self._token = None
            wait_s = pause_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=1.0) if attempt else 0.0
            if time.monotonic() + wait_s >= until:
                break
            time.sleep(wait_s)
        text = "etcd takes none of the tokens that it gives this user: its members need one key and one clock for JWT"
        raise errors.StoreUnavailableError(text, **facts)

    def _logged_in(self, until: float) -> Secret:
        user = {"name": self.config.user, "password": self.config.password or NO_TOKEN}
        try:
            answer = self._ask("auth/authenticate", user, until, NO_TOKEN)
        except errors.StoreUnavailableError as error:
            if messages.AUTH_IS_OFF in str(error.facts.get("reason")):
                return NO_TOKEN
            raise
        token = str(answer.get("token", ""))
        if not token.isascii() or not token.isprintable():  # no header can have it
            raise errors.StoreUnavailableError("the answer is not etcd's: no token")
        return Secret(token.encode())


class EtcdWatch(Watch):
    """Changes below a prefix, as etcd streams them. The first `next` asks for them.

    Taking the stream up, and a probe, may each take the store's `timeout_s`: so much longer may `next` take.
    """

    def __init__(self, store: EtcdStore, prefix: str, *, after: int, identity: str) -> None:
        super().__init__(store.url)
        self._store = store
        self._range = messages.range_request(*store.namespace.bounds(prefix))
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
                self._store.first(self._begin_at, now + self._store.timeout_s)
        except errors.TransportError as error:
            self._drop()
            if stream is None or not isinstance(error, errors.StoreUnavailableError):
                raise
            self._store.failed(stream.endpoint)  # the stream was cut, or its endpoint is silent

    def _drop(self) -> None:
        """End the stream; another is asked for after a pause."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._pause_until_s = time.monotonic() + _PAUSE_S

    def _begin_at(self, endpoint: str, share: float) -> None:
        until = time.monotonic() + share
        request = {"create_request": {**self._range, "start_revision": str(self._after + 1)}}

        def begin(token: Secret) -> None:
            with ExitStack() as failing:
                stream = failing.enter_context(closing(self._connect(endpoint)))
                stream.ask("watch", request, token, until=until, streams=True)
                self._probe(endpoint)
                self._stream = stream
                failing.pop_all()

        self._store.as_user(begin, until)

    def _ask(self, endpoint: str, path: str, body: Json) -> Json:
        until = time.monotonic() + self._store.timeout_s

        def ask(token: Secret) -> Json:
            with closing(self._connect(endpoint)) as connection:
                return connection.ask(path, body, token, until=until)

        return self._store.as_user(ask, until)

    def _connect(self, endpoint: str) -> Connection:
        """A connection that `close` ends, too: of two that are open the newest is the one that is waited for."""
        self._newest = connection = Connection(endpoint, self._store.tls)
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
            if compacted := messages.number(message, "compact_revision"):
                text = "etcd no longer keeps what followed this revision; take a snapshot"
                raise errors.CompactedError(text, after=self._after, compacted=compacted)
            if message.get("canceled"):  # its reason is text for people: what was watched is asked for once
                self._ask(stream.endpoint, "kv/range", {**self._range, "count_only": True})
                raise errors.StoreUnavailableError("etcd has ended the watch", reason=message.get("cancel_reason"))
        return bool(found)

    def _probe(self, endpoint: str) -> None:
        """See that the store is the one it was."""
        identity, revision = messages.identity_of(partial(self._ask, endpoint), self._store.namespace)
        if revision < self._revision or (self._identity and identity != self._identity):
            text = "etcd's data are others than before: they were wiped or restored; start over"
            raise errors.StoreResetError(text, revision=revision, seen=self._revision)
        self._revision, self._identity = revision, identity
        self._probe_s = time.monotonic() + PROBE_S
