"""Episodes over real UCX to a fake GPU: received in page-locked buffers, and copied from these."""

from __future__ import annotations

import numpy as np

from tests.support.fake_gpu import FakeGpu, FakeReceiver
from tests.support.served_ring import served_ring
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
