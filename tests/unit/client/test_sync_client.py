"""The blocking client: the same reads, from threads without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.client import Payload, SyncUCXXClient
from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, StaleSlotError
from ucxx_transport.link.base import Link
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.server.counters import Binding, PortCounters
from ucxx_transport.server.port_server import PortServer
from ucxx_transport.server.session import SessionSource
from ucxx_transport.testing import MemoryLink, MemoryNetwork

EPISODE = bytes(range(256)) * 16


@dataclass
class Neighbour:
    """A ring's server port inside the client's own loop thread: as far away as anything over a link is."""

    ring: SharedRingBuffer
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    links_opened: int = 0

    def link(self) -> AbstractAsyncContextManager[Link]:
        return self._link()

    @asynccontextmanager
    async def _link(self) -> AsyncIterator[Link]:
        self.links_opened += 1
        up, stop = asyncio.Event(), asyncio.Event()
        serving = asyncio.get_running_loop().create_task(self._serve(up, stop))
        await up.wait()
        async with MemoryLink(self.network) as link:
            yield link
        stop.set()
        await serving

    async def _serve(self, up: asyncio.Event, stop: asyncio.Event) -> None:
        ring = self.ring
        source = SessionSource(ring_id=ring.ring_id, fingerprint=ring.fingerprint, schema_bytes=ring.schema_bytes)
        server = PortServer(
            ring,
            source,
            ServerConfig(),
            PortCounters(ring.server_words, 0),
            Binding(ring.server_words),
        )
        async with MemoryLink(self.network) as link, server.listening(link, [1]):
            up.set()
            await stop.wait()


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    with SharedRingBuffer.create(RingConfig(slots=16, slot_bytes=8192, prefault=False)) as ring:
        ring.publish_address("10.0.0.1", (1,))
        yield Neighbour(ring)


def client_of(neighbour: Neighbour, **settings: object) -> SyncUCXXClient:
    values: dict[str, object] = {"local": "off", **settings}
    return SyncUCXXClient(ClientConfig(**values), link_factory=neighbour.link)  # type: ignore[arg-type]  # checked at run time


def test_a_read_over_the_link_blocks_until_the_payload_is_here(neighbour: Neighbour) -> None:
    with client_of(neighbour) as client:
        ref = neighbour.ring.write_raw(EPISODE)
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert payload.transport == "ucx"
        assert client.statistics().ucx == 1
    assert neighbour.ring.slot_state(ref.slot) is SlotState.FREE, "closing takes leave, so the acknowledgement is in"


def test_errors_and_counts_are_those_of_the_async_client(neighbour: Neighbour) -> None:
    with client_of(neighbour) as client:
        ref = neighbour.ring.write_raw(EPISODE)
        neighbour.ring.discard(ref)
        with pytest.raises(StaleSlotError):
            client.read(ref)
        assert (client.statistics().failed, client.statistics().stale) == (1, 1)
        assert client.statistics().lent_buffers == 0


def test_a_silent_server_costs_the_deadline(neighbour: Neighbour) -> None:
    with client_of(neighbour) as client:
        client.read(neighbour.ring.write_raw(EPISODE)).release()
        ref = neighbour.ring.write_raw(EPISODE)
        neighbour.network.faults.drop = 1000
        with pytest.raises(DeadlineExceededError):
            client.read(ref, deadline_s=0.1)
        neighbour.network.faults.drop = 0
        client.read(ref).release()


def test_many_threads_share_one_client_and_every_payload_comes_once(neighbour: Neighbour) -> None:
    refs = [neighbour.ring.write_raw(bytes([number]) * 1000) for number in range(16)]
    with client_of(neighbour) as client, ThreadPoolExecutor(8) as threads:

        def read(number: int) -> int:
            with client.read(refs[number % 16], deadline_s=30.0) as payload:
                assert bytes(payload.buffer) == bytes([number % 16]) * 1000
            return number

        readings = [threads.submit(read, number) for number in range(32)]
        errors = [reading.exception() for reading in readings]
        assert sum(error is None for error in errors) == 16
        assert all(isinstance(error, StaleSlotError) for error in errors if error is not None)
    assert neighbour.links_opened == 1


def test_a_batch_comes_in_order_with_its_errors_in_place(neighbour: Neighbour) -> None:
    refs = [neighbour.ring.write_raw(bytes([number]) * 100) for number in range(4)]
    neighbour.ring.discard(refs[2])
    with client_of(neighbour) as client:
        outcomes = client.read_many(refs)
        assert isinstance(outcomes[2], StaleSlotError)
        for number in (0, 1, 3):
            payload = outcomes[number]
            assert isinstance(payload, Payload)
            assert bytes(payload.buffer) == bytes([number]) * 100


def test_a_batch_mixes_this_host_and_others(neighbour: Neighbour) -> None:
    with client_of(neighbour, local="auto") as client:
        here, there = (neighbour.ring.write_raw(EPISODE) for _ in range(2))
        outcomes = client.read_many([here, replace(there, host_id="another host")])
        transports = [outcome.transport for outcome in outcomes if isinstance(outcome, Payload)]
        assert transports == ["view", "ucx"]


def test_no_thread_is_started_before_a_read_needs_one(neighbour: Neighbour) -> None:
    before = threading.active_count()
    with client_of(neighbour, local="view") as client:
        client.read(neighbour.ring.write_raw(EPISODE)).release()
        assert threading.active_count() == before
    assert neighbour.links_opened == 0


def test_closed_twice_and_used_no_more(neighbour: Neighbour) -> None:
    client = client_of(neighbour)
    client.read(neighbour.ring.write_raw(EPISODE)).release()
    client.close()
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.read(neighbour.ring.write_raw(EPISODE))


def test_closing_while_a_read_waits_ends_that_read(neighbour: Neighbour) -> None:
    client = client_of(neighbour)
    client.read(neighbour.ring.write_raw(EPISODE)).release()
    ref = neighbour.ring.write_raw(EPISODE)
    neighbour.network.faults.drop = 1000
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.read, ref, deadline_s=60.0)
        wait_until(lambda: client.statistics().lent_buffers == 1, what="the read is under way")
        client.close()
        assert waiting.exception(timeout=30.0) is not None
