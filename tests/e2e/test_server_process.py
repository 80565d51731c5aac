"""Ports as processes of their own: a port's death, its worker's, and what a stopped or busy one does to others."""

from __future__ import annotations

import multiprocessing.spawn
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.programs import content
from tests.support.exhaustive import exhaustive
from tests.support.programs import Program, program
from tests.support.raw_peer import raw_peer
from tests.support.served_ring import ServedRing, client_of, open_ring, read_retrying, served_ring
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport import (
    DeadlineExceededError,
    Payload,
    PeerLostError,
    SharedRingBuffer,
    SlotRef,
    SlotState,
    SyncUCXXClient,
)
from ucxx_transport.ring.handle import process_name
from ucxx_transport.ring.segment import segment_path
from ucxx_transport.wire.frames import Kind, Status

MINUTE = 60


def write(ring: SharedRingBuffer, sequence: int, nbytes: int = 1000) -> SlotRef:
    return ring.write_raw(content.make(2, sequence, nbytes), meta={"sequence": sequence})


def holds(payload: Payload, sequence: int) -> bool:
    return content.mismatch(payload.arrays["data"], 2, sequence) == ""


def pid_of_server(served: ServedRing) -> int:
    pid = wait_until(lambda: served.server.statistics().pids[0], MINUTE, what="a server process")
    assert pid is not None
    return pid


def received(served: ServedRing) -> int:
    """Payloads that arrived: acknowledged, or confirmed to the next process where the acknowledgement died with one."""
    now = served.server.statistics()
    return now.total("delivered") + now.total("confirms")


def kill_server(served: ServedRing, number: signal.Signals = signal.SIGKILL) -> int:
    pid = pid_of_server(served)
    os.kill(pid, number)
    return pid


def wait_for_replacement(served: ServedRing, dead: int) -> None:
    wait_until(lambda: served.server.statistics().pids[0] not in {None, dead}, MINUTE, what="another server process")


def test_a_ring_whose_name_was_removed_is_served_read_and_served_again_after_a_death() -> None:
    with served_ring() as served, client_of(local="auto") as client:
        segment_path(served.ring.name).unlink()
        for sequence in range(2):
            with read_retrying(client, write(served.ring, sequence)) as payload:
                assert holds(payload, sequence)
                assert payload.transport == "ucx"
            if sequence == 0:
                wait_for_replacement(served, kill_server(served))
        assert client.statistics().fallbacks >= 1


@pytest.mark.parametrize("number", [signal.SIGKILL, exhaustive(signal.SIGABRT), exhaustive(signal.SIGSEGV)])
def test_dead_server_is_replaced_on_its_ports_and_clients_go_on(
    number: signal.Signals, log_events: list[MutableMapping[str, Any]], record_property: Callable[[str, object], None]
) -> None:
    with served_ring() as served, client_of(connect_timeout_s=1.0) as client:
        ports = served.server.ports
        with client.read(write(served.ring, 0)) as payload:
            assert holds(payload, 0)
        wait_until(lambda: served.server.statistics().total("delivered") == 1, MINUTE)
        refs = [write(served.ring, sequence) for sequence in range(1, 4)]
        began = time.monotonic()
        dead = kill_server(served, number)
        for sequence, ref in enumerate(refs, start=1):
            with read_retrying(client, ref) as payload:
                assert holds(payload, sequence)
            if sequence == 1:
                record_property("seconds_to_next_payload", round(time.monotonic() - began, 2))
        wait_for_replacement(served, dead)
        now = served.server.statistics()
        assert (now.restarts, served.server.ports, served.ring.address()) == (1, ports, ("127.0.0.1", ports))
        wait_until(lambda: received(served) == 4, MINUTE)  # counts outlive the process
        deaths = [event for event in log_events if event["event"] == "sidecar_died"]
        assert [(event["reason"], event["restarts"]) for event in deaths] == [(number.name, 1)]


def test_the_port_of_a_dead_process_is_given_to_no_other_program() -> None:
    with served_ring() as served, client_of() as client:
        (port,) = served.server.ports
        kill_server(served)
        while served.server.statistics().restarts == 0 or not served.server.is_healthy(MINUTE):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("", port))
        with read_retrying(client, write(served.ring, 0)) as payload:
            assert holds(payload, 0)
        assert (served.server.statistics().restarts, served.server.ports) == (1, (port,))
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that have ended
        other.bind(("", port))


