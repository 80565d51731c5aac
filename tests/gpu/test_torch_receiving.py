"""Payloads as torch tensors on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.served_ring import served_ring
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, ConfigError, RingConfig, Schema, SharedRingBuffer, SlotState, TensorSpec
from ucxx_transport.client.payload import BufferPool
from ucxx_transport.gpu.torch import TorchReceiver, TorchRuntime
from ucxx_transport.schema.tensors import as_array
from ucxx_transport.trainer import RolloutFeed
from ucxx_transport.trainer.unpacking import unpacker_for
from ucxx_transport.worker import TrajectoryWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.may_leave("descriptors", "threads", reason="CUDA keeps its driver's, and its threads, for the process"),
]

NAMES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32"]
NAMES += ["float64", "complex64", "complex128", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
SCHEMA = Schema([TensorSpec("number", (), "int64"), TensorSpec("obs", (1 << 20,), "float32", varlen=True)])
A_WHILE_CYCLES = 200_000_000


def of_every_dtype() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    tree: dict[str, Any] = {}
    for name in NAMES:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        tree[name] = (generator.integers(0, 2, (3, 5)) if name == "bool" else generator.integers(0, 9, (3, 5))).astype(
            dtype
        )
    return {**tree, "scalar": np.float32(2.5), "empty": np.zeros((0, 7), np.int16), "list": [{"x": np.arange(3)}]}


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=16, schema=SCHEMA)) as ring:
        yield ring


def numbered(number: int, length: int = 1 << 20) -> dict[str, Any]:
    return {"number": np.int64(number), "obs": np.full(length, number, np.float32)}


@pytest.mark.parametrize("local", ["auto", "copy", "off"])
def test_what_was_prefetched_to_the_gpu_is_bit_for_bit_what_numpy_gives(torch: Any, local: Any) -> None:
    written = of_every_dtype()
    schema = Schema.from_example(written)
    with (
        served_ring(ring={"schema": schema, "slots": 4}) as served,
        RolloutFeed(ClientConfig(local=local), device="cuda") as feed,
    ):
        ref = served.ring.write(written)
        feed.start([ref])
        feed.collect()
        tree = feed.resolve(ref)
        assert tree is not None
        leaves = schema.gather(tree)
        for tensor, field, expected in zip(leaves, schema, schema.gather(written), strict=True):
            assert tensor.is_cuda, field.name
            assert tensor.dtype == getattr(torch, field.dtype.name), field.name
            assert tuple(tensor.shape) == field.shape, field.name
            assert as_array(tensor.cpu(), field.name).tobytes() == np.asarray(expected).tobytes(), field.name


def test_raw_bytes_arrive_too(torch: Any) -> None:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as ring, RolloutFeed(device="cuda:0") as feed:
        trees = [feed.resolve(ring.write_raw(content)) for content in (b"12", b"")]
        assert [tree["data"].tolist() for tree in trees if tree is not None] == [[0x31, 0x32], []]
        assert trees[0] is not None
        assert trees[0]["data"].dtype == torch.uint8


def test_fields_of_a_payload_lie_in_one_piece_of_device_memory(torch: Any, ring: SharedRingBuffer) -> None:
    with RolloutFeed(device=torch.device("cuda", 0)) as feed:
        tree = feed.resolve(ring.write(numbered(3, 100)))
        assert tree is not None
        assert tree["number"].untyped_storage().data_ptr() == tree["obs"].untyped_storage().data_ptr()


@contextmanager
def feed_in_place(ring: SharedRingBuffer) -> Iterator[RolloutFeed]:
    """A feed that has this ring page-locked by now."""

    def is_read_in_place() -> bool:
        feed.resolve(ring.write(numbered(0, 10)))
        return "view" in feed.client_statistics().ways

    with RolloutFeed(device="cuda") as feed:
        wait_until(is_read_in_place, 60, what="the ring is page-locked")
        yield feed


def test_a_ring_of_this_host_is_page_locked_once_and_unlocked_with_the_feed(torch: Any, ring: SharedRingBuffer) -> None:
    attached: list[Any] = []

    class Noting(TorchRuntime):
        def call(self, device: int, function: str, *arguments: int) -> int:
            status = super().call(device, function, *arguments)
            if function == "HostRegister" and arguments[1] == ring.mapping.nbytes:
                attached.append((arguments[0], status))
            return status

    receiver = TorchReceiver("cuda", None)
    receiver.runtime = Noting(torch)
    with RolloutFeed(device=receiver) as feed:
        wait_until(lambda: feed.resolve(ring.write(numbered(0, 10))) and "view" in feed.client_statistics().ways, 60)
        for number in range(20):
            feed.resolve(ring.write(numbered(number)))
        assert [status for _, status in attached] == [0]
    # the pages of the writer's own mapping were never locked, and may be
    TorchRuntime(torch).page_lock(ring.mapping, 0, what="", remedy="")()


@pytest.mark.usefixtures("torch")
def test_what_goes_straight_from_its_slot_is_bit_for_bit_what_was_written_and_makes_room_by_itself(
    ring: SharedRingBuffer,
) -> None:
    with feed_in_place(ring) as feed:
        for turn in range(6):
            refs = [ring.write(numbered(8 * turn + place)) for place in range(8)]
            feed.start(refs)
            feed.collect()
            trees = [feed.resolve(ref) for ref in refs]
            # nobody asks for anything here: the slots come back since the copies have ended
            wait_until(lambda: ring.slot_states() == [SlotState.FREE] * 16, 60, what="all slots are free")
            for place, tree in enumerate(trees):
                assert tree is not None
                assert bool((tree["obs"] == 8 * turn + place).all())
                assert int(tree["number"]) == 8 * turn + place
        assert feed.client_statistics().ways["view"].reads >= 48


def test_a_slot_is_held_while_the_gpu_has_not_copied_it(torch: Any, ring: SharedRingBuffer) -> None:
    receiver = TorchReceiver("cuda", None)
    with RolloutFeed(device=receiver) as feed:
        wait_until(lambda: feed.resolve(ring.write(numbered(0, 10))) and "view" in feed.client_statistics().ways, 60)
        wait_until(lambda: ring.slot_states() == [SlotState.FREE] * 16, 60)
        with torch.cuda.stream(receiver._stream):  # noqa: SLF001 - the copies' own stream, kept busy before them
            torch.cuda._sleep(20 * A_WHILE_CYCLES)  # noqa: SLF001 - as torch's own tests have a GPU busy
            ahead = torch.cuda.Event()
            ahead.record()
        tree = feed.resolve(ring.write(numbered(7)))
        held = ring.slot_states().count(SlotState.READING)
        assert held == 1 or ahead.query()  # unless this machine was so slow that the GPU got there
        assert tree is not None
        assert bool((tree["obs"] == 7).all())
        wait_until(lambda: ring.slot_states() == [SlotState.FREE] * 16, 60, what="the slot is free")


def test_receive_buffers_are_really_page_locked(torch: Any) -> None:
    uploader = unpacker_for("cuda")[1]
    assert uploader is not None
    pool = BufferPool(1 << 30, uploader.page_locker)
    lent = pool.lend(3 << 20)
    assert torch.from_numpy(lent).is_pinned()
    view = lent[100:]
    del lent
    assert torch.from_numpy(view).is_pinned()
    pool.close()
    assert torch.from_numpy(view).is_pinned()


@pytest.mark.parametrize("own_stream", [False, True])
def test_the_consumer_s_stream_waits_by_itself_and_memory_is_not_reused_under_it(
    torch: Any, ring: SharedRingBuffer, *, own_stream: bool
) -> None:
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    right: list[Any] = []
    with RolloutFeed(device="cuda") as feed, torch.cuda.stream(stream):
        for number in range(40):
            refs = [ring.write(numbered(2 * number + place)) for place in range(2)]
            feed.start(refs)
            feed.collect()
            for ref in refs:
                tree = feed.resolve(ref)
                assert tree is not None
                if number % 10 == 0:
                    torch.cuda._sleep(A_WHILE_CYCLES)  # noqa: SLF001 - as torch's own tests have a GPU busy
                right.append((tree["obs"] == tree["number"]).all() & (tree["number"] == len(right)))
                del tree
        assert torch.stack(right).all().item()
    assert ring.slot_states() == [SlotState.FREE] * 16  # closing has waited for the copies


@pytest.mark.usefixtures("torch")
def test_closing_while_copies_are_under_way_leaves_what_has_landed(ring: SharedRingBuffer) -> None:
    feed = RolloutFeed(device="cuda")
    refs = [ring.write(numbered(number)) for number in range(8)]
    feed.start(refs)
    feed.collect()
    trees = [feed.resolve(ref) for ref in refs]
    feed.close()
    assert [int((tree["obs"] == number).all()) for number, tree in enumerate(trees) if tree is not None] == [1] * 8


@pytest.mark.usefixtures("torch")
def test_a_gpu_that_is_not_there_is_an_error_at_set_up() -> None:
    with pytest.raises(ConfigError, match=r"device='cuda:99': this process has \d+ GPU"):
        RolloutFeed(device="cuda:99")


@pytest.mark.usefixtures("torch")
def test_a_payload_goes_on_from_a_gpu_as_it_came(ring: SharedRingBuffer) -> None:
    with RolloutFeed(device="cuda") as feed, TrajectoryWriter("w", schema=SCHEMA, serve=False) as end:
        tree = feed.resolve(ring.write(numbered(9, 1000)))
        assert tree is not None
        record = end.write(tree)
        assert end.ring is not None
        assert record.ref is not None
        found = end.ring.read(record.ref)
        assert (int(found["number"]), found["obs"].tolist()) == (9, [9.0] * 1000)
