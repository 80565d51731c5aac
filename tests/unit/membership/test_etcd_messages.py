"""etcd's JSON both ways, and its refusals as errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.support.rows import row
from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    LeaseLostError,
    StorePermissionError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership import etcd_messages as messages
from ucxx_transport.membership.entries import Entry, Event, Namespace

JOB = Namespace("job")
ONE = "a:1"


def text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def kv(key: str, revision: int, **fields: Any) -> dict[str, Any]:
    return {"key": text(JOB.stored(key)), "mod_revision": str(revision), **fields}


def test_what_is_left_out_is_zero() -> None:
    assert messages.entries([kv("a", 5)], JOB) == (Entry(key="a", value=b"", revision=5, lease_id=None),)
    assert messages.entries([kv("a", 5, lease="7", value=text(b"v"))], JOB)[0].lease_id == 7
    assert messages.revision_of({}) == 0
    assert messages.kvs_of({}) == []


def test_the_identity_is_hidden_from_callers() -> None:
    hidden = {"key": text(JOB.root + b"/identity"), "mod_revision": "2", "value": text(b"word")}
    assert [entry.key for entry in messages.entries([hidden, kv("a", 3)], JOB)] == ["a"]
    events = [{"kv": hidden}, {"kv": kv("a", 3)}]
    assert [batch.revision for batch in messages.batches({"events": events}, JOB)] == [3]


def test_an_identity_is_given_once_and_only_by_a_user_who_may() -> None:
    held: dict[str, Any] = {}

    def ask(path: str, request: Any) -> Any:
        if path == "kv/txn" and "kv" not in held:
            held["kv"] = {"mod_revision": "3", **request["success"][0]["request_put"]}
            return {"succeeded": True}
        found = {"kvs": [held["kv"]] if "kv" in held else [], "header": {"revision": "4"}}
        return {"responses": [{"response_range": found}]} if path == "kv/txn" else found

    def refuse(path: str, request: Any) -> Any:
        if path == "kv/txn":
            raise StorePermissionError("no")
        return ask(path, request)

    assert messages.identity_of(refuse, JOB) == ("", 4)
    word, revision = messages.identity_of(ask, JOB)
    assert len(word) == 32
    assert revision == 4
    assert messages.identity_of(refuse, JOB) == (word, 4)
    kept = held.pop("kv")

    def overtaken(path: str, request: Any) -> Any:
        if path == "kv/txn":
            held["kv"] = kept
        return ask(path, request)

    assert messages.identity_of(overtaken, JOB) == (word, 4)


def test_one_message_may_hold_several_revisions_each_of_them_whole() -> None:
    events = [
        {"kv": kv("a", 4, value=text(b"1"), lease="9")},
        {"type": "DELETE", "kv": kv("b", 5)},
        {"type": "DELETE", "kv": kv("c", 5)},
        {"kv": kv("b", 6)},
    ]
    found = list(messages.batches({"header": {"revision": "6"}, "events": events}, JOB))
    assert [(batch.revision, len(batch.events)) for batch in found] == [(4, 1), (5, 2), (6, 1)]
    assert found[0].events == (Event(kind="put", key="a", value=b"1", revision=4, lease_id=9),)
    assert found[1].events[1] == Event(kind="delete", key="c", value=b"", revision=5)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"hello", b"\xff", b"1"])
def test_what_is_no_object_is_not_etcds(raw: bytes) -> None:
    with pytest.raises(StoreUnavailableError):
        messages.answer_of(200, raw, "host:1")


@pytest.mark.parametrize("broken", [{"key": "?"}, {"key": 5}, {"key": text(b"k"), "mod_revision": "x"}])
def test_fields_of_another_kind_are_not_etcds(broken: dict[str, Any]) -> None:
    with pytest.raises(StoreUnavailableError):
        messages.entries([broken], JOB)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, {"code": 5, "message": "etcdserver: requested lease not found"}, LeaseLostError),
        (403, {"code": 7}, StorePermissionError),
        (400, {"code": 3, "message": "etcdserver: user name is empty"}, StorePermissionError),
        (401, {"code": 16}, StorePermissionError),
        (400, {"code": 11, "message": "etcdserver: mvcc: required revision has been compacted"}, CompactedError),
        (400, {"code": 11, "message": "etcdserver: too large lease TTL"}, StoreUnavailableError),
        (503, {"code": 14}, StoreUnavailableError),
        (504, {"code": 4}, StoreUnavailableError),
        (429, {"code": 8, "message": "etcdserver: mvcc: database space exceeded"}, StoreUnavailableError),
        (500, {"code": 2}, StoreUnavailableError),
        (200, {"error": {"grpc_code": 14, "http_code": 503, "message": "m"}}, StoreUnavailableError),
        (404, {}, ConfigError),
        (400, {}, ConfigError),
        (502, {}, StoreUnavailableError),
    ],
)
def test_a_refusal_is_known_by_its_words_or_its_code(
    status: int, body: dict[str, Any], error: type[TransportError]
) -> None:
    with pytest.raises(error) as caught:
        messages.answer_of(status, json.dumps(body).encode() if body else b"", ONE)
    assert type(caught.value) is error
    assert caught.value.facts["endpoint"] == "a:1"
    if "message" in body:
        assert caught.value.facts["reason"] == body["message"]


def test_each_refusal_says_what_helps() -> None:
    table: list[tuple[int, int, str, type[TransportError], str]] = [
        (429, 8, "etcdserver: mvcc: database space exceeded", StoreUnavailableError, "etcdctl alarm disarm"),
        (429, 8, "etcdserver: too many requests", StoreUnavailableError, "fewer writers"),
        (500, 2, "etcdserver: too many requests", StoreUnavailableError, "fewer writers"),  # as etcd 3.5 answers
        (400, 3, "etcdserver: request is too large", ConfigError, "--max-request-bytes"),
        (429, 8, "grpc: received message larger than max (9 vs. 4)", ConfigError, "--max-request-bytes"),
        (503, 14, "etcdserver: no leader", StoreUnavailableError, "most of its members"),
        (400, 9, "etcdserver: not leader", StoreUnavailableError, "most of its members"),
        (503, 14, "etcdserver: leader changed", StoreUnavailableError, "most of its members"),
        (503, 14, "etcdserver: request timed out", StoreUnavailableError, "most of its members"),
        (
            *(503, 14, "etcdserver: request timed out, possibly due to previous leader failure"),
            *(StoreUnavailableError, "most of its members"),
        ),
        (503, 14, "etcdserver: unhealthy cluster", StoreUnavailableError, "most of its members"),
        (500, 15, "etcdserver: corrupt cluster", StoreUnavailableError, "alarm list"),
        (503, 14, "etcdserver: rpc not supported for learner", StoreUnavailableError, "promote it"),
        (503, 14, "etcdserver: server stopped", StoreUnavailableError, "being stopped"),
        (400, 3, "etcdserver: user name is empty", StorePermissionError, "set store.user"),
        (
            *(400, 3, "etcdserver: authentication failed, invalid user ID or password"),
            *(StorePermissionError, "see to store.user"),
        ),
        (403, 7, "etcdserver: permission denied", StorePermissionError, "READWRITE"),
    ]
    for status, code, said, error, remedy in table:
        stream = {"grpc_code": code, "http_code": status, "message": said}
        for http, body in ((status, {"error": said, "code": code, "message": said}), (200, {"error": stream})):
            with row(said=said), pytest.raises(error) as caught:
                messages.answer_of(http, json.dumps(body).encode(), ONE)
            with row(said=said):
                assert type(caught.value) is error
                assert remedy in caught.value.message
                assert caught.value.retryable is (error is StoreUnavailableError)
                assert caught.value.facts["reason"] == said