def test_one_port_is_killed_and_the_other_answers_without_a_gap(record_property: Callable[[str, object], None]) -> None:
    with served_ring(ring={"slots": 64}, ports=2) as served:
        ports, pids = served.server.ports, served.server.statistics().pids
        assert len({os.getpid(), *pids}) == 3
        assert [process_name(pid) for pid in pids if pid] == [f"the ring's server, pid {pid}" for pid in pids]
        with client_of(connect_timeout_s=1.0, port_quarantine_s=0.0) as client:
            for sequence in range(4):  # both ports have a connection by now
                client.read(write(served.ring, sequence)).release()
            os.kill(pids[0] or 0, signal.SIGKILL)
            longest_s, sequence = 0.0, 4
            while served.server.statistics().pids[0] in {None, pids[0]}:
                began_s = time.monotonic()
                with client.read(write(served.ring, sequence)) as payload:  # no retry of ours: the client rotates
                    assert holds(payload, sequence)
                longest_s, sequence = max(longest_s, time.monotonic() - began_s), sequence + 1
            record_property("longest_read_s", round(longest_s, 3))
        now = served.server.statistics()
        assert (now.restarts, now.pids[1], served.server.ports, served.ring.address()[1]) == (1, pids[1], ports, ports)


def test_a_port_whose_loop_does_not_turn_is_replaced_like_a_dead_one(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    with served_ring(stall_timeout_s=1.0) as served, client_of(connect_timeout_s=1.0) as client:
        ports, stalled = served.server.ports, pid_of_server(served)
        stop_process(stalled)
        wait_for_replacement(served, stalled)
        with read_retrying(client, write(served.ring, 0)) as payload:
            assert holds(payload, 0)
        assert (served.server.ports, served.server.statistics().restarts) == (ports, 1)
        assert [event["pid"] for event in log_events if event["event"] == "sidecar_stalled"] == [stalled]


def test_a_port_that_had_to_be_killed_is_not_counted_as_listening() -> None:
    with served_ring(ports=1, stop_timeout_s=0.2) as served, raw_peer(served.server.ports[0]) as peer:
        peer.greet()
        assert served.server.statistics().total("connections") == 1
        stop_process(pid_of_server(served))
        served.server.stop()
        now = served.server.statistics()
        assert (now.total("port"), now.total("connections"), now.total("accepted")) == (0, 0, 1)


STARTER = """\
#!/bin/sh
echo "$$" >> {begun}
while [ "$(wc -l < {begun})" -lt {count} ]; do sleep 0.02; done
exec {python} "$@"
"""
"""An interpreter that starts once so many of it have begun."""


def test_ports_come_up_and_end_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starter, count = tmp_path / "python", 4
    starter.write_text(STARTER.format(begun=tmp_path / "begun", count=count, python=sys.executable))
    starter.chmod(0o755)
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", None)
    multiprocessing.set_executable(str(starter))
    with served_ring(ports=count) as served:
        pids = served.server.statistics().pids
        assert len(set(served.server.ports)) == len(set(pids)) == count
        assert set(map(str, pids)) == set((tmp_path / "begun").read_text().split())
    assert not any(psutil.pid_exists(pid or 0) for pid in pids)


def test_a_port_s_process_takes_little_memory(record_property: Callable[[str, object], None]) -> None:
    with served_ring() as served, client_of() as client:
        client.read(write(served.ring, 0)).release()
        rollup = Path(f"/proc/{pid_of_server(served)}/smaps_rollup").read_text(encoding="ascii")
    # the ring is its worker's, and libraries are one file for all
    parts = [int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Private_")]
    record_property("own_megabytes", round(sum(parts) / 1e6, 1))
    assert sum(parts) <= 30e6


def test_server_process_is_told_the_folder_of_its_ring(tmp_path: Path) -> None:
    with served_ring(ring={"folder": str(tmp_path)}) as served, client_of(local="auto") as client:
        assert served.ring.folder == tmp_path
        with client.read(write(served.ring, 0)) as payload:
            assert holds(payload, 0)
            assert payload.transport == "ucx"  # this process looks for rings elsewhere


def test_slot_that_a_dead_server_was_sending_is_readable_again() -> None:
    with served_ring() as served:
        ref = write(served.ring, 0, 200_000)

        with raw_peer(served.server.ports[0], served.ring.ring_id) as peer:
            peer.greet()
            (answer,) = peer.fetch(ref)
            assert answer.header.nbytes == ref.nbytes
            assert served.ring.slot_state(ref.slot) is SlotState.READING
            kill_server(served)
            wait_until(lambda: served.ring.slot_state(ref.slot) is SlotState.READY, MINUTE)
        wait_until(lambda: served.ring.statistics().reclaimed_reads == 1, MINUTE)  # the state changes first
        with client_of(connect_timeout_s=1.0) as client, read_retrying(client, ref) as payload:
            assert holds(payload, 0)


def test_payload_whose_delivery_was_heard_goes_to_no_other_though_its_port_dies_before_the_message_has_left() -> None:
    """The answer to a later frame proves to the client that it was heard, so it confirms nothing to the next one."""
    with served_ring(ring={"slot_bytes": 64 << 20}) as served:
        ref = write(served.ring, 0, 64 << 20)
        with raw_peer(served.server.ports[0], served.ring.ring_id) as peer:
            peer.greet()
            (name,) = peer.names([ref])
            peer.say(peer.frame(Kind.FETCH, ring_id=served.ring.ring_id, names=(name,)))  # no receive is posted for it
            peer.say(peer.frame(Kind.FETCH, ends=(name[3] << 1 | 1,)))
            assert peer.ask(Kind.DESCRIBE, ring_id=served.ring.ring_id).status is Status.OK
            assert served.ring.slot_state(ref.slot) is SlotState.READING, "the message has not left"
            kill_server(served)
            wait_until(lambda: served.ring.slot_state(ref.slot) is not SlotState.READING, MINUTE)
        assert served.ring.slot_state(ref.slot) is SlotState.FREE


@pytest.mark.exhaustive
def test_server_dies_again_and_again_and_every_payload_arrives_once() -> None:
    with served_ring(ring={"on_full": "raise"}) as served, client_of(connect_timeout_s=1.0) as client:
        for sequence in range(4):
            ref = write(served.ring, sequence)
            dead = kill_server(served)
            with read_retrying(client, ref) as payload:
                assert holds(payload, sequence)
            wait_for_replacement(served, dead)
        assert served.server.statistics().restarts == 4
        assert client.statistics().reads == 4
        # With its next read the client confirms again what a dying server may not have received.
        with read_retrying(client, write(served.ring, 9)) as payload:
            assert holds(payload, 9)
        wait_until(lambda: served.ring.slot_states().count(SlotState.FREE) == served.ring.slots, MINUTE)


def test_stopped_server_costs_a_read_its_deadline_and_nothing_else() -> None:
    with (
        served_ring(stall_timeout_s=600.0) as served,
        client_of(connect_timeout_s=0.5) as client,
        client_of(connect_timeout_s=0.5) as other,
    ):
        with client.read(write(served.ring, 0)) as payload:  # a connection to find stopped
            assert holds(payload, 0)
        refs = [write(served.ring, sequence) for sequence in (1, 2)]
        pid = pid_of_server(served)
        stop_process(pid)
        try:
            for reader, ref in zip((client, other), refs, strict=True):
                with pytest.raises((DeadlineExceededError, PeerLostError)):
                    reader.read(ref, deadline_s=1.5)
        finally:
            os.kill(pid, signal.SIGCONT)
        for reader, ref, sequence in zip((client, other), refs, (1, 2), strict=True):
            with read_retrying(reader, ref) as payload:
                assert holds(payload, sequence)
        wait_until(lambda: not {SlotState.READING, SlotState.WRITING} & set(served.ring.slot_states()), MINUTE)
        assert (pid_of_server(served), served.server.statistics().restarts) == (pid, 0)
        assert client.statistics().lent_buffers == 0


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def started_worker(worker: Program) -> tuple[str, list[int], SlotRef]:
    facts = worker.hear()
    return facts["ring"], facts["servers"], SlotRef.from_bytes(bytes.fromhex(facts["ref"]))


@pytest.mark.parametrize("number", [signal.SIGKILL, exhaustive(signal.SIGTERM)])
def test_dead_worker_takes_server_ports_and_segment_along(number: signal.Signals) -> None:
    with program("forgetful", "worker-process") as worker, client_of(connect_timeout_s=1.0) as client:
        ring, servers, ref = started_worker(worker)
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == bytes(1000)
        worker.signal(number)
        assert worker.wait() == -number
        wait_until(lambda: not any(map(psutil.pid_exists, servers)), MINUTE, what="the ports' processes end")
        assert not segment_path(ring).exists()
        assert not any(is_listening(port) for port in ref.ports)
        with pytest.raises((PeerLostError, DeadlineExceededError)):
            client.read(SlotRef.from_dict({**ref.to_dict(), "generation": 2}), deadline_s=2.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, exhaustive(signal.SIGTERM), exhaustive(signal.SIGINT)])
def test_signal_to_the_worker_s_whole_group_leaves_nothing(number: signal.Signals) -> None:
    """As `timeout`, a shell's `kill -- -PGID`, and launchers of training jobs send it."""
    with program("forgetful", "worker-process") as worker:
        ring, servers, ref = started_worker(worker)
        os.killpg(worker.pid, number)
        worker.wait()
        wait_until(lambda: not any(map(psutil.pid_exists, servers)), MINUTE, what="the ports' processes end")
        assert not segment_path(ring).exists()
        assert not any(is_listening(port) for port in ref.ports)


@pytest.mark.parametrize("number", [signal.SIGTERM, exhaustive(signal.SIGINT), exhaustive(signal.SIGHUP)])
def test_server_serves_as_long_as_its_worker_whatever_signal_asks_it_to_end(number: signal.Signals) -> None:
    """Slurm sends SIGTERM to every process of a job; the worker may still have payloads to hand out."""
    with served_ring() as served, client_of() as client:
        pid = kill_server(served, number)
        with client.read(write(served.ring, 0)) as payload:
            assert holds(payload, 0)
        assert (pid_of_server(served), served.server.statistics().restarts) == (pid, 0)


def test_server_of_a_worker_that_takes_long_to_die_still_sweeps() -> None:
    """Descriptors close before a process is gone: unmapping a large ring takes a while."""
    with program("long_dying_worker") as worker:
        facts = worker.hear()
        assert is_listening(facts["port"]), "what it has written is served until it is dead"
        assert segment_path(facts["ring"]).exists()
        worker.signal(signal.SIGKILL)
        worker.wait()
        wait_until(lambda: not psutil.pid_exists(facts["server"]), MINUTE, what="the server process ends")
        assert not segment_path(facts["ring"]).exists()


def test_segment_that_nobody_could_sweep_goes_with_the_next_creation() -> None:
    with program("forgetful", "worker-process") as worker:
        ring, servers, _ = started_worker(worker)
        for server in servers:
            stop_process(server)
        worker.signal(signal.SIGKILL)
        worker.wait()
        for server in servers:
            os.kill(server, signal.SIGKILL)
        wait_until(lambda: not any(map(psutil.pid_exists, servers)), MINUTE)
        with open_ring():  # or another process's creation on this host, before this one
            assert not segment_path(ring).exists()


def read_both_ways(client: SyncUCXXClient, local: SyncUCXXClient, refs: list[SlotRef]) -> list[int]:
    return [reader.read(ref).nbytes for ref, reader in zip(refs, (client, local), strict=True)]


def test_worker_that_holds_the_interpreter_lock_is_served_for() -> None:
    with program("busy_worker") as worker, client_of() as client, client_of(local="view") as local:
        refs = [SlotRef.from_bytes(bytes.fromhex(text)) for text in worker.hear()["refs"]]
        # From here on the worker's only Python thread sits in a C call with the lock, until it gets a byte.
        assert read_both_ways(client, local, refs) == [1000, 1000]
        worker.tell(go="on")
        assert worker.hear() == {"states": ["FREE", "FREE"]}
        assert worker.wait() == 0
