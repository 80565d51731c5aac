"""Processes that end without a word: nothing hangs, nothing is left, nobody else is hurt."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.support.programs import program
from tests.support.served_ring import client_of, served_ring
from tests.support.waiting import wait_until
from ucxx_transport import SlotRef, SlotState
from ucxx_transport.ring.segment import segment_path


def segment_exists(name: str) -> bool:
    return segment_path(name).exists()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_worker_that_forgets_to_stop_ends_well_and_takes_everything_along(mode: str) -> None:
    with program("forgetful", f"worker-{mode}") as worker:
        facts = worker.hear()
        with client_of() as client, client.read(SlotRef.from_bytes(bytes.fromhex(facts["ref"]))) as payload:
            assert bytes(payload.buffer) == bytes(1000)
            worker.end_input()
            assert worker.wait() == 0
        assert not segment_exists(facts["ring"])
        if mode == "process":
            wait_until(lambda: all(map(gone, facts["servers"])), 60)


@pytest.mark.parametrize("kind", ["sync", "async", "feed"])
def test_trainer_that_forgets_to_close_ends_well_and_its_payload_counts(kind: str) -> None:
    with served_ring() as served:
        ref = served.ring.write_raw(bytes(500))
        with program("forgetful", f"trainer-{kind}") as trainer:
            assert trainer.ask(ref=ref.to_bytes().hex()) == {"nbytes": 500}
            assert trainer.wait() == 0
        wait_until(lambda: served.ring.slot_state(ref.slot) is SlotState.FREE, 60)
        wait_until(lambda: served.server.statistics().total("connections") == 0, 60)


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_ctrl_c_ends_a_worker_and_its_server(mode: str) -> None:
    with program("forgetful", f"worker-{mode}") as worker:
        facts = worker.hear()
        os.killpg(worker.pid, signal.SIGINT)
        assert worker.wait() == -signal.SIGINT
        wait_until(lambda: not segment_exists(facts["ring"]), 60)
        if mode == "process":
            wait_until(lambda: all(map(gone, facts["servers"])), 60)
