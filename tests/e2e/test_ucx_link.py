"""UCX links between real processes: deaths in every phase, stops, ends of the interpreter, strangers at the port."""

from __future__ import annotations

import contextlib
import dis
import itertools
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.e2e.programs import link_exit, link_peer
from tests.support.exhaustive import exhaustive
from tests.support.interrupts import Interrupter
from tests.support.links import endpoints_open, in_flight
from tests.support.programs import Program, program
from tests.support.rows import row
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport import link
from ucxx_transport.errors import BusyError, ConfigError, PeerLostError, ProtocolError, TransportError
from ucxx_transport.link.address import list_interfaces
from ucxx_transport.link.base import Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink
from ucxx_transport.link.ucx_api import bytes_received, tcp_sockets

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
DEADLINE_S = 30.0
LARGE_BYTES = 64 << 20
GONE = {"reset", "aborted", "refused", "cancelled"}


@dataclass
class Owner:
    """What the owner of an endpoint has heard."""

    error: TransportError | None = None

    def lost(self, error: TransportError) -> None:
        assert self.error is None
        self.error = error


@dataclass
class Here:
    """This process's link, and what its listeners took."""

    reactor: Reactor
    accepted: list[tuple[Endpoint, Owner]] = field(default_factory=list)

    @property
    def link(self) -> UCXXLink:
        """The reactor's."""
        link = self.reactor.link
        assert isinstance(link, UCXXLink)
        return link

    def until(self, condition: Callable[[], object], what: str = "the condition") -> None:
        """The condition has become true; the link has turns meanwhile."""
        end = self.reactor.now() + DEADLINE_S
        while not condition():
            assert self.reactor.now() < end, f"not in time: {what}"
            self.reactor.run_once(min(end, self.reactor.now() + 0.005))

    def turn_for(self, seconds: float) -> None:
        """Give the link turns for a while."""
        end = self.reactor.now() + seconds
        while self.reactor.now() < end:
            self.reactor.run_once(end)

    def outcome(self, operation: Operation) -> str:
        """`ok`, or the reason it failed with, or was given up."""
        self.until(lambda: operation.completed or operation.error is not None, "an operation's end")
        return "ok" if operation.error is None else str(operation.error.facts.get("reason", operation.error))

    def start(self, port: int, host: str = HOST) -> tuple[Endpoint, Owner]:
        """Begin a connection."""
        owner = Owner()
        return self.link.connect(host, port, owner), owner

    def connect(self, port: int) -> tuple[Endpoint, Owner]:
        """A connection that is up."""
        endpoint, owner = self.start(port)
        self.until(lambda: endpoint.handle or owner.error, "connected")
        assert owner.error is None
        return endpoint, owner

    def close(self, endpoint: Endpoint) -> bool:
        """Close the endpoint; whether that was clean."""
        clean: list[bool] = []
        endpoint.close(clean.append)
        self.until(lambda: clean, "closed")
        return clean[0]

    def accept(self, endpoint: Endpoint) -> Owner:
        """Own a connection that came."""
        owner = Owner()
        self.accepted.append((endpoint, owner))
        return owner

    def listen(self, port: int = 0) -> int:
        """The port of a listener."""
        return self.link.listen(port, self.accept).port

    def ask(self, endpoint: Endpoint, kind: int, buffer: bytearray) -> Operation:
        """Post a receive, and ask the peer for as many bytes."""
        receive = endpoint.post_receive(buffer, ignore)
        endpoint.post_send(link_peer.request(kind, len(buffer)))
        return receive

    def hear(self, other: Program, **expected: object) -> None:
        """The peer announces this; the link has turns meanwhile."""
        heard: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: heard.append(other.hear()))
        thread.start()
        try:
            self.until(lambda: heard, f"{expected} from the peer")
        finally:
            thread.join()
        assert heard == [expected]


def ignore(_operation: Operation) -> None:
    """Nothing is done when it ends."""


@contextmanager
def opened(lanes: str = "tcp", **ucx: str) -> Iterator[Here]:
    """A link of this process."""
    with closing(Reactor(partial(UCXXLink, shm_lanes=lanes == "shm", ucx=ucx))) as reactor:
        yield Here(reactor)


