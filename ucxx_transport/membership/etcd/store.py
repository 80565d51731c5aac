"""`EtcdStore`: the Store protocol over etcd v3's JSON gateway."""

from __future__ import annotations

import math
import os
import time
import weakref
from contextlib import suppress
from functools import partial

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, ConflictError, LeaseLostError, StorePermissionError
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.client import EtcdClient
from ucxx_transport.membership.etcd.messages import EtcdReply, Json
from ucxx_transport.membership.etcd.watch import EtcdWatch
from ucxx_transport.membership.keys import Namespace, checked_expected, checked_lease_id, checked_ttl_s, checked_value
from ucxx_transport.membership.store import Entry, Lease, Snapshot, Store, lease_lost, revision_conflict


class EtcdStore(Store):
    """A store in etcd: many machines.

    Its keys lie below `/ucxx_transport/<namespace>/`. Calls go to the endpoint that answered last, and to the others
    when it fails, within the same deadline; a `put` or `delete` that may have been carried out is not sent again.
    """

    def __init__(self, endpoints: tuple[str, ...], config: StoreConfig | None = None, *, tls: bool = False) -> None:
        """Name the cluster; the first call connects.

        Args:
            endpoints: `host:port` of at least one, in the order in which they are tried.
            config: namespace, time limit, user and files of TLS.
            tls: whether it is spoken without a `ca_file` too.

        Raises:
            ConfigError: a setting of TLS cannot be used.
        """
        self._config = config or StoreConfig()
        self._url = f"{'etcds' if tls else 'etcd'}://{','.join(endpoints)}"
        self._namespace = Namespace(self._config.namespace)
        self._new_client = partial(EtcdClient, endpoints, self._config, tls=tls)
        self._by_process = {os.getpid(): self._new_client()}
        self._identity = ""
        self._closed = False
        self._watches: weakref.WeakSet[EtcdWatch] = weakref.WeakSet()

    @property
    def url(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"EtcdStore({self.url!r}, namespace={self._config.namespace!r})"

    def identity(self, *, timeout_s: float | None = None) -> str:
        ask = partial(self._call, until=self._until(timeout_s))
        known = ask("kv/range", messages.range_request(messages.identity_key(self._namespace)))
        self._identity = messages.value_of(known.kvs()) or messages.given_identity(ask, self._namespace)
        return self._identity

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        whole = math.ceil(checked_ttl_s(ttl_s))  # etcd counts in seconds, from 1 on
        reply = self._call("lease/grant", {"TTL": str(whole)}, self._until(timeout_s))
        return Lease(lease_id=reply.number("ID"), ttl_s=float(reply.number("TTL")))

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        checked_lease_id(lease_id)
        reply = self._call("lease/keepalive", {"ID": str(lease_id)}, self._until(timeout_s))
        if not reply.number("TTL"):
            raise lease_lost(lease_id)
        return float(reply.number("TTL"))

    def revoke(self, lease_id: int, *, timeout_s: float | None = None) -> None:
        checked_lease_id(lease_id)
        try:
            self._call("lease/revoke", {"ID": str(lease_id)}, self._until(timeout_s))
        except LeaseLostError:
            return

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        request = messages.range_request(self._namespace.stored(key))
        found = messages.entries(self._call("kv/range", request, self._until(timeout_s)).kvs(), self._namespace)
        return found[0] if found else None

    def put(
        self,
        key: str,
        value: bytes,
        *,
        lease_id: int | None = None,
        expected: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        stored = self._namespace.stored(key)
        if lease_id is not None:
            checked_lease_id(lease_id)
        request = messages.put_request(stored, checked_value(value), lease_id)
        if checked_expected(expected) is None:
            return self._change("kv/put", request, timeout_s).revision
        return self._change_expecting(stored, expected or 0, "request_put", request, timeout_s).revision

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self._namespace.stored(key)
        request = messages.range_request(stored)
        if checked_expected(expected) is None:
            return bool(self._change("kv/deleterange", request, timeout_s).number("deleted"))
        try:
            self._change_expecting(stored, expected or 0, "request_delete_range", request, timeout_s)
        except ConflictError as error:
            if error.facts["revision"] == 0:
                return False
            raise
        return expected != 0

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self._namespace.bounds(prefix)
        identity = messages.range_request(messages.identity_key(self._namespace))
        request = messages.both_ranges(messages.range_request(first, end), identity)
        until = self._until(timeout_s)
        reply = self._call("kv/txn", request, until)
        if not messages.value_of(reply.ranges()[1].kvs()):
            # A watch that follows would not know this store from one that is wiped before it begins.
            with suppress(StorePermissionError):  # who may only read leaves that to the others
                self.identity(timeout_s=until - time.monotonic())
                reply = self._call("kv/txn", request, until)
        found, known = reply.ranges()
        self._identity = messages.value_of(known.kvs())
        return Snapshot(revision=reply.revision, entries=messages.entries(found.kvs(), self._namespace))

    def watch(self, prefix: str = "", *, after: int) -> EtcdWatch:
        watch = EtcdWatch(
            self._client(),
            self._namespace,
            prefix,
            after=after,
            identity=self._identity,
            timeout_s=self._config.timeout_s,
            on_reset=self._forget_identity,
        )
        self._watches.add(watch)
        return watch

    def close(self) -> None:
        self._closed = True
        for watch in list(self._watches):
            watch.close()
        client = self._by_process.pop(os.getpid(), None)
        if client is not None:
            client.close()

    def _change_expecting(
        self, stored: bytes, expected: int, operation: str, request: Json, timeout_s: float | None
    ) -> EtcdReply:
        reply = self._change("kv/txn", messages.if_revision(stored, expected, operation, request), timeout_s)
        if not reply.succeeded:
            kvs = reply.ranges()[0].kvs()
            revision = messages.entry(kvs[0], self._namespace).revision if kvs else 0
            raise revision_conflict(stored, expected, revision)
        return reply

    def _change(self, path: str, body: Json, timeout_s: float | None) -> EtcdReply:
        return self._client().call(path, body, until=self._until(timeout_s), repeatable=False)

    def _call(self, path: str, body: Json, until: float) -> EtcdReply:
        return self._client().call(path, body, until=until)

    def _until(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self._config.timeout_s if timeout_s is None else timeout_s)

    def _client(self) -> EtcdClient:
        """This process's connections: a forked child has none of its parent's, which stay in the dict unused."""
        if self._closed:
            raise ConfigError("the store is closed: open another", url=self.url)
        pid = os.getpid()
        return self._by_process.get(pid) or self._by_process.setdefault(pid, self._new_client())

    def _forget_identity(self) -> None:
        """A watch has found the store to be another one: the next one takes it as it is."""
        self._identity = ""
