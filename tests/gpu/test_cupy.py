"""cupy arrays on a real GPU, both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.waiting import wait_until
from ucxx_transport import ConfigError, RingConfig, Schema, SharedRingBuffer, SlotState, TensorSpec
from ucxx_transport.client.payload import BufferPool
from ucxx_transport.gpu.cupy import CupyRuntime, has_dtype
from ucxx_transport.schema.episode_record import RewardSummary
from ucxx_transport.trainer import RolloutFeed
from ucxx_transport.trainer.unpacking import unpacker_for
from ucxx_transport.worker import TrajectoryWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # cupy warns of what it does not find where it first looks for it
    pytest.mark.may_leave("descriptors", "threads", reason="CUDA keeps its driver's, and its threads, for the process"),
]

NAMES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32"]
NAMES += ["float64", "complex64", "complex128"]
HOST_MEMORY = 1
"""`cudaMemoryTypeHost`, <driver_types.h>."""

SCHEMA = Schema([TensorSpec("number", (), "int64"), TensorSpec("obs", (1 << 20,), "float32", varlen=True)])


@contextmanager
def writing(**settings: Any) -> Iterator[tuple[TrajectoryWriter, Any]]:
    with TrajectoryWriter("w", **{"serve": False, "ring": {"slots": 4}, **settings}) as end:

        def through(trajectory: dict[str, Any]) -> Any:
            record = end.write(trajectory)
            assert end.ring is not None
            assert record.ref is not None
            return end.ring.read(record.ref)

        yield end, through


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=16, schema=SCHEMA)) as ring:
        yield ring


def is_page_locked(cupy: Any, array: Any) -> bool:
    address = array.__array_interface__["data"][0]
    return int(cupy.cuda.runtime.pointerGetAttributes(address).type) == HOST_MEMORY


def busy(cupy: Any) -> None:
    """Have the current stream work for some tens of milliseconds."""
    matrix = cupy.ones((4096, 4096), cupy.float32)
    for _ in range(20):
        matrix = matrix @ matrix * cupy.float32(0)


@pytest.mark.parametrize("name", NAMES)
def test_an_array_arrives_bit_for_bit_whatever_its_layout(cupy: Any, name: str) -> None:
    full = cupy.asarray(np.array([[1.0, 2.0, 0.0], [4.0, 0.5, 8.0]]).astype(name))
    given = {"plain": full, "transposed": full.T, "strided": full[:, ::2], "scalar": full[0, 1], "empty": full[:0]}
    with writing() as (_, through):
        found = through(given)
        for key, array in given.items():
            expected = cupy.asnumpy(array)
            assert (found[key].dtype, found[key].shape) == (expected.dtype, expected.shape), key
            np.testing.assert_array_equal(found[key], expected)


def test_the_ring_is_really_page_locked_and_is_no_more_once_the_writer_is_closed(cupy: Any) -> None:
    with writing() as (end, through):
        through({"x": cupy.ones(1 << 20), "host": np.ones(3)})
        assert end.ring is not None
        mapping = end.ring.mapping
        assert is_page_locked(cupy, mapping)
        assert is_page_locked(cupy, mapping[-64:])
    assert not is_page_locked(cupy, mapping)
    runtime = CupyRuntime(cupy)
    unlock = runtime.page_lock(mapping, 0, what="", remedy="")
    assert runtime.call(0, "HostRegister", mapping.__array_interface__["data"][0], mapping.nbytes, 1) == 712
    unlock()
    assert "error 712" in runtime.error_words(712)


@pytest.mark.parametrize("own_stream", [False, True])
def test_what_the_producer_has_still_to_do_is_waited_for(cupy: Any, *, own_stream: bool) -> None:
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.get_current_stream()
    with writing() as (_, through), stream:
        values = cupy.zeros(1 << 20)
        through({"x": values})
        for number in (3, 4):
            busy(cupy)
            values.fill(number)
            assert (through({"x": values})["x"] == number).all()


def test_narrowing_refuses_what_is_refused_of_host_arrays(cupy: Any) -> None:
    schema = Schema([TensorSpec("f", (3,), "float32"), TensorSpec("i", (2,), "int16")])
    good = {"f": cupy.array([1 / 3, np.inf, np.nan]), "i": cupy.array([-32768, 32767])}
    with writing(schema=schema, narrow=["f", "i"]) as (end, through):
        found = through(good)
        np.testing.assert_array_equal(found["f"], np.array([1 / 3, np.inf, np.nan], np.float32))
        assert found["i"].tolist() == [-32768, 32767]
        for name, values, words in [
            ("f", np.full(3, 1e300), "does not fit float32"),
            ("f", np.ones(3, np.int64), "give floats"),
            ("i", np.array([0, 32768]), "does not fit int16"),
            ("i", np.array([0, 2**63], np.uint64), "does not fit int16"),
            ("i", np.ones(3, np.int64), "shape"),
        ]:
            with pytest.raises(ConfigError, match=words):
                end.write({**good, name: cupy.asarray(values)})
        assert end.ring is not None
        assert end.ring.slot_states() == [SlotState.FREE] * 4


def test_rewards_on_the_gpu_are_summed_up(cupy: Any) -> None:
    with writing(reward="reward") as (end, _):
        record = end.write({"reward": cupy.arange(4, dtype=cupy.float32)})
        assert record.rewards == RewardSummary(total=6.0, mean=1.5, least=0.0, most=3.0)


def test_what_was_prefetched_is_bit_for_bit_what_numpy_gives(cupy: Any) -> None:
    written = {name: np.arange(15).reshape(3, 5).astype(name) for name in NAMES}
    schema = Schema.from_example(written)
    with SharedRingBuffer.create(RingConfig(slots=2, schema=schema)) as ring, RolloutFeed(device="cupy:0") as feed:
        ref = ring.write(written)
        feed.start([ref])
        feed.collect()
        tree = feed.resolve(ref)
        assert tree is not None
        for name, array in tree.items():
            assert isinstance(array, cupy.ndarray)
            assert array.dtype == written[name].dtype
            np.testing.assert_array_equal(cupy.asnumpy(array), written[name])


@pytest.mark.parametrize("name", ["bfloat16", "float8_e5m2"])
def test_a_dtype_is_cupy_s_own_or_is_refused_with_another_way(cupy: Any, name: str) -> None:
    values = np.array([1.5, -2.0], getattr(ml_dtypes, name))
    schema = Schema.from_example({"x": values})
    with SharedRingBuffer.create(RingConfig(slots=2, schema=schema)) as ring, RolloutFeed(device="cupy") as feed:
        ref = ring.write({"x": values})
        if has_dtype(cupy, values.dtype):
            tree = feed.resolve(ref)
            assert tree is not None
            assert cupy.asnumpy(tree["x"]).tobytes() == values.tobytes()
        else:
            with pytest.raises(ConfigError, match=f"cupy .* has no {name}.*device='cuda:0'.*device='numpy'"):
                feed.resolve(ref)


def test_receive_buffers_are_really_page_locked(cupy: Any) -> None:
    uploader = unpacker_for("cupy")[1]
    assert uploader is not None
    pool = BufferPool(1 << 30, uploader.page_locker)
    assert is_page_locked(cupy, pool.lend(3 << 20))


@pytest.mark.usefixtures("cupy")
def test_a_ring_of_this_host_is_copied_from_in_place_once_it_is_page_locked(ring: SharedRingBuffer) -> None:
    def episode(number: int) -> dict[str, Any]:
        return {"number": np.int64(number), "obs": np.full(1 << 20, number, np.float32)}

    with RolloutFeed(device="cupy") as feed:
        wait_until(lambda: feed.resolve(ring.write(episode(0))) and "view" in feed.client_statistics().ways, 60)
        trees = [feed.resolve(ring.write(episode(number))) for number in range(8)]
        wait_until(lambda: ring.slot_states() == [SlotState.FREE] * 16, 60, what="the copies have ended")
        assert [bool((tree["obs"] == number).all()) for number, tree in enumerate(trees) if tree] == [True] * 8


@pytest.mark.parametrize("own_stream", [False, True])
def test_the_consumer_s_stream_waits_by_itself_and_memory_is_not_reused_under_it(
    cupy: Any, ring: SharedRingBuffer, *, own_stream: bool
) -> None:
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.get_current_stream()
    right = []
    with RolloutFeed(device="cupy") as feed, stream:
        for number in range(40):
            ref = ring.write({"number": np.int64(number), "obs": np.full(1 << 20, number, np.float32)})
            feed.start([ref])
            feed.collect()
            tree = feed.resolve(ref)
            assert tree is not None
            if number % 10 == 0:
                busy(cupy)
            right.append((tree["obs"] == tree["number"]).all() & (tree["number"] == number))
            del tree
        assert all(bool(each) for each in right)


def test_arrays_outlive_their_feed_and_their_receiver(cupy: Any, ring: SharedRingBuffer) -> None:
    feed = RolloutFeed(device="cupy")
    tree = feed.resolve(ring.write({"number": np.int64(5), "obs": np.full(1000, 5, np.float32)}))
    feed.close()
    del feed
    others = [cupy.full(1 << 18, 7, cupy.float32) for _ in range(64)]
    assert tree is not None
    assert bool((tree["obs"] == 5).all())
    assert len(others) == 64


def test_a_gpu_that_is_not_there_is_an_error_at_set_up(cupy: Any) -> None:
    assert cupy.cuda.runtime.getDeviceCount() < 99
    with pytest.raises(ConfigError, match=r"device='cupy:99': this process has \d+ GPU"):
        RolloutFeed(device="cupy:99")


ALONE = """
import sys
sys.modules[{other!r}] = None
import numpy as np
import {library} as library
from ucxx_transport.worker import TrajectoryWriter
from ucxx_transport.trainer import RolloutFeed

with TrajectoryWriter("w", serve=False) as end, RolloutFeed(device={device!r}) as feed:
    given = {{"x": {made}, "y": np.arange(3)}}
    tree = feed.resolve(end.write(given).ref)
    print(float(tree["x"].sum()), int(tree["y"].sum()), type(tree["x"]).__module__)
"""


@pytest.mark.parametrize(
    ("library", "other", "device", "made"),
    [
        ("cupy", "torch", "cupy", "library.ones(4)"),
        ("torch", "cupy", "cuda", "library.ones(4, device='cuda')"),
    ],
)
def test_either_library_suffices_alone(
    request: pytest.FixtureRequest, library: str, other: str, device: str, made: str
) -> None:
    request.getfixturevalue(library)
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(library=library, other=other, device=device, made=made)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.split()[:2] == ["4.0", "3"]
