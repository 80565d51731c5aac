"""Rollout actors and a trainer actor on a real Ray cluster of this host; runs where ray is installed.

`tests/conftest.py` has these tests run first: one test process's, on one cluster, beside all others.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from tests.support import leaks
from tests.support.programs import program
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, ConfigError, PeerLostError, UCXXRolloutMixin
from ucxx_transport.ring.segment import segment_path
from ucxx_transport.trainer import RolloutFeed

_record_factory = logging.getLogRecordFactory()
ray: Any = pytest.importorskip("ray", exc_type=ImportError)
logging.setLogRecordFactory(_record_factory)  # Ray's would add a key to the log events of all other tests

from ucxx_transport.integrations.ray import ActorRollouts  # noqa: E402 - it needs ray

PATH = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])


pytestmark = pytest.mark.may_leave(
    "processes", "threads", "descriptors", reason="the cluster keeps workers and connections until it is shut down"
)


class Rollouts(UCXXRolloutMixin):
    """An actor that plays episodes whose every value follows from their number."""

    def __init__(self, name: str) -> None:
        server = {"host": ray.util.get_node_ip_address(), "ports": 1}
        self.setup_ucxx(name, ring={"slots": 32}, server=server, varlen={"obs": 1000}, reward="reward")
        self._played = 0

    def play(self) -> dict[str, object]:
        number, self._played = self._played, self._played + 1
        steps = 10 + number
        return self.write_to_buffer({"obs": np.full((steps, 4), number, np.float32), "reward": np.ones(1, np.float32)})

    def fail(self) -> None:
        raise ZeroDivisionError


class Trainer:
    """An actor that reads what it is told of."""

    def __init__(self, local: Any) -> None:
        self._feed = RolloutFeed(ClientConfig(local=local), deadline_s=20.0)

    def train(self, records: list[Any]) -> tuple[list[tuple[str, int]], dict[str, int]]:
        """Which episodes were read, each as it was played; and how many were lost, by reason."""
        self._feed.start(records)
        seen = []
        rollouts: list[Any] = self._feed.collect()
        for record in rollouts:
            tree: Any = self._feed.resolve(record)
            assert tree["obs"].shape == (10 + record["sequence"], 4)
            assert (tree["obs"] == record["sequence"]).all()
            seen.append((record["worker_id"], record["sequence"]))
        return seen, dict(self._feed.statistics().losses)

    def close(self) -> None:
        self._feed.close()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of its own, whose files, sockets and logs lie in one folder; nothing of it is left."""
    before = leaks.snapshot()
    # a short name: Ray's sockets lie in it, whose paths have at most 107 bytes
    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        environment.setenv("PYTHONPATH", PATH)  # by which an actor's process finds this module
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_AUTH_MODE", "disabled")  # else a token is made, and kept in the user's home
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
    left = leaks.leaks_since(before, allowed=["descriptors"])  # Ray keeps its connections' as long as its process lives
    assert not left, f"Ray left behind: {left}"


def actor(cls: type, *arguments: object) -> Any:
    return ray.remote(num_cpus=0.5)(cls).remote(*arguments)


def take_for_ever(rollouts: ActorRollouts) -> NoReturn:
    while True:
        rollouts.take(1)


@pytest.mark.parametrize("local", ["view", "off"])
def test_references_go_through_ray_and_payloads_through_us_also_when_an_actor_is_killed(local: str) -> None:
    workers = [actor(Rollouts, f"worker-{number}") for number in range(2)]
    trainer = actor(Trainer, local)
    rollouts = ActorRollouts(workers, lambda worker: worker.play.remote(), timeout_s=60.0)
    seen: list[tuple[str, int]] = []

    def both_are_read() -> bool:
        trained, lost = ray.get(trainer.train.remote(rollouts.take(4)), timeout=60)
        assert lost == {}
        seen.extend(trained)
        return len(seen) >= 12 and len({worker for worker, _ in seen}) == 2

    wait_until(both_are_read, 60.0)
    ray.kill(workers[0])
    wait_until(lambda: rollouts.take(1) and rollouts.statistics().lost_actors == 1, 60.0, what="its death is heard of")
    before = rollouts.take(8)
    trained, lost = ray.get(trainer.train.remote(before), timeout=60)
    of_survivor = [("worker-1", record["sequence"]) for record in before if record["worker_id"] == "worker-1"]
    assert len(of_survivor) >= 6  # the dead one had two rollouts in flight, and may have answered them
    assert [one for one in trained if one[0] == "worker-1"] == of_survivor
    assert len(trained) + sum(lost.values()) == len(before)  # what the dead one left may be read, or be lost
    seen += trained
    assert len(set(seen)) == len(seen)
    counts = rollouts.statistics()
    assert counts.asked == counts.received + counts.lost + 2  # two are always being played
    ray.kill(workers[1])
    with pytest.raises(PeerLostError, match="all rollout actors are dead"):
        take_for_ever(rollouts)
    assert rollouts.statistics().lost_actors == 2
    ray.get(trainer.close.remote(), timeout=60)
    ray.kill(trainer)


def test_an_actor_that_died_is_replaced() -> None:
    def replaced(_: Any) -> Any:
        return actor(Rollouts, "second")

    first = actor(Rollouts, "first")
    with ActorRollouts([first], lambda worker: worker.play.remote(), replace=replaced) as rollouts:
        assert next(rollouts)["worker_id"] == "first"
        ray.kill(first)
        wait_until(lambda: next(rollouts)["worker_id"] == "second", 60.0)


def test_a_job_that_ends_leaves_no_ring_behind() -> None:
    with ActorRollouts([actor(Rollouts, "w"), actor(Rollouts, "v")], lambda worker: worker.play.remote()) as rollouts:
        rings = {record["ref"]["ring_name"] for record in rollouts.take(8)}
        rollouts.stop()
        rings |= {record["ref"]["ring_name"] for record in rollouts}
        assert len(rings) == 2
    assert not any(segment_path(ring).exists() for ring in rings)


@pytest.mark.parametrize("end", ["falls-off", "shut-down", "raises", "plays-on"])
def test_a_job_that_ends_without_close_leaves_no_ring_behind(end: str) -> None:
    with program("ray_job", end, ray.get_runtime_context().gcs_address) as job:
        rings = job.hear()["rings"]
        assert job.wait() == (end == "raises")
    assert len(rings) == 2
    assert [ring for ring in rings if segment_path(ring).exists()] == []


def test_what_a_rollout_raises_is_raised_and_the_actor_goes_on() -> None:
    asked = iter(["fail", "play", "play", "play"])

    def ask(worker: Any) -> Any:
        return getattr(worker, next(asked)).remote()

    with ActorRollouts([actor(Rollouts, "w")], ask, in_flight=1) as rollouts:
        with pytest.raises(ZeroDivisionError):
            next(rollouts)
        assert next(rollouts)["sequence"] == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="actor"):
        ActorRollouts([], lambda worker: worker)
    with pytest.raises(ConfigError, match="in_flight"):
        ActorRollouts([object()], lambda worker: worker, in_flight=0)
