"""`EtcdStore`: the Store protocol over etcd v3's JSON gateway."""

from __future__ import annotations

import math
import os
import time
import weakref
from contextlib import suppress
from functools import partial

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, ConflictError, LeaseLostError
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.client import EtcdClient
from ucxx_transport.membership.etcd.messages import Json
from ucxx_transport.membership.etcd.watch import EtcdWatch
from ucxx_transport.membership.keys import Namespace, check_write, checked_ttl_s
from ucxx_transport.membership.store import Entry, Lease, Snapshot, Store, lease_lost, revision_conflict


class EtcdStore(Store):
    """A store in etcd: many machines.

    Its keys lie below `/ucxx_transport/<namespace>/`. Calls go to the endpoint that answered last, and to the others
    when it fails, within the same deadline; a `put` or `delete` that may have been carried out is not sent again.

    Args:
        endpoints: `host:port` of at least one, in the order in which they are tried. The first call connects.
        config: namespace, time limit, user and files of TLS.
        tls: whether it is spoken without a `ca_file` too.

    Raises:
        ConfigError: a setting of TLS cannot be used.
    """

    def __init__(self, endpoints: tuple[str, ...], config: StoreConfig | None = None, *, tls: bool = False) -> None:
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
        self._identity, _ = messages.identity_of(ask, self._namespace)
        return self._identity

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
        with suppress(LeaseLostError):
            self._call("lease/revoke", {"ID": str(lease_id)}, self._until(timeout_s))

    def get(self, key: str, *, timeout_s: float | None = None) -> Entry | None:
        request = messages.range_request(self._namespace.stored(key))
        found = messages.kvs_of(self._call("kv/range", request, self._until(timeout_s)))
        return messages.entry(found[0], self._namespace) if found else None

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
        check_write(value=value, lease_id=lease_id, expected=expected)
        request = messages.put_request(stored, value, lease_id)
        if expected is None:
            return messages.revision_of(self._change("kv/put", request, timeout_s))
        return messages.revision_of(self._change_expecting(stored, expected, "request_put", request, timeout_s))

    def delete(self, key: str, *, expected: int | None = None, timeout_s: float | None = None) -> bool:
        stored = self._namespace.stored(key)
        check_write(expected=expected)
        request = messages.range_request(stored)
        if expected is None:
            return bool(messages.number(self._change("kv/deleterange", request, timeout_s), "deleted"))
        try:
            self._change_expecting(stored, expected, "request_delete_range", request, timeout_s)
        except ConflictError as error:
            if error.facts["revision"] == 0:
                return False
            raise
        return expected != 0

    def snapshot(self, prefix: str = "", *, timeout_s: float | None = None) -> Snapshot:
        first, end = self._namespace.bounds(prefix)
        ask = partial(self._call, until=self._until(timeout_s))
        # First, so that a watch which follows knows this store from one that is wiped before it begins.
        self._identity, _ = messages.identity_of(ask, self._namespace, required=False)
        answer = ask("kv/range", messages.range_request(first, end))
        found = messages.entries(messages.kvs_of(answer), self._namespace)
        return Snapshot(revision=messages.revision_of(answer), entries=found)

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

    def _change_expecting(
        self, stored: bytes, expected: int, operation: str, request: Json, timeout_s: float | None
    ) -> Json:
        answer = self._change("kv/txn", messages.if_revision(stored, expected, operation, request), timeout_s)
        if not answer.get("succeeded"):
            kvs = messages.kvs_of(answer)
            raise revision_conflict(stored, expected, messages.number(kvs[0], "mod_revision") if kvs else 0)
        return answer

    def _change(self, path: str, body: Json, timeout_s: float | None) -> Json:
        return self._client().call(path, body, until=self._until(timeout_s), repeatable=False)

    def _call(self, path: str, body: Json, until: float) -> Json:
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