@contextmanager
def peer(lanes: str, port: int = 0) -> Iterator[tuple[Program, int]]:
    """The program at the other end, and the port it serves."""
    with program("link_peer") as other:
        yield other, other.ask(shm_lanes=lanes == "shm", port=port)["port"]


@contextmanager
def connected(lanes: str) -> Iterator[tuple[Program, Here, Endpoint, Owner]]:
    """A peer, a link, and the connection between them."""
    with peer(lanes) as (other, port), opened(lanes) as here:
        yield other, here, *here.connect(port)


def kill(other: Program) -> None:
    other.signal(signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL


@pytest.fixture(params=["tcp", exhaustive("shm")])
def lanes(request: pytest.FixtureRequest) -> str:
    """Which lanes connections on this host use."""
    chosen: str = request.param
    return chosen


BOTH_LANES = pytest.mark.parametrize("lanes", ["tcp", "shm"])
"""For what the lanes do differently: over shared memory the peer's own process copies."""


@BOTH_LANES
def test_reply_is_exact_over_the_lanes_asked_for(lanes: str) -> None:
    with connected(lanes) as (_other, here, endpoint, _owner):
        for nbytes in (1, 4096, 65536, 1 << 20, 16 << 20):
            into = bytearray(nbytes)
            assert here.outcome(here.ask(endpoint, link_peer.REPLY, into)) == "ok"
            assert into == bytes([link_peer.CONTENT]) * nbytes
        transports = here.link.transports()
        assert "tcp" in transports or transports == ("unknown",)
        assert (transports[0] in {"sysv", "posix"}) == (lanes == "shm" and transports != ("unknown",))


def test_kill_of_an_idle_peer_ends_a_pending_receive(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, owner):
        receive = endpoint.post_receive(bytearray(1 << 20), ignore)
        kill(other)
        assert here.outcome(receive) in GONE
        here.until(lambda: owner.error)
        assert not endpoint.alive
        assert here.close(endpoint)


@BOTH_LANES
def test_kill_is_seen_by_the_first_turn_after_a_time_without_any(lanes: str) -> None:
    for posted in (True, False):
        with connected(lanes) as (other, here, endpoint, owner):
            if posted:
                endpoint.post_receive(bytearray(100), ignore)
            here.reactor.poll()
            here.reactor.arm()
            kill(other)
            select.select([here.reactor.fileno()], [], [], 30)  # the kernel has said so, and nothing runs the link
            here.reactor.poll()
            here.reactor.poll()
            assert isinstance(owner.error, PeerLostError), f"posted={posted}"


def test_kill_is_seen_by_a_reactor_that_sleeps(lanes: str) -> None:
    with connected(lanes) as (other, here, _endpoint, owner):
        other.signal(signal.SIGKILL)
        end = here.reactor.now() + DEADLINE_S
        while owner.error is None:
            assert here.reactor.now() < end
            here.reactor.run_once(end)
        assert other.wait() == -signal.SIGKILL


def test_kill_before_the_reply_ends_the_receive(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        receive = here.ask(endpoint, link_peer.SILENT, bytearray(1 << 20))
        here.hear(other, request=link_peer.SILENT)
        kill(other)
        assert here.outcome(receive) in GONE
        assert here.close(endpoint)


@BOTH_LANES
def test_kill_in_the_middle_of_a_reply_ends_the_receive(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        into = bytearray(LARGE_BYTES)
        receive = here.ask(endpoint, link_peer.REPLY, into)
        here.until(lambda: into.count(link_peer.CONTENT, 0, 4 << 20) > 0)
        kill(other)
        assert here.outcome(receive) in GONE | {"ok"}
        assert here.close(endpoint)
        before = bytes(into)
        here.turn_for(0.05)
        assert into == before
        assert here.link.leaked_buffers == 0


@pytest.mark.may_leave("descriptors", reason="over shared memory, a receive that had only a part")
@pytest.mark.parametrize("seed", [1, *map(exhaustive, (0, 2, 3))])
def test_kill_in_a_stream_of_replies_ends_every_receive(lanes: str, seed: int) -> None:
    nbytes = (64 << 10, 1 << 20, 16 << 20, 700 << 10)[seed]
    with connected(lanes) as (other, here, endpoint, _owner):
        into, replies = bytearray(nbytes), random.Random(seed).randrange(40)
        ended = "ok"
        while ended == "ok":
            try:
                receive = here.ask(endpoint, link_peer.REPLY, into)
            except PeerLostError:
                break
            if replies == 0:
                other.signal(signal.SIGKILL)
            replies -= 1
            ended = here.outcome(receive)
        assert ended in GONE | {"ok"}
        assert here.close(endpoint) or lanes == "shm"  # it never ends there, and keeps its link
        assert other.wait() == -signal.SIGKILL


def test_kill_after_the_reply_is_seen_by_the_next_operation(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        assert here.outcome(here.ask(endpoint, link_peer.REPLY, bytearray(4096))) == "ok"
        kill(other)
        try:
            reason = here.outcome(endpoint.post_receive(bytearray(4096), ignore))
        except PeerLostError as exc:
            reason = str(exc.facts["reason"])
        assert reason in GONE
        assert here.close(endpoint)


def test_kill_of_the_receiver_ends_a_send_in_the_middle(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        endpoint.post_send(link_peer.request(link_peer.RECEIVE, LARGE_BYTES))
        here.hear(other, request=link_peer.RECEIVE)
        send = endpoint.post_send(bytearray(LARGE_BYTES))
        here.reactor.poll()
        kill(other)
        assert here.outcome(send) in GONE | {"ok"}
        assert here.close(endpoint)
        assert here.link.leaked_buffers == 0


def test_kill_of_a_client_is_seen_by_the_server_and_costs_nobody_else(lanes: str) -> None:
    with opened(lanes) as here:
        port = here.listen()
        clients = [link_client(port, lanes) for _ in range(2)]
        try:
            here.until(lambda: len(here.accepted) == 2)
            ends = [endpoint for endpoint, _ in here.accepted]
            for endpoint in ends:
                assert here.outcome(endpoint.post_receive(bytearray(100), ignore)) == "ok"
            receives = [endpoint.post_receive(bytearray(100), ignore) for endpoint in ends]
            clients[0].kill()
            here.until(lambda: any(owner.error for _, owner in here.accepted))
            dead = next(index for index, (_, owner) in enumerate(here.accepted) if owner.error)
            assert here.outcome(receives[dead]) in GONE
            assert here.close(ends[dead])
            assert ends[1 - dead].alive
            assert not receives[1 - dead].completed
        finally:
            for client in clients:
                client.kill()
                client.wait()


CLIENT = """
import sys
from functools import partial
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink
class Owner:
    def lost(self, error): sys.exit(str(error))
reactor = Reactor(partial(UCXXLink, shm_lanes=LANES))
endpoint = reactor.link.connect("127.0.0.1", PORT, Owner())
endpoint.post_receive(bytearray(100), lambda _: None)
endpoint.post_send(b"x" * 16)
while True:
    reactor.run_once(float("inf"))
"""


def link_client(port: int, lanes: str = "tcp") -> subprocess.Popen[bytes]:
    """A process that connects, sends one request, and waits."""
    code = CLIENT.replace("LANES", str(lanes == "shm")).replace("PORT", str(port))
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


def test_stopped_peer_is_noticed_by_the_caller_s_own_time_alone(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, owner):
        stop_process(other.pid)
        receive = here.ask(endpoint, link_peer.REPLY, bytearray(1 << 20))
        here.turn_for(0.3)
        assert (receive.completed, owner.error) == (False, None)
        assert here.close(endpoint)
        assert receive.completed


@BOTH_LANES
def test_stop_in_the_middle_of_a_transfer_never_hands_on_a_buffer_in_use(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        into = bytearray(LARGE_BYTES)
        receive = here.ask(endpoint, link_peer.REPLY, into)
        here.until(lambda: into.count(link_peer.CONTENT, 0, 4 << 20) > 0)
        stop_process(other.pid)
        here.turn_for(0.2)
        clean = here.close(endpoint)
        assert clean == receive.completed
        assert here.link.leaked_buffers == (0 if clean else 1)
        assert clean or lanes == "shm"  # over shared memory the peer's own process copies; that cannot be stopped here
        if clean:
            was = bytes(into)
            other.signal(signal.SIGCONT)
            here.hear(other, request=link_peer.REPLY)
            assert into == was


@BOTH_LANES
def test_buffer_of_a_receive_that_is_cut_off_is_never_written_again(lanes: str) -> None:
    rng = random.Random(1)
    with peer(lanes) as (_other, port), opened(lanes) as here:
        buffer = bytearray(1 << 20)
        for _ in range(50):
            endpoint, _owner = here.connect(port)
            here.ask(endpoint, link_peer.REPLY, buffer)
            here.turn_for(rng.choice([0, 0.0002, 0.0005, 0.001, 0.002]))
            assert here.close(endpoint)
            mark = rng.randrange(1, 256)
            buffer[:] = bytes([mark]) * len(buffer)
            other_end, _owner = here.connect(port)
            into = bytearray(4096)
            assert here.outcome(here.ask(other_end, link_peer.REPLY, into)) == "ok"
            assert into == bytes([link_peer.CONTENT]) * 4096
            assert buffer == bytes([mark]) * len(buffer)
            here.close(other_end)
        assert here.link.leaked_buffers == 0
        assert in_flight(here.link) == 0


def test_late_reply_to_a_closed_endpoint_reaches_no_other(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        buffer = bytearray(1 << 20)
        receive = here.ask(endpoint, link_peer.LATE, buffer)
        here.hear(other, request=link_peer.LATE)
        assert here.close(endpoint)
        assert receive.completed
        other.tell(go=True)
        fresh, _owner = here.connect(int(endpoint.peer.rpartition(":")[2]))
        into = bytearray(1 << 20)
        receive = fresh.post_receive(into, ignore)
        fresh.post_send(link_peer.request(link_peer.REPLY, 100))
        assert here.outcome(receive) == "ok"
        assert into == bytes([link_peer.CONTENT]) * 100 + bytes(len(into) - 100)
        assert buffer == bytes(len(buffer))


def test_port_of_a_killed_server_is_free_at_once(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, _owner):
        port = int(endpoint.peer.rpartition(":")[2])
        receive = endpoint.post_receive(bytearray(100), ignore)
        kill(other)
        assert here.listen(port) == port
        assert here.outcome(receive) in GONE


def test_peer_closing_is_seen_at_once(lanes: str) -> None:
    with connected(lanes) as (other, here, endpoint, owner):
        receive = here.ask(endpoint, link_peer.CLOSE, bytearray(100))
        here.hear(other, request=link_peer.CLOSE)
        assert here.outcome(receive) in GONE
        here.until(lambda: owner.error)
        assert here.close(endpoint)


def steps_of_the_owner_s_call() -> set[int]:
    """The bytecodes of `lose` between what the endpoint notes of its owner's call and the call: as if in it."""
    steps = list(dis.get_instructions(Endpoint.lose))
    noted = next(i for i, step in enumerate(steps) if (step.opname, step.argval) == ("STORE_ATTR", "alive"))
    return {step.offset for step in steps[noted + 1 :]}


def interrupted(run: Callable[[], object], at: int) -> bool:
    """Run it with an interrupt before the link's bytecode of this number; whether there are so many."""
    folder, lose, call = str(Path(link.__file__).parent), Endpoint.lose.__code__, steps_of_the_owner_s_call()
    left = at

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace = trace  # before the next: see tests/support/interrupts.py
        frame.f_trace_opcodes = True
        if event == "opcode" and not (frame.f_code is lose and frame.f_lasti in call):
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return left < 0


def lost_and_interrupted(server: Here, client: Here, port: int, at: int) -> bool:
    """The client hears of a connection's end, with an interrupt at that number; whether there are so many."""
    endpoint, owner = client.start(port)
    while not (endpoint.handle and server.accepted):
        server.reactor.poll()
        client.reactor.poll()
    receive = endpoint.post_receive(bytearray(8), ignore)
    server.accepted.pop()[0].close()
    while endpoints_open(server.link):
        server.reactor.poll()
    assert select.select([client.reactor.fileno()], [], [], DEADLINE_S)[0], "the kernel has said so"

    def hear_of_it() -> None:
        while owner.error is None:
            client.reactor.poll()

    was_interrupted = interrupted(hear_of_it, at)
    client.until(lambda: owner.error and receive.completed, f"the loss, interrupted at {at}")
    assert client.close(endpoint)
    return was_interrupted


@pytest.mark.parametrize("every", [13, exhaustive(1)])
def test_an_interrupt_at_any_bytecode_of_the_link_keeps_no_loss_from_its_owner(every: int) -> None:
    with opened() as server, opened() as client:
        port = server.listen()
        interrupts = itertools.count(0, every)
        last = next(at for at in interrupts if not lost_and_interrupted(server, client, port, at))
        assert last > 300


def test_an_interrupt_anywhere_in_the_making_of_an_endpoint_leaves_a_link_that_can_be_used_and_closed() -> None:
    with opened() as server:
        port = server.listen()
        for at in itertools.count():
            with opened() as client:
                link, interrupter = client.link, Interrupter(at, ("link/endpoint.py",))
                with contextlib.suppress(KeyboardInterrupt), interrupter:
                    link.connect(HOST, port, Owner())
                with row(where=interrupter.where):
                    assert not any(endpoint.handle for endpoint in link.endpoints.values())
                    link.close()
                    assert not link.endpoints
            server.reactor.poll()
            if interrupter.where is None:
                break
        assert at > 10


def test_a_fork_anywhere_in_the_making_of_a_link_is_known_to_all_that_was_there_before() -> None:
    codes: list[int] = []
    reactors = [Reactor(UCXXLink) for _ in range(8)]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.endswith("link/flight.py"):
            return None
        if event == "line":  # as another thread's fork may come between any two
            child = os.fork()
            if child == 0:
                os._exit(sum(not reactor.forked for reactor in reactors))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return trace

    sys.settrace(trace)
    try:
        reactors[0].link.close()
    finally:
        sys.settrace(None)
    for reactor in reactors:
        reactor.close()
    assert len(codes) > 10
    assert not any(codes)


@pytest.mark.parametrize("short", [(), ("without_descriptors",)])
def test_a_listener_that_is_closed_while_clients_connect_ends_them_and_nothing_else(short: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "tests.e2e.programs.late_clients", *short]
    environment = {**os.environ, "UCX_LOG_LEVEL": "error"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "closed with 0 clients that hear on; of its own 0 hurt\n"


@pytest.mark.parametrize("variant", link_exit.VARIANTS)
def test_interpreter_ends_cleanly_with_everything_open(lanes: str, variant: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.e2e.programs.link_exit", variant, lanes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "Traceback" not in ended.stderr


@contextmanager
def foreign_server(answer: bytes) -> Iterator[int]:
    """A TCP server that is not UCX: takes connections, says this, and nothing more."""
    with socket.create_server((HOST, 0)) as server, contextlib.ExitStack() as open_connections:

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    open_connections.enter_context(connection)
                    connection.sendall(answer)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_foreign_server_costs_at_most_the_caller_s_own_time() -> None:
    for answer in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(4096)):
        with row(answer=answer), foreign_server(answer) as port, opened() as here:
            endpoint, _owner = here.start(port)
            here.turn_for(0.5)
            assert not endpoint.handle
            assert here.close(endpoint)
            assert endpoints_open(here.link) == 0
            assert here.link.leaked_buffers == 0


def test_listener_that_has_answered_is_known() -> None:
    with foreign_server(b"") as silent, foreign_server(bytes(4096)) as talking, opened() as here:
        endpoints = [here.start(port)[0] for port in (silent, talking)]
        here.turn_for(0.2)
        assert not endpoints[0].listener_has_answered()


def test_address_that_leads_nowhere_costs_at_most_the_caller_s_own_time() -> None:
    with opened() as here:
        endpoint, _owner = here.start(5001, "203.0.113.1")
        here.turn_for(0.5)
        assert not endpoint.handle
        assert here.close(endpoint)
        assert endpoints_open(here.link) == 0


def test_garbage_at_the_port_costs_only_its_own_connection() -> None:
    rng = random.Random(5)
    with connected("tcp") as (_other, here, endpoint, _owner):
        port = int(endpoint.peer.rpartition(":")[2])
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=5) as stranger:
                stranger.sendall(rng.randbytes(rng.choice([1, 8, 64, 1000])))
        fresh, _owner = here.connect(port)
        for end in (endpoint, fresh):
            assert here.outcome(here.ask(end, link_peer.REPLY, bytearray(64))) == "ok"


@BOTH_LANES
@pytest.mark.parametrize("is_known", [False, True])
def test_messages_that_nothing_waits_for_are_discarded(lanes: str, *, is_known: bool) -> None:
    """Under a tag that is no endpoint's, or on a channel that the endpoint does not have."""
    with opened(lanes) as server, opened(lanes) as client:
        endpoint, _owner = client.start(server.listen())
        both_until(server, client, lambda: endpoint.handle and server.accepted)
        near = server.accepted[0][0]
        near.channels = 1
        tag = near.base << 16 | 9 if is_known else 7
        foreign, array = client.link.binding.lib.UCXXTag(tag), client.link.binding.make_array(bytearray(64 << 10))
        raw: Any = endpoint._ucx  # noqa: SLF001 - a peer that does not keep to the protocol
        flood = []
        while server.link.unexpected_messages < 100:
            flood.append(raw.tag_send(array, foreign))
            assert len(flood) < 10_000, "the server keeps them all"
            server.reactor.poll()
            client.reactor.poll()
        both_until(server, client, lambda: all(request.completed for request in flood))
        into = bytearray(3)
        receive = near.post_receive(into, ignore)
        endpoint.post_send(b"own")
        both_until(server, client, lambda: receive.completed)
        assert into == b"own"


def both_until(one: Here, other: Here, condition: Callable[[], object]) -> None:
    """The condition has become true; both have turns meanwhile."""

    def turned() -> object:
        other.reactor.poll()
        return condition()

    one.until(turned)


def test_half_open_connections_cost_nobody_else() -> None:
    with connected("tcp") as (_other, here, endpoint, _owner), contextlib.ExitStack() as strangers:
        port = int(endpoint.peer.rpartition(":")[2])
        for _ in range(20):
            strangers.enter_context(socket.create_connection((HOST, port), timeout=5))
        fresh, _owner = here.connect(port)
        assert here.outcome(here.ask(fresh, link_peer.REPLY, bytearray(64))) == "ok"


def test_ucx_peer_of_another_program_is_refused_as_such() -> None:
    with opened() as here:
        stranger = stock_client(here.listen())
        try:
            here.until(lambda: here.accepted)
            endpoint, owner = here.accepted[0]
            receive = endpoint.post_receive(bytearray(100), ignore)
            here.until(lambda: owner.error and receive.completed)
            assert isinstance(owner.error, ProtocolError)
            assert isinstance(receive.error, ProtocolError)
            with pytest.raises(ProtocolError):
                endpoint.post_send(b"x")
            assert here.close(endpoint)
        finally:
            stranger.kill()
            stranger.wait()


def stock_client(port: int) -> subprocess.Popen[bytes]:
    """A process that connects with ucxx's own endpoints."""
    code = (
        "import asyncio, ucxx\n"
        "async def main():\n"
        f"    endpoint = await ucxx.create_endpoint({HOST!r}, {port})\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_opening_a_link_leaves_the_environment_alone() -> None:
    code = (
        "import os\n"
        "from functools import partial\n"
        "from ucxx_transport.link.reactor import Reactor\n"
        "from ucxx_transport.link.ucx import UCXXLink\n"
        "before = dict(os.environ)\n"
        "reactor = Reactor(partial(UCXXLink, shm_lanes=True, ucx={'TLS': 'all'}))\n"
        "reactor.link\n"
        "assert dict(os.environ) == before\n"
        "reactor.close()\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX")}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, stdout=subprocess.PIPE, check=True)
    assert ended.stdout == b""


def test_settings_that_ucx_refuses_are_a_configuration_error() -> None:
    for ucx in ({"NO_SUCH_SETTING": "1"}, {"TLS": "no_such_transport"}, {"TCP_TX_SEG_SIZE": "1G"}):
        with row(ucx=ucx), opened(**ucx) as here, pytest.raises(ConfigError):
            here.link.progress()


def test_environment_that_leaves_no_network_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, str]] = [
        {"UCX_TLS": "self,sm"},
        {"UCX_TLS": "^tcp"},
        {"UCX_NET_DEVICES": "no_such_device:1"},
        {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth99"},
    ]
    for environment in rows:
        with row(environment=environment), monkeypatch.context() as patch, opened() as here:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(ConfigError) as caught:
                here.link.progress()
            assert all(word in str(caught.value) for pair in environment.items() for word in pair)


def test_loopback_alone_is_named_where_another_host_is_to_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    outward = [one.address for one in list_interfaces() if one.up and not one.loopback]
    if not outward:
        pytest.skip("needs an interface besides loopback")
    with opened() as server:
        port = server.listen()
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
        with opened() as client:
            _endpoint, owner = client.start(port, outward[0])
            both_until(server, client, lambda: owner.error)
            with pytest.raises(ConfigError, match=r"UCX_NET_DEVICES=lo .* nothing but loopback"):
                raise owner.error or AssertionError


def test_clients_that_die_while_they_connect_are_counted_and_logged_once(
    log_events: list[MutableMapping[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    with opened() as here:
        port = here.listen()
        clients = [link_client(port) for _ in range(3)]
        try:  # this link has no turns meanwhile
            wait_until(lambda: begun_connections(port) == 3, DEADLINE_S, what="three clients have begun")
        finally:
            for client in clients:
                client.kill()
                client.wait()
        here.until(lambda: here.link.accepts_failed == 3)
        (event,) = (event for event in log_events if event["event"] == "accept_failed")
        assert (event["port"], event["peer"].partition(":")[0]) == (port, HOST)
    assert "UCXPY" not in capfd.readouterr().err


def begun_connections(port: int) -> int:
    """How many connections that this process took at that port have sent something."""
    return sum(bytes_received(each) > 0 for each in tcp_sockets() if each.getsockname()[1] == port)


def test_process_without_descriptors_says_so_and_goes_on_with_what_it_has() -> None:
    with peer("tcp") as (_other, port), opened() as here:
        first, _owner = here.connect(port)
        with descriptors_left(20):
            started = [here.start(port) for _ in range(10)]
            here.until(lambda: all(endpoint.handle or owner.error for endpoint, owner in started))
            refused = [owner.error for _, owner in started if owner.error]
            assert len(refused) >= 3
            assert all(isinstance(error, BusyError) and "ulimit -n" in str(error) for error in refused)
            assert here.outcome(here.ask(first, link_peer.REPLY, bytearray(1000))) == "ok"
            for endpoint, _owner in started:
                assert here.close(endpoint)
            again, _owner = here.connect(port)
            assert here.outcome(here.ask(again, link_peer.REPLY, bytearray(1000))) == "ok"


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open so many further descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_sleep() -> None:
    with opened() as server, opened() as client:
        port = server.listen()
        near = [client.start(port)[0] for _ in range(16)]
        both_until(server, client, lambda: len(server.accepted) == 16)
        for endpoint in (*near, *(far for far, _ in server.accepted)):
            endpoint.post_receive(bytearray(100), ignore)
        server.turn_for(0.1)
        client.turn_for(0.1)
        for here in (server, client):
            before = here.reactor.turns
            here.turn_for(0.5)
            assert here.reactor.turns - before < 20
