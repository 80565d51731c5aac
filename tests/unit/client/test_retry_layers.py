"""The port and slot layers of retry, carried out: rotation, quarantine, fresh calls, all under one deadline."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np
import pytest

from tests.support.exchange_rig import ExchangeRig, open_rig
from tests.support.raw_server import welcome
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    DeadlineExceededError,
    PeerLostError,
    ProtocolError,
    TransportError,
)
from ucxx_transport.link.base import Endpoint
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import Schema, TensorSpec
from ucxx_transport.wire.codec import encode_reply
from ucxx_transport.wire.frames import ReadReply, Status

EPISODE = bytes(range(256)) * 16


def rig.now_s -> float:
    return asyncio.get_running_loop().time()


def nothing_is_held(rig: ExchangeRig, *slots: int) -> bool:
    """Whether, once both sides have come to rest, every slot is READY and none is held."""
    rig.advance(30.0)  # virtual: beyond the server's acknowledgement limit and its sweep
    return all(rig.ring.slot_state(slot) is SlotState.READY for slot in slots)


def test_a_dead_port_costs_one_rotation_and_is_avoided_from_then_on() -> None:
    with open_rig(ports=3) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(4)]
        rig.stop_port(1)
        for ref in refs:
            client.consume(ref)
        statistics = client.counts
        assert (statistics.quarantined, statistics.rotations, statistics.retries) == (1, 1, 0)
        rig.settle()
        assert rig.statistics(2).delivered + rig.statistics(3).delivered == 4


def test_a_port_that_dies_with_idle_connections_is_no_failure_of_the_others() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        for _ in range(2):
            client.read_many([rig.write(EPISODE) for _ in range(2)])
        assert client.counts.pooled_endpoints == 2
        refs = [rig.write(EPISODE) for _ in range(3)]
        rig.stop_port(2)
        for ref in refs:
            client.consume(ref)
        rig.settle()
        assert rig.statistics(1).delivered == 2 + 3


def test_a_port_is_tried_again_when_its_quarantine_is_over() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client(port_quarantine_s=30.0)
        refs = [rig.write(EPISODE) for _ in range(4)]
        rig.stop_port(1)
        client.consume(refs[0])
        rig.start_port(1)
        client.consume(refs[1])
        assert rig.statistics(1).delivered == 0
        rig.advance(31.0)
        client.read_many(refs[2:])
        rig.settle()
        assert rig.statistics(1).delivered == 1


def test_a_port_that_keeps_failing_is_counted_each_time_and_logged_once(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    def told() -> int:
        return [event["event"] for event in log_events].count("port_quarantined")

    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1, port_quarantine_s=30.0)
        ref = rig.write(EPISODE)
        rig.stop_port(1)
        for _ in range(3):
            with pytest.raises(PeerLostError):
                client.read(ref)
        assert (client.counts.peers_lost, told()) == (3, 1)
        rig.advance(31.0)
        with pytest.raises(PeerLostError):
            client.read(ref)
        assert told() == 2


def test_when_every_port_is_quarantined_they_are_still_tried() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client(read_attempts=1)
        ref = rig.write(EPISODE)
        rig.stop_port(1)
        rig.stop_port(2)
        with pytest.raises(PeerLostError):
            client.read(ref)
        assert client.counts.quarantined == 2
        rig.start_port(1)
        rig.start_port(2)
        client.consume(ref)


def test_one_call_rotates_once_and_the_slot_layer_makes_as_many_calls_as_configured() -> None:
    with open_rig(ports=4) as rig:
        client = rig.client(read_attempts=2)
        ref = rig.write(EPISODE)
        for port in (1, 2, 3, 4):
            rig.stop_port(port)
        with pytest.raises(PeerLostError):
            client.read(ref)
        statistics = client.counts
        assert (statistics.peers_lost, statistics.rotations, statistics.retries) == (4, 2, 1)
        assert statistics.failed == 1


def test_a_fresh_call_finds_what_the_first_one_lost() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=2)
        ref = rig.write(EPISODE)
        rig.faults.reset_after = 1  # HELLO passes, READ breaks the connection
        client.consume(ref)
        statistics = client.counts
        assert (statistics.retries, statistics.rotations, statistics.peers_lost) == (1, 0, 1)


def test_a_single_attempt_means_a_single_attempt() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        ref = rig.write(EPISODE)
        rig.faults.reset_after = 1
        with pytest.raises(PeerLostError):
            client.read(ref)
        assert client.counts.retries == 0


def test_a_corrupted_payload_is_read_again_over_the_same_connection() -> None:
    ring = RingConfig(slots=2, slot_bytes=8192, checksum=True, prefault=False)
    with open_rig(ports=1, ring=ring) as rig:
        client = rig.client()
        first = rig.write(EPISODE)
        client.consume(first)
        rig.faults_of(1).flip_byte = 64 + 17
        with client.read(rig.write(EPISODE)) as payload:
            assert bytes(payload.buffer) == EPISODE
        statistics = client.counts
        assert (statistics.checksum_errors, statistics.retries) == (1, 1)
        assert (statistics.connections, statistics.quarantined) == (1, 0)


def test_a_truncated_payload_is_never_delivered_and_its_slot_is_ready_again() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        client.consume(rig.write(EPISODE))  # the pooled buffer now holds a whole message of this size
        ref = rig.write(EPISODE)
        rig.faults_of(1).truncate_to = 64 + 1000
        with pytest.raises(ProtocolError, match="cut short"):
            client.read(ref)
        assert client.counts.pooled_endpoints == 0
        rig.settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        client.consume(ref)


def test_a_full_port_is_passed_over_without_quarantine() -> None:
    with open_rig(ports=2, server=ServerConfig(mode="thread", max_connections=1)) as rig:
        occupant, client = rig.client(), rig.client()
        occupant.read_many([rig.write(EPISODE) for _ in range(2)])
        rig.settle()
        rig.stop_port(2)
        rig.start_port(2)
        refs = [rig.write(EPISODE) for _ in range(2)]
        for ref in refs:
            client.consume(ref)
        statistics = client.counts
        assert statistics.busy >= 1
        assert statistics.quarantined == 0
        rig.settle()
        assert rig.statistics(2).delivered == 1 + 2


def test_when_all_ports_are_full_the_client_waits_a_little_and_says_busy() -> None:
    with open_rig(ports=1, server=ServerConfig(mode="thread", max_connections=1)) as rig:
        occupant, client = rig.client(), rig.client(read_attempts=3)
        occupant.consume(rig.write(EPISODE))
        ref, started = rig.write(EPISODE), rig.now_s
        with pytest.raises(BusyError, match="limit of connections"):
            client.read(ref)
        assert rig.now_s - started > 0.01
        assert client.counts.retries == 2
        assert rig.statistics(1).refused == 3
        assert rig.statistics(1).busy == 3
        occupant.aclose()
        rig.advance(2.0)
        client.consume(ref)


def test_a_silent_server_costs_the_deadline_and_not_a_moment_more() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        warm = [rig.write(EPISODE) for _ in range(2)]
        for ref in warm:
            client.consume(ref)
        ref, started = rig.write(EPISODE), rig.now_s
        rig.faults_of(1).drop = rig.faults_of(2).drop = 1000
        with pytest.raises(DeadlineExceededError) as caught:
            client.read(ref, deadline_s=3.0)
        assert 3.0 <= rig.now_s - started < 3.001
        assert isinstance(caught.value, TimeoutError)
        statistics = client.counts
        assert (statistics.deadlines, statistics.failed, statistics.pooled_endpoints) == (1, 1, 0)
        assert nothing_is_held(rig, ref.slot)
        rig.faults_of(1).drop = rig.faults_of(2).drop = 0
        client.consume(ref)


def test_one_silent_port_of_two_still_leaves_time_for_the_other() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        for _ in range(2):
            client.consume(rig.write(EPISODE))
        rig.faults_of(1).drop = 1000
        started = rig.now_s
        client.consume(rig.write(EPISODE), deadline_s=4.0)
        assert rig.now_s - started < 4.0
        assert client.counts.timeouts == 1


def test_a_port_that_never_connects_costs_the_connect_limit_only() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client(connect_timeout_s=0.5)
        rig.faults_of(1).drop = 1000  # it accepts, and says nothing
        started = rig.now_s
        client.consume(rig.write(EPISODE), deadline_s=60.0)
        assert 0.5 <= rig.now_s - started < 0.6
        assert client.counts.quarantined == 1


def test_a_deadline_that_has_passed_fails_without_a_word_against_any_port() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        with pytest.raises(DeadlineExceededError):
            client.read(ref, deadline_s=0.0)
        statistics = client.counts
        assert (statistics.quarantined, statistics.deadlines) == (0, 1)
        assert rig.requests() == 0


def test_waiting_for_a_place_counts_against_the_deadline_but_not_against_a_port() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(max_concurrent_reads=1)
        client.consume(rig.write(EPISODE))
        slow, waiting = rig.write(EPISODE), rig.write(EPISODE)
        hold = rig.faults_of(1).hold = asyncio.Event()
        first = asyncio.create_task(client.read(slow, deadline_s=60.0))
        rig.settle()
        started = rig.now_s
        with pytest.raises(DeadlineExceededError):
            client.read(waiting, deadline_s=2.0)
        assert 2.0 <= rig.now_s - started < 2.001
        hold.set()
        (first).release()
        assert client.counts.quarantined == 0
        client.consume(waiting)


def test_a_batch_has_one_deadline_however_many_of_its_reads_wait_for_a_place() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(max_concurrent_reads=1)
        client.consume(rig.write(EPISODE))
        refs = [rig.write(EPISODE) for _ in range(4)]
        rig.faults_of(1).drop = 1000
        started = rig.now_s
        outcomes = client.read_many(refs, deadline_s=3.0)
        assert 3.0 <= rig.now_s - started < 3.001
        assert isinstance(outcomes[0], PeerLostError | DeadlineExceededError), "it had all the time there was"
        assert [type(outcome) for outcome in outcomes[1:]] == [DeadlineExceededError] * 3
        assert nothing_is_held(rig, *(ref.slot for ref in refs))


def test_a_foreign_server_behind_the_port_is_a_protocol_error_in_time() -> None:
    def greet(endpoint: Endpoint) -> None:
        endpoint.post_send(b"SSH-2.0-OpenSSH_9.2\r\n")

    with open_rig(ports=1) as rig:
        client = rig.client()
        rig.impostor(9, greet)
        rig.publish(9)
        with pytest.raises(ProtocolError, match="not a ucxx_transport reply"):
            client.read(rig.write(EPISODE))
        assert client.counts.protocol_errors == 1
        assert client.counts.lent_buffers == 0


def test_a_false_description_of_the_schema_is_a_protocol_error() -> None:
    schema, other = (Schema([TensorSpec(name, (10,), "uint8")]) for name in "ab")
    lies = {
        "another schema": other.to_bytes(),
        "no schema": b"\xc0",
        "garbage": b"\xff" * 1000,
        "nothing": b"",
        "nesting": b"\x91" * 5000,
        "a list of 2**32": b"\xdd\xff\xff\xff\xff",
    }

    def describes(body: bytes) -> Callable[[Endpoint], None]:
        def greet(endpoint: Endpoint) -> None:
            endpoint.post_send(welcome())
            endpoint.post_send(encode_reply(ReadReply(status=Status.OK, nbytes=len(body)), body))

        return greet

    with open_rig(ports=1, ring=RingConfig(slots=8, schema=schema, prefault=False)) as rig:
        for port, (lie, body) in enumerate(lies.items(), start=20):
            client = rig.client(read_attempts=1)
            rig.impostor(port, describes(body))
            rig.publish(port)
            with pytest.raises(TransportError) as caught:
                client.read(rig.ring.write({"a": np.zeros(10, np.uint8)}))
            assert isinstance(caught.value, ProtocolError), lie
            assert client.counts.lent_buffers == 0, lie


def test_nothing_behind_the_port_is_peer_lost() -> None:
    with open_rig(ports=1) as rig:
        rig.publish(9)
        with pytest.raises(PeerLostError):
            rig.client().read(rig.write(EPISODE))


@pytest.mark.parametrize(
    ("server_token", "client_token", "words"),
    [("right", "wrong", "wrong token"), ("right", None, "ClientConfig"), (None, "right", "ServerConfig")],
)
def test_a_wrong_or_missing_token_is_told_at_once_and_not_retried(
    server_token: str | None, client_token: str | None, words: str
) -> None:
    with open_rig(ports=2, server=ServerConfig(mode="thread", token=server_token)) as rig:
        client = rig.client(token=client_token)
        ref = rig.write(EPISODE)
        with pytest.raises(AuthenticationError, match=words):
            client.read(ref)
        statistics = client.counts
        assert (statistics.unauthorized, statistics.retries, statistics.quarantined) == (1, 0, 0)
        assert rig.requests() == 0
        assert rig.ring.slot_state(ref.slot) is SlotState.READY


def test_with_the_same_token_on_both_sides_reads_work() -> None:
    with open_rig(ports=1, server=ServerConfig(mode="thread", token="secret")) as rig:
        client = rig.client(token="secret")
        for _ in range(3):
            client.consume(rig.write(EPISODE))
        assert client.counts.connections == 1
