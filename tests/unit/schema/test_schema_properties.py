"""Round trips of whatever may be written, and refusals of whatever may arrive."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, TypeVar

import msgpack
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.payloads import pack_into
from ucxx_transport.errors import ConfigError, ProtocolError, TransportError
from ucxx_transport.schema import Schema, SlotRef, TensorSpec
from ucxx_transport.schema.fields import DTYPES

Form = TypeVar("Form")

keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
    lambda key: key.isprintable() and "/" not in key and not key.isdecimal()
)
dtypes = st.sampled_from(list(DTYPES.values()))
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of every dtype with every bit pattern: NaNs with payloads too."""
    dtype, shape = draw(dtypes), draw(shapes)
    count = int(np.prod(shape))
    if dtype.kind == "b":
        return np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool).reshape(shape)
    nbytes = count * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8).view(dtype).reshape(shape)


def has_more_than_numbers(node: Any) -> bool:
    """Whether a list is a container: one of numbers alone is an array."""
    if isinstance(node, list):
        return any(map(has_more_than_numbers, node))
    return isinstance(node, dict) or node.ndim > 0


trees = st.dictionaries(
    keys,
    st.recursive(
        arrays(),
        lambda nodes: (
            st.dictionaries(keys, nodes, min_size=1, max_size=3)
            | st.lists(nodes, min_size=1, max_size=3).filter(has_more_than_numbers)
        ),
        max_leaves=6,
    ),
    min_size=1,
    max_size=4,
)
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda nodes: (
        st.lists(nodes, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), nodes, max_size=3)
    ),
    max_leaves=8,
)
printable = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.isprintable)
slot_refs = st.builds(
    SlotRef,
    ring_id=st.binary(min_size=16, max_size=16),
    ring_name=printable.filter(lambda name: "/" not in name and name not in (".", "..")),
    slot=st.integers(0, (1 << 32) - 1),
    generation=st.integers(0, (1 << 64) - 1),
    nbytes=st.integers(0, (1 << 64) - 1),
    host_id=printable,
    host=st.none() | printable,
    ports=st.lists(st.integers(1, 65535), max_size=64).map(tuple),
    fingerprint=st.integers(0, (1 << 64) - 1),
    checksum=st.none() | st.integers(0, (1 << 64) - 1),
    meta=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), plain_values, max_size=4),
)
# Whatever JSON or msgpack can decode to, and a little more.
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda nodes: st.lists(nodes, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), nodes, max_size=4),
    max_leaves=10,
)


def assert_same(found: Any, given: Any) -> None:
    """Same nesting, same dtypes, same bits."""
    if isinstance(given, dict):
        assert type(found) is dict
        assert set(found) == set(given)
        for key in given:
            assert_same(found[key], given[key])
    elif isinstance(given, list):
        assert type(found) is list
        assert len(found) == len(given)
        for one, other in zip(found, given, strict=True):
            assert_same(one, other)
    else:
        assert found.dtype == given.dtype
        assert found.shape == given.shape
        assert found.tobytes() == given.tobytes()


def assert_form_or_refusal(form_of: Callable[[Any], Form], value: object) -> Form | None:
    """Either a form, or a `ProtocolError` that names a field and is not as long as what it refuses."""
    try:
        return form_of(value)
    except ProtocolError as refused:
        error = refused
    assert error.facts["field"]
    assert len(str(error)) < 2000
    return None


@given(trees)
def test_a_tree_comes_back_bit_by_bit(tree: dict[str, Any]) -> None:
    schema = Schema.from_example(tree)
    memory = bytearray(schema.nbytes)
    assert pack_into(schema, memory, tree) == schema.nbytes
    assert_same(schema.views(memory), tree)
    assert Schema.from_bytes(schema.to_bytes()) == schema


