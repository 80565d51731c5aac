"""The port and slot layers of retry, carried out: rotation, quarantine, fresh calls, all under one deadline."""

from __future__ import annotations

import struct
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Never

import numpy as np
import pytest

from tests.support.exchange_rig import ExchangeRig, SilentPeer, open_rig
from tests.support.links import endpoints_open
from tests.support.payloads import ref_to
from tests.support.rows import row
from ucxx_transport.client import Payload
from ucxx_transport.client.connections import CONNECTS_AT_ONCE
from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.ports import PROBE_S
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    ConfigError,
    DeadlineExceededError,
    PeerLostError,
    ProtocolError,
    TransportError,
)
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import Schema, SlotRef, TensorSpec
from ucxx_transport.testing import Hold
from ucxx_transport.wire.codec import encode_offer, encode_reply
from ucxx_transport.wire.frames import NONCE_BYTES, OfferedPayload, ReplyHeader, Status

EPISODE = bytes(range(256)) * 16
_BODY = struct.pack("<32sIIQ", bytes(NONCE_BYTES), 64, 0, 1 << 30)


def welcome(fingerprint: int = 0) -> bytes:
    """Of a server whose ring has this schema."""
    return encode_reply(ReplyHeader(status=Status.OK, nbytes=len(_BODY), fingerprint=fingerprint), _BODY)


def nothing_is_held(rig: ExchangeRig, *refs: SlotRef) -> bool:
    """Whether, once both sides have come to rest, every slot is READY and none is held."""
    rig.advance(30.0)  # beyond the server's acknowledgement limit and its sweep
    return rig.states(*refs) == [SlotState.READY] * len(refs)


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
            jobs = [client.core.begin((rig.write(EPISODE),)) for _ in range(2)]
            client.outcomes(*jobs)
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
        client.outcomes(*(client.core.begin((ref,)) for ref in refs[2:]))
        rig.settle()
        assert rig.statistics(1).delivered == 1


def test_a_port_that_keeps_failing_is_counted_each_time_and_logged_once(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    def logged() -> int:
        return [event["event"] for event in log_events].count("port_quarantined")

    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1, port_quarantine_s=30.0)
        ref = rig.write(EPISODE)
        rig.stop_port(1)
        for _ in range(3):
            with pytest.raises(PeerLostError):
                client.read(ref)
        assert (client.counts.peers_lost, logged()) == (3, 1)
        rig.advance(31.0)
        with pytest.raises(PeerLostError):
            client.read(ref)
        assert logged() == 2


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
        occupant.outcomes(*(occupant.core.begin((rig.write(EPISODE),)) for _ in range(2)))
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
        occupant.close()
        rig.advance(2.0)
        client.consume(ref)


def test_what_the_end_of_a_call_abandons_is_not_failed_by_a_connection_that_is_being_closed() -> None:
    def no_link(_: Reactor) -> Never:
        raise ConfigError("no link here")

    core = ClientCore({"local": "off"}, no_link)
    first, second = (ref_to(host="10.0.0.1", ports=(port,)) for port in (5001, 5002))
    abandoned = core.begin([first])
    ended = core.begin([second], on_done=lambda _: core.abandon(abandoned))  # while the first one's is being closed
    while core.reactor.poll():
        pass
    assert (abandoned.done, ended.done) == (True, True)
    assert core.statistics().failed == 1
    core.close()


def test_a_silent_server_costs_the_deadline_and_not_a_moment_more() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        client.outcomes(*(client.core.begin((rig.write(EPISODE),)) for _ in range(2)))
        ref, started = rig.write(EPISODE), rig.now_s
        rig.faults_of(1).drop = rig.faults_of(2).drop = 1000
        with pytest.raises(DeadlineExceededError) as caught:
            client.read(ref, deadline_s=3.0)
        assert 3.0 <= rig.now_s - started < 3.001
        assert isinstance(caught.value, TimeoutError)
        statistics = client.counts
        assert (statistics.deadlines, statistics.failed) == (1, 1)
        assert nothing_is_held(rig, ref)
        rig.faults_of(1).drop = rig.faults_of(2).drop = 0
        client.consume(ref)


