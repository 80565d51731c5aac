"""A slot is given back only when its send is known to be over: by acknowledgement, by the close, or much later."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.virtual_time import settle
from tests.unit.server.raw_peer import ack_of, request_of
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import PeerLostError
from ucxx_transport.link.base import LinkStatistics, OnEndpoint
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import Binding, PortCounters
from ucxx_transport.server.port_server import PortServer
from ucxx_transport.server.session import SessionSource
from ucxx_transport.wire.codec import encode_request
from ucxx_transport.wire.frames import Describe, Hello

pytestmark = pytest.mark.anyio


@dataclass(slots=True)
class Operation:
    """A `Pending` that ends when the test says so."""

    told: asyncio.Event = field(default_factory=asyncio.Event)
    completed: bool = False
    error: PeerLostError | None = None

    def end(self, error: PeerLostError | None = None) -> None:
        self.completed, self.error = True, error
        self.told.set()

    def give_up(self, error: PeerLostError) -> None:
        if not self.completed:
            self.error = error
            self.told.set()

    async def wait(self, until_s: float | None = None) -> None:
        async with asyncio.timeout_at(until_s):
            await self.told.wait()
        if self.error is not None:
            raise self.error


@dataclass(slots=True)
class StuckEndpoint:
    """An `Endpoint` whose large sends never end by themselves, and whose close may not end them either."""

    close_ends_sends: bool
    peer: str = "stuck:1"
    alive: bool = True
    closed: bool = False
    large_sends: list[Operation] = field(default_factory=list)
    _receives: deque[tuple[memoryview, Operation]] = field(default_factory=deque)

    def hear(self, frame: bytes) -> None:
        """The peer says `frame`."""
        view, operation = self._receives.popleft()
        view[: len(frame)] = frame
        operation.end()

    def post_receive(self, buffer: object) -> Operation:
        assert isinstance(buffer, bytearray)
        if not self.alive:
            raise PeerLostError("gone", reason="reset")
        operation = Operation()
        self._receives.append((memoryview(buffer), operation))
        return operation

    def post_send(self, buffer: object) -> Operation:
        assert isinstance(buffer, bytes | memoryview)
        operation = Operation()
        if len(buffer) > 1000:
            self.large_sends.append(operation)
        else:
            operation.end()
        return operation

    async def close(self) -> bool:
        self.alive, self.closed = False, True
        for _, operation in self._receives:
            operation.end(PeerLostError("closed", reason="closed"))
        if self.close_ends_sends:
            for operation in self.large_sends:
                operation.end(PeerLostError("closed", reason="closed"))
        for operation in self.large_sends:
            operation.give_up(PeerLostError("closed", reason="closed"))
        return all(operation.completed for operation in self.large_sends)


@dataclass(slots=True)
class OneListener:
    """A `Link` that only listens, and its `Listener`."""

    port: int = 0
    on_endpoint: OnEndpoint | None = None

    async def listen(self, port: int, on_endpoint: OnEndpoint) -> OneListener:
        self.port, self.on_endpoint = port, on_endpoint
        return self

    async def connect(self, host: str, port: int) -> StuckEndpoint:
        raise PeerLostError("nobody there", host=host, port=port)

    def statistics(self) -> LinkStatistics:
        return LinkStatistics()

    def transports(self) -> tuple[str, ...]:
        return ()

    async def close(self) -> None:
        self.on_endpoint = None

    async def aclose(self) -> None:
        self.on_endpoint = None


@asynccontextmanager
async def serving(
    endpoint: StuckEndpoint, *, schema_bytes: bytes = b""
) -> AsyncIterator[tuple[SharedRingBuffer, SlotRef, PortCounters]]:
    """One port with `endpoint` connected, greeted, and one payload of 2000 bytes on its way to it."""
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=4096, prefault=False)) as ring:
        counters = PortCounters(ring.server_words, 0)
        source = SessionSource(ring_id=ring.ring_id, fingerprint=0, schema_bytes=schema_bytes)
        clock = asyncio.get_running_loop().time
        server = PortServer(ring, source, ServerConfig(), counters, Binding(ring.server_words), clock=clock)
        link = OneListener()
        async with server.listening(link, [1]):
            assert link.on_endpoint is not None
            link.on_endpoint(endpoint)
            await settle()
            endpoint.hear(encode_request(Hello(reader=1, nonce=bytes(32))))
            await settle()
            ref = ring.write_raw(bytes(2000))
            endpoint.hear(encode_request(request_of(ref)))
            await settle()
            assert len(endpoint.large_sends) == 1
            yield ring, ref, counters


async def test_an_acknowledgement_before_the_send_is_over_waits_for_it() -> None:
    endpoint = StuckEndpoint(close_ends_sends=True)
    async with serving(endpoint) as (ring, ref, counters):
        endpoint.hear(encode_request(ack_of(ref)))
        await settle()
        assert ring.slot_state(ref.slot) is SlotState.READING, "UCX may still read from the slot"
        endpoint.large_sends[0].end()
        await settle()
        assert ring.slot_state(ref.slot) is SlotState.FREE
        assert counters.snapshot().delivered == 1


async def test_an_acknowledged_payload_stays_delivered_when_its_send_fails_afterwards() -> None:
    endpoint = StuckEndpoint(close_ends_sends=True)
    async with serving(endpoint) as (ring, ref, counters):
        endpoint.hear(encode_request(ack_of(ref)))
        await settle()
        endpoint.large_sends[0].end(PeerLostError("reset", reason="reset"))
        await settle()
        assert ring.slot_state(ref.slot) is SlotState.FREE
        assert counters.snapshot().delivered == 1


@pytest.mark.parametrize("send_is_over", [True, False])
async def test_an_acknowledgement_counts_when_the_peer_is_gone_in_the_same_moment(*, send_is_over: bool) -> None:
    endpoint = StuckEndpoint(close_ends_sends=True)
    async with serving(endpoint) as (ring, ref, counters):
        if send_is_over:
            endpoint.large_sends[0].end()
        endpoint.hear(encode_request(ack_of(ref)))
        endpoint.alive = False  # before anybody has looked at what came
        await settle()
        assert ring.slot_state(ref.slot) is SlotState.FREE
        assert (counters.snapshot().delivered, counters.snapshot().released) == (1, 0)


async def test_closing_the_connection_ends_the_send_and_gives_the_slot_back() -> None:
    endpoint = StuckEndpoint(close_ends_sends=True)
    async with serving(endpoint) as (ring, ref, counters):
        await asyncio.sleep(61.0)
        assert endpoint.closed
        assert ring.slot_state(ref.slot) is SlotState.READY
        assert counters.snapshot().delivery_timeouts == 1


async def test_a_send_that_outlives_its_connection_keeps_its_slot_until_it_ends(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    endpoint = StuckEndpoint(close_ends_sends=False)
    async with serving(endpoint) as (ring, ref, counters):
        await asyncio.sleep(61.0)
        assert endpoint.closed
        assert counters.snapshot().connections == 0
        assert ring.slot_state(ref.slot) is SlotState.READING, "UCX may still read from the slot"
        assert counters.snapshot().stuck_sends == 1
        assert "send_stuck" in [event["event"] for event in log_events]
        endpoint.large_sends[0].end()
        await asyncio.sleep(1.0)
        assert ring.slot_state(ref.slot) is SlotState.READY


async def test_an_acknowledged_payload_whose_send_never_ends_frees_its_connection_and_in_the_end_its_slot() -> None:
    endpoint = StuckEndpoint(close_ends_sends=False)
    async with serving(endpoint) as (ring, ref, counters):
        endpoint.hear(encode_request(ack_of(ref)))
        await asyncio.sleep(3600.0)
        assert (endpoint.closed, counters.snapshot().connections, counters.snapshot().stuck_sends) == (True, 0, 1)
        assert ring.slot_state(ref.slot) is SlotState.READING, "UCX may still read from the slot"
        endpoint.large_sends[0].end()
        await asyncio.sleep(1.0)
        assert ring.slot_state(ref.slot) is SlotState.FREE, "it was delivered: nobody else may get it"


async def test_a_peer_that_reads_no_reply_is_answered_once() -> None:
    endpoint = StuckEndpoint(close_ends_sends=True)
    schema = bytes(2000)
    async with serving(endpoint, schema_bytes=schema) as (ring, ref, _):
        endpoint.large_sends[0].end()
        endpoint.hear(encode_request(ack_of(ref)))
        await settle()
        endpoint.hear(encode_request(Describe(ring_id=ring.ring_id)))
        await settle()
        assert len(endpoint.large_sends) == 2
        endpoint.hear(encode_request(Describe(ring_id=ring.ring_id)))
        await settle()
        assert len(endpoint.large_sends) == 2, "the reply before has not left"
        endpoint.large_sends[1].end()
        await settle()
        assert len(endpoint.large_sends) == 3
        endpoint.hear(encode_request(Describe(ring_id=ring.ring_id)))
        await asyncio.sleep(3600.0)
        assert endpoint.closed, "and not for ever"


@pytest.mark.may_leave("descriptors", reason="a send that never ends keeps its slot for the life of the process")
async def test_a_stopping_port_waits_for_nothing_that_never_ends() -> None:
    endpoint = StuckEndpoint(close_ends_sends=False)
    async with serving(endpoint) as (ring, ref, _):
        assert ring.slot_state(ref.slot) is SlotState.READING
    assert endpoint.closed