@given(trees, st.data())
def test_a_varlen_tree_comes_back_and_is_never_padded(tree: dict[str, Any], data: st.DataObject) -> None:
    example = Schema.from_example(tree)
    candidates = [field.name for field in example if field.shape]
    chosen = data.draw(st.sets(st.sampled_from(candidates))) if candidates else set()
    maxima = {field.name: field.shape[0] + data.draw(st.integers(1, 100)) for field in example if field.name in chosen}
    schema = Schema.from_example(tree, varlen=maxima, lengths="any")
    memory = bytearray(b"\xa5" * schema.nbytes)
    nbytes = pack_into(schema, memory, tree)
    assert_same(schema.views(bytes(memory[:nbytes])), tree)
    table_bytes = -(-8 * len(chosen) // 64) * 64
    assert nbytes <= table_bytes + sum(-(-field.nbytes // 64) * 64 for field in example)
    _, placed = schema.arrange(tree)
    assert nbytes == placed.nbytes
    assert placed == schema.layout(dict(zip(schema.varlen, placed.lengths, strict=True)))
    assert all(offset % 64 == 0 for offset in placed.offsets)
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(placed.shapes, placed.dtypes, strict=True)]
    for size, (offset, following) in zip(sizes, pairwise(placed.offsets), strict=False):
        assert offset + size <= following


@given(st.binary(max_size=400), st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_any_bytes_are_a_payload_or_a_protocol_error(raw: bytes, claims: list[int]) -> None:
    fields = [
        TensorSpec("a", (9, 3), "f4", varlen=True),
        TensorSpec("b", (5,), "u2"),
        TensorSpec("c/0", (9,), "u1", varlen=True),
    ]
    schema = Schema([*fields, TensorSpec("d", (4,), "f8", varlen=True)])
    for payload in (raw, b"".join(claim.to_bytes(8, "little") for claim in claims) + raw):
        try:
            views = schema.views(payload)
        except ProtocolError:
            continue
        assert views["a"].shape[0] <= 9
        assert views["a"].tobytes() in payload


@given(slot_refs)
def test_a_reference_round_trips(ref: SlotRef) -> None:
    assert SlotRef.from_bytes(ref.to_bytes()) == ref
    assert SlotRef.from_dict(json.loads(json.dumps(ref.to_dict(), allow_nan=False))) == ref
    assert replace(ref, slot=0).meta == ref.meta


@given(anything)
def test_any_value_is_a_form_or_a_protocol_error(value: Any) -> None:
    for form_of in (Schema.from_dict, SlotRef.from_dict, TensorSpec.from_dict):
        assert_form_or_refusal(form_of, value)


@given(slot_refs, st.data())
def test_a_reference_with_one_field_changed_is_a_reference_or_a_protocol_error(
    ref: SlotRef, data: st.DataObject
) -> None:
    form = ref.to_dict()
    form[data.draw(st.sampled_from(sorted(form)))] = data.draw(anything)
    changed = assert_form_or_refusal(SlotRef.from_dict, form)
    if changed is not None:
        assert SlotRef.from_bytes(changed.to_bytes()) == changed


@given(st.data())
def test_a_schema_with_one_value_changed_is_a_schema_or_a_protocol_error(data: st.DataObject) -> None:
    fields: list[dict[str, object]] = [TensorSpec(f"f{i}/x", (3, i), "f4", varlen=bool(i)).to_dict() for i in range(3)]
    changed = data.draw(st.sampled_from(fields))
    changed[data.draw(st.sampled_from(sorted(changed)))] = data.draw(
        anything | st.sampled_from(["f0", "f1/x", [0], "bool"])
    )
    try:
        schema = Schema.from_dict({"version": 1, "fields": fields})
    except ProtocolError:
        return
    assert Schema.from_dict(schema.to_dict()) == schema


@given(slot_refs, st.data())
def test_bytes_with_some_changed_are_a_reference_or_a_protocol_error(ref: SlotRef, data: st.DataObject) -> None:
    raw = bytearray(ref.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for form_of in (SlotRef.from_bytes, Schema.from_bytes):
        assert_form_or_refusal(form_of, raw)


@given(st.binary(max_size=200), anything)
def test_any_bytes_are_a_form_or_a_protocol_error(raw: bytes, value: Any) -> None:
    try:
        packed: bytes = msgpack.packb(value)
    except (ValueError, OverflowError):
        packed = raw
    for form_of in (SlotRef.from_bytes, Schema.from_bytes):
        for one in (raw, packed):
            assert_form_or_refusal(form_of, one)


@given(anything, anything)
def test_only_our_errors_come_of_what_a_caller_gives(tree: Any, value: Any) -> None:
    schema = Schema(
        [TensorSpec("a", (2,), "f4"), TensorSpec("b/0", (), "i8"), TensorSpec("c", (3,), "u1", varlen=True)]
    )
    memory = bytearray(schema.nbytes)
    for data in (tree, {"a": value, "b": [value], "c": value}, {"a": [1, 2], "b": [3], "c": value}):
        try:
            nbytes = pack_into(schema, memory, data)
        except ConfigError:
            continue
        schema.views(memory[:nbytes])
    for call in (Schema.from_example, Schema):
        try:
            call(tree)
        except ConfigError:
            continue
    for arguments in ((value, (), "f4"), ("x", value, "f4"), ("x", (), value), ("x", (3,), "f4", value)):
        try:
            TensorSpec(*arguments)
        except TransportError:
            continue