def test_the_last_call_has_all_the_time_that_is_left_also_on_a_connection_that_lay_idle() -> None:
    with open_rig(ports=3) as rig:
        client = rig.client(read_attempts=2)
        rig.publish(1)
        client.consume(rig.write(EPISODE))
        rig.publish(2, 3, 1)
        rig.stop_port(2)
        rig.stop_port(3)
        rig.faults_of(1).hold = hold = Hold()
        job = client.begin(rig.write(EPISODE), deadline_s=8.0)
        assert (client.counts.rotations, client.counts.retries) == (1, 1)
        rig.advance(6.0)
        assert not job.done
        hold.set()
        assert isinstance(client.result(job), Payload)


def test_a_silent_port_keeps_no_buffer_from_others_once_its_connection_is_closed() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        client.outcomes(*(client.core.begin((rig.write(EPISODE),)) for _ in range(2)))
        rig.faults_of(1).drop = rig.faults_of(2).drop = 1000
        job = client.begin(rig.write(EPISODE), deadline_s=8.0)
        rig.advance(4.5)  # it is late, and may come after all
        assert client.counts.lent_buffers == 2
        rig.advance(1.0)
        assert client.counts.lent_buffers == 1
        client.abandon(job)


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


def test_a_handshake_that_has_no_answer_says_what_a_loopback_address_may_mean() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(connect_timeout_s=0.5, read_attempts=1)
        ref = rig.write(EPISODE)
        rig.faults_of(1).drop = 1000
        for host, said in (
            ("127.0.0.1", "loopback: a worker on another host"),
            ("localhost", "loopback"),
            ("10.0.0.1", ""),
        ):
            with row(host=host), pytest.raises(PeerLostError, match="is a ucxx_transport server there") as caught:
                client.read(replace(ref, host=host), deadline_s=60.0)
            assert ("loopback" in caught.value.message) == bool(said)
            assert said in caught.value.message


def test_a_deadline_that_has_passed_fails_without_a_word_against_any_port() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        with pytest.raises(DeadlineExceededError):
            client.read(ref, deadline_s=0.0)
        statistics = client.counts
        assert (statistics.quarantined, statistics.deadlines) == (0, 1)
        assert rig.requests() == 0


def test_waiting_for_room_counts_against_the_deadline_but_not_against_a_port() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=8, slot_bytes=2 << 20, prefault=False)) as rig:
        client = rig.client()
        client.consume(rig.write(EPISODE))
        slow = [rig.write(bytes(2 << 20)) for _ in range(2)]
        waiting = rig.write(EPISODE)
        hold = rig.faults_of(1).hold = Hold()
        first = client.begin(*slow, deadline_s=60.0)
        started = rig.now_s
        with pytest.raises(DeadlineExceededError):
            client.read(waiting, deadline_s=2.0)
        assert 2.0 <= rig.now_s - started < 2.001
        rig.faults_of(1).hold = None
        hold.set()
        assert all(isinstance(outcome, Payload) for outcome in client.outcomes(first))
        assert client.counts.quarantined == 0
        client.consume(waiting)


def test_a_batch_has_one_deadline_however_many_of_its_reads_wait_for_room() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=8, slot_bytes=2 << 20, prefault=False)) as rig:
        client = rig.client()
        client.consume(rig.write(EPISODE))
        refs = [rig.write(bytes(2 << 20)) for _ in range(4)]
        rig.faults_of(1).drop = 1000
        started = rig.now_s
        outcomes = client.read_many(refs, deadline_s=3.0)
        assert 3.0 <= rig.now_s - started < 3.001
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceededError] * 4
        assert nothing_is_held(rig, *refs)


