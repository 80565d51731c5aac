from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace
from enum import IntEnum
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.support.rows import row
from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema import SlotRef

REF = SlotRef(
    ring_id=bytes(range(16)),
    ring_name="ucxx_transport-worker-0",
    slot=5,
    generation=1 << 40,
    nbytes=7_900_000_000,
    host_id="a3" * 16,
    host="192.0.2.7",
    ports=(5001, 5002, 5003, 5004),
    fingerprint=(1 << 64) - 1,
    checksum=1 << 63,
    meta={"policy_version": 7, "return": 451.5, "tags": ["a", None, True], "nested": {"k": -1}},
)
BARE = SlotRef(ring_id=bytes(16), ring_name="r", slot=0, generation=0, nbytes=0, host_id="h")

HUGE = 1 << 20_000
MALFORMED_VALUES: dict[str, list[Any]] = {
    "ring_name": [None, 7, "", "a/b", "..", ".", "a\0", "a\n", "\ud800", "x" * 201, b"r"],
    "slot": [None, True, -1, 1 << 32, 1.0, "1", HUGE],
    "generation": [None, True, -1, 1 << 64, 0.5, "1"],
    "nbytes": [None, True, -1, 1 << 64, 0.5, "1"],
    "fingerprint": [None, True, -1, 1 << 64, 0.5, "1"],
    "checksum": [True, -1, 1 << 64, 0.5, "1"],
    "host_id": [None, "", "x" * 129, "\0", 7],
    "host": ["", "x" * 256, "a\n", 7, False],
    "ports": [None, 5001, "5001", {5001: 1}, [0], [65536], [-1], [True], ["1"], [1.0], [1] * 65, [HUGE]],
    "meta": [
        *(None, [], "text", {1: 2}, {"a": {2: 3}}, {"a": float("nan")}, {"a": [float("inf")]}, {"a": 1 << 64}),
        *({"a": -(1 << 64)}, {"a": HUGE}, {"a": "\ud800"}, {"\ud800": 1}, {"a": "x" * 70_000}),
    ],
}
MALFORMED = [(field, value) for field, values in MALFORMED_VALUES.items() for value in values]


