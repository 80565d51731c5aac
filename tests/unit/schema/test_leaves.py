"""What is one array and what is a container; and the ways that refusals of leaves name."""

from __future__ import annotations

import re
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.payloads import pack_into
from tests.support.rows import row
from ucxx_transport.errors import ConfigError
from ucxx_transport.schema import Schema, TensorSpec

try:
    import torch
except ImportError:
    torch: Any = None  # type: ignore[no-redef]  # where it is not installed

IDS = Schema([TensorSpec("ids", (8,), "int64", varlen=True), TensorSpec("image", (4, 3), "float32", varlen=True)])


class BatchOfArrays(Mapping[str, object]):
    """A mapping like a TensorDict: its length is its batch size, and its truth is not to be asked for."""

    def __init__(self, **arrays: object) -> None:
        self._arrays = arrays

    def __getitem__(self, key: str) -> object:
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return 7

    def __bool__(self) -> bool:
        raise RuntimeError("converting this to a boolean value is not permitted")


def test_lists_of_nothing_but_numbers_are_one_array() -> None:
    rows: list[tuple[Any, dict[str, tuple[tuple[int, ...], str]]]] = [
        ([101, 7, 42], {"x": ((3,), "int64")}),
        ((0.5, 1), {"x": ((2,), "float64")}),
        ([True, False], {"x": ((2,), "bool")}),
        ([[1, 2], (3, 4)], {"x": ((2, 2), "int64")}),
        ([np.float32(1), np.float32(2)], {"x": ((2,), "float32")}),
        ([np.int64(1), 2.5], {"x": ((2,), "float64")}),
        ([ml_dtypes.bfloat16(1), ml_dtypes.bfloat16(2)], {"x": ((2,), "bfloat16")}),
        ([np.array(1, "u1"), np.array(2, "u1")], {"x": ((2,), "uint8")}),
        ([2**63, 2**64 - 1], {"x": ((2,), "uint64")}),
        (list(range(5000)), {"x": ((5000,), "int64")}),
        ([1, np.ones(2)], {"x/0": ((), "int64"), "x/1": ((2,), "float64")}),
        ([[1, 2], {"a": 1.0}], {"x/0": ((2,), "int64"), "x/1/a": ((), "float64")}),
        ([{"w": [1, 2]}, {"w": [3]}], {"x/0/w": ((2,), "int64"), "x/1/w": ((1,), "int64")}),
    ]
    if torch is not None:
        rows.append(([torch.tensor(1), torch.tensor(2)], {"x": ((2,), "int64")}))
        bfloat16 = torch.tensor(1.5, dtype=torch.bfloat16)
        rows.append(([bfloat16, bfloat16], {"x": ((2,), "bfloat16")}))
    for value, expected in rows:
        with row(value=value):
            schema = Schema.from_example({"x": value})
            assert {field.name: (field.shape, field.dtype.name) for field in schema} == expected
            memory = bytearray(schema.nbytes)
            pack_into(schema, memory, {"x": value})
            if "x" in expected:
                numbers = [list(item) if isinstance(item, (list, tuple)) else float(item) for item in value]
                np.testing.assert_array_equal(schema.views(memory)["x"].astype("f8"), numbers)


def test_lists_are_varlen_with_and_without_a_schema() -> None:
    schemas = [IDS, Schema.from_example({"ids": [1, 2], "image": [[1.0, 2, 3]]}, varlen={"ids": 8, "image": 4})]
    for schema in schemas:
        for ids, image in (([101, 7, 42], [[0.5, 1, 2], [3, 4, 5]]), ((), ()), ([5], [])):
            with row(schema=schema, ids=ids, image=image):
                memory = bytearray(schema.nbytes)
                pack_into(schema, memory, {"ids": ids, "image": image})
                found = schema.views(memory)
                assert found["ids"].tolist() == list(ids)
                assert found["image"].tolist() == list(image)
                assert found["image"].shape[1] == 3


def test_where_a_schema_names_positions_a_list_of_numbers_stays_a_list() -> None:
    schema = Schema([TensorSpec("x/0", (), "int64"), TensorSpec("x/1", (), "float64")])
    for value in ([1, 2.5], (1, 2.5)):
        with row(value=value):
            assert [leaf.tolist() for leaf in schema.arrange({"x": value})[0]] == [1, 2.5]


def test_numbers_in_a_list_carry_no_dtype_of_their_own() -> None:
    schema = Schema([TensorSpec("x", (3,), "float32")])
    for value in ([0, 1.0, np.float64(0.1)], [np.float64(0), 1, 0.1], (np.int64(0), np.array(1.0), 0.1)):
        with row(value=value):
            found = schema.arrange({"x": value})[0][0]
            np.testing.assert_array_equal(found, np.array([0, 1, 0.1], "f4"))


def test_an_integer_that_a_list_s_other_numbers_would_round_is_refused() -> None:
    for value in ([2**53 + 1, 0.5], [-1, 2**64 - 1], [[2**63 - 1], [1.0]]):
        with row(value=value), pytest.raises(ConfigError, match="'x': a list of 2 has integers that float64 would"):
            Schema.from_example({"x": value})
    assert Schema.from_example({"x": [2**53, 0.5]}).fields[0].dtype.name == "float64"