class Impostor(SilentPeer):
    """Answers whatever comes on each channel with the next of its messages."""

    def __init__(self, endpoint: Endpoint, messages: Sequence[bytes]) -> None:
        for channel, message in enumerate(messages, start=1):
            endpoint.post_send(message, channel=channel)


def test_a_foreign_server_behind_the_port_is_a_protocol_error_in_time() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        rig.impostor(9, lambda endpoint: Impostor(endpoint, [b"SSH-2.0-OpenSSH_9.2\r\n"]))
        rig.publish(9)
        with pytest.raises(ProtocolError, match="not an answer of ucxx_transport"):
            client.read(rig.write(EPISODE))
        assert client.counts.protocol_errors == 1
        assert client.counts.lent_buffers == 0


def test_a_false_description_of_the_schema_is_a_protocol_error() -> None:
    schema, other = (Schema([TensorSpec(name, (10,), "uint8")]) for name in "ab")
    lies: dict[str, bytes | None] = {
        "raw bytes": None,
        "another schema": other.to_bytes(),
        "no schema": b"\xc0",
        "garbage": b"\xff" * 1000,
        "nothing": b"",
        "nesting": b"\x91" * 5000,
        "a list of 2**32": b"\xdd\xff\xff\xff\xff",
    }
    with open_rig(ports=1, ring=RingConfig(slots=8, schema=schema, prefault=False)) as rig:
        for port, (lie, body) in enumerate(lies.items(), start=20):
            client = rig.client(read_attempts=1)

            rig.publish(port)
            ref = rig.ring.write({"a": np.zeros(10, np.uint8)})
            header = ReplyHeader(
                Status.OK, ref.nbytes, ref.ring_id, ref.slot, ref.generation, ref.checksum, ref.fingerprint
            )
            answers = [welcome()]
            if body is not None:
                answers = [
                    welcome(ref.fingerprint),
                    encode_reply(ReplyHeader(status=Status.OK, nbytes=len(body)), body),
                ]
            rig.impostor(port, partial(Impostor, messages=[*answers, encode_reply(header, bytes(ref.nbytes))]))
            with row(lie=lie):
                with pytest.raises(ProtocolError):
                    client.read(ref)
                assert client.counts.lent_buffers == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_offer_of_another_schema_than_the_ring_s_is_a_protocol_error(count: int) -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(read_attempts=1)
        rig.publish(9)
        source = rig.write(EPISODE)
        picked = [OfferedPayload(slot, 1, 8, None, 0, b"") for slot in range(count)]
        body = encode_offer(picked)
        header = ReplyHeader(Status.OK, len(body), source.ring_id, fingerprint=5)
        answers = [welcome(), encode_reply(header, body)]
        answers += [
            encode_reply(ReplyHeader(Status.OK, 8, source.ring_id, each.slot, 1, fingerprint=5), bytes(8))
            for each in picked
        ]
        rig.impostor(9, partial(Impostor, messages=answers))
        take = client.core.take_call(source, 0.0, max_payloads=count, max_bytes=1 << 20, selector="oldest")
        client.core.reads.go_on(take)
        rig.run_until(lambda: take.done)
        with pytest.raises(ProtocolError, match="another schema"):
            take.result()
        rig.settle()
        assert client.counts.lent_buffers == 0


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


# --- A source that does not answer, in a batch with others ---


def two_sources(rig: ExchangeRig) -> tuple[list[SlotRef], list[SlotRef]]:
    """Payloads of a source behind port 1 and of one behind port 2 (one ring, for all the client knows two)."""
    rig.publish(1)
    first = [rig.write(EPISODE) for _ in range(3)]
    rig.publish(2)
    return first, [rig.write(EPISODE) for _ in range(3)]


RING_OF_MANY = RingConfig(slots=32, slot_bytes=8192, prefault=False)


