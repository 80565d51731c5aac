"""Trees of every dtype, layout, container and kind of array: each comes back bit by bit, or is refused."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict, UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.exhaustive import exhaustive
from tests.support.payloads import pack_into
from ucxx_transport import ClientConfig, ConfigError, Schema, SyncUCXXClient, TrajectoryWriter
from ucxx_transport.schema.fields import DTYPES

T = TypeVar("T")

BATCH = 250
"""Trees in a payload: a ring, a server and its clients take longer than many trees."""


@dataclass(frozen=True)
class Case:
    """What is given, and what comes back: an array, or a dict or list of these; None where it must be refused.

    `is_number`: a list of nothing but these is one array.
    """

    value: Any
    expected: Any
    is_number: bool = False


def bits(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
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


SAME: list[Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = [
    LAYOUTS[name] for name in ("contiguous", "fortran", "strided", "big-endian", "unaligned", "writable")
]
"""Those that keep shape and values."""


class Convertible:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self._array


class Interface:
    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.__array_interface__ = array.__array_interface__
        self._array = array


class Subclass(np.ndarray):
    pass


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
    if tensor.is_complex() and array.size % 3:
        return torch.conj_physical(tensor).conj()
    return tensor.requires_grad_() if tensor.is_floating_point() and array.size % 2 else tensor


def as_jax(array: np.ndarray[Any, Any]) -> Any:
    importlib.import_module("jax").config.update("jax_enable_x64", True)  # noqa: FBT003 - as jax has it
    try:
        found = importlib.import_module("jax.numpy").asarray(array)
    except (TypeError, ValueError):
        return array
    return found if np.asarray(found).dtype == array.dtype else array


KINDS: dict[str, Callable[[np.ndarray[Any, Any]], Any]] = {
    "numpy": lambda array: array,
    "scalar": lambda array: array[()],
    "array": Convertible,
    "subclass": lambda array: array.view(Subclass),
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


MAPPINGS: list[Callable[[Any], Any]] = [dict, OrderedDict, UserDict, MappingProxyType]
PYTHON_KINDS: list[type[Any]] = [bool, int, float, complex, bytes, bytearray, memoryview]
LISTED = ("bool", "int64", "float64", "complex128")
NUMBERS = (0.0, -0.0, 0.1, 1.0, -1.0, 2.0**53, -(2.0**62), 5e-324, float("inf"), float("-inf"), float("nan"))
NO_LEAVES: list[Any] = [
    *(None, "text", object(), {1, 2}, {}, {0: 1.0}, {"0": 1.0}, {"": 1.0}, {"a\n": 1.0}, {b"a": 1.0}),
    *([[1], [1, 2]], [1, [2]], [1, None], [2**70], [-1, 2**64 - 1], ["a"], range),
    *(np.ma.masked_array([1.0, 2.0], [True, False]), np.array(["a"]), np.array([None]), np.array([1], "M8[s]")),
    *(np.zeros(2, [("a", "f4")]), np.zeros(2, ml_dtypes.int4), Convertible(None)),  # type: ignore[arg-type]  # its dtypes have no types
]
REFUSED: list[Any] = [*NO_LEAVES, [], ()]  # which are 0 rows where a schema says so
MISFITS: list[Any] = [*NO_LEAVES, np.zeros((1,) * 6), np.zeros((9, 9, 9, 9)), {"more": np.zeros(1)}]


class Draw:
    """Cases out of a source of random choices: a seeded one is fast, and Hypothesis's makes a failure small."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def tree(self) -> Case:
        return self._mapping(2, self._random.randint(1, 4))

    def one(self, items: Sequence[T]) -> T:
        return self._random.choice(items)

    def happens(self, one_in: int) -> bool:
        return not self._random.randint(0, one_in - 1)

    def dressed(self, expected: Any) -> Any:
        """Another value that comes back so where the schema is known: other containers, layouts and kinds of array."""
        if isinstance(expected, dict):
            return self.one(MAPPINGS)({key: self.dressed(item) for key, item in expected.items()})
        if isinstance(expected, list):
            return self.one((list, tuple))(self.dressed(item) for item in expected)
        if expected.size and expected.dtype.name in LISTED and self.happens(2):
            return expected.tolist()
        return KINDS[self.one(sorted(KINDS))](self.one(SAME)(expected).reshape(expected.shape))

    def spoilt(self, value: Any, expected: Any) -> Any:
        """That value with one leaf that does not fit."""
        if isinstance(expected, dict):
            key = self.one(sorted(expected))
            return {**value, key: self.spoilt(value[key], expected[key])}
        if isinstance(expected, list):
            at = self._random.randrange(len(expected))
            return [*value[:at], self.spoilt(value[at], expected[at]), *value[at + 1 :]]
        return self.one(MISFITS)

    def _node(self, depth: int) -> Case:
        if depth and self.happens(3):
            return self.one((self._list, self._mapping))(depth - 1, self._random.randint(1, 3))
        if self.happens(40):
            return Case(self.one(REFUSED), None)
        return self._numbers() if self.happens(3) else self._array()

    def _mapping(self, depth: int, count: int) -> Case:
        items = {self._key(): self._node(depth) for _ in range(count)}
        value = self.one(MAPPINGS)({key: item.value for key, item in items.items()})
        is_refused = any(item.expected is None for item in items.values())
        return Case(value, None if is_refused else {key: item.expected for key, item in items.items()})

    def _key(self) -> str:
        return "".join(self.one("abc_é ") for _ in range(self._random.randint(1, 3)))

    def _list(self, depth: int, count: int) -> Case:
        items = [self._node(depth) for _ in range(count)]
        if all(item.is_number for item in items):  # else it would be one array
            items.append(Case(np.ones(1), np.ones(1)))
        value = self.one((list, tuple))(item.value for item in items)
        is_refused = any(item.expected is None for item in items)
        return Case(value, None if is_refused else [item.expected for item in items])

    def _array(self) -> Case:
        dtype, kind = DTYPES[self.one(sorted(DTYPES))], KINDS[self.one(sorted(KINDS))]
        shape = tuple(self._random.randint(0, 3) for _ in range(self._random.randint(0, 4)))
        contents = bits(dtype, shape, self._random.randint(0, 999))
        if contents.size and self.happens(9):  # a list of a library's numbers is one array
            row = contents.ravel()[:3]
            numbers = [kind(row[at : at + 1].reshape(())) for at in range(len(row))]
            if all(getattr(number, "ndim", None) == 0 for number in numbers):
                return Case(numbers, row, is_number=True)
        array = np.asarray(LAYOUTS[self.one(sorted(LAYOUTS))](contents))
        value, is_swapped = kind(array), array.dtype.byteorder == ">"
        expected = np.ascontiguousarray(array.byteswap() if is_swapped else array).reshape(array.shape)
        expected = expected.view(array.dtype.newbyteorder("=")) if is_swapped else expected.copy()
        return Case(value, expected, is_number=getattr(value, "ndim", None) == 0)

    def _numbers(self) -> Case:
        """Of Python: a number, lists of them, or bytes."""
        kind = self.one(PYTHON_KINDS)
        if kind in PYTHON_KINDS[4:]:
            raw = bytes(self._random.randint(0, 255) for _ in range(self._random.randint(1, 9)))
            return Case(kind(raw), np.frombuffer(raw, np.uint8))
        shape = tuple(self._random.randint(1, 3) for _ in range(self._random.randint(0, 2)))
        array: np.ndarray[Any, Any] = np.empty(shape, np.int64 if kind is int else np.dtype(kind))
        for index in np.ndindex(shape):
            number = self.one(NUMBERS[:7] if kind is int else NUMBERS)
            array[index] = complex(number, self.one(NUMBERS)) if kind is complex else kind(number)
        nested: Any = array.tolist()
        return Case(tuple(nested) if shape and self.happens(2) else nested, array, is_number=True)


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, item in expected.items():
            assert_same(found[key], item, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for at, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{at}")
    else:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert bits_of(found) == bits_of(expected), path


def bits_of(array: np.ndarray[Any, Any]) -> bytes:
    if array.dtype.name in ("float128", "complex256"):  # of 16 bytes ten count
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, 16)[:, :10].tobytes()
    return array.tobytes()


