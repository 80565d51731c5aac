"""Payloads to a fake GPU, whose copies move nothing until it is said to have got so far."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.fake_gpu import POISON, FakeGpu, FakeReceiver
from tests.support.local_worker import LocalWorker
from tests.support.waiting import wait_until
from tests.unit.trainer.fake_core import FakeCore
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    ProtocolError,
    RingConfig,
    Schema,
    SharedRingBuffer,
    SlotError,
    SlotState,
    SyncUCXXClient,
    TensorSpec,
)
from ucxx_transport.client import Payload
from ucxx_transport.gpu.runtime import Bytes, PageLockError, Upload
from ucxx_transport.trainer import EpisodeStream, Prefetcher, RolloutFeed
from ucxx_transport.trainer.unpacking import DevicePayload, DeviceUploader, map_leaves

SCHEMA = Schema(
    [
        TensorSpec("obs", (8, 2), "float32", varlen=True),
        TensorSpec("act/id", (8,), "int16", varlen=True),
        TensorSpec("logits", (3,), "bfloat16"),
        TensorSpec("done", (), "bool"),
    ]
)


def episode(number: int) -> dict[str, Any]:
    return {
        "obs": np.full((number % 8, 2), number, np.float32),
        "act": {"id": np.arange(number % 5, dtype=np.int16)},
        "logits": np.array([number, 2.5, -3], ml_dtypes.bfloat16),
        "done": np.bool_(number % 2),
    }


def seen(tree: Any) -> Any:
    return map_leaves(lambda leaf: leaf.seen_by_the_gpu(), tree)


def same(found: Any, expected: dict[str, Any]) -> bool:
    pairs = zip(SCHEMA.gather(found), SCHEMA.gather(expected), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=32, schema=SCHEMA, on_full="raise")) as ring:
        yield ring


BUFFERS = 8192
"""Bytes: receive buffers can be page-locked, and no ring."""


def by_buffers() -> FakeGpu:
    gpu = FakeGpu()
    gpu.lockable = BUFFERS
    return gpu


@contextmanager
def feed_in_place(gpu: FakeGpu, ring: SharedRingBuffer) -> Iterator[RolloutFeed]:
    """A feed that has this ring page-locked by now."""

    def is_read_in_place() -> bool:
        feed.resolve(ring.write(episode(0)))
        gpu.finish()
        return "view" in feed.client_statistics().ways

    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        wait_until(is_read_in_place, what="the ring is page-locked")
        wait_until(lambda: ring.slot_states() == [SlotState.FREE] * 32, what="its slots are free")
        gpu.log.clear()
        yield feed


def reading(ring: SharedRingBuffer) -> int:
    return ring.slot_states().count(SlotState.READING)


def uploads(gpu: FakeGpu) -> list[str]:
    return [entry for entry in gpu.log if entry.startswith("upload")]


def test_a_batch_is_on_its_way_to_the_device_before_anybody_asks_for_it_by_one_copy_a_payload(
    ring: SharedRingBuffer,
) -> None:
    gpu = by_buffers()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        refs = [ring.write(episode(number)) for number in range(3)]
        feed.start(refs)
        wait_until(lambda: feed.is_ready)
        assert uploads(gpu) == [f"upload {ref.nbytes}" for ref in refs]
        assert ring.slot_states() == [SlotState.FREE] * 32
        assert "ready" not in gpu.log
        feed.collect()
        trees = [feed.resolve(ref) for ref in refs]
        assert gpu.counts()["ready"] == 3
        assert "wait" not in gpu.counts()
        assert len(uploads(gpu)) == 3
        assert not same(seen(trees[1]), episode(1))  # the GPU is not there yet, and nobody has waited for it
        gpu.finish()
        assert [same(seen(tree), episode(number)) for number, tree in enumerate(trees)] == [True] * 3
        assert feed.client_statistics().ways["copy"].reads == 3


def test_episodes_begin_their_way_while_others_of_the_batch_are_still_being_read() -> None:
    class Slow(FakeReceiver):
        """Notes how many of the slots were still to be read when a copy began."""

        left: list[int]

        def upload(self, source: Bytes) -> Upload:
            self.left.append(worker.ring.get_ready_count())
            return super().upload(source)

    with SharedRingBuffer.create(RingConfig(slots=8, slot_bytes=64)) as raw:
        worker = LocalWorker(raw)
        receiver = Slow(FakeGpu())
        receiver.left = []
        with Prefetcher(device=receiver) as prefetcher:
            batch = prefetcher.fetch(worker.play(4))
            assert len(batch.payloads) == 4
            assert receiver.left == [3, 2, 1, 0]
            batch.release()


def test_what_is_fetched_on_demand_takes_the_same_way(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        ref = ring.write(episode(7))
        tree = feed.resolve(ref)
        assert gpu.log[-2:] == [f"upload {ref.nbytes}", "ready"]
        gpu.finish()
        assert same(seen(tree), episode(7))
        assert feed.resolve(ref) is None  # delivered once
        assert feed.statistics().losses == {"duplicate": 1}
        assert len(uploads(gpu)) == 1


def test_an_episode_that_is_taken_twice_is_copied_once_and_ordered_each_time(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        ref = ring.write(episode(7))
        feed.start([ref])
        feed.collect()
        trees = [feed.resolve(ref) for _ in range(2)]
        gpu.finish()
        assert [same(seen(tree), episode(7)) for tree in trees] == [True] * 2
        assert (len(uploads(gpu)), gpu.counts()["ready"]) == (1, 2)


def test_bytes_of_a_raw_ring_arrive_as_they_are_and_no_bytes_at_all_too() -> None:
    gpu = FakeGpu()
    with (
        SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as ring,
        RolloutFeed(device=FakeReceiver(gpu)) as feed,
    ):
        trees = [feed.resolve(ring.write_raw(content)) for content in (b"12", b"")]
        gpu.finish()
        assert [seen(tree)["data"].tobytes() for tree in trees] == [b"12", b""]


def test_a_stream_of_episodes_lands_too(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    refs = [ring.write(episode(number)) for number in range(5)]
    with EpisodeStream(refs, device=FakeReceiver(gpu)) as stream:
        trees = [each.arrays for each in stream]
        gpu.finish()
    assert [same(seen(tree), episode(number)) for number, tree in enumerate(trees)] == [True] * 5


def test_a_receive_buffer_is_used_again_only_when_its_copy_has_ended(ring: SharedRingBuffer) -> None:
    gpu = by_buffers()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        first, second = (feed.resolve(ring.write(episode(number))) for number in (3, 4))
        assert feed.client_statistics().lent_buffers == 2
        gpu.finish()
        assert (same(seen(first), episode(3)), same(seen(second), episode(4))) == (True, True)
        wait_until(
            lambda: feed.client_statistics().lent_buffers == 0, what="both have come back, without a further read"
        )
        third = feed.resolve(ring.write(episode(5)))
        gpu.finish()
        assert same(seen(third), episode(5))
        buffers = [entry for entry in gpu.log if entry.startswith("register")]
        assert len(buffers) == 3  # one to see whether any can be locked, and two to receive in


def test_buffers_are_locked_once_each_and_unlocked_while_their_memory_is_there(ring: SharedRingBuffer) -> None:
    gpu = by_buffers()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        for turn in range(6):
            feed.resolve(ring.write(episode(turn)))
            gpu.finish()
        locked = gpu.counts()["register"]
        assert locked <= 3
    assert gpu.registered == {}
    assert gpu.counts()["unregister"] == locked
    assert not any(entry.endswith("unmapped") for entry in gpu.log)


def test_closing_waits_for_the_copies_under_way_and_what_has_landed_stays(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    feed = RolloutFeed(device=FakeReceiver(gpu))
    refs = [ring.write(episode(number)) for number in (2, 3)]
    feed.start(refs)
    feed.collect()
    tree = feed.resolve(refs[1])
    feed.close()
    gc.collect()
    assert "wait upload" in gpu.log
    assert gpu.registered == {}
    assert same(seen(tree), episode(3))
    with pytest.raises(ConfigError, match="closed"):
        feed.start([ring.write(episode(1))])


def test_a_batch_that_is_released_before_it_has_landed_harms_nobody(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        first = ring.write(episode(6))
        feed.start([first])
        feed.collect()
        tree = feed.resolve(first)
        feed.release()
        with pytest.raises(SlotError, match="released"):
            _released(ring).arrays  # noqa: B018 - what raises is the look at it
        second = feed.resolve(ring.write(episode(7)))
        gpu.finish()
        assert (same(seen(tree), episode(6)), same(seen(second), episode(7))) == (True, True)


def _released(ring: SharedRingBuffer) -> Payload:
    gpu = FakeGpu()
    uploader = DeviceUploader(FakeReceiver(gpu))
    with SyncUCXXClient(ClientConfig(local="copy")) as client:
        payload = client.read(ring.write(episode(1)))
        gpu.registered[0] = 1 << 62  # of a client that knows nothing of GPUs
        uploaded = uploader.upload(payload, FakeCore().reactor)
    assert payload.released
    uploaded.release()
    uploader.close()
    return uploaded


def test_nothing_lands_any_more_once_it_is_closed(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    uploader = DeviceUploader(FakeReceiver(gpu))
    uploader.close()
    with SyncUCXXClient() as client:
        payload = client.read(ring.write(episode(5)))
        with pytest.raises(ConfigError, match="closed"):
            uploader.upload(payload, FakeCore().reactor)
        assert payload.released
    assert uploads(gpu) == []


def test_a_landed_payload_has_no_bytes_on_the_host(ring: SharedRingBuffer) -> None:
    gpu = by_buffers()
    with Prefetcher(device=FakeReceiver(gpu)) as prefetcher:
        ref = ring.write(episode(4))
        batch = prefetcher.fetch([_record(ref)])
        payload = batch.payloads[0]
        assert isinstance(payload, DevicePayload)
        assert (payload.nbytes, payload.ref, payload.transport, payload.released) == (ref.nbytes, ref, "copy", False)
        with pytest.raises(SlotError, match="take its arrays"):
            payload.buffer  # noqa: B018 - what raises is the look at it
        batch.release()
        assert payload.released


def test_nothing_of_the_device_is_seen_before_its_turn(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        tree = feed.resolve(ring.write(episode(7)))
        assert set(seen(tree)["obs"].tobytes()) == {POISON}


def test_episodes_of_this_host_go_straight_from_their_slots_which_are_held_until_the_copies_have_ended(
    ring: SharedRingBuffer,
) -> None:
    gpu = FakeGpu()
    with feed_in_place(gpu, ring) as feed:
        refs = [ring.write(episode(number)) for number in range(3)]
        feed.start(refs)
        wait_until(lambda: feed.is_ready)
        assert gpu.log == [f"upload {ref.nbytes}" for ref in refs]
        feed.collect()
        trees = [feed.resolve(ref) for ref in refs]
        feed.release()
        assert reading(ring) == 3
        gpu.finish()
        wait_until(lambda: reading(ring) == 0, what="the slots are released, by nobody's further call")
        assert [same(seen(tree), episode(number)) for number, tree in enumerate(trees)] == [True] * 3
        assert feed.client_statistics().lent_buffers == 0
    assert gpu.registered == {}
    assert not any(entry.endswith("unmapped") for entry in gpu.log)


def test_reads_go_on_by_buffers_while_a_ring_is_being_page_locked(ring: SharedRingBuffer) -> None:
    def hold(nbytes: int) -> None:
        if nbytes > BUFFERS:
            goes_on.wait()

    goes_on = threading.Event()
    gpu = FakeGpu()
    gpu.on_register = hold
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        trees = [feed.resolve(ring.write(episode(number))) for number in range(4)]
        assert feed.client_statistics().ways["copy"].reads == 4
        assert reading(ring) == 0
        gpu.finish()
        assert [same(seen(tree), episode(number)) for number, tree in enumerate(trees)] == [True] * 4
        goes_on.set()
    assert gpu.registered == {}


def test_a_ring_that_cannot_be_page_locked_is_read_by_buffers_and_said_once(
    ring: SharedRingBuffer, log_events: list[MutableMapping[str, Any]]
) -> None:
    def said() -> list[str]:
        return [event["ring"] for event in log_events if event["event"] == "ring_not_page_locked"]

    gpu = by_buffers()
    with RolloutFeed(device=FakeReceiver(gpu)) as feed:
        for number in range(3):
            tree = feed.resolve(ring.write(episode(number)))
            gpu.finish()
            assert same(seen(tree), episode(number))
            wait_until(lambda: said() == [ring.name])
        assert feed.client_statistics().ways["copy"].reads == 3
    assert said() == [ring.name]


def test_closing_waits_for_copies_from_slots_and_unlocks_the_ring_while_it_is_mapped(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    with feed_in_place(gpu, ring) as feed:
        tree = feed.resolve(ring.write(episode(5)))
        assert reading(ring) == 1
    assert "wait upload" in gpu.log
    assert same(seen(tree), episode(5))
    assert reading(ring) == 0
    assert gpu.registered == {}
    assert not any(entry.endswith("unmapped") for entry in gpu.log)


def test_a_ring_is_page_locked_by_every_client_that_reads_from_it(ring: SharedRingBuffer) -> None:
    first, second = FakeGpu(), FakeGpu()
    with feed_in_place(first, ring), feed_in_place(second, ring):
        assert [ring.mapping.nbytes in gpu.registered.values() for gpu in (first, second)] == [True] * 2


def test_for_a_device_a_client_chooses_by_itself_where_it_reads_in_place() -> None:
    with pytest.raises(ConfigError, match=r"local='view'.*'auto'") as caught:
        RolloutFeed(ClientConfig(local="view"), device=FakeReceiver(FakeGpu()))
    assert caught.value.facts["field"] == "local"


def test_that_nothing_can_be_page_locked_is_said_at_set_up() -> None:
    gpu = FakeGpu()
    gpu.refuse = 801
    with pytest.raises(PageLockError, match=r"a receive buffer of 4096 bytes.*\(error 801\).*buffer_pool_bytes"):
        RolloutFeed(device=FakeReceiver(gpu))


def test_a_buffer_that_cannot_be_page_locked_costs_its_episode_with_the_reason(ring: SharedRingBuffer) -> None:
    gpu = FakeGpu()
    losses: list[Any] = []
    with RolloutFeed(device=FakeReceiver(gpu), on_loss=losses.append) as feed:
        gpu.refuse = 2
        with pytest.raises(PageLockError, match="1 of 1 episodes of a batch are lost"):
            feed.resolve(ring.write(episode(1)))
        assert [type(loss.error) for loss in losses] == [PageLockError]
        gpu.refuse = 0
        assert feed.resolve(ring.write(episode(1))) is not None


def test_a_device_without_room_costs_the_episode_and_its_buffer_comes_back(ring: SharedRingBuffer) -> None:
    class Full(FakeReceiver):
        def upload(self, source: Bytes) -> Upload:
            raise ConfigError("no memory for it", field="device", nbytes=source.nbytes)

    losses: list[Any] = []
    with RolloutFeed(device=Full(by_buffers()), on_loss=losses.append) as feed:
        with pytest.raises(ConfigError, match=r"are lost: worker .*: no memory for it"):
            feed.resolve(ring.write(episode(1)))
        assert [(loss.reason.value, str(loss.error)[:16]) for loss in losses] == [("failed", "no memory for it")]
        assert feed.client_statistics().lent_buffers == 0


def test_bytes_that_are_no_payload_of_the_schema_are_not_copied() -> None:
    gpu = FakeGpu()
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64)) as raw, SyncUCXXClient() as client:
        read = client.read(raw.write_raw(b"\xff" * 64))
        uploader = DeviceUploader(FakeReceiver(gpu))
        claimed = Payload(read.ref, np.frombuffer(read.buffer, np.uint8), SCHEMA, read.transport)
        with pytest.raises(ProtocolError, match="'obs' claims"):
            uploader.upload(claimed, FakeCore().reactor)
        assert claimed.released
        assert uploads(gpu) == []
        read.release()


def _record(ref: Any) -> Any:
    from ucxx_transport.schema.episode_record import EpisodeRecord

    return EpisodeRecord(worker_id="w", sequence=0, ref=ref)
