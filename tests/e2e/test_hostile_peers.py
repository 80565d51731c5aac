"""A hostile peer costs the server that peer's connection, and no other peer anything."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from time import monotonic

import psutil
import pytest
import structlog

from tests.support.raw_peer import NONCE, Answer, RawPeer, raw_peer
from tests.support.rows import row
from tests.support.served_ring import LOOPBACK, ServedRing, client_of, read_retrying, served_ring
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from tests.support.well_behaved import trainer_at_work
from ucxx_transport import AuthenticationError, BusyError, SlotRef, SlotState
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink
from ucxx_transport.server.connection import FRAMES_POSTED, MAX_FRAMES
from ucxx_transport.wire.codec import encode_frame
from ucxx_transport.wire.frames import FRAME_BYTES, MAX_NAMES, Frame, Kind, Status

MINUTE = 60
HELLO = encode_frame(Frame(Kind.HELLO, 1, attempt=1, word=7, secret=NONCE))

log = structlog.get_logger(__name__)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedRing]:
    """One port with short limits, in a process of its own."""
    limits = {"first_frame_timeout_s": 1.0, "send_timeout_s": 5.0, "ack_timeout_s": 1.0, "idle_timeout_s": 30.0}
    with served_ring(ring={"slots": 16}, ports=1, **limits) as opened:
        yield opened


@pytest.fixture
def mortal() -> Iterator[ServedRing]:
    """The same for one test alone: its process may be ended by what comes in, and replaced."""
    with served_ring(ring={"slots": 16}, ports=1) as opened:
        yield opened


@pytest.fixture
def ref(served: ServedRing) -> Iterator[SlotRef]:
    """A payload that must be there, whole and READY, whatever the test does to it."""
    written = served.ring.write_raw(bytes(range(200)))
    yield written
    wait_until(lambda: served.ring.slot_state(written.slot) is SlotState.READY, MINUTE)
    with client_of(connect_timeout_s=1.0) as client, read_retrying(client, written) as payload:
        assert bytes(payload.buffer) == bytes(range(200))


def seeded() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    log.info("seed", seed=seed)
    return random.Random(seed)


@contextmanager
def peer_of(served: ServedRing) -> Iterator[RawPeer]:
    """A connection to the one port, which says nothing yet."""
    with raw_peer(served.server.ports[0], served.ring.ring_id) as peer:
        yield peer


def is_ready(served: ServedRing, ref: SlotRef) -> bool:
    return served.ring.slot_state(ref.slot) is SlotState.READY


def count(served: ServedRing, name: str) -> int:
    return served.server.statistics().total(name)


# Raw sockets: bytes that are not even UCX.


def listening_ports(served: ServedRing) -> list[int]:
    """Every TCP port of the server's process: its own, and the one UCX opens for its data connections."""
    pid = wait_until(lambda: served.server.statistics().pids[0], MINUTE)
    assert pid is not None
    return sorted(
        connection.laddr.port
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


def connection_to(port: int) -> socket.socket | None:
    try:
        return socket.create_connection((LOOPBACK, port), timeout=10)
    except OSError:
        return None  # the server is just being replaced: garbage may have ended it


def say(connection: socket.socket, words: bytes) -> None:
    with suppress(OSError):  # it may hang up whenever it likes
        connection.sendall(words)


def test_garbage_on_every_port_hurts_no_one_else(mortal: ServedRing) -> None:
    chance = seeded()
    with trainer_at_work(mortal) as trainer, ExitStack() as stack:
        for _ in range(120):
            connection = connection_to(chance.choice(listening_ports(mortal)))
            if connection is None:
                continue
            stack.enter_context(connection)
            say(connection, chance.randbytes(chance.choice((1, 8, 24, 100, 1000, 50_000))))
            if chance.random() < 0.5:
                if chance.random() < 0.5:  # a reset instead of an end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
        trainer.must_get(20)


def recorded_handshake() -> bytes:
    """What a UCX client says first, as its server hears it."""
    heard: list[bytes] = []

    def listen() -> None:
        connection, _ = listener.accept()
        with connection:  # its end wakes the client
            heard.append(connection.recv(65536))

    with socket.create_server((LOOPBACK, 0)) as listener:
        thread = threading.Thread(target=listen, name="recorder")
        thread.start()
        with raw_peer(listener.getsockname()[1]) as peer:
            peer.run_until(lambda: bool(heard))
        thread.join()
    return heard[0]


def test_mutated_handshakes_hurt_no_one_else(mortal: ServedRing) -> None:
    chance = seeded()
    handshake = recorded_handshake()
    assert len(handshake) > 20
    with trainer_at_work(mortal) as trainer, ExitStack() as stack:
        for _ in range(100):
            connection = connection_to(mortal.server.ports[0])
            if connection is None:
                continue
            stack.enter_context(connection)
            changed = bytearray(handshake)
            for _ in range(chance.choice((1, 1, 1, 3, 20))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            say(connection, bytes(changed[: chance.choice((len(changed), chance.randrange(1, len(changed))))]))
        trainer.must_get(20)
        log.info("server process after mutated handshakes", restarts=mortal.server.statistics().restarts)


def test_handshake_that_aborts_ucx_costs_a_restart_and_no_one_else(mortal: ServedRing) -> None:
    # Seen with UCX 1.21: another version in the address ends the process by an assertion (`address.c`, `addr_version`).
    # A UCX that has mended it passes as well.
    handshake = bytearray(recorded_handshake())
    handshake[25] ^= 8
    with trainer_at_work(mortal) as trainer:
        connection = connection_to(mortal.server.ports[0])
        assert connection is not None
        with connection:
            say(connection, bytes(handshake))
            connection.settimeout(MINUTE)
            with suppress(ConnectionResetError):
                connection.recv(4096)  # an answer, or the end of the process
        trainer.must_get(20)
        log.info("server process after that handshake", restarts=mortal.server.statistics().restarts)


def test_silent_and_slow_connections_hurt_no_one_else(served: ServedRing) -> None:
    handshake = recorded_handshake()
    with trainer_at_work(served) as trainer, ExitStack() as stack:
        silent = [connection_to(served.server.ports[0]) for _ in range(300)]
        slow = [connection_to(served.server.ports[0]) for _ in range(30)]
        for connection in filter(None, (*silent, *slow)):
            stack.enter_context(connection)
        for position in range(12):
            for connection in filter(None, slow):
                say(connection, handshake[position : position + 1])
            trainer.must_get(3)


# UCX peers that do not keep to the protocol. What else a frame may say wrongly, and when, the unit tests of the
# sessions and of the port show without UCX.


def last_words(peer: RawPeer, message: bytes) -> tuple[Status, str]:
    """What the port answers to this message, on channel 1, before it hangs up."""
    answer = peer.expect(1)
    peer.say(message)
    peer.wait_for(answer)
    assert answer.has_come
    assert peer.is_closed()
    return answer.status, answer.body.decode()


def test_bad_first_frame_is_answered_with_its_reason_and_a_hang_up(served: ServedRing) -> None:
    rows = [
        (random.Random(5).randbytes(200), "not a ucxx_transport frame"),
        (b"", "not a ucxx_transport frame"),
        (HELLO[:50], "cut short"),
        (HELLO[:4] + b"\1\0" + HELLO[6:128], "speaks protocol version 1, this side 2"),
        (HELLO[:8] + b"\2" + HELLO[9:], "cut short"),
    ]
    with trainer_at_work(served):
        for message, words in rows:
            with row(message=message), peer_of(served) as peer:
                status, text = last_words(peer, message)
                assert (status, words in text) == (Status.BAD_REQUEST, True), text


def test_frame_longer_than_any_ends_its_connection(served: ServedRing) -> None:
    with trainer_at_work(served), peer_of(served) as peer:
        peer.say(HELLO.ljust(FRAME_BYTES + 1, b"\0"))
        assert peer.is_closed()


def test_more_names_than_the_window_end_the_connection_and_nothing_else(served: ServedRing, ref: SlotRef) -> None:
    with trainer_at_work(served), peer_of(served) as peer:
        peer.greet()
        peer.begin_fetch(*[ref] * MAX_NAMES)
        peer.begin_fetch(ref)
        assert peer.is_closed()


def test_client_that_floods_its_port_with_valid_frames_is_cut_off_and_one_that_is_only_early_is_not(
    mortal: ServedRing,
) -> None:
    """UCX keeps for a port whatever comes before it is asked for."""
    pid = wait_until(lambda: mortal.server.statistics().pids[0], MINUTE)
    assert pid is not None
    with peer_of(mortal) as early, peer_of(mortal) as flooding:
        for peer in (early, flooding):
            assert peer.greet().status is Status.OK
        stop_process(pid)
        try:
            for peer, frames in ((early, MAX_FRAMES - FRAMES_POSTED), (flooding, 8 * MAX_FRAMES)):
                for _ in range(frames):
                    peer.say(peer.frame(Kind.FETCH))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert flooding.is_closed()
        assert early.ask(Kind.DESCRIBE, ring_id=mortal.ring.ring_id).status is Status.OK
    assert mortal.server.statistics().pids == (pid,)


def test_payload_that_is_never_acknowledged_is_ready_again(served: ServedRing, ref: SlotRef) -> None:
    with trainer_at_work(served), peer_of(served) as peer:
        peer.greet()
        [answer] = peer.fetch(ref)
        assert answer.status is Status.OK
        assert served.ring.slot_state(ref.slot) is SlotState.READING
        assert peer.is_closed(), "when the time for its end is over"
        wait_until(lambda: served.ring.slot_state(ref.slot) is SlotState.READY, MINUTE)


def test_reader_that_hangs_up_in_the_middle_leaves_the_payload_ready(served: ServedRing, ref: SlotRef) -> None:
    del ref  # its fixture looks whether it is there
    for _ in range(5):
        written = served.ring.write_raw(bytes(100_000))
        with peer_of(served) as peer:
            peer.greet()
            peer.begin_fetch(written)
            peer.reset()
        wait_until(partial(is_ready, served, written), MINUTE)


def test_peer_that_reads_nothing_is_closed_and_leaves_the_payloads_ready(served: ServedRing) -> None:
    large = [served.ring.write_raw(bytes(1 << 20)) for _ in range(8)]
    with trainer_at_work(served), peer_of(served) as peer:
        peer.greet()
        names = peer.names(large)
        peer.say(peer.frame(Kind.FETCH, ring_id=served.ring.ring_id, names=names))
        assert peer.is_closed()
        for written in large:
            wait_until(partial(is_ready, served, written), MINUTE)
            assert served.ring.discard(written)


def test_connection_without_a_word_is_closed_in_time(served: ServedRing) -> None:
    before = count(served, "handshake_timeouts")
    with peer_of(served) as peer:
        assert peer.is_closed()
    assert count(served, "handshake_timeouts") == before + 1


def test_client_with_a_wrong_token_gets_nothing() -> None:
    with served_ring(token="right") as served, trainer_at_work(served, token="right"):
        ref = served.ring.write_raw(b"secret")
        with client_of(token="wrong") as client, pytest.raises(AuthenticationError, match="token"):
            client.read(ref)
        assert client.statistics().quarantined == 0
        assert served.ring.slot_state(ref.slot) is SlotState.READY
        assert count(served, "unauthorized") == 1


# Too many.


def greeted(reactor: Reactor, port: int) -> tuple[RawPeer, Status | None]:
    """Connect and say HELLO, and stay; the server's status, or None when it hangs up without one."""

    def run_until(condition: Callable[[], bool]) -> None:
        until_s = monotonic() + MINUTE
        while not condition():
            assert monotonic() < until_s, "it never comes to that"
            reactor.run_once(until_s)

    peer = RawPeer(run_until)
    peer.endpoint = reactor.link.connect(LOOPBACK, port, peer)
    answer = peer.expect(1)
    peer.say(HELLO)
    peer.wait_for(answer)
    return peer, answer.status if answer.has_come else None


def test_connections_above_the_limit_are_answered_busy_and_the_others_go_on() -> None:
    with served_ring(ports=1, max_connections=4) as served, trainer_at_work(served) as trainer:
        reactor = Reactor(UCXXLink)
        try:
            port = served.server.ports[0]
            statuses = [greeted(reactor, port)[1] for _ in range(5)]
            assert statuses == [Status.OK] * 3 + [Status.BUSY] * 2
            ref = served.ring.write_raw(b"later")
            with client_of() as client, pytest.raises(BusyError):
                client.read(ref)
            assert served.ring.discard(ref)
            trainer.must_get(5)
        finally:
            reactor.close()
        with client_of() as client, read_retrying(client, served.ring.write_raw(b"now")) as payload:
            assert bytes(payload.buffer) == b"now"
        wait_until(lambda: count(served, "connections") <= 2, MINUTE)


def test_flood_of_connections_hurts_no_one_else() -> None:
    with served_ring(ports=1, max_connections=8) as served, trainer_at_work(served) as trainer:
        reactor = Reactor(UCXXLink)
        until_s = monotonic() + MINUTE
        try:
            peers: list[tuple[RawPeer, Answer]] = []
            for _ in range(150):
                peer = RawPeer(lambda _: None)
                peer.endpoint = reactor.link.connect(LOOPBACK, served.server.ports[0], peer)
                peers.append((peer, peer.expect(1)))
                peer.say(HELLO)
            while not all(answer.has_come or peer.error for peer, answer in peers):
                assert monotonic() < until_s, "some are neither answered nor lost"
                reactor.run_once(until_s)
            assert {answer.status for _, answer in peers if answer.has_come} <= {Status.OK, Status.BUSY}
        finally:
            reactor.close()
        assert count(served, "refused") > 0
        trainer.must_get(10)
        wait_until(lambda: count(served, "connections") <= 1, MINUTE)