def in_memory(case: Case, *, is_varlen: bool) -> None:
    if case.expected is None:
        with pytest.raises(ConfigError):
            Schema.from_example(case.value)
        return
    schema = Schema.from_example(case.value)
    if is_varlen:
        schema = Schema.from_example(case.value, rows_of(schema))
    memory = bytearray(schema.nbytes)
    pack_into(schema, memory, case.value)
    assert_same(schema.views(memory), case.expected)


def rows_of(schema: Schema) -> dict[str, int]:
    return {field.name: field.shape[0] + 3 for field in schema if field.shape}


def by_every_way(cases: Sequence[Case], draw: Draw) -> None:
    """All in one payload; what must be refused is tried by the writer before the first, and between a write and reads.

    A refusal leaves the writer and its ring as they were.
    """
    good = {f"tree {number}": case for number, case in enumerate(cases) if case.expected is not None}
    given_ = {name: case.value for name, case in good.items()}
    expected = {name: case.expected for name, case in good.items()}
    bad: list[Any] = [case.value for case in cases if case.expected is None]
    misfits = [*bad, {}, {**given_, "one more": np.zeros(1)}, {name: given_[name] for name in [*given_][1:]}]
    names = [draw.one([*given_]) for _ in bad]
    misfits += [{**given_, name: draw.spoilt(given_[name], expected[name])} for name in names]
    schema = Schema.from_example(given_)
    maxima = rows_of(schema) if draw.happens(2) else {}
    options: dict[str, Any] = {"varlen": maxima}
    if draw.happens(2):
        options = {"schema": Schema.from_example(given_, maxima)}
    if draw.happens(2):
        options["narrow"] = [field.name for field in schema]
    server = {"ports": 1, "host": "127.0.0.1", "mode": "thread"}
    with TrajectoryWriter("worker", ring={"slots": 2}, server=server, **options) as writer:
        for value in bad:
            assert_refused(writer, value)
        for config, transport in WAYS:
            ref = writer.write(given_).ref
            given_ = draw.dressed(expected)
            assert ref is not None
            for value in misfits:
                assert_refused(writer, value)
            with SyncUCXXClient(config) as client, client.read(ref, deadline_s=60) as payload:
                assert payload.transport == transport
                assert_same(payload.arrays, expected)


