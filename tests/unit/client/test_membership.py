"""A client that is told which sources are gone: their reads end at once, whatever they wait for, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.support.exchange_rig import HOST, ExchangeRig, open_rig
from tests.support.source_records import record
from ucxx_transport.client import Payload, SyncUCXXClient, UCXXClient
from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import DeadlineExceededError, PeerLostError, StaleSlotError
from ucxx_transport.membership import SourceRecord
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import Binding

EPISODE = bytes(range(256)) * 16
Listener = Callable[[SourceRecord], None]


@dataclass
class FakeWatcher:
    """A `Watcher` that a test speaks through."""

    listeners: list[tuple[Listener | None, Listener | None]] = field(default_factory=list)
    known: list[SourceRecord] = field(default_factory=list)

    def subscribe(
        self, *, on_add: Listener | None = None, on_update: Listener | None = None, on_remove: Listener | None = None
    ) -> Callable[[], None]:
        del on_update
        listener = (on_add, on_remove)
        self.listeners.append(listener)
        for source in self.known:
            if on_add is not None:
                on_add(source)
        return lambda: self.listeners.remove(listener)

    def add(self, source: SourceRecord) -> None:
        for on_add, _ in tuple(self.listeners):
            if on_add is not None:
                on_add(source)

    def remove(self, source: SourceRecord) -> None:
        for _, on_remove in tuple(self.listeners):
            if on_remove is not None:
                on_remove(source)


def source_of(rig: ExchangeRig, *ports: int) -> SourceRecord:
    return record("w", ring_id=rig.ring.ring_id, host=HOST, ports=ports or (1, 2))


def reading(client: UCXXClient, ref: SlotRef, deadline_s: float = 3600.0) -> asyncio.Task[Payload]:
    return asyncio.ensure_future(client.read(ref, deadline_s=deadline_s))


def is_removed(task: asyncio.Task[Payload]) -> bool:
    with pytest.raises(PeerLostError, match="is gone") as caught:
        task
    return caught.value.facts["reason"] == "removed"


def silent(rig: ExchangeRig) -> None:
    rig.faults_of(1).hold = asyncio.Event()


def unreachable(rig: ExchangeRig) -> None:
    rig.faults.hang_connect = True


def not_ready(rig: ExchangeRig) -> None:
    Binding(rig.ring.server_words).awaited = True


@pytest.mark.parametrize("how", [silent, unreachable, not_ready], ids=lambda how: how.__name__)
def test_a_read_ends_when_its_source_is_gone_whatever_it_waits_for(how: Callable[[ExchangeRig], None]) -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher, connect_timeout_s=600.0, read_attempts=100)
        how(rig)
        task = reading(client, rig.write(EPISODE))
        rig.advance(0.05)
        assert not task.done()
        began_s = asyncio.get_running_loop().time()
        watcher.remove(source_of(rig, 1))
        assert is_removed(task)
        assert asyncio.get_running_loop().time() - began_s < 1.0  # virtual: the read had an hour
        assert (client.counts.failed, client.counts.reads) == (1, 0)


def test_a_read_that_waits_for_its_turn_ends_when_its_source_is_gone() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher, max_concurrent_reads=1)
        silent(rig)
        tasks = [reading(client, rig.write(EPISODE)) for _ in range(3)]
        rig.settle()
        watcher.remove(source_of(rig, 1))
        assert [is_removed(task) for task in tasks] == [True] * 3


def test_a_new_read_from_a_source_that_is_gone_fails_without_a_request() -> None:
    with open_rig() as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        refs = [rig.write(EPISODE) for _ in range(2)]
        watcher.remove(source_of(rig))  # before anything was read
        for ref in refs:
            assert is_removed(reading(client, ref))
        assert rig.requests() == 0
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.READY] * 2


def test_a_source_that_is_back_is_read_from_again() -> None:
    with open_rig() as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        ref = rig.write(EPISODE)
        watcher.remove(source_of(rig))
        assert is_removed(reading(client, ref))
        watcher.add(source_of(rig))
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_a_pending_read_ends_also_when_its_source_is_back_under_a_new_epoch() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        silent(rig)
        task = reading(client, rig.write(EPISODE))
        rig.settle()
        watcher.remove(source_of(rig, 1))
        watcher.add(source_of(rig, 1))
        assert is_removed(task)


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
            client.read_many([rig.write(EPISODE) for _ in range(2)])
        assert (rig.statistics(1).requests > 0) is is_known


def test_idle_connections_to_a_source_that_is_gone_are_closed_and_no_others() -> None:
    with open_rig(ports=2) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        for _ in range(2):
            client.read_many([rig.write(EPISODE) for _ in range(2)])
        assert client.counts.pooled_endpoints == 2
        watcher.remove(record("another", host=HOST, ports=(2,)))
        rig.settle()
        assert client.counts.pooled_endpoints == 1
        assert [rig.statistics(port).connections for port in (1, 2)] == [1, 0]


def test_the_end_of_another_source_ends_no_read() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        hold = rig.faults_of(1).hold = asyncio.Event()
        task = reading(client, rig.write(EPISODE))
        rig.settle()
        watcher.remove(record("another", host=HOST, ports=(7,)))
        rig.settle()
        hold.set()
        with task as payload:
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
        task = reading(client, rig.write(EPISODE))
        rig.settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            task


def test_a_client_hears_of_the_sources_there_are_before_it_has_read() -> None:
    with open_rig() as rig:
        watcher = FakeWatcher(known=[source_of(rig)])
        with rig.client(watcher=watcher).read(rig.write(EPISODE)) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_a_closed_client_hears_nothing_more() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        client.consume(rig.write(EPISODE))
        (told, gone) = watcher.listeners[0]
        assert told is not None
        assert gone is not None
        client.aclose()
        client.aclose()
        assert watcher.listeners == []
        gone(source_of(rig, 1))  # one that was on its way
        told(source_of(rig, 1))
        rig.settle()


def test_a_client_may_be_closed_during_a_notification() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        client = rig.client(watcher=watcher)
        silent(rig)
        task = reading(client, rig.write(EPISODE))
        rig.settle()
        watcher.remove(source_of(rig, 1))
        client.aclose()
        with pytest.raises(PeerLostError):
            task


def test_a_client_whose_loop_has_ended_may_still_be_notified() -> None:
    watcher = FakeWatcher()
    with open_rig(ports=1) as rig:
        ref, source = rig.write(EPISODE), source_of(rig, 1)

        def read_and_leave() -> None:
            client = SyncUCXXClient(ClientConfig(local="off"), watcher=watcher, link_factory=rig.client_link)
            rig.faults.refuse = True
            with pytest.raises(PeerLostError):
                client.read(ref, deadline_s=0.01)
            gone = watcher.listeners[0][1]
            client.close()
            assert gone is not None
            gone(source)

        read_and_leave()


def test_a_ring_of_this_host_is_read_in_place_whatever_the_watcher_reports() -> None:
    with open_rig(ports=1) as rig:
        watcher = FakeWatcher()
        with SyncUCXXClient(ClientConfig(), watcher=watcher, link_factory=rig.client_link) as client:
            watcher.remove(source_of(rig, 1))
            with client.read(rig.write(EPISODE)) as payload:
                assert (payload.transport, bytes(payload.buffer)) == ("view", EPISODE)
        assert rig.opened_links == []
