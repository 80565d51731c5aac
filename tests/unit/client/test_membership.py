"""A client that knows which sources are gone: their reads end at once, whatever they wait for, and nobody else's."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.exchange_rig import HOST, ExchangeRig, RigClient, open_rig
from tests.support.port_beside import port_beside
from tests.support.source_records import record
from ucxx_transport.client import SyncUCXXClient
from ucxx_transport.client.jobs import Job
from ucxx_transport.config import ClientConfig, RingConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, PeerLostError, StaleSlotError, TransportError
from ucxx_transport.membership import SourceRecord, SourceWatcher
from ucxx_transport.membership.entries import source_key
from ucxx_transport.membership.local_store import LocalStore
from ucxx_transport.membership.sources import SourceChange
from ucxx_transport.ring import SlotState
from ucxx_transport.ring.layout import AWAITED
from ucxx_transport.testing import Hold

EPISODE = bytes(range(256)) * 16
Report = Callable[[SourceChange], object]


@dataclass
class FakeWatcher:
    """A `Watcher` that a test speaks through."""

    reports: list[Report] = field(default_factory=list)
    known: list[SourceRecord] = field(default_factory=list)

    def report_to(self, report: Report) -> Callable[[], None]:
        self.reports.append(report)
        for source in self.known:
            report(SourceChange("add", source))
        return lambda: self.reports.remove(report)

    def add(self, source: SourceRecord) -> None:
        for report in tuple(self.reports):
            report(SourceChange("add", source))

    def remove(self, source: SourceRecord) -> None:
        for report in tuple(self.reports):
            report(SourceChange("remove", source))


def source_of(rig: ExchangeRig, *ports: int) -> SourceRecord:
    return record("w", ring_id=rig.ring.ring_id, host=HOST, ports=ports or (1, 2))


def is_removed(job: Job) -> bool:
    """Whether a job of one has failed because its source is gone."""
    assert job.done
    outcome = job.outcomes[0]
    assert isinstance(outcome, PeerLostError)
    assert "is gone" in outcome.message
    return outcome.facts["reason"] == "removed"


def silent(rig: ExchangeRig) -> None:
    rig.faults_of(1).hold = Hold()


def waiting(rig: ExchangeRig, watcher: FakeWatcher) -> tuple[RigClient, Job]:
    """A client with a read under way that is not answered."""
    client = rig.client(watcher=watcher)
    silent(rig)
    job = client.begin(rig.write(EPISODE), deadline_s=3600.0)
    rig.settle()
    return client, job


def unreachable(rig: ExchangeRig) -> None:
    rig.faults.hang_connect = True


def not_ready(rig: ExchangeRig) -> None:
    rig.ring.server_words[AWAITED] = 1


@pytest.mark.parametrize("how", [silent, unreachable, not_ready], ids=lambda how: how.__name__)
def test_a_read_ends_when_its_source_is_gone_whatever_it_waits_for(how: Callable[[ExchangeRig], None]) -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher, connect_timeout_s=600.0, read_attempts=100)
        how(rig)
        job = client.begin(rig.write(EPISODE), deadline_s=3600.0)
        rig.advance(0.05)
        assert not job.done
        watcher.remove(source_of(rig, 1))
        rig.settle()
        assert is_removed(job)
        assert (client.counts.failed, client.counts.reads) == (1, 0)


def test_a_read_that_waits_for_its_turn_ends_when_its_source_is_gone() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=4, slot_bytes=2 << 20, prefault=False)) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        silent(rig)
        refs = [rig.write(bytes(2 << 20)) for _ in range(3)]
        jobs = [client.begin(ref, deadline_s=3600.0) for ref in refs]
        watcher.remove(source_of(rig, 1))
        rig.settle()
        assert [is_removed(job) for job in jobs] == [True] * 3


def test_a_new_read_from_a_source_that_is_gone_fails_without_a_request() -> None:
    with open_rig() as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        refs = [rig.write(EPISODE) for _ in range(2)]
        watcher.remove(source_of(rig))  # before anything was read
        for ref in refs:
            assert is_removed(client.begin(ref, deadline_s=3600.0))
        assert rig.requests() == 0
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.READY] * 2


def test_a_source_that_is_back_is_read_from_again() -> None:
    with open_rig() as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        ref = rig.write(EPISODE)
        watcher.remove(source_of(rig))
        assert is_removed(client.begin(ref, deadline_s=3600.0))
        watcher.add(source_of(rig))
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_a_client_that_lay_idle_meanwhile_reads_from_a_source_that_is_back() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        client.consume(rig.write(EPISODE))
        rig.idle_alone = (client,)
        watcher.remove(source_of(rig, 1))
        watcher.add(source_of(rig, 1))
        rig.idle_alone = ()
        client.consume(rig.write(EPISODE))


def test_a_pending_read_ends_also_when_its_source_is_back_under_a_new_epoch() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        _, job = waiting(rig, watcher)
        watcher.remove(source_of(rig, 1))
        watcher.add(source_of(rig, 1))
        rig.settle()
        assert is_removed(job)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_ports_of_a_source_that_is_there_are_tried_at_once(is_known: bool) -> None:
    with open_rig(ports=2) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher, port_quarantine_s=3600.0)
        rig.stop_port(1)
        client.consume(rig.write(EPISODE))
        assert client.counts.quarantined == 1
        rig.start_port(1)
        if is_known:
            watcher.add(source_of(rig))
        rig.settle()
        for _ in range(4):
            client.outcomes(*(client.core.begin((rig.write(EPISODE),)) for _ in range(2)))
        assert (rig.statistics(1).requests > 0) is is_known


def test_idle_connections_to_a_source_that_is_gone_are_closed_and_no_others() -> None:
    with open_rig(ports=2) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        client.outcomes(*(client.core.begin((rig.write(EPISODE),)) for _ in range(2)))
        assert client.counts.pooled_endpoints == 2
        watcher.remove(record("another", host=HOST, ports=(2,)))
        rig.settle()
        assert client.counts.pooled_endpoints == 1
        assert [rig.statistics(port).connections for port in (1, 2)] == [1, 0]


def test_the_end_of_another_source_ends_no_read() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        hold = rig.faults_of(1).hold = Hold()
        job = client.begin(rig.write(EPISODE), deadline_s=3600.0)
        rig.settle()
        watcher.remove(record("another", host=HOST, ports=(7,)))
        rig.settle()
        hold.set()
        with client.result(job) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_a_read_that_fails_by_itself_says_why() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(watcher=FakeWatcher(), connect_timeout_s=600.0)
        ref = rig.write(EPISODE)
        rig.ring.discard(ref)
        with pytest.raises(StaleSlotError):
            client.read(ref)
        silent(rig)
        with pytest.raises(DeadlineExceededError):
            client.read(rig.write(EPISODE), deadline_s=5.0)


def test_a_client_hears_of_the_sources_there_are_before_it_has_read() -> None:
    with open_rig() as rig:
        watcher = FakeWatcher(known=[source_of(rig)])
        with rig.client(watcher=watcher).read(rig.write(EPISODE)) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_what_is_no_watcher_is_refused_where_it_is_given() -> None:
    with pytest.raises(ConfigError, match="watcher must be a SourceWatcher, not str"):
        SyncUCXXClient(watcher="local://")  # type: ignore[arg-type]  # what is refused


def test_a_closed_client_hears_nothing_more() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        client.consume(rig.write(EPISODE))
        (report,) = watcher.reports
        client.close()
        client.close()
        assert watcher.reports == []
        report(SourceChange("remove", source_of(rig, 1)))  # one that was on its way
        report(SourceChange("add", source_of(rig, 1)))
        rig.settle()


def test_a_client_may_be_closed_during_a_notification() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client, job = waiting(rig, watcher)
        watcher.remove(source_of(rig, 1))
        client.close()
        assert isinstance(job.outcomes[0], PeerLostError)


def test_a_client_that_lies_idle_keeps_the_newest_report_of_each_source_alone() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        client.consume(rig.write(EPISODE))
        rig.idle_alone = (client,)
        for _ in range(100):
            watcher.add(source_of(rig, 1))
        assert len(client.core.reactor._submitted) == 1  # noqa: SLF001 - what grows is nowhere else to be seen
        rig.idle_alone = ()
        client.consume(rig.write(EPISODE))


def test_a_blocking_client_that_lay_idle_meanwhile_reads_from_a_source_that_is_back() -> None:
    watcher = FakeWatcher()
    with port_beside() as beside, beside.client(watcher=watcher) as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        source = record("w", ring_id=beside.ring.ring_id, host=HOST, ports=(5001,))
        watcher.remove(source)
        watcher.add(source)
        client.read(beside.ring.write_raw(EPISODE)).release()


def test_a_listener_reads_at_once_from_a_source_that_has_published_itself_again(tmp_path: Path) -> None:
    outcomes: queue.Queue[bytes | TransportError] = queue.Queue()

    def read(source: SourceRecord) -> None:
        try:
            with client.read(beside.ring.write_raw(bytes([source.epoch])), deadline_s=60.0) as payload:
                outcomes.put(bytes(payload.buffer))
        except TransportError as error:
            outcomes.put(error)

    with port_beside() as beside, LocalStore(tmp_path / "store.db") as store, SourceWatcher(store) as watcher:
        watcher.subscribe(on_add=read)  # before the client does
        with beside.client(watcher=watcher) as client:
            for epoch in range(1, 31):
                source = record("w", epoch, ring_id=beside.ring.ring_id, host=HOST, ports=(5001,))
                store.put(source_key("w"), source.to_bytes())
                assert outcomes.get(timeout=60.0) == bytes([epoch])


def test_a_ring_of_this_host_is_read_in_place_whatever_the_watcher_reports() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        with SyncUCXXClient(ClientConfig(), watcher=watcher, link_factory=rig.client_link) as client:
            watcher.remove(source_of(rig, 1))
            with client.read(rig.write(EPISODE)) as payload:
                assert (payload.transport, bytes(payload.buffer)) == ("view", EPISODE)
        assert rig.opened_links == 0