WAYS = (
    (ClientConfig(local="auto"), "view"),
    (ClientConfig(local="copy"), "copy"),
    (ClientConfig(local="off"), "ucx"),
)


def assert_refused(writer: TrajectoryWriter, value: Any) -> None:
    before = state_of(writer)
    with pytest.raises(ConfigError):
        writer.write(value)
    assert state_of(writer) == before


def state_of(writer: TrajectoryWriter) -> tuple[object, ...]:
    ring = writer.ring
    if ring is None:
        return (writer.statistics(),)
    return (writer.statistics(), ring.name, ring.statistics(), ring.slot_states())


def test_any_tree_comes_back_bit_by_bit_by_every_way_or_is_refused() -> None:
    cases: list[Case] = []

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def of_hypothesis(random: Random) -> None:
        draw = Draw(random)
        case = draw.tree()
        in_memory(case, is_varlen=draw.happens(2))
        cases.append(case)

    of_hypothesis()
    by_every_way(cases, Draw(Random(0)))


@pytest.mark.parametrize("seed", [exhaustive(seed) for seed in range(8)])
def test_thousands_of_trees_come_back_bit_by_bit_by_every_way_or_are_refused(seed: int) -> None:
    draw = Draw(Random(seed))
    for _ in range(2500 // BATCH):
        cases = [draw.tree() for _ in range(BATCH)]
        for case in cases:
            in_memory(case, is_varlen=draw.happens(2))
        by_every_way(cases, draw)
