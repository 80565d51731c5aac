"""Rollout workers with the mixin, in processes of their own, read over UCX and in place."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.programs.rollout_worker import MAX_STEPS, play
from tests.support.exhaustive import exhaustive
from tests.support.programs import Program, program
from tests.support.rows import row
from tests.support.served_ring import client_of
from tests.support.waiting import wait_until
from ucxx_transport import (
    ConfigError,
    PeerLostError,
    SlotRef,
    StaleSlotError,
    SyncUCXXClient,
    TrajectoryWriter,
    UCXXRolloutMixin,
)
from ucxx_transport.ring.segment import NAME_PREFIX, segment_folder, segment_path
from ucxx_transport.schema.episode_record import EpisodeRecord

MINUTE = 60


def episode_of(worker: Program, steps: int) -> EpisodeRecord:
    return EpisodeRecord.from_dict(worker.ask(steps=steps, version=3)["record"])


def read_as_played(client: SyncUCXXClient, record: EpisodeRecord) -> str:
    assert record.ref is not None
    assert record.episode_length is not None
    expected = play(record.episode_length)
    with client.read(record.ref) as payload:
        np.testing.assert_array_equal(payload.arrays["obs"]["image"], expected["obs"]["image"])
        np.testing.assert_array_equal(payload.arrays["obs"]["speed"], expected["obs"]["speed"])
        return payload.transport


def segments_of(ref: SlotRef | None) -> list[Path]:
    assert ref is not None
    return [path for path in [segment_path(ref.ring_name)] if path.exists()]


@pytest.mark.parametrize("local", ["off", exhaustive("view")])
def test_trainer_reads_what_workers_played(local: str) -> None:
    with (
        program("rollout_worker", "worker-0") as first,
        program("rollout_worker", "worker-1") as second,
        client_of(local=local) as client,
    ):
        refs = []
        for steps in (1, 200, MAX_STEPS):
            for worker, name in ((first, "worker-0"), (second, "worker-1")):
                record = episode_of(worker, steps)
                assert (record.worker_id, record.episode_length, record.policy_version) == (name, steps, 3)
                assert record.rewards is not None
                assert record.rewards.total == steps
                assert read_as_played(client, record) == ("ucx" if local == "off" else "view")
                refs.append(record.ref)
        for worker in (first, second):
            statistics = worker.ask(cleanup=True)["statistics"]
            assert (statistics["written"], statistics["dropped"]) == (3, {})
            assert worker.wait() == 0
        assert not any(segments_of(ref) for ref in refs)


def test_episode_without_room_is_a_record_with_the_reason() -> None:
    with program("rollout_worker", "worker-0") as worker, client_of() as client:
        records = [episode_of(worker, 10) for _ in range(6)]
        assert [record.sequence for record in records] == list(range(6))
        assert [record.ref is None for record in records] == [False] * 4 + [True] * 2
        assert str(records[5].dropped).startswith("RingFullError")
        for record in records[:4]:
            read_as_played(client, record)
        assert worker.ask(cleanup=True)["statistics"]["dropped"] == {"RingFullError": 2}
        assert worker.wait() == 0


def test_killed_worker_leaves_nothing_and_the_other_goes_on() -> None:
    with (
        program("rollout_worker", "worker-0") as victim,
        program("rollout_worker", "worker-1") as other,
        client_of(connect_timeout_s=1.0) as client,
    ):
        lost, kept = episode_of(victim, 50), episode_of(other, 60)
        victim.signal(signal.SIGKILL)
        victim.wait()
        wait_until(lambda: not segments_of(lost.ref), MINUTE, what="the victim's segment goes")
        assert lost.ref is not None
        with pytest.raises((PeerLostError, StaleSlotError, TimeoutError)):
            client.read(lost.ref, deadline_s=2.0)
        assert read_as_played(client, kept) == "ucx"
        other.end_input()  # and no cleanup: a program's end does it
        assert other.wait() == 0


def test_what_ucx_alone_can_judge_is_refused_where_the_worker_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: tuple[tuple[dict[str, str], dict[str, str], str], ...] = (
        ({}, {"TLS": "nosuch"}, "UCX does not start with these settings .*'TLS': 'nosuch'"),
        ({"UCX_TLS": "self"}, {}, "UCX_TLS=self .environment. leaves UCX no network transport"),
    )
    for environment, ucx, said in rows:
        with row(environment=environment, ucx=ucx), monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            worker = UCXXRolloutMixin()
            with pytest.raises(ConfigError, match=said):
                worker.setup_ucxx("w", varlen=9, server={"host": "127.0.0.1", "ucx": ucx})
            assert worker.ucxx_writer is None
            assert not [*segment_folder().glob(f"{NAME_PREFIX}*")]
            worker.setup_ucxx("w", varlen=9, serve=False)
            worker.cleanup_ucxx()


def test_ports_that_are_threads_need_no_interpreter_to_start_processes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an application that embeds Python; whatever is set of UCX."""
    monkeypatch.setenv("UCX_LOG_LEVEL", "fatal")
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", None)
    monkeypatch.setattr(sys, "executable", "")
    server = {"host": "127.0.0.1", "ports": 1}
    with pytest.raises(ConfigError, match="no Python interpreter"):
        TrajectoryWriter("w", server=server)
    with TrajectoryWriter("w", server={**server, "mode": "thread"}) as writer:
        assert writer.write({"obs": [1.0]}).ref is not None
        assert writer.server is not None
        assert len(writer.server.ports) == 1


def test_a_program_may_fork_after_it_has_set_up_a_worker_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set of UCX: it is tried elsewhere, since none survives a fork."""
    monkeypatch.setenv("UCX_LOG_LEVEL", "fatal")
    program_text = """
import os
from ucxx_transport import TrajectoryWriter
server = {"host": "127.0.0.1", "ports": 1, "mode": "thread"}
writer = TrajectoryWriter("parent", server=server)
child = os.fork()
if child == 0:
    with TrajectoryWriter("child", server=server) as own:
        os._exit(0 if own.write({"obs": [1.0]}).ref is not None else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bool(writer.write({"obs": [1.0]}).ref))
writer.close()
"""
    done = subprocess.run([sys.executable, "-c", program_text], capture_output=True, text=True, check=False)
    assert done.stdout == "0 True\n", done.stderr
