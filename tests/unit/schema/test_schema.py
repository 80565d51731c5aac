from __future__ import annotations

import copy
import json
import pickle
import struct
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from tests.support.payloads import pack_into
from tests.support.rows import row
from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema import Schema, TensorSpec

FIXED = Schema([TensorSpec("obs", (3, 5), "float32"), TensorSpec("done", (), "bool"), TensorSpec("act", (7,), "int64")])
VARLEN = Schema(
    [
        TensorSpec("obs", (10, 4), "float32", varlen=True),
        TensorSpec("seed", (), "uint64"),
        TensorSpec("reward", (10,), "float16", varlen=True),
    ]
)


def test_fields_lie_in_order_each_on_a_64_byte_boundary() -> None:
    assert dict(FIXED.offsets) == {"obs": 0, "done": 64, "act": 128}
    assert FIXED.nbytes == 128 + 7 * 8


def test_a_table_of_lengths_comes_first_only_with_varlen_fields() -> None:
    assert dict(VARLEN.offsets) == {"obs": 64, "seed": 64 + 192, "reward": 64 + 192 + 64}
    nine = Schema([TensorSpec(f"f{i}", (1,), "u1", varlen=True) for i in range(9)])
    assert nine.offsets["f0"] == 128


def test_a_varlen_field_takes_only_the_rows_it_has() -> None:
    placement = VARLEN.layout({"obs": 1, "reward": 3})
    assert placement.offsets == (64, 128, 192)
    assert placement.shapes == ((1, 4), (), (3,))
    assert placement.nbytes == 198
    assert placement.lengths == (1, 3)


def test_a_length_left_out_is_the_maximum() -> None:
    assert VARLEN.layout({"obs": 0}).lengths == (0, 10)
    assert VARLEN.layout() == VARLEN.layout({}) == VARLEN.layout({"obs": 10, "reward": 10})
    assert VARLEN.layout().nbytes == VARLEN.nbytes


def test_a_length_that_cannot_be_is_refused() -> None:
    rows: list[dict[str, Any]] = [{"obs": 11}, {"obs": -1}, {"obs": True}, {"obs": 1.0}, {"seed": 1}, {"nope": 1}]
    for lengths in rows:
        with row(lengths=lengths), pytest.raises(ConfigError):
            VARLEN.layout(lengths)


def test_lengths_are_little_endian_words_at_the_start_of_the_payload() -> None:
    memory = bytearray(VARLEN.nbytes)
    pack_into(VARLEN, memory, {"obs": np.zeros((2, 4), "f4"), "seed": 1, "reward": np.zeros(5, "f2")})
    assert struct.unpack_from("<2Q", memory) == (2, 5)


def test_the_fingerprint_tells_schemas_apart_and_never_changes() -> None:
    # Pinned: a ring's segment and a SlotRef written by another release must keep their meaning.
    assert Schema([TensorSpec("x", (2,), "float32")]).fingerprint == 0x2B33875EA57E5A2C
    variants = [
        [TensorSpec("x", (2,), "float32")],
        [TensorSpec("y", (2,), "float32")],
        [TensorSpec("x", (3,), "float32")],
        [TensorSpec("x", (2,), "int32")],
        [TensorSpec("x", (2,), "float32", varlen=True)],
        [TensorSpec("x", (2,), "float32"), TensorSpec("y", (2,), "float32")],
        [TensorSpec("y", (2,), "float32"), TensorSpec("x", (2,), "float32")],
    ]
    assert len({Schema(fields).fingerprint for fields in variants}) == len(variants)


@pytest.mark.parametrize("schema", [FIXED, VARLEN])
def test_a_schema_travels(schema: Schema) -> None:
    for other in (
        Schema.from_dict(schema.to_dict()),
        Schema.from_dict(json.loads(json.dumps(schema.to_dict()))),
        Schema.from_bytes(schema.to_bytes()),
        Schema.from_bytes(memoryview(schema.to_bytes())),
        pickle.loads(pickle.dumps(schema)),  # noqa: S301  # our own bytes
        copy.deepcopy(schema),
    ):
        assert other == schema
        assert hash(other) == hash(schema)
        assert other.fingerprint == schema.fingerprint
        assert other.layout() == schema.layout()


def test_a_schema_differs_from_anything_else() -> None:
    assert FIXED != VARLEN
    assert FIXED != 7
    assert list(FIXED) == list(FIXED.fields)
    assert len(FIXED) == 3
    assert VARLEN.varlen == ("obs", "reward")


def test_names_that_make_no_tree_are_refused() -> None:
    rows: list[list[str]] = [
        [],
        ["a", "a"],
        ["a", "a/b"],
        ["a/b", "a"],
        ["0"],
        ["0/a"],
        ["l/1"],
        ["l/0", "l/2"],
        ["l/00"],
        ["l/0", "l/a"],
        ["l/٣"],
        [f"f{i}" for i in range(4097)],
        [f"{i:04}".rjust(255, "x") for i in range(4096)],
    ]
    for names in rows:
        with row(names=names), pytest.raises(ConfigError):
            Schema([TensorSpec(name, (), "u1") for name in names])


