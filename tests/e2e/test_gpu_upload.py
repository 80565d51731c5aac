"""Episodes to a fake GPU: of other hosts, over real UCX, from page-locked buffers; of this host, from their slots."""

from __future__ import annotations

import signal

import numpy as np

from tests.e2e.programs.rollout_worker import play
from tests.support.fake_gpu import FakeGpu, FakeReceiver
from tests.support.programs import program
from tests.support.served_ring import served_ring
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, Schema, TensorSpec
from ucxx_transport.trainer import RolloutFeed

SCHEMA = Schema([TensorSpec("obs", (1 << 18,), "float32", varlen=True), TensorSpec("number", (), "int64")])


def test_episodes_of_another_host_land_from_locked_buffers_that_are_used_again() -> None:
    gpu = FakeGpu()
    with (
        served_ring(ring={"schema": SCHEMA, "slots": 16}) as served,
        RolloutFeed(ClientConfig(local="off"), device=FakeReceiver(gpu)) as feed,
    ):
        for turn in range(3):
            lengths = [1 << 18, 1000 * turn, 5, 0]
            written = [
                {"obs": np.full(length, turn + length, np.float32), "number": np.int64(number)}
                for number, length in enumerate(lengths)
            ]
            refs = [served.ring.write(episode) for episode in written]
            feed.start(refs)
            feed.collect()
            trees = [feed.resolve(ref) for ref in refs]
            gpu.finish()
            for tree, episode in zip(trees, written, strict=True):
                assert tree is not None
                np.testing.assert_array_equal(tree["obs"].seen_by_the_gpu(), episode["obs"])
                assert tree["number"].seen_by_the_gpu() == episode["number"]
        assert feed.client_statistics().ways["ucx"].reads == 12
        assert gpu.counts()["upload"] == 12
        assert gpu.counts()["register"] < 12
    assert gpu.registered == {}


def test_episodes_of_a_worker_on_this_host_go_from_their_slots_and_a_worker_that_is_killed_takes_none_along() -> None:
    def is_read_in_place() -> bool:
        feed.resolve(worker.ask(steps=1, version=3)["record"])
        gpu.finish()
        return "view" in feed.client_statistics().ways

    gpu = FakeGpu()
    with program("rollout_worker", "worker-0") as worker, RolloutFeed(device=FakeReceiver(gpu)) as feed:
        wait_until(is_read_in_place, 60, what="the ring is page-locked")
        wait_until(lambda: worker.ask(ring=True)["ring"]["free"] == 4, 60, what="all slots are free")
        lengths = (200, 10, 30)
        records = [worker.ask(steps=steps, version=3)["record"] for steps in lengths]
        feed.start(records)
        feed.collect()
        trees = [feed.resolve(record) for record in records]
        feed.release()
        assert worker.ask(ring=True)["ring"]["reading"] == 3  # no copy has ended
        gpu.finish()
        wait_until(lambda: worker.ask(ring=True)["ring"]["free"] == 4, 60, what="the copies' ends are noticed")
        records = [worker.ask(steps=steps, version=3)["record"] for steps in lengths]
        trees += [feed.resolve(record) for record in records]
        worker.signal(signal.SIGKILL)
        worker.wait()
        gpu.finish()
        for tree, steps in zip(trees, lengths * 2, strict=True):
            assert tree is not None
            np.testing.assert_array_equal(tree["obs"]["image"].seen_by_the_gpu(), play(steps)["obs"]["image"])
        assert feed.client_statistics().ways["view"].reads >= 6
    assert gpu.registered == {}
    assert not any(entry.endswith("unmapped") for entry in gpu.log)
