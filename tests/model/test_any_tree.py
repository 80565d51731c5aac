"""Trees of every dtype, layout, container and kind of array: each comes back bit by bit, or is refused."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.exhaustive import exhaustive
from tests.support.payloads import pack_into
from ucxx_transport import ClientConfig, ConfigError, Schema, ServerConfig, SyncUCXXClient, TrajectoryWriter
from ucxx_transport.schema.tensor_spec import DTYPES

BATCH = 100
"""Trees in a payload: a ring and a server take longer than many trees."""


@dataclass(frozen=True)
class Case:
    """What is given, and what comes back: an array, or a dict or list of these; None where it must be refused.

    `is_number`: a list of nothing but these is one array.
    """

    value: Any
    expected: Any
    is_number: bool = False


def contents(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """An array of any bits, NaNs with payloads too."""
    random = np.random.default_rng(seed)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    count = int(np.prod(shape))
    return np.frombuffer(random.bytes(count * dtype.itemsize), np.uint8).view(dtype).reshape(shape)


LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "contiguous": lambda array: array,
    "fortran": np.asfortranarray,
    "reversed": lambda array: array[tuple(slice(None, None, -1) for _ in array.shape)],
    "transposed": lambda array: array.T,
    "strided": lambda array: np.repeat(array, 2, 0)[::2] if array.ndim else array,
    "broadcast": lambda array: np.broadcast_to(array, (2, *array.shape)),
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")) if array.dtype.isbuiltin == 1 else array,
    "unaligned": lambda array: np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape),
    "writable": lambda array: array.copy(),
}


class Convertible:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self._array


class Interface:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array


class DLPack:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """The same in torch, of the same strides where it has these; what torch has not stays as it is."""
    import torch

    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype) or not array.dtype.isnative or array.dtype.name.startswith("float4"):
        return array
    tensor = torch.empty(array.shape, dtype=dtype)
    if array.size:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(raw.copy()))
    if array.ndim > 1:
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.requires_grad_() if tensor.is_floating_point() and array.size % 2 else tensor


def as_jax(array: np.ndarray[Any, Any]) -> Any:
    jnp = importlib.import_module("jax.numpy")

    try:
        found = jnp.asarray(array)
    except (TypeError, ValueError):
        return array
    return found if np.asarray(found).dtype == array.dtype else array


KINDS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "numpy": lambda array: array,
    "scalar": lambda array: array[()],
    "array": Convertible,
    "interface": lambda array: Interface(array) if array.dtype.isbuiltin == 1 else array,
    "dlpack": lambda array: (
        DLPack(array)
        if array.dtype.isbuiltin == 1 and array.dtype.itemsize <= 8 and array.dtype.isnative and array.flags.writeable
        else array
    ),
}
if importlib.util.find_spec("torch"):
    KINDS["torch"] = as_tensor
if importlib.util.find_spec("jax"):
    KINDS["jax"] = as_jax


@st.composite
def arrays(draw: st.DrawFn) -> Case:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 3), max_size=4).map(tuple))
    array = np.asarray(
        LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](contents(dtype, shape, draw(st.integers(0, 999))))
    )
    kind = draw(st.sampled_from(sorted(KINDS)))
    value = KINDS[kind](array)
    expected = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="), copy=True).reshape(array.shape)
    if not array.dtype.isnative or array.dtype.byteorder == ">":
        bits = np.ascontiguousarray(array).byteswap()
        expected = bits.view(bits.dtype.newbyteorder("=")).reshape(array.shape)
    return Case(value, expected, is_number=getattr(value, "ndim", None) == 0)


small_ints = st.integers(-(2**53), 2**53)
numbers = st.one_of(
    st.lists(small_ints, min_size=1, max_size=4).map(
        lambda items: Case(items, np.array(items, np.int64), is_number=True)
    ),
    st.lists(st.floats(width=64), min_size=1, max_size=4).map(
        lambda items: Case(tuple(items), np.array(items), is_number=True)
    ),
    st.lists(st.lists(small_ints | st.booleans(), min_size=2, max_size=2), min_size=1, max_size=3).map(
        lambda items: Case(items, np.array(items), is_number=True)
    ),
    small_ints.map(lambda number: Case(number, np.array(number), is_number=True)),
    st.floats().map(lambda number: Case(number, np.array(number), is_number=True)),
    st.complex_numbers().map(lambda number: Case(number, np.array(number), is_number=True)),
    st.binary(min_size=1, max_size=9).map(lambda raw: Case(raw, np.frombuffer(raw, np.uint8))),
    st.binary(min_size=1, max_size=9).map(lambda raw: Case(memoryview(raw), np.frombuffer(raw, np.uint8))),
)
refused = st.sampled_from(
    [
        *(None, "text", object(), {1, 2}, {}, [], (), {0: 1.0}, {"0": 1.0}, {"": 1.0}, {"a\n": 1.0}, {b"a": 1.0}),
        *([[1], [1, 2]], [1, [2]], [1, None], [2**70], [-1, 2**64 - 1], ["a"], range),
        *(np.ma.masked_array([1.0, 2.0], [True, False]), np.array(["a"]), np.array([None]), np.array([1], "M8[s]")),
        *(np.zeros(2, [("a", "f4")]), np.zeros(2, ml_dtypes.int4), Convertible(None)),  # type: ignore[arg-type]
    ]
).map(lambda value: Case(value, None))


def in_list(make: Callable[[Any], Any]) -> Callable[[list[Case]], Case]:
    def of(items: list[Case]) -> Case:
        if all(item.is_number for item in items):  # else it would be one array
            items = [*items, Case(np.ones(1), np.ones(1))]
        is_refused = any(item.expected is None for item in items)
        return Case(make([item.value for item in items]), None if is_refused else [item.expected for item in items])

    return of


def in_mapping(make: Callable[[Any], Any]) -> Callable[[dict[str, Case]], Case]:
    def of(items: dict[str, Case]) -> Case:
        is_refused = any(item.expected is None for item in items.values())
        expected = None if is_refused else {key: item.expected for key, item in items.items()}
        return Case(make({key: item.value for key, item in items.items()}), expected)

    return of


keys = st.text("abc_é ", min_size=1, max_size=4)
mapping_types: list[Callable[[Any], Any]] = [dict, OrderedDict, UserDict, MappingProxyType]


def containers(nodes: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    lists = st.lists(nodes, min_size=1, max_size=3)
    mappings = st.dictionaries(keys, nodes, min_size=1, max_size=3)
    return st.one_of(
        *(lists.map(in_list(make)) for make in (list, tuple)),
        *(mappings.map(in_mapping(make)) for make in mapping_types),
    )


leaves = st.integers(0, 39).flatmap(lambda odd: refused if odd == 39 else arrays() if odd < 26 else numbers)
trees = st.sampled_from(mapping_types).flatmap(
    lambda make: st.dictionaries(keys, st.recursive(leaves, containers, max_leaves=6), min_size=1, max_size=4).map(
        in_mapping(make)
    )
)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, item in expected.items():
            assert_same(found[key], item)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits_of(found) == bits_of(expected)


def bits_of(array: np.ndarray[Any, Any]) -> bytes:
    if array.dtype.name in ("float128", "complex256"):  # of 16 bytes ten count
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, 16)[:, :10].tobytes()
    return array.tobytes()


@pytest.mark.parametrize("examples", [300, exhaustive(20_000)])
def test_any_tree_comes_back_bit_by_bit_by_every_way_or_is_refused(examples: int) -> None:
    pending: list[Case] = []

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(trees, st.booleans())
    def in_memory(case: Case, is_varlen: bool) -> None:
        if case.expected is None:
            with pytest.raises(ConfigError):
                Schema.from_example(case.value)
            return
        schema = Schema.from_example(case.value)
        if is_varlen:
            maxima = {field.name: field.shape[0] + 3 for field in schema if field.shape}
            schema = Schema.from_example(case.value, maxima)
        memory = bytearray(schema.nbytes)
        pack_into(schema, memory, case.value)
        assert_same(schema.views(memory), case.expected)
        pending.append(case)

    in_memory()
    assert len(pending) > examples // 2
    for start in range(0, len(pending), BATCH):
        by_every_way({f"tree {number}": case for number, case in enumerate(pending[start : start + BATCH])})


def by_every_way(cases: dict[str, Case]) -> None:
    given_, expected = {}, {}
    for name, case in cases.items():
        given_[name], expected[name] = case.value, case.expected
    server = ServerConfig(ports=1, host="127.0.0.1", mode="thread")
    with TrajectoryWriter("worker", ring={"slots": 1}, server=server) as writer:
        for local, transport in (("auto", "view"), ("copy", "copy"), ("off", "ucx")):
            ref = writer.write(given_).ref
            assert ref is not None
            with SyncUCXXClient(ClientConfig(local=local)) as client, client.read(ref, deadline_s=60) as payload:  # type: ignore[arg-type]  # one of its words
                assert payload.transport == transport
                assert_same(payload.arrays, expected)
