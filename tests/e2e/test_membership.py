"""Workers that come, go, hang and come back, as a trainer's watcher sees them: real processes, stores and UCX.

On one store in the gate, and on the other where there is time: the conformance suite proves the two equal. What
`tests/unit/membership` shows in one process is repeated here only where there is time.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.exhaustive import exhaustive
from tests.support.fake_source import FakeSource
from tests.support.programs import Program, program
from tests.support.sidecars import sidecars_of
from tests.support.stopping import stop_process
from tests.support.store_rigs import StoreRig
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    HeartbeatPublisher,
    PeerLostError,
    PublisherConfig,
    SlotRef,
    SourceWatcher,
    StaleSlotError,
    SyncUCXXClient,
)
from ucxx_transport.membership import ReplicaMonitor, SourceRecord, SourceStatus, Store
from ucxx_transport.ring.segment import sweep_orphans
from ucxx_transport.teardown import Teardown

MINUTE = 60
INTERVAL_S = 1.0  # on a busy machine a renewal may be two seconds late
TTL_S = 3 * INTERVAL_S
OUTLIVED_S = 1.5 * TTL_S
"""In which a lease that is not renewed ends."""

FAST = {"interval_s": INTERVAL_S, "backoff_s": 0.02, "max_backoff_s": 0.2}
OVER_UCX = ClientConfig(local="off", connect_timeout_s=1.0)


@pytest.fixture
def host(own_rig: StoreRig, monkeypatch: pytest.MonkeyPatch) -> StoreRig:
    """The store of the test, which the worker processes reach by their environment."""
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__NAMESPACE", str(own_rig.settings["namespace"]))
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__TIMEOUT_S", "0.5")  # what their calls wait for at most
    own_rig.open().snapshot()  # the first call makes the file
    return own_rig


@pytest.fixture
def store(host: StoreRig) -> Store:
    return host.open()


class Heard:
    """What a watcher reports, in order."""

    def __init__(self, store: Store) -> None:
        self.changes: list[tuple[str, str, int, SourceStatus]] = []
        self.moments_s: list[float] = []
        self._lock = threading.Lock()
        self.watcher = SourceWatcher(
            store,
            on_add=lambda record: self._note("add", record),
            on_update=lambda record: self._note("update", record),
            on_remove=lambda record: self._note("remove", record),
        )

    def _note(self, kind: str, record: SourceRecord) -> None:
        with self._lock:
            self.changes.append((kind, record.worker_id, record.epoch, record.status))
            self.moments_s.append(time.monotonic())

    def of(self, kind: str) -> list[tuple[str, int]]:
        with self._lock:
            return [(worker, epoch) for what, worker, epoch, _ in self.changes if what == kind]

    def statuses(self, epoch: int) -> list[SourceStatus]:
        with self._lock:
            return [status for _, _, of, status in self.changes if of == epoch]

    def moment_of_removal(self) -> float:
        with self._lock:
            return next(at for change, at in zip(self.changes, self.moments_s, strict=True) if change[0] == "remove")


@pytest.fixture
def heard(store: Store) -> Iterator[Heard]:
    seen = Heard(store)
    with seen.watcher:
        yield seen


@contextmanager
def worker(host: StoreRig, worker_id: str = "w", *, serve: str = "unserved", **settings: object) -> Iterator[Program]:
    with program("source_worker", host.url, worker_id, serve, json.dumps({**FAST, **settings})) as running:
        assert running.hear() == {"ready": True}
        yield running
    sweep_orphans()  # of one that was killed: without a server beside it no other process does


def ended(running: Program) -> None:
    running.end_input()
    assert running.wait() == 0


def ref_of(answer: dict[str, object]) -> SlotRef:
    return SlotRef.from_dict(answer["ref"])


@pytest.mark.parametrize("own_rig", ["local", "etcd"], indirect=True)
def test_a_worker_is_seen_with_where_it_serves_and_goes_when_it_stops(host: StoreRig, heard: Heard) -> None:
    with worker(host, "a/b ü", serve="0") as running:
        assert running.ask(published=MINUTE) == {"epoch": 1}
        (source,) = heard.watcher.wait_for(1, MINUTE)
        assert (source.worker_id, source.host, list(source.ports)) == (
            "a/b ü",
            "127.0.0.1",
            running.ask(look=True)["ports"],
        )
        assert source.status is SourceStatus.READY
        assert len(sidecars_of(running.pid)) == 1, "the process that serves renews the lease, too"
        ref = ref_of(running.ask(write="hello"))
        assert ref.ring_id == source.ring_id
        with SyncUCXXClient(OVER_UCX, watcher=heard.watcher) as client:
            assert bytes(client.read(ref, deadline_s=MINUTE).buffer) == b"hello"
        ended(running)
    wait_until(lambda: heard.of("remove") == [("a/b ü", 1)], MINUTE, what="the source is gone")
    assert heard.statuses(1)[-1] is SourceStatus.STALE  # as it was known when it went
    assert heard.watcher.sources(status=None) == ()


@pytest.mark.parametrize("serve", ["0", exhaustive("unserved")])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_is_gone_long_before_its_lease_would_have_been(
    host: StoreRig, heard: Heard, end: signal.Signals, serve: str
) -> None:
    with worker(host, serve=serve, interval_s=MINUTE) as running:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        wait_until(lambda: keeper_keeps(running), MINUTE, what="the sidecar renews")
        running.signal(end)
        assert running.wait() == (-end if end is signal.SIGKILL else 128 + end)
        wait_until(lambda: heard.of("remove") == [("w", 1)], MINUTE, what="the source is gone")
    if end is signal.SIGTERM:
        assert heard.statuses(1)[-1] is SourceStatus.STALE


def test_a_worker_killed_with_all_its_group_is_gone_when_its_lease_is_over(host: StoreRig, heard: Heard) -> None:
    with worker(host, keeper="thread") as running:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        running.signal(signal.SIGKILL)
        running.wait()
        wait_until(lambda: heard.of("remove") == [("w", 1)], MINUTE, what="the source is gone")


def test_a_read_in_the_bind_window_is_not_ready_and_is_served_after_it(host: StoreRig) -> None:
    host.stall()
    with worker(host, serve="0") as running, SyncUCXXClient(OVER_UCX) as client:
        ref = ref_of(running.ask(write="early"))
        assert running.ask(look=True)["state"] == "publishing"
        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(client.read, ref, deadline_s=MINUTE)
            wait_until(lambda: client.statistics().not_ready > 1, MINUTE, what="it is answered NOT_READY")
            assert not reading.done()
            host.resume()
            assert running.ask(published=MINUTE) == {"epoch": 1}
            assert bytes(reading.result(MINUTE).buffer) == b"early"
        ended(running)


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_store_that_comes_up_after_the_time_to_publish_is_published_to(host: StoreRig) -> None:
    host.stall()
    with worker(host, publish_timeout_s=0.1) as running:
        wait_until(lambda: running.ask(look=True)["statistics"]["attempts"] > 2, MINUTE, what="it tries on and on")
        assert running.ask(published=0.01) == {"error": "DeadlineExceededError"}
        host.resume()
        assert running.ask(published=MINUTE) == {"epoch": 1}
        ended(running)


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_worker_that_is_not_to_retry_fails_with_the_store_s_answer(host: StoreRig) -> None:
    host.stall()
    with worker(host, publish_timeout_s=0.1, on_timeout="stop") as running:
        assert running.ask(published=MINUTE) == {"error": "StoreUnavailableError"}
        looked = running.ask(look=True)
        assert looked["state"] == "failed"
        host.resume()
        assert running.ask(look=True)["statistics"] == looked["statistics"]  # it does not try again
        ended(running)


@pytest.mark.parametrize("outage_s", [exhaustive(TTL_S / 3), OUTLIVED_S])
def test_a_trainer_reads_on_while_the_store_is_away(host: StoreRig, heard: Heard, outage_s: float) -> None:
    with worker(host, serve="0") as running, SyncUCXXClient(OVER_UCX, watcher=heard.watcher) as client:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        host.stall()
        until_s = time.monotonic() + outage_s
        reads = 0
        while time.monotonic() < until_s:
            text = f"episode {reads}"
            assert bytes(client.read(ref_of(running.ask(write=text)), deadline_s=MINUTE).buffer) == text.encode()
            reads += 1
        assert heard.of("remove") == []
        host.resume()
        wait_until(lambda: is_settled(running, heard), MINUTE, what="worker and watcher agree again")
        # a lease that was lost meanwhile is a new epoch: what is written just then may be lost with the old one
        wait_until(lambda: reads_one(client, running), MINUTE, what="it reads on")
        assert running.ask(look=True)["epoch"] <= 2
        ended(running)


def is_settled(running: Program, heard: Heard) -> bool:
    """Whether the watcher knows the worker by the epoch that it has."""
    looked = running.ask(look=True)
    epochs = [source.epoch for source in heard.watcher.sources()]
    return looked["state"] == "live" and epochs == [looked["epoch"]] and heard.watcher.statistics().synced


def reads_one(client: SyncUCXXClient, running: Program) -> bool:
    """Whether a payload written now can be read."""
    try:
        return bytes(client.read(ref_of(running.ask(write="after")), deadline_s=MINUTE).buffer) == b"after"
    except (PeerLostError, StaleSlotError):
        return False


def test_a_stopped_worker_is_removed_and_comes_back_with_a_larger_epoch(host: StoreRig, heard: Heard) -> None:
    with worker(host, serve="0") as running, SyncUCXXClient(OVER_UCX, watcher=heard.watcher) as client:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        old = ref_of(running.ask(write="of the first epoch"))
        stop_process(running.pid)
        wait_until(lambda: heard.of("remove") == [("w", 1)], MINUTE, what="it is missed")
        with pytest.raises(PeerLostError, match="is gone"):
            client.read(old, deadline_s=MINUTE)
        running.signal(signal.SIGCONT)
        wait_until(lambda: heard.of("add")[1:] == [("w", 2)], MINUTE, what="it is back")
        assert running.ask(published=MINUTE) == {"epoch": 2}
        with pytest.raises(StaleSlotError):
            client.read(old, deadline_s=MINUTE)
        new = ref_of(running.ask(write="of the second"))
        assert bytes(client.read(new, deadline_s=MINUTE).buffer) == b"of the second"
        ended(running)


@pytest.mark.parametrize("how", ["hold", exhaustive("spin")])
def test_a_busy_interpreter_costs_no_lease(host: StoreRig, heard: Heard, how: str) -> None:
    with worker(host) as running:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        wait_until(lambda: keeper_keeps(running), MINUTE, what="the sidecar renews")
        assert running.ask(**{how: OUTLIVED_S}) == {}
        assert running.ask(look=True)["statistics"]["losses"] == 0
        assert heard.of("remove") == []
        ended(running)


@pytest.mark.parametrize("serve", ["0", exhaustive("unserved")])
def test_a_killed_sidecar_is_replaced_and_costs_no_lease(host: StoreRig, heard: Heard, serve: str) -> None:
    with worker(host, serve=serve) as running:
        running.ask(published=MINUTE)
        wait_until(lambda: keeper_keeps(running), MINUTE, what="the sidecar renews")
        (sidecar,) = sidecars_of(running.pid)
        ports = running.ask(look=True)["ports"]
        os.kill(sidecar, signal.SIGKILL)
        wait_until(lambda: keeper_keeps(running, restarts=1), MINUTE, what="another sidecar renews")
        running.ask(hold=OUTLIVED_S)
        assert running.ask(look=True)["ports"] == ports
        assert heard.of("remove") == []
        ended(running)


def keeper_keeps(running: Program, restarts: int = 0) -> bool:
    statistics = running.ask(look=True)["statistics"]
    return bool(statistics["keeper_keeps"]) and statistics["keeper_restarts"] == restarts


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_reaped_source_publishes_itself_again(host: StoreRig, store: Store, heard: Heard) -> None:
    with worker(host) as running:
        running.ask(published=MINUTE)
        entry = store.get("sources/w")
        assert entry is not None
        assert entry.lease_id is not None
        store.revoke(entry.lease_id)
        wait_until(lambda: heard.of("add")[1:] == [("w", 2)], MINUTE, what="it is back")
        assert heard.of("remove") == [("w", 1)]
        ended(running)


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_deleted_record_is_published_again(host: StoreRig, store: Store, heard: Heard) -> None:
    with worker(host) as running:
        running.ask(published=MINUTE)
        assert store.delete("sources/w")
        wait_until(lambda: heard.of("add")[1:] == [("w", 2)], MINUTE, what="it is back")
        ended(running)


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_of_two_workers_of_one_name_exactly_one_wins(host: StoreRig, heard: Heard) -> None:
    with worker(host) as first, worker(host) as second:
        outcomes = [running.ask(published=MINUTE) for running in (first, second)]
        assert sorted(outcomes, key=str) == [{"epoch": 1}, {"error": "DuplicateSourceError"}]
        loser = first if "error" in outcomes[0] else second
        assert loser.ask(look=True)["state"] == "failed"
        assert heard.of("add") == [("w", 1)]
        assert heard.of("remove") == []
        for running in (first, second):
            ended(running)


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_dead_worker_s_name_is_taken_with_a_larger_epoch(host: StoreRig, heard: Heard) -> None:
    with worker(host, keeper="thread") as dead:
        dead.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        dead.signal(signal.SIGKILL)
        dead.wait()
        with worker(host) as heir:
            assert heir.ask(published=MINUTE) == {"epoch": 2}
            wait_until(lambda: heard.of("add") == [("w", 1), ("w", 2)], MINUTE, what="the heir is seen")
            assert heard.of("remove") == [("w", 1)]
            ended(heir)


def test_a_server_that_hangs_is_reported_stale_once_and_ready_when_it_heals(host: StoreRig, heard: Heard) -> None:
    with worker(host, serve="0") as running:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        server = running.ask(server_pid=True)["server"]
        stop_process(server)
        try:
            wait_until(lambda: SourceStatus.STALE in heard.statuses(1), MINUTE, what="it is reported stale")
            assert heard.watcher.sources() == ()
        finally:
            os.kill(server, signal.SIGCONT)
        wait_until(lambda: heard.statuses(1)[-1] is SourceStatus.READY, MINUTE, what="it is reported ready")
        assert heard.statuses(1).count(SourceStatus.STALE) == 1
        assert heard.of("remove") == []
        ended(running)


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_wiped_store_is_published_to_again_and_nothing_restarts(host: StoreRig, heard: Heard) -> None:
    with worker(host, serve="0") as running, SyncUCXXClient(OVER_UCX, watcher=heard.watcher) as client:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        host.wipe()
        wait_until(lambda: ("w", 2) in heard.of("add"), MINUTE, what="it is back under a larger epoch")
        assert heard.of("remove") == [("w", 1)]
        assert running.ask(published=MINUTE) == {"epoch": 2}
        ref = ref_of(running.ask(write="after the wipe"))
        assert bytes(client.read(ref, deadline_s=MINUTE).buffer) == b"after the wipe"
        ended(running)


@pytest.mark.exhaustive
@pytest.mark.parametrize("own_rig", ["etcd"], indirect=True)  # a file has nothing to restart
def test_a_restarted_store_goes_on_with_its_sources(host: StoreRig, heard: Heard) -> None:
    with worker(host) as running:
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        host.restart()
        wait_until(lambda: is_settled(running, heard), MINUTE, what="worker and watcher agree again")
        ended(running)
    wait_until(lambda: heard.watcher.sources(status=None) == (), MINUTE, what="its end is seen by the same watcher")


@pytest.mark.exhaustive  # the protocol's unit tests show it
def test_a_reference_to_a_dead_worker_is_stale_at_another_one_on_its_port(host: StoreRig) -> None:
    with worker(host, "first", serve="0") as first, SyncUCXXClient(OVER_UCX) as client:
        first.ask(published=MINUTE)
        old = ref_of(first.ask(write="of the first"))
        (port,) = first.ask(look=True)["ports"]
        server = first.ask(server_pid=True)["server"]
        first.signal(signal.SIGKILL)
        first.wait()
        wait_until(lambda: not Path(f"/proc/{server}").exists(), MINUTE, what="the port is free")
        with worker(host, "second", serve=str(port)) as second:
            second.ask(published=MINUTE)
            new = ref_of(second.ask(write="of the second"))
            assert (new.host, new.ports) == (old.host, old.ports)
            with pytest.raises(StaleSlotError):
                client.read(old, deadline_s=MINUTE)
            assert bytes(client.read(new, deadline_s=MINUTE).buffer) == b"of the second"
            ended(second)


def test_a_read_that_waits_for_a_hanging_worker_ends_when_that_is_missed(host: StoreRig, heard: Heard) -> None:
    with (
        ThreadPoolExecutor(1) as threads,
        worker(host, serve="0") as running,
        SyncUCXXClient(OVER_UCX, watcher=heard.watcher) as client,
    ):
        running.ask(published=MINUTE)
        heard.watcher.wait_for(1, MINUTE)
        first, ref = ref_of(running.ask(write="one")), ref_of(running.ask(write="two"))
        assert bytes(client.read(first, deadline_s=MINUTE).buffer) == b"one"
        server = running.ask(server_pid=True)["server"]
        stop_process(server)  # so that it neither answers nor breaks the connection
        reading = threads.submit(client.read, ref, deadline_s=10 * MINUTE)
        wait_until(lambda: client.statistics().lent_buffers > 0, MINUTE, what="the read is on its way")
        stop_process(running.pid)
        with pytest.raises(PeerLostError) as lost:
            reading.result(MINUTE)
        os.kill(server, signal.SIGCONT)
        running.signal(signal.SIGKILL)
        assert lost.value.facts["reason"] == "removed"
        assert client.statistics().pooled_endpoints == 0


@pytest.mark.exhaustive  # `tests/unit/membership` shows it in one process
def test_a_monitor_fires_when_the_last_worker_is_killed_and_never_before_the_first_came(
    host: StoreRig, heard: Heard
) -> None:
    dead: list[object] = []
    all_gone: list[bool] = []
    with ReplicaMonitor(on_dead=dead.append, on_all_gone=lambda: all_gone.append(True), feed=heard.watcher) as monitor:
        wait_until(lambda: heard.watcher.statistics().synced, MINUTE, what="the watcher knows that there is none")
        assert (dead, all_gone) == ([], [])
        with worker(host, "v") as first, worker(host, "w") as second:
            wait_until(lambda: monitor.alive == {"v", "w"}, MINUTE, what="both are there")
            first.signal(signal.SIGKILL)
            wait_until(lambda: dead == ["v"], MINUTE, what="the first is missed")
            assert all_gone == []
            second.signal(signal.SIGKILL)
            wait_until(lambda: all_gone, MINUTE, what="none is left")
    assert (dead, all_gone) == (["v", "w"], [True])


def test_a_teardown_ends_while_the_store_does_not_answer_and_logs_each_step(
    host: StoreRig, log_events: list[MutableMapping[str, Any]]
) -> None:
    store = host.open(timeout_s=float(MINUTE))
    served: list[str] = []
    config = PublisherConfig(interval_s=INTERVAL_S, stop_timeout_s=1.0)
    publisher = HeartbeatPublisher(store, "w", FakeSource(), config)
    publisher.start()
    publisher.wait_published(MINUTE)
    host.stall()
    try:
        teardown = Teardown("worker", margin_s=0)
        outcomes = [
            teardown.step(name, call, time.monotonic() + limit_s).outcome
            for name, call, limit_s in (
                ("publisher", publisher.stop, MINUTE / 2),  # by its own bound: the store's calls may take a minute
                ("store", lambda: store.grant(1.0), 0.05),
                ("server", lambda: served.append("stopped"), MINUTE),
            )
        ]
    finally:
        host.resume()
    assert outcomes == ["done", "hung", "done"]
    assert served == ["stopped"]
    logged = [(event["step"], event["event"]) for event in log_events if event.get("teardown") == "worker"]
    assert logged == [
        ("publisher", "teardown_step"),
        ("publisher", "teardown_done"),
        ("store", "teardown_step"),
        ("store", "teardown_hung"),
        ("server", "teardown_step"),
        ("server", "teardown_done"),
    ]
    wait_until(lambda: not hanging_threads(), MINUTE, what="what was left behind ends when the store answers")


def hanging_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name in ("ucxx-publisher", "teardown-store")]
