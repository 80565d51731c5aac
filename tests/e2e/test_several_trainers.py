"""Several trainers on one worker: each gets every payload, or each payload goes to one of them; one is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.exhaustive import exhaustive
from tests.support.programs import Program, program
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until

MINUTE = 60

LOCALS = pytest.mark.parametrize("local", ["off", exhaustive("view")])


@contextmanager
def a_worker_and_two_trainers(local: str, **ring: object) -> Iterator[tuple[Program, Program, Program]]:
    with ExitStack() as running:
        worker = running.enter_context(program("rollout_worker", "worker-0", json.dumps(ring)))
        first, second = (running.enter_context(program("trainer", local)) for _ in range(2))
        yield worker, first, second
        worker.ask(cleanup=True)
        assert worker.wait() == 0
        for trainer in (first, second):
            trainer.end_input()
        assert first.wait() == 0


def played(worker: Program, *lengths: int) -> list[Any]:
    return [worker.ask(steps=steps, version=1)["record"] for steps in lengths]


def at_rest(worker: Program) -> dict[str, int] | None:
    """The ring's counts, once no slot is being read."""
    found: dict[str, int] = worker.ask(ring=True)["ring"]
    return found if found["reading"] == 0 else None


def kill(trainer: Program) -> None:
    trainer.signal(signal.SIGKILL)
    assert trainer.wait() == -signal.SIGKILL


@LOCALS
def test_every_rank_gets_every_payload_and_one_that_is_killed_costs_the_others_nothing(local: str) -> None:
    ring = {"slots": 8, "readers": 2, "on_full": "overwrite"}
    with a_worker_and_two_trainers(local, **ring) as (worker, survivor, victim):
        records = played(worker, 10, 200, 30)
        for rank in (survivor, victim):
            assert rank.ask(start=records) == {}
        assert [rank.ask(collect=True)["trained"] for rank in (survivor, victim)] == [[0, 1, 2]] * 2
        records = played(worker, 40, 50)
        for rank in (survivor, victim):
            rank.ask(start=records)
        assert victim.ask(hold=True)["trained"] == [3, 4]
        kill(victim)
        assert survivor.ask(collect=True)["trained"] == [3, 4]
        for sequence in range(5, 17, 2):  # more than the ring has slots: what the dead one never had is overwritten
            survivor.ask(start=played(worker, 100 + sequence, 7))
            assert survivor.ask(collect=True) == {"trained": [sequence, sequence + 1], "lost": {}}
        survivor.ask(start=[])
        survivor.ask(collect=True)  # lets go of the batch before
        found = wait_until(lambda: at_rest(worker), MINUTE, what="no slot is being read")
        assert found is not None
        assert found["overwritten"] > 0
        assert found["freed"] >= 3
        assert found["ready"] + found["overwritten"] + found["freed"] == found["committed"] == 17


@LOCALS
def test_ranks_that_share_a_stream_get_each_payload_once_also_when_one_is_killed(local: str) -> None:
    with a_worker_and_two_trainers(local, slots=8, on_full="raise") as (worker, survivor, victim):
        records = played(worker, 10, 20, 30, 40, 50, 60, 70, 80)
        survivor.ask(start=records[:4])
        victim.ask(start=records[4:])
        assert survivor.ask(collect=True)["trained"] == [0, 1, 2, 3]
        assert victim.ask(hold=True)["trained"] == [4, 5, 6, 7]
        if local != "view":
            wait_until(lambda: at_rest(worker), MINUTE, what="the server knows that all were received")
        kill(victim)
        # the control plane hears of the death and gives the dead rank's records to the other one
        survivor.ask(start=records)
        heard = survivor.ask(collect=True)
        if local == "view":  # the dead rank had not finished with its payloads, which lay in their slots
            assert heard == {"trained": [4, 5, 6, 7], "lost": {"duplicate": 4}}
        else:  # it had received them
            assert heard == {"trained": [], "lost": {"duplicate": 4, "stale": 4}}
        survivor.ask(start=[])
        survivor.ask(collect=True)  # lets go of the batch before
        survivor.ask(start=played(worker, 5, 6, 7, 8, 9, 10, 11, 12))  # all slots can be written again
        assert survivor.ask(collect=True)["trained"] == list(range(8, 16))


def test_a_trainer_killed_while_its_batch_is_on_its_way_leaves_all_of_it_to_the_others() -> None:
    with a_worker_and_two_trainers("off", slots=8, on_full="raise") as (worker, survivor, victim):
        victim.ask(start=played(worker, 900))  # it is connected
        assert victim.ask(collect=True)["trained"] == [0]
        records = played(worker, 100, 200, 300, 400, 500, 600, 700, 800)
        server = worker.ask(server=True)["server"]
        stop_process(server)
        victim.ask(start=records)
        kill(victim)
        os.kill(server, signal.SIGCONT)
        survivor.ask(start=records)
        assert survivor.ask(collect=True) == {"trained": [1, 2, 3, 4, 5, 6, 7, 8], "lost": {}}
        found = wait_until(lambda: at_rest(worker), MINUTE, what="no slot is being read")
        assert found is not None
        assert (found["free"], found["freed"], found["committed"]) == (8, 9, 9)