def test_a_stopped_source_costs_a_batch_one_attempt_the_first_time_and_little_afterwards() -> None:
    with open_rig(ports=2, ring=RING_OF_MANY) as rig:
        client = rig.client()
        for refs in two_sources(rig):
            client.consume(*refs)
        thaw = rig.freeze_port(1)
        for took_s in (4.0, PROBE_S, PROBE_S):
            stopped, healthy = two_sources(rig)
            began_s = rig.now_s
            outcomes = client.read_many([*stopped, *healthy], deadline_s=8.0)
            assert [type(outcome) for outcome in outcomes] == [DeadlineExceededError] * 3 + [Payload] * 3
            assert rig.now_s - began_s <= took_s + 0.001
        thaw()
        rig.settle()
        refs = [ref for source in two_sources(rig) for ref in source]
        client.consume(*refs)


def test_a_source_that_is_slow_to_connect_is_given_up_beside_others_by_an_error_that_says_so() -> None:
    with open_rig(ports=2, ring=RING_OF_MANY) as rig:
        client = rig.client(connect_timeout_s=1.0)
        rig.faults_of(1).hold = hold = Hold()
        slow, healthy = two_sources(rig)
        began_s = rig.now_s
        outcomes = client.read_many([*slow, *healthy], deadline_s=60.0)
        assert rig.now_s - began_s == pytest.approx(1.0 + PROBE_S)
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceededError] * 3 + [Payload] * 3
        assert all(outcome.retryable for outcome in outcomes if isinstance(outcome, TransportError))
        assert "none has answered within the 0.5 s" in str(outcomes[0])
        assert "read it again, and raise connect_timeout_s" in str(outcomes[0])
        rig.faults_of(1).hold = None
        hold.set()
        client.consume(*slow)


def test_the_others_of_such_a_batch_come_at_once() -> None:
    with open_rig(ports=2, ring=RING_OF_MANY) as rig:
        client = rig.client()
        for refs in two_sources(rig):
            client.consume(*refs)
        rig.freeze_port(1)
        stopped, healthy = two_sources(rig)
        job = client.begin(*stopped, *healthy, deadline_s=8.0)
        assert [outcome is None for outcome in job.outcomes] == [True] * 3 + [False] * 3
        client.outcomes(job)


def test_a_source_in_quarantine_that_is_back_delivers_all_of_a_batch() -> None:
    with open_rig(ports=2, ring=RING_OF_MANY) as rig:
        client = rig.client()
        for refs in two_sources(rig):
            client.consume(*refs)
        rig.stop_port(1)
        stopped, healthy = two_sources(rig)
        outcomes = client.read_many([*stopped, *healthy])
        assert [type(outcome) for outcome in outcomes] == [PeerLostError] * 3 + [Payload] * 3
        rig.start_port(1)
        began_s = rig.now_s
        client.consume(*stopped, *healthy[:0])
        assert rig.now_s == began_s
        assert client.counts.quarantined >= 1


def test_a_source_in_quarantine_that_is_back_has_the_whole_deadline_once_it_has_answered_one_read() -> None:
    with open_rig(ports=2, ring=RingConfig(slots=16, slot_bytes=64 << 10, prefault=False)) as rig:
        client = rig.client()
        rig.publish(1)
        stopped = [rig.write(bytes(60_000)) for _ in range(5)]
        rig.publish(2)
        healthy = [rig.write(EPISODE) for _ in range(4)]
        client.consume(stopped[0], healthy[0])
        thaw = rig.freeze_port(1)
        client.read_many([stopped[1], healthy[1]], deadline_s=2.0)
        thaw()
        rig.faults_of(1).spare, rig.faults_of(1).drop = 2, 2  # the late payload and one more pass
        job = client.begin(*stopped[2:], *healthy[2:], deadline_s=60.0)
        rig.advance(2.0)
        assert [outcome is None for outcome in job.outcomes] == [False, True, True, False, False]
        client.abandon(job)


