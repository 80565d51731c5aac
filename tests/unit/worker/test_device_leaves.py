"""Leaves on a GPU into slots, with a fake GPU whose copies move nothing until they are waited for."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.fake_gpu import FakeGpu, FakeRuntime
from ucxx_transport import ConfigError, RingConfig, Schema, SharedRingBuffer, SlotState, TensorSpec
from ucxx_transport.gpu.runtime import PageLockError
from ucxx_transport.schema.episode_record import RewardSummary
from ucxx_transport.worker import TrajectoryWriter
from ucxx_transport.worker.packing import TrajectoryPacker

SCHEMA = Schema(
    [
        TensorSpec("obs", (8, 2), "float32", varlen=True),
        TensorSpec("act/id", (8,), "int16", varlen=True),
        TensorSpec("logits", (3,), "bfloat16"),
    ]
)
OBS = np.arange(10, dtype=np.float32).reshape(5, 2)
IDS = np.array([-32768, 7, 32767], np.int16)
LOGITS = np.array([1, 2.5, -3], ml_dtypes.bfloat16)


@contextmanager
def packing(gpu: FakeGpu, *narrow: str, **settings: Any) -> Iterator[tuple[SharedRingBuffer, TrajectoryPacker]]:
    with SharedRingBuffer.create(RingConfig(**{"slots": 2, "schema": SCHEMA, **settings})) as ring:
        packer = TrajectoryPacker(ring, SCHEMA, narrow, runtimes=FakeRuntime(gpu))
        try:
            yield ring, packer
        finally:
            packer.close()


def trajectory(gpu: FakeGpu, **other: object) -> dict[str, Any]:
    return {"obs": gpu.array(OBS), "act": {"id": IDS}, "logits": gpu.array(LOGITS), **other}


def test_leaves_of_both_kinds_arrive_as_they_were_by_one_copy_each() -> None:
    gpu = FakeGpu()
    with packing(gpu) as (ring, packer):
        found = ring.read(packer.write(trajectory(gpu), meta={"k": 1}))
        np.testing.assert_array_equal(found["obs"], OBS)
        np.testing.assert_array_equal(found["act"]["id"], IDS)
        np.testing.assert_array_equal(found["logits"], LOGITS)
        assert found["logits"].dtype == ml_dtypes.bfloat16
        assert gpu.log == [f"register {ring.mapping.nbytes}", "download 40", "download 6", "wait 0"]


def test_copies_are_waited_for_once_a_device_and_before_the_slot_is_committed() -> None:
    gpu = FakeGpu()
    states: list[SlotState] = []
    with packing(gpu) as (ring, packer):
        gpu.on_wait = lambda: states.extend(ring.slot_states())
        # the ring's own checksum is taken of what a reader will find: a copy that came later would break it
        found = ring.read(packer.write(trajectory(gpu, logits=gpu.array(LOGITS, device=1))))
        np.testing.assert_array_equal(found["logits"], LOGITS)
        assert sorted(gpu.log[-2:]) == ["wait 0", "wait 1"]
        assert states == [SlotState.WRITING, SlotState.FREE] * 2


def test_a_checksum_is_of_what_was_copied() -> None:
    gpu = FakeGpu()
    with packing(gpu, checksum=True) as (ring, packer):
        ref = packer.write(trajectory(gpu))
        assert ref.checksum is not None
        np.testing.assert_array_equal(ring.read(ref)["obs"], OBS)


def test_the_ring_is_page_locked_once_and_unlocked_while_it_is_mapped() -> None:
    gpu = FakeGpu()
    with packing(gpu) as (ring, packer):
        for _ in range(3):
            ring.read(packer.write(trajectory(gpu)))
        nbytes = ring.mapping.nbytes
        assert list(gpu.registered.values()) == [nbytes]
        packer.close()
        packer.close()
        with pytest.raises(ConfigError, match="closed"):
            packer.write(trajectory(gpu))
        assert ring.slot_states() == [SlotState.FREE] * 2
    assert [entry for entry in gpu.log if "register" in entry] == [f"register {nbytes}", f"unregister {nbytes} mapped"]


def test_a_ring_is_not_unlocked_under_a_copy() -> None:
    gpu = FakeGpu()
    copying, go_on = threading.Event(), threading.Event()

    def held_up() -> None:
        copying.set()
        assert go_on.wait(60)

    with packing(gpu) as (ring, packer):
        gpu.on_wait = held_up
        writer = threading.Thread(target=packer.write, args=(trajectory(gpu),))
        writer.start()
        assert copying.wait(60)
        closer = threading.Thread(target=packer.close)
        closer.start()
        closer.join(0.1)  # no matter how long: it waits for the copy
        assert gpu.registered
        go_on.set()
        writer.join()
        closer.join()
        assert gpu.registered == {}
        assert ring.get_ready_count() == 1


def test_a_ring_of_host_leaves_is_never_page_locked() -> None:
    gpu = FakeGpu()
    with packing(gpu) as (ring, packer):
        ring.read(packer.write({"obs": OBS, "act": {"id": IDS}, "logits": LOGITS}))
    assert gpu.log == []


def test_a_ring_that_is_closed_first_is_unlocked_all_the_same() -> None:
    gpu = FakeGpu()
    with TrajectoryWriter("w", schema=SCHEMA, serve=False, ring={"slots": 2}, runtimes=FakeRuntime(gpu)) as end:
        end.write(trajectory(gpu))
        assert end.ring is not None
        end.ring.close()
        assert gpu.registered
    assert gpu.registered == {}
    assert gpu.log[-1].endswith(" mapped")


def test_a_writer_that_nobody_closes_unlocks_its_ring_before_the_memory_goes() -> None:
    gpu = FakeGpu()
    ring = SharedRingBuffer.create(RingConfig(slots=2, schema=SCHEMA))
    packer = TrajectoryPacker(ring, SCHEMA, runtimes=FakeRuntime(gpu))
    packer.write(trajectory(gpu))
    del packer, ring
    gc.collect()
    assert gpu.registered == {}
    assert gpu.log[-1].endswith(" mapped")


def test_a_ring_that_cannot_be_locked_is_an_error_that_says_what_to_do_and_nothing_is_written() -> None:
    gpu = FakeGpu()
    gpu.refuse = 2
    settings: dict[str, Any] = {"schema": SCHEMA, "serve": False, "ring": {"slots": 2}, "on_error": "drop"}
    with TrajectoryWriter("w", runtimes=FakeRuntime(gpu), **settings) as end:
        words = r"a ring of \d+ bytes cannot be page-locked.*the GPU's words \(error 2\).*ulimit -l.*ring\.slots"
        with pytest.raises(PageLockError, match=words) as caught:
            end.write(trajectory(gpu))
        assert caught.value.facts["status"] == 2
        assert end.ring is not None
        assert end.ring.statistics().written == 0
        assert "download" not in gpu.counts()
        gpu.refuse = 0
        assert end.write(trajectory(gpu)).ref is not None


def test_memory_that_somebody_else_has_locked_is_used_and_left_to_them() -> None:
    gpu = FakeGpu()
    with packing(gpu) as (ring, packer):
        gpu.registered[ring.mapping.__array_interface__["data"][0]] = ring.mapping.nbytes
        gpu.refuse = 712
        np.testing.assert_array_equal(ring.read(packer.write(trajectory(gpu)))["obs"], OBS)
        packer.close()
        assert len(gpu.registered) == 1


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_copy_that_fails_leaves_the_slot_free_and_no_copy_under_way(fail_at: int) -> None:
    gpu = FakeGpu()
    states: list[SlotState] = []
    with SharedRingBuffer.create(RingConfig(slots=1, schema=SCHEMA)) as ring:
        leaves = FakeRuntime(gpu)
        packer = TrajectoryPacker(ring, SCHEMA, runtimes=leaves)
        leaves.fail_at = fail_at
        gpu.on_wait = lambda: states.extend(ring.slot_states())
        with pytest.raises(RuntimeError, match="fell over"):
            packer.write(trajectory(gpu))
        assert ring.slot_states() == [SlotState.FREE]
        assert (states, gpu.downloads) == ([SlotState.WRITING], [])
        leaves.fail_at = None
        ref = packer.write(trajectory(gpu, obs=gpu.array(-OBS)))
        gpu.finish()
        np.testing.assert_array_equal(ring.read(ref)["obs"], -OBS)
        packer.close()


def test_a_host_leaf_that_does_not_fit_is_refused_before_a_slot_or_a_copy_beside_it() -> None:
    gpu = FakeGpu()
    schema = Schema([TensorSpec("x", (2,), "float32"), TensorSpec("y", (2,), "float32")])
    with SharedRingBuffer.create(RingConfig(slots=1, schema=schema)) as ring:
        packer = TrajectoryPacker(ring, schema, narrow=["y"], runtimes=FakeRuntime(gpu))
        with pytest.raises(ConfigError, match="does not fit float32"):
            packer.write({"x": gpu.array(np.ones(2, np.float32)), "y": np.array([1e300, 0])})
        assert gpu.downloads == []
        assert ring.statistics().aborted == 0
        assert ring.slot_states() == [SlotState.FREE]
        packer.close()


@pytest.mark.parametrize(
    ("other", "on_host", "words"),
    [
        ({"obs": OBS.astype(np.float64)}, {}, "dtype float64 would not keep its values in float32"),
        ({"obs": np.ones((9, 2), np.float32)}, {}, r"shape \(9, 2\) is not \(≤8, 2\)"),
        ({"obs": np.ones((2, 3), np.float32)}, {}, r"shape \(2, 3\) is not"),
        ({"logits": LOGITS[:2]}, {}, r"shape \(2,\) is not \(3,\)"),
        ({}, {"act": {"id": np.zeros(2, np.int64)}}, "dtype int64 would not keep its values in int16"),
        ({}, {"act": {"name": IDS}}, "missing: 'act/id'"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_words_for_host_arrays_and_no_slot_is_touched(
    other: dict[str, Any], on_host: dict[str, Any], words: str
) -> None:
    gpu = FakeGpu()
    with packing(gpu) as (ring, packer):
        given = trajectory(gpu, **{name: gpu.array(values) for name, values in other.items()}, **on_host)
        with pytest.raises(ConfigError, match=words):
            packer.write(given)
        assert ring.statistics().written == 0
        assert gpu.log == []


def test_a_narrower_dtype_is_widened_by_way_of_the_host() -> None:
    gpu = FakeGpu()
    with packing(gpu) as (ring, packer):
        found = ring.read(packer.write(trajectory(gpu, obs=gpu.array(OBS.astype(np.float16)))))
        np.testing.assert_array_equal(found["obs"], OBS)
        assert "to_host 20" in gpu.log
        assert gpu.counts()["download"] == 1


def test_a_field_that_may_be_narrowed_is_by_way_of_the_host_and_is_warned_of_once(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    gpu = FakeGpu()
    with packing(gpu, "obs", "act/id", "logits") as (ring, packer):
        given: dict[str, Any] = {
            "obs": gpu.array(np.full((3, 2), 1 / 3)),
            "act": {"id": gpu.array(IDS.astype(np.int64))},
            "logits": np.array([1.0, 1 / 3, -2.5], np.float32),
        }
        for _ in range(2):
            found = ring.read(packer.write(given))
            np.testing.assert_array_equal(found["obs"], np.full((3, 2), 1 / 3, np.float32))
            np.testing.assert_array_equal(found["act"]["id"], IDS)
            np.testing.assert_array_equal(found["logits"], given["logits"].astype(ml_dtypes.bfloat16))
        assert gpu.counts() == {"to_host": 4}
    assert [(event["field"], event["given"], event["stored"]) for event in log_events] == [
        ("obs", "float64", "float32"),
        ("act/id", "int64", "int16"),
        ("logits", "float32", "bfloat16"),
    ]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("id", np.array([32768]), "a value of int64 does not fit int16"),
        ("id", np.array([0, -32769]), "a value of int64 does not fit int16"),
        ("id", np.array([2**63], np.uint64), "a value of uint64 does not fit int16"),
        ("id", np.array([1.0]), "float64 would not keep its values in int16; give the field float64"),
        ("obs", np.full((1, 2), 1e300), "a value of float64 does not fit float32"),
        ("obs", np.ones((1, 2), np.int64), "int64 would not keep its values in float32; give floats"),
    ],
)
def test_what_would_not_be_the_same_number_is_refused_from_a_device_too(name: str, values: Any, words: str) -> None:
    gpu = FakeGpu()
    with packing(gpu, "obs", "act/id") as (ring, packer):
        leaf = gpu.array(values)
        with pytest.raises(ConfigError, match=words):
            packer.write(trajectory(gpu, **({"act": {"id": leaf}} if name == "id" else {"obs": leaf})))
        assert ring.statistics().committed == 0
        assert ring.slot_states() == [SlotState.FREE] * 2
        assert gpu.downloads == []


def test_an_empty_array_of_wider_integers_is_narrowed_to_nothing() -> None:
    gpu = FakeGpu()
    with packing(gpu, "act/id") as (ring, packer):
        found = ring.read(packer.write(trajectory(gpu, act={"id": gpu.array(np.zeros(0, np.int64))})))
        assert found["act"]["id"].shape == (0,)


def test_the_schema_may_be_that_of_a_first_trajectory_on_the_device_and_none_of_it_is_copied_for_that() -> None:
    gpu = FakeGpu()
    leaves = FakeRuntime(gpu)
    end = TrajectoryWriter("w", varlen={"obs": 50}, serve=False, ring={"slots": 2}, runtimes=leaves)
    with end:
        record = end.write(trajectory(gpu, layers=[gpu.array(IDS), IDS]))
        assert end.ring is not None
        assert record.ref is not None
        schema = end.ring.schema
        assert schema is not None
        assert {field.name: (field.shape, field.dtype.name, field.varlen) for field in schema} == {
            "obs": ((50, 2), "float32", True),
            "act/id": ((3,), "int16", False),
            "logits": ((3,), "bfloat16", False),
            "layers/0": ((3,), "int16", False),
            "layers/1": ((3,), "int16", False),
        }
        assert gpu.counts() == {"register": 1, "download": 3, "wait": 1}
        np.testing.assert_array_equal(end.ring.read(record.ref)["layers"], [IDS, IDS])


def test_rewards_on_the_device_are_summed_up_like_others() -> None:
    gpu = FakeGpu()
    rewards = gpu.array(np.arange(4, dtype=np.float32))
    with TrajectoryWriter("w", reward="reward", serve=False, ring={"slots": 2}, runtimes=FakeRuntime(gpu)) as end:
        record = end.write({"reward": rewards, "obs": OBS})
        assert record.episode_length == 4
        assert record.rewards == RewardSummary(total=6.0, mean=1.5, least=0.0, most=3.0)
        assert "to_host 16" in gpu.log


def test_what_no_library_can_take_off_its_gpu_is_dropped_or_raised_like_any_misfit() -> None:
    gpu = FakeGpu()

    class Foreign:
        __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012 - as such libraries have it

    with TrajectoryWriter(
        "w", schema=SCHEMA, on_error="drop", serve=False, ring={"slots": 2}, runtimes=FakeRuntime(gpu)
    ) as end:
        record = end.write(trajectory(gpu, obs=Foreign()))
        assert str(record.dropped).startswith("ConfigError: field 'obs': numpy cannot take a Foreign")
