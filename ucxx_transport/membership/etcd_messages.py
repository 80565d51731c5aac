"""The v3 JSON of etcd, both ways, without any I/O (https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/).

| in JSON               | is                                                                       |
|-----------------------|--------------------------------------------------------------------------|
| keys, values          | base64                                                                   |
| int64                 | text: revisions, lease ids, times to live                                |
| a field of its zero   | left out: an empty value, lease 0, `succeeded: false`, the type of a PUT |
| a lost lease, renewed | status 200 without a `TTL`                                               |
| a refused watch       | status 200, `created` and `canceled` in one message                      |
| a compacted watch     | status 200, `canceled` with a `compact_revision`                         |

The store's identity lies at `/identity` below the namespace: no key of a caller begins with "/", and none sees it.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any, Final

from ucxx_transport import errors
from ucxx_transport.membership.entries import Batch, Entry, Event, Namespace

Json = Mapping[str, Any]
"""A JSON object; `Any` because its shape is etcd's, and is read field by field here alone."""

_NOT_A_GATEWAY: Final = (400, 404, 405, 415, 426)

AUTH_IS_OFF: Final = "authentication is not enabled"
_ASKED_FOR: Final = "etcd asks for a user, and there is none: set store.user and store.password"
_TOKEN: Final = "etcd does not know this user's token any more"  # noqa: S105 - words
NO_LOGIN: Final = (_ASKED_FOR, _TOKEN)
"""A new token helps: the request had none, or one that etcd does not know any more."""
_UNSETTLED: Final = (
    "etcd has no leader that answers: most of its members must run, reach each other, and have disks that keep up"
)
_TOO_LARGE: Final = "etcd takes no request of this size: raise its --max-request-bytes, or store less (meta)"
_REFUSALS: Final[Mapping[type[errors.TransportError], Mapping[str | int, str]]] = {
    errors.StorePermissionError: {
        "user name is empty": _ASKED_FOR,
        "invalid auth token": _TOKEN,
        "revision of auth store is old": _TOKEN,
        "revision in header is old": _TOKEN,  # the same, before etcd 3.5.2
        16: _TOKEN,
        "authentication failed": "etcd knows no such user with this password: see to store.user and store.password",
        7: "etcd does not let this user do that: grant its role READWRITE on the namespace's prefix",
    },
    errors.ConfigError: {"request is too large": _TOO_LARGE, "received message larger than max": _TOO_LARGE},
    errors.CompactedError: {"revision has been compacted": "etcd no longer keeps this revision; take a snapshot"},
    errors.LeaseLostError: {5: "the lease has ended: take another one and put its keys again"},
    errors.StoreUnavailableError: {
        "no leader": _UNSETTLED,
        "not leader": _UNSETTLED,
        "leader changed": _UNSETTLED,
        "request timed out": _UNSETTLED,
        "unhealthy cluster": _UNSETTLED,
        "database space exceeded": (
            "etcd has no space left and takes no writes, though leases are renewed: compact and defragment it, or "
            "raise its --quota-backend-bytes, then `etcdctl alarm disarm`"
        ),
        "too many requests": (
            "etcd has more to write than its disk takes: faster disks, or fewer writers; it is asked again"
        ),
        "corrupt": (
            "etcd's members differ in their data, and it takes no writes: `etcdctl alarm list` names the member to "
            "replace"
        ),
        "for learner": (
            "this member of etcd is a learner, and serves nothing yet: promote it, or leave it out of the URL"
        ),
        "server stopped": "this member of etcd is being stopped",
    },
}
"""What is raised for etcd's words, the first that are in its answer, else for gRPC's code.

The words are those by which etcd's own clients know its errors (api/v3rpc/rpctypes/error.go); codes say less, and two
releases have two for one error (https://grpc.github.io/grpc/core/md_doc_statuscodes.html). 5 is not found, of which
only leases are named; 7 permission denied; 16 unauthenticated. All else is a StoreUnavailableError.
"""
_KNOWN: Final = {words: (kind, why) for kind, rows in _REFUSALS.items() for words, why in rows.items()}
_NO_GATEWAY: Final = (
    "what answers there is not etcd's JSON gateway (/v3, etcd 3.4 or later, --enable-grpc-gateway): name its client "
    "URL; etcds:// where it speaks TLS"
)
_IDENTITY: Final = "/identity"