def test_any_mapping_is_a_container() -> None:
    arrays = {"ids": np.arange(3), "image": np.zeros((1, 3), "f4")}
    for mapping in (UserDict(arrays), MappingProxyType(arrays), BatchOfArrays(**arrays)):
        with row(mapping=type(mapping)):
            assert [field.name for field in Schema.from_example(mapping)] == ["ids", "image"]
            assert [leaf.shape for leaf in IDS.arrange(mapping)[0]] == [(3,), (1, 3)]
            assert [
                leaf.shape
                for leaf in Schema([TensorSpec("a/ids", (3,), "i8")]).arrange({"a": BatchOfArrays(ids=np.arange(3))})[0]
            ] == [(3,)]


class Broken(UserDict[str, object]):
    def items(self) -> Any:
        raise IndexError("rows differ")


def refusal(call: Callable[..., object], *arguments: object) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        call(*arguments)
    return refused.value


def test_each_refusal_of_a_leaf_names_its_field_and_a_way_that_works() -> None:
    image = np.ones((2, 3), "f4")
    zero_rows = r"np.zeros\(\(0, 3\), 'float32'\)"
    masked = np.ma.masked_array([1.0, 2.0], [False, True])
    with_schema: list[tuple[object, str, str]] = [
        ({"ids": [1]}, "image", rf"missing: 'image': an episode without 'image' must give 0 rows, {zero_rows}"),
        ({"ids": [1], "image": None}, "image", rf"None is no array; an episode without .* {zero_rows}"),
        ({"ids": [1], "image": [[1, 2, 3], [4]]}, "image", r"unequal lengths \(3, 1\); pad them, or .* the lengths as"),
        ({"ids": [1, [2]], "image": image}, "ids", r"unequal lengths \(a number, 1\)"),
        ({"ids": [0.5], "image": image}, "ids", r"float64 would not keep .* int64; give the field float64: schema="),
        ({"ids": [1], "image": image, "more": image}, "more", "unknown: 'more': name in schema= every field"),
        ({"ids": ["a"], "image": image}, "ids", "encode the text"),
        ({"ids": masked, "image": image}, "ids", r"lose its mask; give array.filled\(value\), and the mask as a field"),
    ]
    without: list[tuple[object, str, str]] = [
        ({"x": None}, "x", "give 0 rows where an episode has none"),
        ({"x": []}, "x", r"leave it out, or give 0 rows: np.zeros\(\(0, …"),
        ({"x": {}}, "x", "leave it out"),
        ({"x": [1.0, np.ma.masked]}, "x", "lose its mask"),
        ({"x": np.ma.masked_array([1.0])}, "x", "array.data where nothing is masked"),
        ({"x": {0: image}}, "x", "under 'x' is 0: keys must be text, and not empty; name it, as in 'agent_0'"),
        ({"x": {"0": image}}, "x", "under 'x' reads as a list position: name it, as in 'agent_0'"),
        ({"x": {0: image, "b": image}}, "x", "keys must be text"),
        ({7: image}, "data", "of the root is 7.*'agent_7'"),
        ({"x": [2**70]}, "x", "numbers of 64 bits at most"),
        (Broken(x=image), "data", "IndexError: rows differ.*; give a dict of its arrays"),
    ]
    cases: list[tuple[Callable[..., object], object, str, str]]
    cases = [*((IDS.arrange, *case) for case in with_schema), *((Schema.from_example, *case) for case in without)]
    for call, tree, field, words in cases:
        with row(tree=tree):
            error = refusal(call, tree)
            assert error.facts["field"] == field
            assert re.search(words, error.message), error.message
    lacking = refusal(lambda: Schema.from_example({"ids": [1]}, varlen={"ids": 8, "image": 4}))
    assert "give it 0 rows there, such as np.zeros" in lacking.message


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_each_tensor_that_is_no_array_is_refused_with_what_makes_one_of_it() -> None:
    fake = __import__("torch._subclasses", fromlist=["FakeTensorMode"]).FakeTensorMode()
    ragged = [torch.ones(3), torch.ones(5)]
    rows: list[tuple[Callable[[], object], str]] = [
        (lambda: torch.nested.nested_tensor(ragged, layout=torch.jagged), "to_padded_tensor"),
        (lambda: torch.nested.nested_tensor(ragged), "to_padded_tensor"),
        (lambda: torch.eye(3).to_sparse(), "to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "to_dense"),
        (lambda: torch.ones(3, device="meta"), "it has no values"),
        (lambda: fake.from_tensor(torch.ones(3)), "it has no values"),
        (lambda: [fake.from_tensor(torch.tensor(1.0))], "it has no values"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "dequantize"),
    ]
    for make, words in rows:
        with row(words=words), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its prototypes
            error = refusal(Schema.from_example, {"x": make()})
            assert error.facts["field"] == "x"
            assert words in error.message
