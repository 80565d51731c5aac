"""The v3 JSON of etcd, both ways, without any I/O (https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/).

| in JSON               | is                                                                       |
|-----------------------|--------------------------------------------------------------------------|
| keys, values          | base64                                                                   |
| int64                 | text: revisions, lease ids, times to live                                |
| a field of its zero   | left out: an empty value, lease 0, `succeeded: false`, the type of a PUT |
| a lost lease, renewed | status 200 without a `TTL`                                               |
| a refused watch       | status 200, `created` and `canceled` in one message                      |
| a compacted watch     | status 200, `canceled` with a `compact_revision`                         |

A refusal is known by its gRPC code (https://grpc.github.io/grpc/core/md_doc_statuscodes.html):

| code                                                            | raised                                   |
|-----------------------------------------------------------------|------------------------------------------|
| 5 not found                                                     | `LeaseLostError`: only leases are named  |
| 7 permission denied                                             | `StorePermissionError`                   |
| 3 invalid argument ("user name is empty"), 16 unauthenticated   | a new token, then `StorePermissionError` |
| 11 out of range                                                 | `CompactedError`                         |
| all others: unavailable, deadline exceeded, no space, unknown … | `StoreUnavailableError`                  |
| none, with an HTTP status of a server that is no etcd gateway   | `ConfigError`                            |

The store's identity lies at `/identity` below the namespace: no key of a caller begins with "/", and none sees it.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    LeaseLostError,
    StorePermissionError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.store import Batch, Entry, Event

Json = Mapping[str, Any]
"""A JSON object; `Any` because its shape is etcd's, and is read field by field here alone."""

_IDENTITY: Final = b"/identity"

_INVALID_ARGUMENT: Final = 3
_NOT_FOUND: Final = 5
_PERMISSION_DENIED: Final = 7
FAILED_PRECONDITION: Final = 9
_OUT_OF_RANGE: Final = 11
_UNAUTHENTICATED: Final = 16
NOT_LOGGED_IN: Final = frozenset({_INVALID_ARGUMENT, _UNAUTHENTICATED})
"""A request without a user, or with a token that is not known any more. All requests here are well-formed otherwise."""
_NOT_A_GATEWAY: Final = frozenset({400, 404, 405, 415, 426})


@dataclass(frozen=True, slots=True)
class EtcdReply:
    """An answer of etcd, a JSON object."""

    body: Json

    @property
    def revision(self) -> int:
        """The store's, when it answered."""
        return _int(self.body.get("header", {}), "revision")

    @property
    def succeeded(self) -> bool:
        """Whether a transaction's comparisons held."""
        return bool(self.body.get("succeeded"))

    def number(self, field: str) -> int:
        """An int64; 0 when it is left out."""
        return _int(self.body, field)

    def kvs(self) -> list[Json]:
        """What a range has found."""
        found = self.body.get("kvs") or []
        return [kv for kv in found if isinstance(kv, dict)]

    def ranges(self) -> list[EtcdReply]:
        """The answers of a transaction's ranges, in their order."""
        found = self.body.get("responses") or []
        return [EtcdReply(each.get("response_range") or {}) for each in found if isinstance(each, dict)]


Ask = Callable[[str, Json], EtcdReply]
"""Asks etcd: a path below `/v3/` and a request, to the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchMessage:
    """One line of a watch's stream.

    Attributes:
        canceled: etcd has ended it.
        compacted: because what it asks for is gone: the first revision that is kept; 0: not so.
        reason: of the end, in etcd's words.
        batches: the changes, by revision.
    """

    canceled: bool
    compacted: int
    reason: str
    batches: tuple[Batch, ...]


def parsed(text: bytes, endpoint: str) -> Json:
    """The object that the text is; a StoreUnavailableError where it is none: cut off, or not etcd's."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StoreUnavailableError("the answer is no JSON object: cut off, or not etcd's", endpoint=endpoint)
    return found


def answer_of(status: int, text: bytes, endpoint: str) -> EtcdReply:
    """The answer in a response; where it is none, an error of the module's table."""
    if status != 200:
        try:
            body = parsed(text, endpoint)
        except StoreUnavailableError:
            body = {}
        raise refusal(status, body, endpoint)
    body = parsed(text, endpoint)
    if code_of(body):
        raise refusal(status, body, endpoint)
    return EtcdReply(body.get("result", body))


def is_not_logged_in(error: TransportError) -> bool:
    """Whether etcd asks for a token, or for another one."""
    return error.facts.get("code") in NOT_LOGGED_IN


def code_of(body: Json) -> int:
    """The gRPC code of an error's body; 0 when it has none."""
    error = body.get("error")
    code = error.get("grpc_code") if isinstance(error, dict) else body.get("code")  # a stream's error, or a call's
    return code if isinstance(code, int) else 0