def answer_of(status: int, text: bytes, endpoint: str) -> Json:
    """The answer in a response, or in a line of a stream; where it is none, an error by `_REFUSALS`."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        if status == 200:
            why = "the answer is no JSON object: cut off, or not etcd's"
            raise errors.StoreUnavailableError(why, endpoint=endpoint)
        body = {}
    error = body.get("error")
    said = error if isinstance(error, dict) else body  # a stream's error is an object, a call's is text beside its code
    code, words = said.get("grpc_code", said.get("code")), said.get("message", error)
    if status == 200 and not code and not error:
        return body.get("result", body)  # type: ignore[no-any-return]  # what else it may hold is read field by field
    code, reason = code if isinstance(code, int) else 0, str(words or "")
    known = next((row for row in _KNOWN if isinstance(row, str) and row in reason), code)
    kind, why = _KNOWN.get(known, (errors.StoreUnavailableError, "etcd does not answer as asked"))
    if not code and status in _NOT_A_GATEWAY:
        kind, why = errors.ConfigError, _NO_GATEWAY
    raise kind(why, endpoint=endpoint, status=status, code=code, reason=reason)


def identity_of(ask: Callable[[str, Json], Json], namespace: Namespace) -> tuple[str, int]:
    """The store's identity, a random word that it is given now if it has none, and its revision when it was asked.

    "" where there is none, and this user may not give it one. `ask` takes a path below `/v3/` and a request.
    """
    key = namespace.root + _IDENTITY.encode()
    found = ask("kv/range", range_request(key))
    kvs, revision = kvs_of(found), revision_of(found)
    if not kvs:
        word = secrets.token_hex(16)
        try:
            given = ask("kv/txn", if_revision(key, 0, "request_put", put_request(key, word.encode())))
        except errors.StorePermissionError:
            return "", revision
        if given.get("succeeded"):
            return word, revision
        kvs = kvs_of(given)  # another was first
    return entry(kvs[0], namespace).value.decode(errors="replace") if kvs else "", revision


def range_request(first: bytes, end: bytes | None = None) -> dict[str, object]:
    """Ask for one key, or for those from `first` on, below `end`, in order; deleting names them by the same."""
    return {"key": _text(first)} if end is None else {"key": _text(first), "range_end": _text(end)}


def put_request(key: bytes, value: bytes, lease_id: int | None = None) -> Json:
    """Write one key."""
    return {"key": _text(key), "value": _text(value), "lease": str(lease_id or 0)}


def if_revision(key: bytes, revision: int, operation: str, request: Json) -> Json:
    """Do `request` when the key has this revision (0: does not exist), else answer with the key as it is."""
    return {
        "compare": [{"target": "MOD", "result": "EQUAL", "key": _text(key), "mod_revision": str(revision)}],
        "success": [{operation: request}],
        "failure": [{"request_range": range_request(key)}],
    }


def number(holder: Json, field: str) -> int:
    """An int64 of an answer; 0 when it is left out."""
    try:
        return int(holder.get(field) or 0)
    except (TypeError, ValueError):
        raise errors.StoreUnavailableError("the answer is not etcd's: no number", field=field) from None


def revision_of(answer: Json) -> int:
    """The store's, when it answered."""
    return number(answer.get("header") or {}, "revision")


def kvs_of(answer: Json) -> list[Json]:
    """The keys that a range has found, alone or where a transaction's comparison did not hold."""
    for response in answer.get("responses") or []:
        answer = response.get("response_range") or {}
    return answer.get("kvs") or []


def entry(kv: Json, namespace: Namespace) -> Entry:
    """A key as a range gives it."""
    return Entry(
        key=namespace.key(_bytes(kv, "key")),
        value=_bytes(kv, "value"),
        revision=number(kv, "mod_revision"),
        lease_id=number(kv, "lease") or None,
    )


def entries(kvs: Iterable[Json], namespace: Namespace) -> tuple[Entry, ...]:
    """The callers' keys of a range."""
    return tuple(found for kv in kvs if (found := entry(kv, namespace)).key != _IDENTITY)


def batches(message: Json, namespace: Namespace) -> Iterator[Batch]:
    """The callers' changes in a message of a watch, by revision: each whole, as etcd keeps them together."""
    for revision, group in groupby(message.get("events") or [], key=lambda one: number(one["kv"], "mod_revision")):
        # of a deleted key etcd leaves value and lease out
        changes = [
            Event(kind="delete" if one.get("type") == "DELETE" else "put", **asdict(entry(one["kv"], namespace)))
            for one in group
        ]
        if shown := tuple(change for change in changes if change.key != _IDENTITY):
            yield Batch(revision=revision, events=shown)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _bytes(holder: Json, field: str) -> bytes:
    try:
        return base64.b64decode(holder.get(field) or "", validate=True)
    except (TypeError, ValueError):
        raise errors.StoreUnavailableError("the answer is not etcd's: no base64", field=field) from None
