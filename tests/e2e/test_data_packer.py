"""A trainer with the data packer's mixin on rollout workers in processes of their own, somebody killed meanwhile."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from tests.e2e.programs.rollout_worker import play
from tests.support.exhaustive import exhaustive
from tests.support.programs import Program, program
from tests.support.rows import row
from tests.support.served_ring import served_ring
from tests.support.waiting import wait_until
from ucxx_transport import AuthenticationError, ClientConfig, UCXXDataPackerMixin
from ucxx_transport.trainer import Loss

RETRYABLE = {"timeout", "unreachable"}


class EpisodePacker:
    """A framework's packer: gives the episode, and checks that it is the one that was asked for."""

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        assert (n_ignore_prefix_tokens, kwargs) == (0, {})
        expected = play(sample)
        np.testing.assert_array_equal(rollout_output["obs"]["image"], expected["obs"]["image"])
        np.testing.assert_array_equal(rollout_output["obs"]["speed"], expected["obs"]["speed"])
        return rollout_output


class Packer(UCXXDataPackerMixin, EpisodePacker):
    def __init__(self) -> None:
        self.lost: list[Loss] = []
        self.trained: Counter[tuple[str, int]] = Counter()

    def on_episode_lost(self, loss: Loss) -> None:
        self.lost.append(loss)

    def train(self, rollouts: list[Any] | None) -> float:
        """A step: something that depends on every byte of the batch."""
        assert rollouts is not None
        total = 0.0
        for rollout in rollouts:
            record = rollout.completion
            tree = self.get_policy_input(record["episode_length"], record)
            total = total * 0.9 + float(tree["obs"]["image"].sum()) + float(tree["obs"]["speed"].sum())
            self.trained[record["worker_id"], record["sequence"]] += 1
        return total


@contextmanager
def packer_of(**settings: Any) -> Iterator[Packer]:
    packer = Packer()
    local = settings.pop("local", "off")
    client = ClientConfig(local=local, connect_timeout_s=1.0, deadline_s=10.0)
    packer.setup_ucxx_data_packer(client=client, **{"deadline_s": 60.0, "max_fetch_rounds": 100, **settings})
    try:
        yield packer
    finally:
        packer.shutdown_ucxx_data_packer()


@contextmanager
def workers(count: int) -> Iterator[list[Program]]:
    with ExitStack() as running:
        yield [running.enter_context(program("rollout_worker", f"worker-{number}")) for number in range(count)]


def played(worker: Program, *lengths: int) -> list[Any]:
    return [SimpleNamespace(completion=worker.ask(steps=steps, version=3)["record"]) for steps in lengths]


@pytest.mark.parametrize("local", ["off", exhaustive("view"), exhaustive("copy")])
def test_steps_are_bit_equal_with_and_without_prefetching(local: str) -> None:
    with workers(2) as (first, second), packer_of(local=local) as ahead, packer_of(local=local) as on_demand:
        batches = [(10, 300), (20, 1), (1000, 7)]
        plain = [on_demand.train(played(first, one) + played(second, other)) for one, other in batches]
        fetched = []
        ahead.start_prefetch(played(first, batches[0][0]) + played(second, batches[0][1]))
        for one, other in [*batches[1:], (5, 5)]:
            rollouts = ahead.collect_prefetch()
            ahead.start_prefetch(played(first, one) + played(second, other))
            fetched.append(ahead.train(rollouts))
        assert fetched == plain
        assert ahead.lost == on_demand.lost == []


def test_killed_worker_costs_a_trainer_that_worker_s_episodes_only() -> None:
    with workers(2) as (victim, other), packer_of(deadline_s=5.0) as packer:
        packer.start_prefetch(played(victim, 10) + played(other, 10))
        packer.train(packer.collect_prefetch())
        rollouts = [*played(victim, 20, 30), *played(other, 40, 50)]
        server = victim.ask(server=True)["server"]
        victim.signal(signal.SIGKILL)
        victim.wait()
        wait_until(lambda: not psutil.pid_exists(server), 60, what="its server has noticed")  # it serves until then
        packer.start_prefetch(rollouts)
        kept = packer.collect_prefetch()
        packer.start_prefetch(played(other, 60, 70))
        assert kept == rollouts[2:]
        packer.train(kept)
        assert [loss.index for loss in packer.lost] == [0, 1]
        assert {loss.reason.value for loss in packer.lost} <= RETRYABLE
        packer.train(packer.collect_prefetch())
        assert packer.get_policy_input(20, rollouts[0].completion) is None  # asked for again, no hang
        assert set(packer.trained.values()) == {1}
        assert len(packer.trained) == 6
        assert packer.ucxx_feed is not None
        assert sum(packer.ucxx_feed.statistics().losses.values()) == 3


@pytest.mark.parametrize("local", ["off", "view"])
def test_what_is_too_old_makes_room_in_a_ring_that_is_full(local: str) -> None:
    with workers(1) as (worker,), packer_of(local=local, max_staleness=1) as packer:
        for _ in range(2):
            packer.start_prefetch(played(worker, 10, 200, 30, 40), policy_version=9)
            assert packer.collect_prefetch() == []
            wait_until(lambda: worker.ask(ring=True)["ring"]["free"] == 4, what="the worker has been told")
        assert {loss.reason.value for loss in packer.lost} == {"too_old"}
        assert len(packer.lost) == 8
        assert worker.ask(ring=True)["ring"]["overwritten"] == 0


def test_a_token_that_differs_stops_the_trainer_with_worker_host_and_remedy() -> None:
    for server, client, remedy in (
        ("right", "wrong", "wrong token; give client and server the same one"),
        ("right", None, r"the server asks for a token; set ClientConfig\(token=…\)"),
        (None, "wrong", r"this client has a token but the server asks for none; set ServerConfig\(token=…\)"),
    ):
        packer = Packer()
        with row(server=server, client=client), served_ring(token=server) as served:
            packer.setup_ucxx_data_packer(client={"local": "off", "token": client})
            try:
                refs = [served.ring.write_raw(bytes(8)) for _ in range(2)]
                packer.start_prefetch(refs)
                words = f"2 of 2 episodes of a batch are lost: worker '{served.ring.name}' at 127.0.0.1: .*{remedy}"
                with pytest.raises(AuthenticationError, match=words):
                    packer.collect_prefetch()
                assert [loss.reason.value for loss in packer.lost] == ["failed"] * 2
                assert packer.prefetch_missing == tuple(packer.lost)
                with pytest.raises(AuthenticationError, match="1 of 1 episodes"):
                    packer.get_policy_input(None, served.ring.write_raw(bytes(8)))
                packer.start_prefetch(["text"])
                assert packer.collect_prefetch() == ["text"]
            finally:
                packer.shutdown_ucxx_data_packer()


def test_killed_server_process_costs_a_trainer_nothing() -> None:
    with workers(1) as (worker,), packer_of() as packer:
        packer.start_prefetch(played(worker, 10))
        for steps in (200, 300, 400):
            rollouts = packer.collect_prefetch()
            upcoming = played(worker, steps, steps + 1)
            os.kill(worker.ask(server=True)["server"], signal.SIGKILL)
            packer.start_prefetch(upcoming)
            packer.train(rollouts)
        packer.train(packer.collect_prefetch())
        assert packer.lost == []
        assert len(packer.trained) == 7
        assert set(packer.trained.values()) == {1}
