from __future__ import annotations

from collections import OrderedDict
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.payloads import pack_into
from tests.support.rows import row
from ucxx_transport.errors import ConfigError
from ucxx_transport.schema import Schema, TensorSpec


class Foreign:
    """Speaks DLPack alone."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class Convertible:
    """Speaks `__array__` alone, and may refuse."""

    def __init__(self, array: np.ndarray[Any, Any] | None) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
        if self._array is None:
            raise RuntimeError("lives on a device")
        return self._array


def round_trip(field: TensorSpec, value: object) -> Any:
    schema = Schema([field])
    memory = bytearray(schema.nbytes)
    nbytes = pack_into(schema, memory, {"x": value})
    return schema.views(memory[:nbytes])["x"]


def refusal(field: TensorSpec, value: object) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        round_trip(field, value)
    assert refused.value.facts["field"] == "x"
    return refused.value


def test_whatever_holds_the_same_numbers_is_taken() -> None:
    rows: list[object] = [
        np.arange(4, dtype="f4"),
        np.repeat(np.arange(4, dtype="f4"), 2)[::2],
        np.arange(4, dtype=">f4"),
        np.arange(4, dtype="f2"),
        np.arange(4, dtype="u2"),
        np.arange(4, dtype="f4").data,
        Foreign(np.arange(4, dtype="f4")),
        Convertible(np.arange(4, dtype="f4")),
        [0, 1, 2, 3],
        (0.0, 1.0, 2, True + 2),
        np.arange(4).astype(ml_dtypes.bfloat16),
    ]
    for value in rows:
        with row(value=value):
            assert round_trip(TensorSpec("x", (4,), "float32"), value).tolist() == [0, 1, 2, 3]


def test_bytes_are_uint8() -> None:
    assert bytes(round_trip(TensorSpec("x", (3,), "uint8"), b"abc")) == b"abc"
    assert bytes(round_trip(TensorSpec("x", (3,), "uint8"), bytearray(b"abc"))) == b"abc"


def test_a_number_is_a_scalar() -> None:
    rows: list[tuple[str, complex | np.floating[Any]]] = [
        *(("float32", 0.1), ("float16", 1), ("int8", -128), ("uint64", 2**64 - 1), ("bool", True), ("bfloat16", 1.0)),
        *(("complex64", 1j), ("float32", float("nan")), ("float16", float("inf")), ("float64", np.float32(0.5))),
    ]
    for dtype, value in rows:
        with row(dtype=dtype, value=value):
            found = round_trip(TensorSpec("x", (), dtype), value)
            assert found.shape == ()
            np.testing.assert_array_equal(found, np.asarray(value).astype(found.dtype))


def test_a_number_that_does_not_fit_is_refused() -> None:
    rows: list[tuple[str, object]] = [
        *(
            ("int8", 128),
            ("uint8", -1),
            ("int32", 1.0),
            ("bool", 1),
            ("float32", 1j),
            ("float16", 1e9),
            ("float16", 2049),
        ),
        *(("int64", 2**64), ("int8", [1, 300]), ("int32", np.float64(1)), ("int64", [0, np.float64(0.5)])),
    ]
    for dtype, value in rows:
        with row(dtype=dtype, value=value):
            shape = (len(value),) if isinstance(value, list) else ()
            assert dtype in str(refusal(TensorSpec("x", shape, dtype), value))


def test_a_dtype_that_would_narrow_is_refused_with_both_and_the_remedy() -> None:
    rows: list[tuple[str, str]] = [
        *(
            ("float64", "float32"),
            ("int64", "int32"),
            ("float32", "int32"),
            ("int64", "float64"),
            ("uint64", "float64"),
        ),
        *(("int64", "complex128"), ("uint8", "int8"), ("int8", "uint64"), ("complex64", "float32"), ("uint8", "bool")),
        *(("float32", "bfloat16"), ("int8", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float16")),
        *(("float8_e4m3fn", "float8_e5m2"), ("float8_e4m3", "float8_e4m3fn"), ("int8", "float8_e5m2")),
    ]
    for given, wanted in rows:
        with row(given=given, wanted=wanted):
            value = np.zeros(2, getattr(ml_dtypes, given, given))
            message = str(refusal(TensorSpec("x", (2,), wanted), value))
            assert given in message
            assert wanted in message
            assert any(f"give {what}" in message for what in (f"the field {given}", "the field", "floats"))
            assert f"astype('{wanted}')" not in message or wanted == "float64"


def test_whatever_converts_keeps_every_value() -> None:
    small = [
        "int8",
        "uint8",
        "int16",
        "uint16",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e8m0fnu",
    ]
    every = [*small, "int32", "int64", "uint32", "uint64", "float32", "float64", "complex64", "complex128"]
    converted = 0
    for given in small:
        dtype = np.dtype(getattr(ml_dtypes, given, given))
        count = 1 << (8 * dtype.itemsize)
        values = np.arange(count).astype(f"u{dtype.itemsize}").view(dtype)
        for wanted in every:
            try:
                found = round_trip(TensorSpec("x", (count,), wanted), values)
            except ConfigError:
                continue
            converted += 1
            with np.errstate(invalid="ignore"):
                np.testing.assert_array_equal(found.real.astype("f8"), values.astype("f8"), f"{given} → {wanted}")
    assert converted > 40


def test_another_shape_is_refused_with_both() -> None:
    rows: list[tuple[int, ...]] = [(), (3,), (5,), (4, 1), (1, 4)]
    for shape in rows:
        with row(shape=shape):
            assert "(4,)" in str(refusal(TensorSpec("x", (4,), "f4"), np.zeros(shape, "f4")))


def test_a_varlen_field_refuses_what_differs_beyond_its_rows() -> None:
    rows: list[tuple[int, ...]] = [(), (2,), (5, 3), (2, 2), (2, 3, 1)]
    for shape in rows:
        with row(shape=shape):
            assert "≤4" in str(refusal(TensorSpec("x", (4, 3), "f4", varlen=True), np.zeros(shape, "f4")))


def test_a_varlen_field_comes_back_with_the_rows_it_had() -> None:
    for rows in range(5):
        with row(rows=rows):
            value = np.arange(rows * 3, dtype="f4").reshape(rows, 3)
            found = round_trip(TensorSpec("x", (4, 3), "f4", varlen=True), value)
            assert found.shape == (rows, 3)
            np.testing.assert_array_equal(found, value)


def test_what_is_no_array_of_numbers_is_refused() -> None:
    rows: list[object] = [
        None,
        "text",
        object(),
        [[1], [1, 2]],
        {"a": 1},
        Convertible(None),
        [None],
        np.array(["a"]),
        {1, 2},
    ]
    for value in rows:
        with row(value=value):
            refusal(TensorSpec("x", (2,), "f4"), value)


def test_a_list_that_contains_itself_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    refusal(TensorSpec("x", (1,), "f4"), value)
    with pytest.raises(ConfigError, match=r"at most \d+ levels"):
        Schema.from_example({"x": value})


NESTED = Schema(
    [
        TensorSpec("obs/image", (2,), "u1"),
        TensorSpec("layers/1/w", (2,), "u1"),
        TensorSpec("obs/state", (2,), "u1"),
        TensorSpec("layers/0/w", (2,), "u1"),
    ]
)


def tree_of(sequence: type = list, mapping: type = dict) -> Any:
    one = [np.full(2, number, np.uint8) for number in range(4)]
    return mapping(obs=mapping(image=one[0], state=one[1]), layers=sequence([mapping(w=one[2]), mapping(w=one[3])]))


@pytest.mark.parametrize("tree", [tree_of(), tree_of(tuple), tree_of(mapping=OrderedDict)])
def test_nested_data_comes_back_as_dicts_and_lists(tree: Any) -> None:
    memory = bytearray(NESTED.nbytes)
    pack_into(NESTED, memory, tree)
    found = NESTED.views(memory)
    assert type(found["layers"]) is list
    assert type(found["obs"]) is dict
    assert [found["obs"][key][0] for key in ("image", "state")] == [0, 1]
    assert [layer["w"][0] for layer in found["layers"]] == [2, 3]


def test_a_key_may_be_a_path() -> None:
    memory = bytearray(NESTED.nbytes)
    tree = tree_of()
    flat = {"obs/image": tree["obs"]["image"], "obs/state": tree["obs"]["state"], "layers": tree["layers"]}
    pack_into(NESTED, memory, flat)
    assert NESTED.views(memory)["obs"]["state"][0] == 1


def test_data_that_does_not_fit_the_schema_is_refused_by_name() -> None:
    rows: list[tuple[dict[Any, Any], str]] = [
        ({"obs": {"image": np.zeros(2, "u1")}}, "missing: 'obs/state'"),
        ({"more": np.zeros(2, "u1")}, "unknown: 'more'"),
        ({"layers": [{"w": np.zeros(2, "u1")}] * 3}, "unknown: 'layers/2/w'"),
        ({"layers": {"w": np.zeros(2, "u1")}}, "missing: 'layers/1/w', 'layers/0/w'; unknown: 'layers/w'"),
        ({"layers": []}, "empty container at 'layers'"),
        ({"layers": {"0": {"w": 1}}}, "list position"),
        ({"obs": {0: 1}}, "must be text"),
        ({"": {"obs": 1}}, "not empty"),
        ({"obs/image": np.zeros(2, "u1")}, "twice"),
        ({"obs": np.zeros(2, "u1")}, "missing: 'obs/image', 'obs/state'; unknown: 'obs'"),
    ]
    for change, message in rows:
        with row(change=change, message=message), pytest.raises(ConfigError, match=message):
            pack_into(NESTED, bytearray(NESTED.nbytes), tree_of() | change)


def test_data_is_a_mapping() -> None:
    rows: list[Any] = [None, [], np.zeros(3), 7, {}]
    for tree in rows:
        with row(tree=tree), pytest.raises(ConfigError, match=r"data must be a mapping|data has no fields: give"):
            pack_into(NESTED, bytearray(NESTED.nbytes), tree)


def test_many_missing_fields_are_not_all_listed() -> None:
    schema = Schema([TensorSpec(f"f{i}", (), "u1") for i in range(1000)])
    with pytest.raises(ConfigError, match="and 995 more"):
        pack_into(
            schema, bytearray(schema.nbytes), {"other": 1, "f999": 1} | {f"g{i}": 1 for i in range(998)} | {"f": 0}
        )


def test_nothing_is_written_before_everything_is_checked() -> None:
    schema = Schema([TensorSpec("a", (4,), "u1", varlen=True), TensorSpec("b", (), "u1")])
    memory = bytearray(schema.nbytes)
    with pytest.raises(ConfigError, match="b"):
        pack_into(schema, memory, {"a": np.ones(3, "u1"), "b": 300})
    assert memory == bytearray(schema.nbytes)


def test_fields_start_on_64_byte_boundaries_of_aligned_memory() -> None:
    backing = np.zeros(1024, np.uint8)
    start = -backing.ctypes.data % 64
    schema = Schema([TensorSpec(name, (3,), dtype) for name, dtype in (("a", "u1"), ("b", "c16"), ("c", "f2"))])
    views = schema.views(backing[start : start + schema.nbytes])
    assert all(view.ctypes.data % 64 == 0 for view in views.values())