def refusal(status: int, body: Json, endpoint: str) -> TransportError:
    """The error for an answer that is none; its body is empty when it is not JSON."""
    code = code_of(body)
    facts: dict[str, object] = {"endpoint": endpoint, "status": status, "code": code, "reason": _words(body)}
    if code == _NOT_FOUND:
        return LeaseLostError("the lease has ended: take another one and put its keys again", **facts)
    if code == _PERMISSION_DENIED:
        return StorePermissionError(
            "etcd does not let this user do that: grant its role READWRITE on the namespace's prefix", **facts
        )
    if code in NOT_LOGGED_IN:
        return StorePermissionError("etcd refuses this user: see to store.user and store.password", **facts)
    if code == _OUT_OF_RANGE:
        return CompactedError("etcd no longer keeps this revision; take a snapshot", **facts)
    if not code and status in _NOT_A_GATEWAY:
        return ConfigError(
            "what answers there is not etcd's JSON gateway (/v3, etcd 3.4 or later, --enable-grpc-gateway): name its "
            "client URL; etcds:// where it speaks TLS",
            **facts,
        )
    return StoreUnavailableError("etcd does not answer as asked", **facts)


def identity_key(namespace: Namespace) -> bytes:
    """Where the store's identity lies."""
    return namespace.root + _IDENTITY


def range_request(first: bytes, end: bytes | None = None, *, count_only: bool = False) -> Json:
    """Ask for one key, or for those from `first` on, below `end`, in order; deleting names them by the same."""
    request: dict[str, object] = {"key": _text(first)}
    if end is not None:
        request["range_end"] = _text(end)
    if count_only:
        request["count_only"] = True
    return request


def put_request(key: bytes, value: bytes, lease_id: int | None) -> Json:
    """Write one key."""
    request: dict[str, object] = {"key": _text(key), "value": _text(value)}
    if lease_id is not None:
        request["lease"] = str(lease_id)
    return request


def if_revision(key: bytes, revision: int, operation: str, request: Json) -> Json:
    """Do `request` when the key has this revision (0: does not exist), else answer with the key as it is."""
    return {
        "compare": [{"target": "MOD", "result": "EQUAL", "key": _text(key), "mod_revision": str(revision)}],
        "success": [{operation: request}],
        "failure": [{"request_range": range_request(key)}],
    }


def both_ranges(*requests: Json) -> Json:
    """Ask for several ranges at one revision."""
    return {"success": [{"request_range": request} for request in requests]}


def given_identity(ask: Ask, namespace: Namespace) -> str:
    """The store's identity: a random word that it is given now if it has none. Raises what `ask` does."""
    key, word = identity_key(namespace), secrets.token_hex(16)
    put = put_request(key, word.encode(), None)
    reply = ask("kv/txn", if_revision(key, 0, "request_put", put))
    return word if reply.succeeded else value_of(reply.ranges()[0].kvs())


def watch_request(first: bytes, end: bytes, *, after: int) -> Json:
    """Ask for the changes after a revision."""
    return {"create_request": {**range_request(first, end), "start_revision": str(after + 1)}}


def entry(kv: Json, namespace: Namespace) -> Entry:
    """A key as a range gives it."""
    return Entry(
        key=namespace.key(_bytes(kv, "key")),
        value=_bytes(kv, "value"),
        revision=_int(kv, "mod_revision"),
        lease_id=_int(kv, "lease") or None,
    )


def entries(kvs: Iterable[Json], namespace: Namespace) -> tuple[Entry, ...]:
    """The callers' keys of a range."""
    hidden = identity_key(namespace)
    return tuple(entry(kv, namespace) for kv in kvs if _bytes(kv, "key") != hidden)


def watch_message(line: Json, namespace: Namespace) -> WatchMessage:
    """A line of a watch's stream; its changes are whole revisions, as etcd keeps them together."""
    result = line.get("result") or {}
    return WatchMessage(
        canceled=bool(result.get("canceled")),
        compacted=_int(result, "compact_revision"),
        reason=str(result.get("cancel_reason", "")),
        batches=tuple(_batches(result.get("events") or [], namespace)),
    )


def value_of(kvs: list[Json]) -> str:
    """The text of a range's one value; "" when it has found nothing."""
    return _bytes(kvs[0], "value").decode(errors="replace") if kvs else ""


def _batches(events: list[Json], namespace: Namespace) -> Iterator[Batch]:
    hidden = identity_key(namespace)
    for revision, group in groupby(events, key=lambda event: _int(event.get("kv") or {}, "mod_revision")):
        shown = tuple(_event(event, namespace) for event in group if _bytes(event["kv"], "key") != hidden)
        if shown:
            yield Batch(revision=revision, events=shown)


def _event(event: Json, namespace: Namespace) -> Event:
    found = entry(event["kv"], namespace)
    if event.get("type") == "DELETE":
        return Event(kind="delete", key=found.key, value=b"", revision=found.revision)
    return Event(kind="put", **asdict(found))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _bytes(holder: Json, field: str) -> bytes:
    try:
        return base64.b64decode(holder.get(field) or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise StoreUnavailableError("the answer is not etcd's: no base64", field=field) from None


def _int(holder: Json, field: str) -> int:
    try:
        return int(holder.get(field) or 0)
    except (TypeError, ValueError):
        raise StoreUnavailableError("the answer is not etcd's: no number", field=field) from None


def _words(body: Json) -> str:
    error = body.get("error")
    found = error.get("message") if isinstance(error, dict) else body.get("message", error)
    return str(found or "")
