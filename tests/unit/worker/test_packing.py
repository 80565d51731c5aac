from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ucxx_transport import ConfigError, RingConfig, Schema, SharedRingBuffer, SlotState, TensorSpec
from ucxx_transport.worker.packing import TrajectoryPacker

SCHEMA = Schema(
    [
        TensorSpec("obs", (8, 2), "float32", varlen=True),
        TensorSpec("act/id", (8,), "int16", varlen=True),
        TensorSpec("logprob", (3,), "bfloat16"),
    ]
)


@contextmanager
def packing(*narrow: str) -> Iterator[tuple[SharedRingBuffer, TrajectoryPacker]]:
    with SharedRingBuffer.create(RingConfig(slots=2, schema=SCHEMA)) as ring:
        yield ring, TrajectoryPacker(ring, SCHEMA, narrow)


def trajectory(**other: object) -> dict[str, Any]:
    return {
        "obs": np.arange(10, dtype=np.float32).reshape(5, 2),
        "act": {"id": np.arange(4, dtype=np.int16)},
        "logprob": np.array([1, 2, 3], ml_dtypes.bfloat16),
        **other,
    }


def test_a_trajectory_that_fits_is_written_as_it_is() -> None:
    with packing() as (ring, packer):
        given = trajectory()
        found = ring.read(packer.write(given, meta={"k": 1}))
        np.testing.assert_array_equal(found["obs"], given["obs"])
        np.testing.assert_array_equal(found["act"]["id"], given["act"]["id"])


def test_a_field_that_may_be_narrowed_is_and_is_warned_of_once(log_events: list[MutableMapping[str, Any]]) -> None:
    with packing("obs", "act/id", "logprob") as (ring, packer):
        given = trajectory(
            obs=np.full((3, 2), 1 / 3),
            act={"id": np.array([-32768, 32767], np.int64)},
            logprob=np.array([1.0, 1 / 3, -2.5], np.float32),
        )
        for _ in range(2):
            ref = packer.write(given, meta={"policy_version": 3})
            assert ref.meta == {"policy_version": 3}
            found = ring.read(ref)
            np.testing.assert_array_equal(found["obs"], given["obs"].astype(np.float32))
            np.testing.assert_array_equal(found["act"]["id"], [-32768, 32767])
            np.testing.assert_array_equal(found["logprob"], given["logprob"].astype(ml_dtypes.bfloat16))
    warned = [(event["field"], event["given"], event["stored"]) for event in log_events]
    assert warned == [
        ("obs", "float64", "float32"),
        ("act/id", "int64", "int16"),
        ("logprob", "float32", "bfloat16"),
    ]


def test_a_field_that_may_not_be_narrowed_is_refused_and_no_slot_is_touched() -> None:
    with packing("obs") as (ring, packer):
        with pytest.raises(ConfigError, match="act/id"):
            packer.write(trajectory(act={"id": np.zeros(2, np.int64)}))
        assert ring.statistics().written == 0


@pytest.mark.parametrize("name", ["obs", "act/id"])
def test_a_field_that_may_be_narrowed_and_need_not_be_is_not_warned_of(
    name: str, log_events: list[MutableMapping[str, Any]]
) -> None:
    with packing(name) as (ring, packer):
        found = ring.read(packer.write(trajectory(obs=np.ones((1, 2), np.float16), act={"id": np.ones(1, np.int8)})))
        assert (found["obs"].dtype, found["act"]["id"].dtype) == (np.float32, np.int16)
    assert log_events == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"act": {"id": np.array([32768])}}, "does not fit int16"),
        ({"act": {"id": np.array([0, -32769])}}, "does not fit int16"),
        ({"act": {"id": np.array([2**63], np.uint64)}}, "does not fit int16"),
        ({"act": {"id": np.array([1.0])}}, "give the field float64"),
        ({"obs": np.full((1, 2), 1e300)}, "does not fit float32"),
        ({"obs": np.ones((1, 2), np.int64)}, "give floats for a field of floats"),
        ({"obs": np.ones((9, 2))}, "shape"),
        ({"obs": np.ones((1, 3))}, "shape"),
    ],
)
def test_what_would_not_be_the_same_number_is_refused_and_leaves_nothing(other: dict[str, Any], words: str) -> None:
    with packing("obs", "act/id") as (ring, packer):
        with pytest.raises(ConfigError, match=words):
            packer.write(trajectory(**other))
        assert ring.slot_states() == [SlotState.FREE] * 2
        assert ring.statistics().committed == 0


def test_a_value_that_cannot_be_narrowed_costs_no_unread_payload() -> None:
    with SharedRingBuffer.create(RingConfig(slots=2, schema=SCHEMA, on_full="overwrite")) as ring:
        packer = TrajectoryPacker(ring, SCHEMA, ["obs"])
        refs = [packer.write(trajectory()) for _ in range(2)]
        with pytest.raises(ConfigError, match="does not fit float32"):
            packer.write(trajectory(obs=np.full((1, 2), 1e300)))
        assert ring.ready_refs() == refs
        assert ring.statistics().overwritten == 0


def test_an_infinite_value_stays_infinite() -> None:
    with packing("obs") as (ring, packer):
        found = ring.read(packer.write(trajectory(obs=np.array([[np.inf, np.nan]]))))
        np.testing.assert_array_equal(found["obs"], [[np.inf, np.nan]])


def test_a_name_that_is_no_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="'rewards'"), packing("rewards"):
        pass


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [("float8_e4m3fn", 448.0, 1000.0), ("float8_e5m2", 57344.0, 1e6), ("bfloat16", 3.38e38, 3.4e38)],
)
def test_a_value_too_large_for_a_short_float_is_refused(dtype: str, largest: float, too_large: float) -> None:
    schema = Schema([TensorSpec("x", (2,), dtype)])
    with SharedRingBuffer.create(RingConfig(slots=2, schema=schema)) as ring:
        packer = TrajectoryPacker(ring, schema, narrow=["x"])
        found = ring.read(packer.write({"x": np.array([largest, -1.0], np.float32)}))
        assert np.isfinite(found["x"].astype(np.float32)).all()
        with pytest.raises(ConfigError, match=f"does not fit {dtype}"):
            packer.write({"x": np.array([1.0, too_large], np.float32)})
        assert ring.slot_states() == [SlotState.FREE] * 2