def nested(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


@pytest.mark.parametrize("ref", [REF, BARE])
def test_a_reference_travels(ref: SlotRef) -> None:
    for other in (
        SlotRef.from_bytes(ref.to_bytes()),
        SlotRef.from_bytes(bytearray(ref.to_bytes())),
        SlotRef.from_dict(ref.to_dict()),
        SlotRef.from_dict(json.loads(json.dumps(ref.to_dict(), allow_nan=False))),
        SlotRef.from_dict(msgpack.unpackb(msgpack.packb(ref.to_dict()))),
        pickle.loads(pickle.dumps(ref)),  # noqa: S301  # our own bytes
        copy.deepcopy(ref),
    ):
        assert other == ref
        assert hash(other) == hash(ref)
        assert other.ports == ref.ports
        assert dict(other.meta) == dict(ref.meta)


@pytest.mark.parametrize("number", [lambda text: int(float(text)), float])
@pytest.mark.parametrize("ref", [REF, BARE])
def test_a_reference_survives_a_json_whose_numbers_are_doubles(ref: SlotRef, number: Any) -> None:
    for _ in range(2):  # the second is made by a template
        assert SlotRef.from_dict(json.loads(json.dumps(ref.to_dict()), parse_int=number)) == ref


@pytest.mark.parametrize("field", ["fingerprint", "checksum"])
def test_a_hash_that_was_a_number_of_json_on_its_way_is_refused_by_name(field: str) -> None:
    form = REF.to_dict()
    assert SlotRef.from_dict(form) == REF
    for damaged in (
        int(str(form[field]), 16),
        float(int(str(form[field]), 16)),
        "0xffffffffffffff",
        "F" * 16,
        "f" * 17,
    ):
        with row(damaged=damaged), pytest.raises(ProtocolError, match=f"{field} must be text of 16 hex digits"):
            SlotRef.from_dict(form | {field: damaged})


def test_a_reference_is_small() -> None:
    assert len(REF.to_bytes()) < 256
    assert len(replace(REF, meta={}).to_bytes()) < 160


def test_a_reference_is_named_by_ring_slot_and_generation() -> None:
    assert REF.name == (REF.ring_id, 5, 1 << 40)
    other = replace(REF, host=None, ports=(), meta={})
    assert other.name == REF.name
    assert hash(other) == hash(REF)
    assert other != REF
    assert replace(REF, generation=1).name != REF.name


def test_a_reference_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        REF.slot = 6  # type: ignore[misc]  # what is tested
    with pytest.raises(TypeError):
        REF.meta["policy_version"] = 8  # type: ignore[index]  # what is tested


def test_meta_is_a_copy() -> None:
    meta = {"a": {"b": [1]}}
    ref = replace(REF, meta=meta)
    meta["a"]["b"].append(2)
    assert ref.meta == {"a": {"b": [1]}}


def test_meta_takes_what_numpy_computes() -> None:
    class Outcome(IntEnum):
        WON = 1

    meta = {"mean": np.float32(0.5), "n": np.int64(3), "won": np.bool_(True), "pair": (1, 2), "o": Outcome.WON}  # noqa: FBT003  # a value
    ref = replace(REF, meta=meta)
    assert ref.to_dict()["meta"] == {"mean": 0.5, "n": 3, "won": True, "pair": [1, 2], "o": 1}
    assert SlotRef.from_bytes(ref.to_bytes()) == ref


def test_meta_that_json_lacks_is_refused() -> None:
    rows: list[object] = [b"bytes", {1, 2}, object(), 1j, np.zeros(3), np.datetime64("2024-01-01"), np.complex64(1)]
    for value in rows:
        with row(value=value):
            with pytest.raises(ConfigError) as refused:
                replace(REF, meta={"a": value})
            assert refused.value.facts["field"] == "meta"


def test_meta_may_be_deep_but_not_without_end() -> None:
    assert replace(REF, meta=nested(16)).meta == nested(16)
    with pytest.raises(ConfigError, match="levels deep"):
        replace(REF, meta=nested(17))
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(ConfigError, match="levels deep"):
        replace(REF, meta=endless)


def test_a_reference_cannot_be_made_malformed() -> None:
    rows: list[tuple[str, Any]] = [*MALFORMED, ("ring_id", "00" * 16), ("ring_id", b"short"), ("ring_id", None)]
    for field, value in rows:
        with row(field=field, value=value):
            with pytest.raises(ConfigError, match=field) as refused:
                replace(REF, **{field: value})
            assert refused.value.facts["field"] == field
            assert len(str(refused.value)) < 400


def test_a_malformed_dict_is_refused_by_field() -> None:
    rows: list[tuple[str, Any]] = [
        *MALFORMED,
        *(("ring_id", value) for value in (None, 7, b"x" * 16, "00" * 15, "zz" * 16, "00 " * 10 + "00", "AA" * 16)),
    ]
    for field, value in rows:
        with row(field=field, value=value):
            with pytest.raises(ProtocolError, match=field) as refused:
                SlotRef.from_dict(REF.to_dict() | {field: value})
            assert refused.value.facts["field"] == field


def test_another_format_version_is_refused() -> None:
    rows: list[Any] = [0, 2, True, "1", None, 1.5, 2.0, HUGE]
    for version in rows:
        with row(version=version), pytest.raises(ProtocolError, match="version"):
            SlotRef.from_dict(REF.to_dict() | {"version": version})


def test_a_missing_field_is_named() -> None:
    rows: list[str] = ["version", "ring_id", "ring_name", "slot", "generation", "nbytes", "host_id"]
    for field in rows:
        with row(field=field):
            form = REF.to_dict()
            del form[field]
            with pytest.raises(ProtocolError, match=field):
                SlotRef.from_dict(form)


def test_an_unknown_field_is_named() -> None:
    rows: list[Any] = ["more", "Slot", 7, None]
    for key in rows:
        with row(key=key), pytest.raises(ProtocolError, match=str(key)):
            SlotRef.from_dict({**REF.to_dict(), key: 1})


def test_an_optional_field_may_be_left_out() -> None:
    rows: list[str] = ["host", "ports", "fingerprint", "checksum", "meta"]
    for field in rows:
        with row(field=field):
            form = BARE.to_dict()
            del form[field]
            assert SlotRef.from_dict(form) == BARE


def test_what_is_no_mapping_is_refused() -> None:
    rows: list[Any] = [None, [], "text", 7, [("slot", 1)]]
    for form in rows:
        with row(form=form), pytest.raises(ProtocolError):
            SlotRef.from_dict(form)


VALUES = msgpack.unpackb(REF.to_bytes())


def test_bytes_that_are_no_reference_are_refused() -> None:
    rows: list[Any] = [
        *(
            b"",
            b"\xc0",
            b"\x90",
            b"\xc1",
            None,
            "text",
            7,
            bytes(100_000),
            b"\xdd\xff\xff\xff\xff",
            b"\x91" * 2000 + b"\xc0",
        ),
        *(
            msgpack.packb(VALUES[:-1]),
            msgpack.packb([*VALUES, 1]),
            msgpack.packb(VALUES) + b"\0",
            msgpack.packb(VALUES)[:-1],
        ),
        *(msgpack.packb([2, *VALUES[1:]]), msgpack.packb([True, *VALUES[1:]]), msgpack.packb(REF.to_dict())),
        msgpack.packb([*VALUES[:-1], {"a": msgpack.ExtType(5, b"x")}]),
        msgpack.packb([*VALUES[:-1], {"a": msgpack.Timestamp(1)}]),
        msgpack.packb([*VALUES[:-1], {"a": b"bytes"}]),
        msgpack.packb([*VALUES[:-1], {1: 1}]),
    ]
    for raw in rows:
        with row(raw=raw), pytest.raises(ProtocolError):
            SlotRef.from_bytes(raw)


def test_a_reference_cut_short_is_refused() -> None:
    for cut in range(0, len(REF.to_bytes()), 7):
        with row(cut=cut), pytest.raises(ProtocolError):
            SlotRef.from_bytes(REF.to_bytes()[:cut])


def test_bytes_too_long_are_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        SlotRef.from_bytes(msgpack.packb([*VALUES, "x" * 100_000]))


def test_extension_types_are_refused_while_decoding() -> None:
    with pytest.raises(ProtocolError, match="not msgpack"):
        SlotRef.from_bytes(msgpack.packb([*VALUES[:-1], {"a": msgpack.ExtType(5, b"x")}]))