def test_a_schema_is_made_of_specs() -> None:
    with pytest.raises(ConfigError, match="TensorSpec"):
        Schema(["obs"])  # type: ignore[list-item]  # what is tested


def test_a_schema_beyond_any_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="bytes"):
        Schema([TensorSpec(f"f{i}", (1 << 47,), "u1") for i in range(3)])


def test_4096_fields_are_enough() -> None:
    schema = Schema([TensorSpec(f"f{i}", (2,), "u1") for i in range(4096)])
    assert Schema.from_bytes(schema.to_bytes()) == schema


def test_a_malformed_schema_is_refused_by_field() -> None:
    rows: list[tuple[dict[str, Any], str]] = [
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"fields": {}}, "fields"),
        ({"fields": []}, "fields"),
        ({"fields": [1]}, "tensor spec"),
        ({"fields": [{}] * 4097}, "fields"),
        ({"other": 1}, "'other'"),
    ]
    for change, field in rows:
        with row(change=change, field=field):
            with pytest.raises(ProtocolError) as refusal:
                Schema.from_dict(FIXED.to_dict() | change)
            assert refusal.value.facts["field"] == field


def test_fields_that_collide_are_a_protocol_error_when_they_come_from_outside() -> None:
    form = FIXED.to_dict()
    form["fields"] = [TensorSpec("a", (), "u1").to_dict(), TensorSpec("a/b", (), "u1").to_dict()]
    with pytest.raises(ProtocolError, match="a/b"):
        Schema.from_dict(form)


def test_bytes_that_are_no_schema_are_refused() -> None:
    rows: list[Any] = [b"", b"\xc1", b"\x01", b"\x01\x01", bytes(2 << 20), "text", None, b"\xdd\xff\xff\xff\xff"]
    for raw in rows:
        with row(raw=raw), pytest.raises(ProtocolError):
            Schema.from_bytes(raw)


@pytest.mark.parametrize("claim", [11, 1 << 63, (1 << 64) - 1])
def test_a_length_claimed_over_the_maximum_is_refused_by_field(claim: int) -> None:
    memory = bytearray(VARLEN.nbytes)
    struct.pack_into("<2Q", memory, 0, 1, claim)
    with pytest.raises(ProtocolError, match="reward") as refusal:
        VARLEN.views(memory)
    assert refusal.value.facts["field"] == "reward"


def test_a_payload_cut_short_is_refused() -> None:
    rows: list[int] = [0, 15, 16, 63, 128, VARLEN.nbytes - 1]
    for nbytes in rows:
        with row(nbytes=nbytes):
            memory = bytearray(VARLEN.nbytes)
            struct.pack_into("<2Q", memory, 0, 10, 10)
            with pytest.raises(ProtocolError, match=f"{nbytes} bytes"):
                VARLEN.views(memory[:nbytes])


def test_views_share_the_memory() -> None:
    memory = bytearray(FIXED.nbytes)
    views = FIXED.views(memory, writable=True)
    views["act"][:] = 3
    assert struct.unpack_from("<7q", memory, 128) == (3,) * 7
    assert not FIXED.views(memory)["act"].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        FIXED.views(memory)["act"][0] = 1


def test_views_keep_their_memory_alive() -> None:
    memory = np.zeros(FIXED.nbytes, np.uint8)
    gone = weakref.ref(memory)
    view = FIXED.views(memory)["obs"][1:]
    del memory
    assert gone() is not None
    del view
    assert gone() is None


def test_views_of_any_contiguous_buffer() -> None:
    for memory in (bytes(184), bytearray(184), np.zeros(23, np.uint64), np.zeros((23, 8), np.uint8)):
        assert FIXED.views(memory)["obs"].shape == (3, 5)


def test_what_is_no_contiguous_buffer_is_refused() -> None:
    rows: list[Any] = [np.zeros((400, 2), np.uint8)[:, 0], "text", None, 7]
    for buffer in rows:
        with row(buffer=buffer), pytest.raises(ConfigError, match="contiguous"):
            FIXED.views(buffer)


def test_read_only_memory_is_not_written_to() -> None:
    with pytest.raises(ConfigError, match="read-only"):
        FIXED.views(bytes(FIXED.nbytes), writable=True)


