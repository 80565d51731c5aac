from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.source_records import record
from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.membership import SourceRecord, SourceStatus
from ucxx_transport.membership.sources import MAX_RECORD_BYTES

GOOD: dict[str, Any] = json.loads(record("a/b ü", 7, meta={"gpu": [0, 1]}).to_bytes())


def changed(**fields: object) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("worker_id", "w" * 129),
        ("worker_id", "a\nb"),
        ("worker_id", b"w"),
        ("epoch", 0),
        ("epoch", -1),
        ("epoch", 1 << 64),
        ("epoch", True),
        ("epoch", 1.0),
        ("session", "0" * 31),
        ("session", "0" * 33),
        ("session", "G" * 32),
        ("session", "A" * 32),
        ("status", "ready"),
        ("ring_id", bytes(15)),
        ("ring_id", "0" * 16),
        ("ring_name", ""),
        ("ring_name", "x\0y"),
        ("host_id", ""),
        ("host", ""),
        ("host", "a\tb"),
        ("ports", (0,)),
        ("ports", (65536,)),
        ("ports", (True,)),
        ("ports", "80"),
        ("ports", tuple(range(1, 66))),
        ("ttl_s", -1.0),
        ("ttl_s", float("nan")),
        ("ttl_s", float("inf")),
        ("ttl_s", 6),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"a source's {field} cannot be") as caught:
        replace(record(), **{field: value})
    assert caught.value.facts["field"] == field


@pytest.mark.parametrize(
    "source",
    [
        record("w" * 128, (1 << 64) - 1),
        record("ü/%2F ☃", ports=tuple(range(1, 65))),
        record(host=None, ports=()),
        record(status=SourceStatus.STARTING, ttl_s=0.0),
        record(status=SourceStatus.STALE, meta={"rank": 3, "nested": {"list": [1, 2.5, None, True, "é"]}}),
    ],
    ids=lambda source: source.worker_id[:8],
)
def test_a_record_survives_the_store(source: SourceRecord) -> None:
    assert SourceRecord.from_bytes(source.to_bytes()) == source


def test_an_operator_can_read_a_record_in_the_store() -> None:
    assert json.loads(record("a/b ü", 7, meta={"gpu": [0, 1]}).to_bytes()) == {
        "version": 1,
        "worker_id": "a/b ü",
        "epoch": 7,
        "session": b"a/b \xc3\xbc".hex().rjust(32, "0"),
        "status": "ready",
        "ring_id": b"a/b \xc3\xbc".hex().rjust(32, "0"),
        "ring_name": "ucxx_transport-612f6220c3bc",
        "host_id": "another host",
        "host": "10.0.0.1",
        "ports": [5001, 5002],
        "ttl_s": 6.0,
        "meta": {"gpu": [0, 1]},
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("version", True),
        ("worker_id", 7),
        ("epoch", 0),
        ("epoch", "1"),
        ("session", "short"),
        ("status", "dead"),
        ("status", ["ready"]),
        ("status", None),
        ("ring_id", "00"),
        ("ring_id", "zz" * 16),
        ("ring_id", 7),
        ("ring_id", "00 " * 16),
        ("ring_name", None),
        ("host_id", 1),
        ("host", 5),
        ("ports", [0]),
        ("ports", [[1]]),
        ("ports", None),
        ("ports", {"5001": 1}),
        ("ttl_s", "6"),
        ("ttl_s", "soon"),
        ("ttl_s", None),
        ("ttl_s", -1),
        ("ttl_s", True),
        ("ttl_s", 10**400),
        ("meta", None),
        ("meta", []),
    ],
)
def test_a_malformed_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=field) as caught:
        SourceRecord.from_bytes(changed(**{field: value}))
    assert caught.value.facts["field"] == field


def test_a_missing_field_is_refused_by_name() -> None:
    for field in GOOD:
        without = {name: value for name, value in GOOD.items() if name != field}
        with pytest.raises(ProtocolError, match=field):
            SourceRecord.from_bytes(json.dumps(without).encode())


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="colour"):
        SourceRecord.from_bytes(changed(colour="red"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b"\x80",
        b"[" * 50_000,
        b"1" * 5000,
        b"NaN",
        b'{"a":NaN,' + b"[" * 50_000,
        b" " * 70_000,
    ],
    ids=["empty", "null", "list", "text", "cut", "bom", "latin", "deep", "digits", "nan", "nan_then_deep", "long"],
)
def test_what_is_no_record_is_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        SourceRecord.from_bytes(raw)


