"""etcd's JSON both ways, and its refusals as errors."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    LeaseLostError,
    StorePermissionError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership.etcd import messages
from ucxx_transport.membership.etcd.client import Endpoints, share_s
from ucxx_transport.membership.etcd.messages import refusal
from ucxx_transport.membership.keys import Namespace
from ucxx_transport.membership.store import Entry, Event

JOB = Namespace("job")
ONE, TWO, THREE = ("a:1", "b:1", "c:1")


def text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def kv(key: str, revision: int, **fields: Any) -> dict[str, Any]:
    return {"key": text(JOB.stored(key)), "mod_revision": str(revision), **fields}


def test_what_is_left_out_is_zero() -> None:
    assert messages.entries([kv("a", 5)], JOB) == (Entry(key="a", value=b"", revision=5, lease_id=None),)
    assert messages.entries([kv("a", 5, lease="7", value=text(b"v"))], JOB)[0].lease_id == 7
    assert messages.EtcdReply({}).revision == 0
    assert not messages.EtcdReply({}).succeeded
    assert messages.value_of([]) == ""


def test_the_identity_is_hidden_from_callers() -> None:
    hidden = {"key": text(messages.identity_key(JOB)), "mod_revision": "2", "value": text(b"word")}
    assert [entry.key for entry in messages.entries([hidden, kv("a", 3)], JOB)] == ["a"]
    assert messages.value_of([hidden]) == "word"
    events = [{"kv": hidden}, {"kv": kv("a", 3)}]
    message = messages.watch_message({"result": {"events": events}}, JOB)
    assert [batch.revision for batch in message.batches] == [3]


def test_one_message_may_hold_several_revisions_each_of_them_whole() -> None:
    events = [
        {"kv": kv("a", 4, value=text(b"1"), lease="9")},
        {"type": "DELETE", "kv": kv("b", 5)},
        {"type": "DELETE", "kv": kv("c", 5)},
        {"kv": kv("b", 6)},
    ]
    message = messages.watch_message({"result": {"header": {"revision": "6"}, "events": events}}, JOB)
    assert [(batch.revision, len(batch.events)) for batch in message.batches] == [(4, 1), (5, 2), (6, 1)]
    assert message.batches[0].events == (Event(kind="put", key="a", value=b"1", revision=4, lease_id=9),)
    assert message.batches[1].events[1] == Event(kind="delete", key="c", value=b"", revision=5)
    assert (message.canceled, message.compacted) == (False, 0)


def test_a_watch_begins_after_the_revision() -> None:
    request = messages.watch_request(*JOB.bounds("a"), after=41)["create_request"]
    assert request["start_revision"] == "42"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"hello", b"\xff", b"1"])
def test_what_is_no_object_is_not_etcds(raw: bytes) -> None:
    with pytest.raises(StoreUnavailableError):
        messages.parsed(raw, "host:1")


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
        (400, {"code": 11}, CompactedError),
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
def test_a_refusal_is_known_by_its_code(status: int, body: dict[str, Any], error: type[TransportError]) -> None:
    found = refusal(status, body, ONE)
    assert type(found) is error
    assert found.facts["endpoint"] == "a:1"
    if "message" in body:
        assert found.facts["reason"] == body["message"]


def test_the_endpoint_that_answered_is_asked_first() -> None:
    endpoints = Endpoints((ONE, TWO, THREE))
    assert list(endpoints.in_turn()) == [(ONE, 2), (TWO, 1), (THREE, 0)]
    endpoints.answered(TWO)
    assert [endpoint for endpoint, _others in endpoints.in_turn()] == [TWO, THREE, ONE]
    endpoints.failed(ONE)  # not the one in front
    assert [endpoint for endpoint, _others in endpoints.in_turn()] == [TWO, THREE, ONE]
    endpoints.failed(TWO)
    assert [endpoint for endpoint, _others in endpoints.in_turn()] == [THREE, ONE, TWO]
    endpoints.failed(THREE)
    assert [endpoint for endpoint, _others in endpoints.in_turn()] == [ONE, TWO, THREE]


def test_endpoints_share_the_time_that_is_left() -> None:
    assert share_s(6.0, 2) == 2.0
    assert share_s(6.0, 0) == 6.0
    assert share_s(-1.0, 0) == 0.0