def test_reads_with_hardly_any_time_leave_a_connection_to_those_that_follow() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        hold = rig.faults_of(1).hold = Hold()  # connecting takes longer than any of these reads may
        for limit_ms in (0.4, 0.8, 1.6) * 10:
            with pytest.raises(DeadlineExceededError):
                client.read(rig.write(EPISODE), deadline_s=limit_ms / 1000)
        hold.set()
        rig.faults_of(1).hold = None
        rig.settle()
        client.consume(rig.write(EPISODE), deadline_s=0.0004)
        statistics = client.counts
        assert (statistics.connections, statistics.quarantined) == (1, 0)


def test_a_client_that_does_something_else_while_it_connects_blames_no_port() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client(connect_timeout_s=1.0)
        hold = rig.faults_of(1).hold = Hold()
        with pytest.raises(DeadlineExceededError):
            client.read(rig.write(EPISODE), deadline_s=0.001)
        rig.idle_alone = (client,)
        rig.faults_of(1).hold = None
        hold.set()
        rig.advance(5.0)
        rig.idle_alone = ()
        client.consume(rig.write(EPISODE))
        assert (client.counts.connections, client.counts.quarantined) == (1, 0)


def test_many_first_connects_take_turns_and_no_port_is_blamed_for_the_wait(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    ring = RingConfig(slots=64, slot_bytes=8192, prefault=False)
    with open_rig(ports=40, ring=ring) as rig:
        client = rig.client(connect_timeout_s=1.0)
        refs, hold = [], Hold()
        for number in range(1, 41):
            rig.publish(number)
            refs.append(rig.write(EPISODE))
            rig.faults_of(number).hold = hold
        job = client.begin(*refs, deadline_s=60.0)
        connected = []
        for until_s in (0.2, 0.3, 0.6):
            rig.advance(until_s - (rig.now_s - 1000.0))
            connected.append(endpoints_open(client.link))
        assert connected == [CONNECTS_AT_ONCE, 2 * CONNECTS_AT_ONCE, 40]
        assert [event["event"] for event in log_events] == ["connects_queued"]
        rig.advance(0.5)  # the first ones have had their time; the last ones began later
        assert client.counts.quarantined == CONNECTS_AT_ONCE
        hold.set()
        assert all(isinstance(outcome, Payload) for outcome in client.outcomes(job))


def test_sources_that_never_answer_hold_up_a_first_connect_to_another_one_only_briefly() -> None:
    ring = RingConfig(slots=64, slot_bytes=8192, prefault=False)
    with open_rig(ports=40, ring=ring) as rig:
        client = rig.client(connect_timeout_s=5.0)
        refs = []
        for number in range(1, 41):
            rig.publish(number)
            refs.append(rig.write(EPISODE))
            rig.faults_of(number).hold = Hold() if number < 40 else None
        began_s = rig.now_s
        job = client.begin(*refs, deadline_s=8.0)
        rig.run_until(lambda: job.outcomes[-1] is not None)
        assert rig.now_s - began_s <= 0.5
        client.abandon(job)
        for number in range(1, 40):
            hold, rig.faults_of(number).hold = rig.faults_of(number).hold, None
            assert hold is not None
            hold.set()


def test_every_time_limit_of_a_call_is_checked_where_it_comes_in() -> None:
    with open_rig(ports=1) as rig:
        client = rig.client()
        for given in (-1, -0.001, float("nan"), float("inf"), "soon", "", True, b"5s", [1]):
            with row(given=given):
                for call in (client.core.begin, client.core.discard_call):
                    with pytest.raises(ConfigError, match="deadline_s") as caught:
                        call([], given)  # type: ignore[arg-type]  # what is refused
                    assert caught.value.facts["field"] == "deadline_s"
        for accepted in ("5s", "250ms", 1, 2.5, 0):
            with row(accepted=accepted):
                client.core.begin([], accepted)