def test_a_whole_number_of_seconds_is_a_time_to_live() -> None:
    assert SourceRecord.from_bytes(changed(ttl_s=6)).ttl_s == 6.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("field", "value"), [("ttl_s", "NaN"), ("ttl_s", "1e999"), ("meta", '{"x":[-Infinity]}'), ("epoch", "Infinity")]
)
def test_numbers_that_json_has_not_are_refused(field: str, value: str) -> None:
    raw = changed(**{field: "HERE"}).replace(b'"HERE"', value.encode())
    with pytest.raises(ProtocolError, match=f"{field}.*(nan|inf)") as refused:
        SourceRecord.from_bytes(raw)
    assert refused.value.facts["field"] == field


def is_refused_or_whole(raw: bytes) -> None:
    refusal = ""
    try:
        source = SourceRecord.from_bytes(raw)
    except ProtocolError as error:
        refusal = str(error)
    else:
        assert SourceRecord.from_bytes(source.to_bytes()) == source
    assert len(refusal) < 1000  # anyone may have written it, and it goes into a log


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_a_protocol_error(raw: bytes) -> None:
    is_refused_or_whole(raw)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(sorted(GOOD)), JSON, min_size=1, max_size=3))
@example({"ring_id": "z" * 60_000})
@example({"status": "z" * 60_000})
@example({"ttl_s": "z" * 60_000})
@example({"meta": {"\ud800": "\ud800"}})
def test_no_values_are_more_than_a_protocol_error(fields: dict[str, object]) -> None:
    is_refused_or_whole(changed(**fields))


@settings(max_examples=50)
@given(st.integers(0, len(changed()) - 1), st.binary(min_size=0, max_size=3))
def test_no_damage_is_more_than_a_protocol_error(at: int, patch: bytes) -> None:
    raw = changed()
    is_refused_or_whole(raw[:at] + patch + raw[at + 1 :])


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"x": object()}, r"meta\['x'\] must be made of .*, not an object"),
        ({"x": {"y": [float("nan")]}}, r"meta\['x'\]\['y'\] must be a finite number, not nan"),
        ({("tuple",): 1}, "meta must be keyed by text"),
        ([1], "meta must be a mapping"),
        (None, "meta must be a mapping"),
        ({"x": "y" * MAX_RECORD_BYTES}, "at most 65536"),
    ],
    ids=["object", "nan", "key", "list", "none", "large"],
)
def test_meta_that_cannot_be_published_is_refused_where_it_is_given(meta: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        record(meta=meta)
    assert caught.value.facts["field"] == "meta"


def test_a_record_too_large_for_the_store_is_refused_where_it_is_written() -> None:
    with pytest.raises(ConfigError, match="at most 65536") as caught:
        record(meta={"x": "\t" * (MAX_RECORD_BYTES - 100)}).to_bytes()
    assert caught.value.facts["field"] == "meta"


def test_a_record_travels_through_a_process_pool() -> None:
    source = record(meta={"gpu": [0, 1]})
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own
    assert copy == source
    assert hash(copy) == hash(source)


def test_records_are_told_apart_by_what_they_say_and_go_into_sets() -> None:
    assert record(meta={"a": [1]}) == record(meta={"a": [1]})
    assert record(meta={"a": [1]}) != record(meta={"a": [2]})
    assert record() != record(ports=(1,))
    assert len({record(meta={"a": [1]}), record(meta={"a": [1]}), record(epoch=2)}) == 2


def test_a_record_cannot_be_changed_through_what_it_was_made_of() -> None:
    meta = {"a": 1}
    ports = [5001]
    source = record(meta=meta, ports=ports)
    meta["a"] = 2
    ports.append(5002)
    assert (source.meta, source.ports) == ({"a": 1}, (5001,))
    with pytest.raises(TypeError):
        source.meta["a"] = 3  # type: ignore[index]  # what is refused
