"""The in-memory network as a user's test has it: a server and clients in their own threads, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    DeadlineExceededError,
    EpisodeStream,
    PeerLostError,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SlotState,
    SyncUCXXClient,
    TransportError,
    UCXXServer,
)
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.testing import Faults, Hold, MemoryNetwork

LARGE = bytes(range(256)) * 256  # does not fit an eager message


@dataclass(frozen=True)
class Job:
    """What a user's test has: a ring that is served on a network in memory."""

    ring: SharedRingBuffer
    server: UCXXServer
    network: MemoryNetwork

    def client(self, **settings: Any) -> SyncUCXXClient:
        config = ClientConfig(local="off", **settings)
        return SyncUCXXClient(config, link_factory=self.network.link)


@pytest.fixture
def job() -> Iterator[Job]:
    network = MemoryNetwork()
    with (
        SharedRingBuffer.create(RingConfig(slots=64, slot_bytes=len(LARGE), checksum=True, prefault=False)) as ring,
        UCXXServer(ring, ServerConfig(mode="thread", ports=2), link_factory=network.link) as server,
    ):
        yield Job(ring, server, network)


def test_payloads_of_any_size_come_whole_and_are_consumed_at_the_source(job: Job) -> None:
    with job.client() as client:
        for content in (b"", b"x", LARGE[:8191], LARGE[:8192], LARGE):
            ref = job.ring.write_raw(content)
            with client.read(ref) as payload:
                assert payload.transport == "ucx"
                assert bytes(payload.buffer) == content
        assert client.statistics().reads == 5
    wait_until(lambda: sum(port.delivered for port in job.server.statistics().ports) == 5)


def test_several_threads_read_over_one_network_at_once(job: Job) -> None:
    def read(number: int) -> bool:
        content = bytes([number]) * 20_000
        with clients[number % 3].read(job.ring.write_raw(content)) as payload:
            return bytes(payload.buffer) == content

    clients = [job.client() for _ in range(3)]
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(48)))
    for client in clients:
        client.close()


def test_a_trainer_s_stream_reads_over_it(job: Job) -> None:
    refs = [job.ring.write_raw(bytes([number])) for number in range(8)]
    with EpisodeStream(refs, ClientConfig(local="off"), link_factory=job.network.link) as episodes:
        assert [bytes(episode.arrays["data"]) for episode in episodes] == [bytes([number]) for number in range(8)]


def test_a_message_that_vanishes_is_a_deadline(job: Job) -> None:
    ref = job.ring.write_raw(b"lost")
    with job.client() as client:
        job.network.faults.drop = 1000
        with pytest.raises(DeadlineExceededError):
            client.read(ref, deadline_s=0.2)
        job.network.faults.drop = 0
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == b"lost"


def test_a_refused_connection_is_a_lost_peer(job: Job) -> None:
    job.network.faults.refuse = True
    with job.client(read_attempts=1) as client, pytest.raises(PeerLostError):
        client.read(job.ring.write_raw(b"x"), deadline_s=5)


def test_a_changed_byte_is_read_again(job: Job) -> None:
    ref = job.ring.write_raw(b"a" * 100)
    with job.client() as client:
        with client.read(job.ring.write_raw(b"the connection is up")):
            pass
        job.network.faults.spare, job.network.faults.flip_byte = 1, 64 + 17
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == b"a" * 100


def test_a_server_that_has_stopped_is_an_error_and_its_ring_is_untouched(job: Job) -> None:
    ref = job.ring.write_raw(b"later")
    with job.client(read_attempts=1) as client:
        with client.read(job.ring.write_raw(b"now")):
            pass
        job.server.stop()
        with pytest.raises(TransportError):
            client.read(ref, deadline_s=1)
    assert job.ring.slot_state(ref.slot) is SlotState.READY


class Heard:
    """The owner of an endpoint that only listens."""

    def lost(self, _error: TransportError) -> None:
        """Nothing to do."""


def test_a_close_that_was_late_because_its_thread_was_stopped_and_is_busy_leaks_no_buffer() -> None:
    network, now_s, accepted, closed = MemoryNetwork(), [0.0], list[Endpoint](), list[bool]()

    def accept(endpoint: Endpoint) -> Heard:
        accepted.append(endpoint)
        return Heard()

    with (
        closing(Reactor(network.link, spin_s=0.0, clock=lambda: now_s[0])) as near,
        closing(Reactor(network.link, spin_s=0.0, clock=lambda: now_s[0])) as far,
    ):
        port = far.link.listen(0, accept).port
        ends = [near.link.connect("host", port, Heard()) for _ in range(2)]
        while near.poll() or far.poll():
            pass
        ends[0].post_receive(bytearray(8), lambda _: None)
        ends[0].close(closed.append)
        now_s[0] += 60
        while not closed:
            accepted[1].post_send(b"there is something in every turn")
            near.poll()
        assert (closed, near.link.leaked_buffers) == ([True], 0)


def test_a_hold_calls_what_waits_for_it_once_and_its_errors_are_the_callers() -> None:
    hold = Hold()
    called: list[str] = []

    def fail() -> None:
        raise IndexError("of the action")

    hold.when_set(lambda: called.append("first"))
    hold.when_set(fail)
    hold.when_set(lambda: called.append("last"))
    assert (hold.is_set(), called) == (False, [])
    with pytest.raises(IndexError, match="of the action"):
        hold.set()
    assert (hold.is_set(), called) == (True, ["first"])
    hold.set()
    hold.when_set(lambda: called.append("late"))
    assert called == ["first", "last", "late"]


def test_the_connection_of_the_message_behind_so_many_breaks_and_no_other() -> None:
    for passing in (0, 1, 3):
        faults = Faults(reset_after=passing)
        with row(passing=passing):
            assert [faults.breaks_connection() for _ in range(6)] == [number == passing for number in range(6)]
