from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.rows import row
from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema import TensorSpec

NUMPY_NAMES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
ML_NAMES = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e4m3b11fnuz"]


def test_a_dtype_is_known_by_name_type_and_object() -> None:
    rows: list[str] = [*NUMPY_NAMES, *ML_NAMES]
    for name in rows:
        with row(name=name):
            scalar_type = getattr(ml_dtypes, name, None) or np.dtype(name).type
            specs = {TensorSpec("x", (3,), dtype) for dtype in (name, scalar_type, np.dtype(scalar_type))}
            assert len(specs) == 1
            spec = specs.pop()
            assert spec.dtype.name == name
            assert spec.nbytes == 3 * np.dtype(scalar_type).itemsize
            assert TensorSpec.from_dict(spec.to_dict()) == spec


def test_a_long_double_is_named_after_its_size() -> None:
    spec = TensorSpec("x", (), np.longdouble)
    assert spec.dtype == np.dtype(np.longdouble)
    assert TensorSpec.from_dict(spec.to_dict()) == spec


def test_byte_order_is_always_little_endian() -> None:
    assert TensorSpec("x", (), ">f4") == TensorSpec("x", (), "<f4") == TensorSpec("x", (), np.float32)


def test_a_dtype_that_cannot_be_shared_is_refused_with_a_remedy() -> None:
    rows: list[tuple[Any, str]] = [
        (object, "pickle"),
        ("U5", "meta"),
        ("S5", "uint8"),
        ("V8", "field of its own"),
        ([("a", "f4")], "field of its own"),
        ("datetime64[ns]", "int64"),
        ("timedelta64[s]", "int64"),
        (ml_dtypes.int4, "supported are"),
        ("nonsense", "supported are"),
        ("a" * 100, "not a dtype"),
        (None, "not a dtype"),
        (7, "not a dtype"),
    ]
    for dtype, remedy in rows:
        with row(dtype=dtype, remedy=remedy):
            with pytest.raises(ConfigError, match=remedy) as refusal:
                TensorSpec("obs", (3,), dtype)
            assert refusal.value.facts["field"] == "obs"


def test_a_malformed_name_is_refused() -> None:
    rows: list[Any] = [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "a\0",
        "a\nb",
        "\ud800",
        "x" * 256,
        "/".join("a" * 33),
        7,
        None,
        b"a",
    ]
    for name in rows:
        with row(name=name), pytest.raises(ConfigError):
            TensorSpec(name, (), "float32")


def test_a_well_formed_name_is_kept() -> None:
    rows: list[str] = ["a", "obs/image", "layers/0/w", "Schritt größe", "x" * 255, "/".join("a" * 32)]
    for name in rows:
        with row(name=name):
            assert TensorSpec(name, (), "float32").name == name


def test_a_malformed_shape_is_refused() -> None:
    rows: list[Any] = [-1, (3, -1), 1.5, (1.5,), ("3",), "3", b"3", True, (True,), None, (1,) * 33, [np.arange(2)]]
    for shape in rows:
        with row(shape=shape), pytest.raises(ConfigError, match="x"):
            TensorSpec("x", shape, "float32")


def test_a_shape_comes_from_any_integers() -> None:
    assert TensorSpec("x", 3, "u1").shape == (3,)
    assert TensorSpec("x", [np.int64(3), np.uint8(2)], "u1").shape == (3, 2)
    assert TensorSpec("x", (), "u1").shape == ()


def test_a_field_beyond_any_memory_is_refused() -> None:
    rows: list[tuple[int, ...]] = [(1 << 49,), (1 << 30, 1 << 30), (0, 1 << 60), (1 << 200,)]
    for shape in rows:
        with row(shape=shape), pytest.raises(ConfigError, match="bytes"):
            TensorSpec("x", shape, "u1")


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_varlen_needs_a_leading_dimension(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="leading"):
        TensorSpec("x", shape, "u1", varlen=True)


def test_varlen_is_a_bool() -> None:
    with pytest.raises(ConfigError, match="varlen"):
        TensorSpec("x", (3,), "u1", varlen=1)  # type: ignore[arg-type]  # what is tested


def test_a_spec_is_immutable_and_replaceable() -> None:
    spec = TensorSpec("x", (3,), "bfloat16", varlen=True)
    with pytest.raises(FrozenInstanceError):
        spec.name = "y"  # type: ignore[misc]  # what is tested
    assert replace(spec, name="y") == TensorSpec("y", (3,), "bfloat16", varlen=True)
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301  # our own bytes


def test_a_malformed_dict_is_refused_by_field() -> None:
    rows: list[tuple[dict[str, Any], str]] = [
        ({"name": 7}, "name"),
        ({"name": ""}, "''"),
        ({"shape": 3}, "shape"),
        ({"shape": [True]}, "x"),
        ({"shape": [-1]}, "x"),
        ({"shape": [1 << 70]}, "x"),
        ({"shape": [1 << 49]}, "x"),
        ({"dtype": "object"}, "dtype"),
        ({"dtype": 3}, "dtype"),
        ({"dtype": "f4"}, "dtype"),
        ({"varlen": 1}, "x"),
        ({"extra": 1}, "'extra'"),
    ]
    for change, field in rows:
        with row(change=change, field=field):
            form = TensorSpec("x", (3,), "float32").to_dict() | change
            with pytest.raises(ProtocolError) as refusal:
                TensorSpec.from_dict(form)
            assert refusal.value.facts["field"] == field


def test_a_missing_field_is_named() -> None:
    rows: list[str] = ["name", "shape", "dtype", "varlen"]
    for field in rows:
        with row(field=field):
            form = TensorSpec("x", (3,), "float32").to_dict()
            del form[field]
            with pytest.raises(ProtocolError, match=field) as refusal:
                TensorSpec.from_dict(form)
            assert refusal.value.facts["field"] == field