def test_a_schema_from_an_example_fits_it() -> None:
    tree = {"obs": {"image": np.zeros((5, 2), "u1"), "t": 3}, "l": [1.5, np.ones(1), (True, 2j)], "b": b"abc"}
    schema = Schema.from_example(tree, varlen=["obs/image"])
    assert [(field.name, field.shape, field.dtype.name, field.varlen) for field in schema] == [
        ("obs/image", (5, 2), "uint8", True),
        ("obs/t", (), "int64", False),
        ("l/0", (), "float64", False),
        ("l/1", (1,), "float64", False),
        ("l/2", (2,), "complex128", False),
        ("b", (3,), "uint8", False),
    ]
    memory = bytearray(schema.nbytes)
    pack_into(schema, memory, tree)
    assert schema.views(memory)["l"][2][1] == 2j


def test_an_example_may_be_shorter_than_the_maximum() -> None:
    schema = Schema.from_example({"x": np.zeros((5, 2)), "y": np.zeros((0, 3))}, varlen={"x": 100, "y": 7})
    assert [field.shape for field in schema] == [(100, 2), (7, 3)]


def test_varlen_that_does_not_fit_the_example_is_refused() -> None:
    form = r"varlen must be names of fields, or these with maxima from 1 on .*, not "
    rows: list[tuple[Any, str]] = [
        ("x", f"{form}'x'"),
        (None, f"{form}None"),
        (0, f"{form}0"),
        (True, f"{form}True"),
        (1.5, f"{form}1.5"),
        ([["x"]], f"{form}a list of 1"),
        ({"x": 0}, form + r"\{'x': 0\}"),
        ({"x": -1}, form + r"\{'x': -1\}"),
        ({"x": "9"}, form + r"\{'x': '9'\}"),
        ({1: 9}, form + r"\{1: 9\}"),
        (["nope"], r"'nope', which the example lacks; give it 0 rows"),
        (["scalra"], r"'scalra', which the example lacks; did you mean 'scalar'\?"),
        ({"x": 1}, "5 rows, at most 1"),
        (["scalar"], "leading dimension"),
        ({"scalar": 3}, "give 1 dimensions"),
        (["empty"], "leading dimension"),
    ]
    for varlen, words in rows:
        with row(varlen=varlen), pytest.raises(ConfigError, match=words) as caught:
            Schema.from_example({"x": np.zeros((5, 2)), "scalar": 1.0, "empty": np.zeros((0, 2))}, varlen)
        assert "\n" not in str(caught.value)


ONE_LENGTH = [TensorSpec(name, (9,), "u1", varlen=True) for name in ("obs", "reward", "next")]


def test_varlen_fields_of_one_maximum_have_one_length_unless_any_is_chosen() -> None:
    def rows(*counts: int) -> dict[str, Any]:
        return {name: np.zeros(count, "u1") for name, count in zip(("obs", "reward", "next"), counts, strict=True)}

    cases: list[tuple[Any, tuple[int, ...], str | None]] = [
        (9, (3, 3, 3), None),
        (9, (4, 3, 4), "'obs': 4 rows, but 'reward' has 3: give both as many, or lengths='any'"),
        (9, (4, 4, 3), "'obs': 4 rows, but 'next' has 3"),
        (9, (3, 0, 3), None),  # it has none in this episode
        (9, (0, 3, 4), "'reward': 3 rows, but 'next' has 4"),
        (["obs", "reward", "next"], (4, 3, 4), "'obs': 4 rows, but 'reward' has 3"),
        ({"obs": 10, "reward": 9, "next": 10}, (4, 3, 4), None),  # of two kinds, by their maxima
        ({"obs": 10, "reward": 9, "next": 10}, (4, 3, 5), "'obs': 4 rows, but 'next' has 5"),
    ]
    for varlen, counts, words in cases:
        tree = rows(*counts)
        for example in (tree, rows(9, 9, 9)):
            with row(varlen=varlen, counts=counts, is_first=example is tree):
                with pytest.raises(ConfigError, match=words) if words else nullcontext():
                    assert Schema.from_example(example, varlen).arrange(tree)[1].lengths == counts
                assert Schema.from_example(example, varlen, "any").arrange(tree)[1].lengths == counts
    with pytest.raises(ConfigError, match="'obs': 4 rows, but 'reward' has 3"):  # the example's 4, and the 4 given
        Schema.from_example(rows(4, 3, 9), {"obs": None, "reward": 4, "next": 9})


def test_whether_lengths_are_equal_is_the_writer_s_own_and_no_part_of_what_readers_compare() -> None:
    equal, anyhow = Schema(ONE_LENGTH, "equal"), Schema(ONE_LENGTH)
    assert (equal.lengths, anyhow.lengths) == ("equal", "any")
    assert equal == anyhow
    assert equal.fingerprint == anyhow.fingerprint
    assert copy.copy(equal).lengths == "equal"
    assert Schema.from_bytes(equal.to_bytes()).lengths == "any"
    with pytest.raises(ConfigError, match="lengths must be 'equal' or 'any', not 'same'"):
        Schema(ONE_LENGTH, "same")  # type: ignore[arg-type]  # what is tested
