from __future__ import annotations

import re
from collections.abc import MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.local_worker import LocalWorker
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, ConfigError, UCXXDataPackerMixin
from ucxx_transport.trainer import Loss, LossReason

LOCAL = ClientConfig(local="view")


class TextPacker:
    """A framework's own packer: says what it was given."""

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        return sample, rollout_output, n_ignore_prefix_tokens, kwargs


class Packer(UCXXDataPackerMixin, TextPacker):
    def __init__(self) -> None:
        self.lost: list[Loss] = []

    def on_episode_lost(self, loss: Loss) -> None:
        self.lost.append(loss)


@pytest.fixture
def packer() -> Any:
    packer = Packer()
    packer.setup_ucxx_data_packer(client=LOCAL)
    yield packer
    packer.shutdown_ucxx_data_packer()
    packer.shutdown_ucxx_data_packer()


@pytest.mark.parametrize("output", [None, "text", {"obs": [1]}, 3])
def test_what_is_not_ours_passes_through_untouched(packer: Packer, output: object) -> None:
    for each in (packer, Packer()):  # set up, and not
        sample = object()
        found = each.get_policy_input(sample, output, 7, extra=1)
        assert found == (sample, output, 7, {"extra": 1})
        assert found[1] is output
    assert packer.get_policy_input() == (None, None, 0, {})


def test_the_packer_is_given_the_episode_in_the_place_of_its_reference(packer: Packer, worker: LocalWorker) -> None:
    cold = [packer.is_cold_start]
    rollouts = [SimpleNamespace(completion=record.to_dict()) for record in worker.play(2)]
    packer.start_prefetch(rollouts)
    wait_until(lambda: packer.is_prefetch_ready)
    assert packer.wait_prefetch()
    packer.defer_prefetch(rollouts)
    buffers = [packer.prefetch_buffer]
    assert packer.collect_prefetch() == rollouts
    cold.append(packer.is_cold_start)
    sample, tree, ignored, extra = packer.get_policy_input("s", rollouts[1].completion, 7, extra=1)
    assert (sample, tree["data"].tobytes(), ignored, extra) == ("s", (1).to_bytes(8, "little"), 7, {"extra": 1})
    (later,) = worker.play(1)
    assert packer.get_policy_input("s", later)[1]["data"].tobytes() == (2).to_bytes(8, "little")
    packer.release_prefetch()
    cold.append(packer.is_cold_start)
    assert cold == [True, False, True]
    buffers.append(packer.prefetch_buffer)
    assert buffers == [rollouts, None]
    assert packer.lost == []


def test_a_lost_episode_is_none_and_the_hook_is_called(packer: Packer, worker: LocalWorker) -> None:
    (record,) = worker.play(1)
    assert record.ref is not None
    worker.ring.discard(record.ref)
    assert packer.get_policy_input("s", record.to_dict()) is None
    assert [(loss.record, loss.reason) for loss in packer.lost] == [(record, LossReason.STALE)]


def test_who_does_not_listen_finds_the_loss_in_the_log(
    worker: LocalWorker, log_events: list[MutableMapping[str, Any]]
) -> None:
    class Deaf(UCXXDataPackerMixin, TextPacker):
        pass

    packer = Deaf()
    packer.setup_ucxx_data_packer(client=LOCAL)
    try:
        (record,) = worker.play(1)
        assert record.ref is not None
        worker.ring.discard(record.ref)
        assert packer.get_policy_input(None, record) is None
        assert packer.get_policy_input(None, {**record.to_dict(), "sequence": -1}) is None
    finally:
        packer.shutdown_ucxx_data_packer()
    logged = [
        (event["reason"], event["worker"], event["sequences"])
        for event in log_events
        if event["event"] == "episodes_lost"
    ]
    assert logged == [("stale", "w", (record.sequence,)), ("malformed", "w", (None,))]


def test_a_packer_tells_what_is_missing_of_the_batch_in_use_and_may_fill_it_up(worker: LocalWorker) -> None:
    packer = Packer()
    packer.setup_ucxx_data_packer(client={"local": "view"}, on_missing="refill")
    try:
        rollouts = [SimpleNamespace(completion=record.to_dict()) for record in worker.play(3)]
        rollouts[0].completion["sequence"] = -1
        packer.start_prefetch(rollouts)
        assert not packer.prefetch_missing
        assert packer.collect_prefetch() == [rollouts[1], rollouts[1], rollouts[2]]
        assert [(loss.index, loss.reason) for loss in packer.prefetch_missing] == [(0, LossReason.MALFORMED)]
        assert tuple(packer.lost) == packer.prefetch_missing
    finally:
        packer.shutdown_ucxx_data_packer()


def test_a_subclass_says_where_its_rollouts_keep_their_output(worker: LocalWorker) -> None:
    class Elsewhere(Packer):
        def rollout_output_of(self, rollout: Any) -> object:
            return rollout["out"]

    packer = Elsewhere()
    packer.setup_ucxx_data_packer(client=LOCAL)
    try:
        packer.start_prefetch([{"out": record} for record in worker.play(1)])
        (rollout,) = packer.collect_prefetch()
        assert packer.get_policy_input(None, rollout["out"])[1]["data"].nbytes == 8
    finally:
        packer.shutdown_ucxx_data_packer()


def test_a_wrong_set_up_is_refused_with_the_remedy(packer: Packer, worker: LocalWorker) -> None:
    with pytest.raises(ConfigError, match="set up already"):
        packer.setup_ucxx_data_packer()

    class Backwards(TextPacker, UCXXDataPackerMixin):
        pass

    class Alone(UCXXDataPackerMixin):
        pass

    for wrong in (Backwards(), Alone()):
        with pytest.raises(ConfigError, match=r"class Packer\(UCXXDataPackerMixin, YourDataPacker\)"):
            wrong.setup_ucxx_data_packer()
    for settings, message in (
        ({"device": "tpu"}, "device must be"),
        ({"max_staleness": -1}, "max_staleness"),
        (
            {"unreachable_batches": 0},
            "unreachable_batches must be a whole number, at least 1, or None for never, not 0",
        ),
        ({"on_missing": "refil"}, "on_missing must be 'shrink', 'refill' or a function, not 'refil'"),
        ({"deadline": 10}, "Unknown setting of RolloutFeed 'deadline'; did you mean 'deadline_s'?"),
        ({"client": {"locl": "view"}}, "Unknown setting of ClientConfig 'locl'; did you mean 'local'?"),
        ({"on_loss": print}, "on_loss is no setting of a packer; override on_episode_lost"),
        ({"output_of": print}, "output_of is no setting of a packer; override rollout_output_of"),
    ):
        with row(settings=settings), pytest.raises(ConfigError, match=re.escape(message)):
            Packer().setup_ucxx_data_packer(**settings)
    fresh = Packer()
    (record,) = worker.play(1)
    for call in (lambda: fresh.start_prefetch([]), lambda: fresh.get_policy_input(None, record), fresh.wait_prefetch):
        with pytest.raises(ConfigError, match=r"call setup_ucxx_data_packer\(\) first"):
            call()
