"""UCX links between real processes: deaths in every phase, stops, ends of the interpreter, strangers at the port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.e2e.programs import link_exit, link_peer
from tests.support.exhaustive import exhaustive
from tests.support.programs import Program, program
from tests.support.rows import row
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport.errors import ConfigError, PeerLostError, ProtocolError
from ucxx_transport.link.address import list_interfaces
from ucxx_transport.link.base import Endpoint, Pending
from ucxx_transport.link.ucxx import UCXXLink

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
DEADLINE_S = 30.0
LARGE_BYTES = 64 << 20
GONE = {"reset", "aborted", "refused"}


@contextmanager
def peer(lanes: str, port: int = 0) -> Iterator[tuple[Program, int]]:
    """The program at the other end, and the port it serves."""
    with program("link_peer") as other:
        yield other, other.ask(shm_lanes=lanes == "shm", port=port)["port"]


@asynccontextmanager
async def connected(lanes: str) -> AsyncIterator[tuple[Program, UCXXLink, Endpoint]]:
    """A peer, a link, and the connection between them."""
    with peer(lanes) as (other, port):
        async with UCXXLink.open(shm_lanes=lanes == "shm") as link:
            with anyio.fail_after(DEADLINE_S):
                endpoint = await link.connect(HOST, port)
            yield other, link, endpoint


async def outcome(pending: Pending) -> str:
    """`ok`, or the reason it failed with."""
    with anyio.fail_after(DEADLINE_S):
        try:
            await pending.wait()
        except PeerLostError as exc:
            return str(exc.facts["reason"])
    return "ok"


async def until(condition: Callable[[], bool]) -> None:
    """The condition has become true."""
    end = anyio.current_time() + DEADLINE_S
    while not condition():
        assert anyio.current_time() < end, "not in time"
        await anyio.sleep(0.0005)


async def hear(other: Program, **expected: object) -> None:
    """The peer has announced this."""
    assert await anyio.to_thread.run_sync(other.hear) == expected


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
async def test_reply_is_exact_over_the_lanes_asked_for(lanes: str) -> None:
    async with connected(lanes) as (_other, link, endpoint):
        for nbytes in (1, 4096, 65536, 1 << 20, 16 << 20):
            into = bytearray(nbytes)
            receive = endpoint.post_receive(into)
            endpoint.post_send(link_peer.request(link_peer.REPLY, nbytes))
            assert await outcome(receive) == "ok"
            assert into == bytes([link_peer.CONTENT]) * nbytes
        transports = link.transports()
        assert "tcp" in transports or transports == ("unknown",)
        assert (transports[0] in {"sysv", "posix"}) == (lanes == "shm" and transports != ("unknown",))


async def test_kill_of_an_idle_peer_ends_a_pending_receive(lanes: str) -> None:
    async with connected(lanes) as (other, link, endpoint):
        receive = endpoint.post_receive(bytearray(1 << 20))
        kill(other)
        assert await outcome(receive) in GONE
        assert not endpoint.alive
        assert await endpoint.close()
        assert link.statistics().peers_lost == 1


async def test_kill_before_the_reply_ends_the_receive(lanes: str) -> None:
    async with connected(lanes) as (other, _link, endpoint):
        receive = endpoint.post_receive(bytearray(1 << 20))
        endpoint.post_send(link_peer.request(link_peer.SILENT))
        await hear(other, request=link_peer.SILENT)
        kill(other)
        assert await outcome(receive) in GONE
        assert await endpoint.close()


@BOTH_LANES
async def test_kill_in_the_middle_of_a_reply_ends_the_receive(lanes: str) -> None:
    async with connected(lanes) as (other, link, endpoint):
        into = bytearray(LARGE_BYTES)
        receive = endpoint.post_receive(into)
        endpoint.post_send(link_peer.request(link_peer.REPLY, LARGE_BYTES))
        await until(lambda: into.count(link_peer.CONTENT, 0, 4 << 20) > 0)
        kill(other)
        assert await outcome(receive) in GONE | {"ok"}
        assert await endpoint.close()
        before = bytes(into)
        await anyio.sleep(0.05)
        assert into == before
        assert link.statistics().leaked_buffers == 0


@pytest.mark.parametrize("seed", [1, *map(exhaustive, (0, 2, 3))])
async def test_kill_in_a_stream_of_replies_ends_every_receive(lanes: str, seed: int) -> None:
    nbytes = (64 << 10, 1 << 20, 16 << 20, 700 << 10)[seed]
    async with connected(lanes) as (other, _link, endpoint):
        into, replies = bytearray(nbytes), random.Random(seed).randrange(40)
        ended = "ok"
        while ended == "ok":
            try:
                receive = endpoint.post_receive(into)
                endpoint.post_send(link_peer.request(link_peer.REPLY, nbytes))
            except PeerLostError:
                break
            if replies == 0:
                other.signal(signal.SIGKILL)
            replies -= 1
            ended = await outcome(receive)
        assert ended in GONE | {"ok"}
        await endpoint.close()
        assert other.wait() == -signal.SIGKILL


async def test_kill_after_the_reply_is_seen_by_the_next_operation(lanes: str) -> None:
    async with connected(lanes) as (other, _link, endpoint):
        receive = endpoint.post_receive(bytearray(4096))
        endpoint.post_send(link_peer.request(link_peer.REPLY, 4096))
        assert await outcome(receive) == "ok"
        kill(other)
        with pytest.raises(PeerLostError) as caught, anyio.fail_after(DEADLINE_S):
            await endpoint.post_receive(bytearray(4096)).wait()
        assert caught.value.facts["reason"] in GONE
        assert await endpoint.close()


async def test_kill_of_the_receiver_ends_a_send_in_the_middle(lanes: str) -> None:
    async with connected(lanes) as (other, link, endpoint):
        endpoint.post_send(link_peer.request(link_peer.RECEIVE, LARGE_BYTES))
        await hear(other, request=link_peer.RECEIVE)
        send = endpoint.post_send(bytearray(LARGE_BYTES))
        await anyio.lowlevel.checkpoint()
        kill(other)
        assert await outcome(send) in GONE | {"ok"}
        assert await endpoint.close()
        assert link.statistics().leaked_buffers == 0


async def test_kill_of_a_client_is_seen_by_the_server_and_costs_nobody_else(lanes: str) -> None:
    lost: list[str] = []
    accepted: list[Endpoint] = []
    async with UCXXLink.open(shm_lanes=lanes == "shm") as link:
        listener = await link.listen(0, accepted.append)
        clients = [link_client(listener.port, lanes) for _ in range(2)]
        try:
            await until(lambda: len(accepted) == 2)
            receives = [endpoint.post_receive(bytearray(100)) for endpoint in accepted]
            asked = [await outcome(receive) for receive in receives]
            assert asked == ["ok", "ok"]
            receives = [endpoint.post_receive(bytearray(100)) for endpoint in accepted]
            clients[0].kill()
            await until(lambda: any(not endpoint.alive for endpoint in accepted))
            dead = next(index for index, endpoint in enumerate(accepted) if not endpoint.alive)
            lost.append(await outcome(receives[dead]))
            assert await accepted[dead].close()
            assert accepted[1 - dead].alive
            assert not receives[1 - dead].completed
        finally:
            for client in clients:
                client.kill()
                client.wait()
        assert lost[0] in GONE


def link_client(port: int, lanes: str) -> subprocess.Popen[bytes]:
    """A process that connects, sends one request, and waits."""
    code = (
        "import asyncio\n"
        "from ucxx_transport.link.ucxx import UCXXLink\n"
        "async def main():\n"
        f"    async with UCXXLink.open(shm_lanes={lanes == 'shm'}) as link:\n"
        f"        endpoint = await link.connect({HOST!r}, {port})\n"
        "        receive = endpoint.post_receive(bytearray(100))\n"
        "        endpoint.post_send(b'x' * 16)\n"
        "        await receive.wait()\n"
        "asyncio.run(main())\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


async def test_stopped_peer_is_noticed_by_the_callers_own_timeout_alone(lanes: str) -> None:
    async with connected(lanes) as (other, _link, endpoint):
        stop_process(other.pid)
        receive = endpoint.post_receive(bytearray(1 << 20))
        endpoint.post_send(link_peer.request(link_peer.REPLY, 1 << 20))
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.3):
                await receive.wait()
        assert await endpoint.close()
        assert receive.completed


@BOTH_LANES
async def test_stop_in_the_middle_of_a_transfer_never_hands_on_a_buffer_in_use(lanes: str) -> None:
    async with connected(lanes) as (other, link, endpoint):
        into = bytearray(LARGE_BYTES)
        receive = endpoint.post_receive(into)
        endpoint.post_send(link_peer.request(link_peer.REPLY, LARGE_BYTES))
        await until(lambda: into.count(link_peer.CONTENT, 0, 4 << 20) > 0)
        stop_process(other.pid)
        with anyio.move_on_after(0.2):
            await outcome(receive)
        free = await endpoint.close()
        assert free == receive.completed
        assert link.statistics().leaked_buffers == (0 if free else 1)
        assert (
            free or lanes == "shm"
        )  # over shared memory the peer's own process copies; nobody can stop that from here
        if free:
            was = bytes(into)
            other.signal(signal.SIGCONT)
            await hear(other, request=link_peer.REPLY)
            assert into == was


@BOTH_LANES
async def test_buffer_of_a_cancelled_receive_is_never_written_again(lanes: str) -> None:
    rng = random.Random(1)
    with peer(lanes) as (_other, port):
        async with UCXXLink.open(shm_lanes=lanes == "shm") as link:
            buffer = bytearray(1 << 20)
            for _ in range(50):
                endpoint = await link.connect(HOST, port)
                receive = endpoint.post_receive(buffer)
                endpoint.post_send(link_peer.request(link_peer.REPLY, len(buffer)))
                with anyio.move_on_after(rng.choice([0, 0.0002, 0.0005, 0.001, 0.002])):
                    await receive.wait()
                assert await endpoint.close()
                mark = rng.randrange(1, 256)
                buffer[:] = bytes([mark]) * len(buffer)
                other_end = await link.connect(HOST, port)
                into = bytearray(4096)
                receive = other_end.post_receive(into)
                other_end.post_send(link_peer.request(link_peer.REPLY, 4096))
                assert await outcome(receive) == "ok"
                assert into == bytes([link_peer.CONTENT]) * 4096
                assert buffer == bytes([mark]) * len(buffer)
                await other_end.close()
            assert link.statistics().leaked_buffers == 0
            assert link.statistics().in_flight == 0


async def test_late_reply_to_a_closed_endpoint_reaches_nobody(lanes: str) -> None:
    async with connected(lanes) as (other, link, endpoint):
        buffer = bytearray(1 << 20)
        receive = endpoint.post_receive(buffer)
        endpoint.post_send(link_peer.request(link_peer.LATE, len(buffer)))
        await hear(other, request=link_peer.LATE)
        assert await endpoint.close()
        assert receive.completed
        other.tell(go=True)
        fresh = await link.connect(HOST, int(endpoint.peer.rpartition(":")[2]))
        into = bytearray(1 << 20)
        receive = fresh.post_receive(into)
        fresh.post_send(link_peer.request(link_peer.REPLY, 100))
        assert await outcome(receive) == "ok"
        assert into == bytes([link_peer.CONTENT]) * 100 + bytes(len(into) - 100)
        assert buffer == bytes(len(buffer))


async def test_port_of_a_killed_server_is_free_at_once(lanes: str) -> None:
    async with connected(lanes) as (other, link, endpoint):
        port = int(endpoint.peer.rpartition(":")[2])
        receive = endpoint.post_receive(bytearray(100))
        kill(other)
        listener = await link.listen(port, lambda _endpoint: None)
        assert listener.port == port
        assert await outcome(receive) in GONE


async def test_peer_closing_is_seen_at_once(lanes: str) -> None:
    async with connected(lanes) as (other, _link, endpoint):
        receive = endpoint.post_receive(bytearray(100))
        endpoint.post_send(link_peer.request(link_peer.CLOSE))
        await hear(other, request=link_peer.CLOSE)
        assert await outcome(receive) in GONE
        assert await endpoint.close()


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


async def test_foreign_server_costs_at_most_the_callers_own_timeout() -> None:
    for answer in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(4096)):
        with foreign_server(answer) as port:
            async with UCXXLink.open() as link:
                with pytest.raises((PeerLostError, ProtocolError, TimeoutError)):
                    with anyio.fail_after(0.5):
                        await link.connect(HOST, port)
                assert link.statistics().endpoints_open == 0, answer
                assert link.statistics().leaked_buffers == 0, answer


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "no such host"])
async def test_name_that_cannot_be_looked_up_is_unreachable(host: str) -> None:
    async with UCXXLink.open() as link:
        with pytest.raises(PeerLostError) as caught:
            await link.connect(host, 5001)
        assert caught.value.facts["reason"] == "unreachable"


async def test_address_that_leads_nowhere_costs_at_most_the_callers_own_timeout() -> None:
    async with UCXXLink.open() as link:
        for host in ("203.0.113.1", "no-such-host.invalid"):
            with pytest.raises((PeerLostError, TimeoutError)):
                with anyio.fail_after(0.5):
                    await link.connect(host, 5001)
        assert link.statistics().endpoints_open == 0


async def test_garbage_at_the_port_costs_only_its_own_connection() -> None:
    rng = random.Random(5)
    async with connected("tcp") as (_other, link, endpoint):
        port = int(endpoint.peer.rpartition(":")[2])
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=5) as stranger:
                stranger.sendall(rng.randbytes(rng.choice([1, 8, 64, 1000])))
        fresh = await link.connect(HOST, port)
        for end in (endpoint, fresh):
            receive = end.post_receive(bytearray(64))
            end.post_send(link_peer.request(link_peer.REPLY, 64))
            assert await outcome(receive) == "ok"


@BOTH_LANES
async def test_messages_under_a_tag_that_is_nobodys_are_thrown_away(lanes: str) -> None:
    shm = lanes == "shm"
    accepted: list[Endpoint] = []
    async with UCXXLink.open(shm_lanes=shm) as server, UCXXLink.open(shm_lanes=shm) as client:
        listener = await server.listen(0, accepted.append)
        endpoint = await client.connect(HOST, listener.port)
        foreign, array = client.binding.lib.UCXXTag(7), client.binding.make_array(bytearray(64 << 10))
        raw = endpoint._ucx  # noqa: SLF001 - a peer that does not keep to the protocol
        assert raw is not None
        sent, flood = 0, []
        while server.statistics().unexpected_messages < 100:
            flood.append(raw.tag_send(array, foreign))
            sent += 1
            assert sent < 10_000, "the server keeps them all"
            await anyio.lowlevel.checkpoint()
        await until(lambda: all(request.completed for request in flood))
        into = bytearray(3)
        receive = accepted[0].post_receive(into)
        endpoint.post_send(b"own")
        assert await outcome(receive) == "ok"
        assert into == b"own"


async def test_half_open_connections_cost_nobody_else() -> None:
    async with connected("tcp") as (_other, link, endpoint):
        port = int(endpoint.peer.rpartition(":")[2])
        with contextlib.ExitStack() as strangers:
            for _ in range(20):
                strangers.enter_context(socket.create_connection((HOST, port), timeout=5))
            fresh = await link.connect(HOST, port)
            receive = fresh.post_receive(bytearray(64))
            fresh.post_send(link_peer.request(link_peer.REPLY, 64))
            assert await outcome(receive) == "ok"


async def test_ucx_peer_of_another_program_is_refused_as_such() -> None:
    accepted: list[Endpoint] = []
    async with UCXXLink.open() as link:
        listener = await link.listen(0, accepted.append)
        stranger = stock_client(listener.port)
        try:
            await until(lambda: bool(accepted))
            receive = accepted[0].post_receive(bytearray(100))
            with pytest.raises(ProtocolError):
                with anyio.fail_after(DEADLINE_S):
                    await receive.wait()
            with pytest.raises(ProtocolError):
                accepted[0].post_send(b"x")
            assert await accepted[0].close()
        finally:
            stranger.kill()
            stranger.wait()


def stock_client(port: int) -> subprocess.Popen[bytes]:
    """A process that connects with ucxx's own endpoints."""
    code = (
        "import asyncio, ucxx\n"
        "async def main():\n"
        f"    await ucxx.create_endpoint({HOST!r}, {port})\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def test_opening_a_link_leaves_the_environment_alone() -> None:
    code = (
        "import asyncio, os\n"
        "from ucxx_transport.link.ucxx import UCXXLink\n"
        "async def main():\n"
        "    before = dict(os.environ)\n"
        "    async with UCXXLink.open(shm_lanes=True, ucx={'TLS': 'all'}):\n"
        "        assert dict(os.environ) == before\n"
        "asyncio.run(main())\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX")}
    ended = await anyio.run_process([sys.executable, "-c", code], cwd=ROOT, env=clean)
    assert ended.stdout == b""


async def test_settings_that_ucx_refuses_are_a_configuration_error() -> None:
    for ucx in ({"NO_SUCH_SETTING": "1"}, {"TLS": "no_such_transport"}, {"TCP_TX_SEG_SIZE": "1G"}):
        with pytest.raises(ConfigError):
            UCXXLink.create(ucx=ucx)


async def test_environment_that_leaves_no_network_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, str]] = [
        {"UCX_TLS": "self,sm"},
        {"UCX_TLS": "^tcp"},
        {"UCX_NET_DEVICES": "no_such_device:1"},
        {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth99"},
    ]
    for environment in rows:
        with row(environment=environment), monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(ConfigError) as caught:
                UCXXLink.create()
            assert all(word in str(caught.value) for pair in environment.items() for word in pair)


async def test_loopback_alone_is_named_where_another_host_is_to_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    outward = [one.address for one in list_interfaces() if one.up and not one.loopback]
    if not outward:
        pytest.skip("needs an interface besides loopback")
    async with UCXXLink.open() as server:
        listener = await server.listen(0, lambda _: None)
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
        async with UCXXLink.open() as client:
            with pytest.raises(ConfigError, match=r"UCX_NET_DEVICES=lo .* nothing but loopback"):
                await client.connect(outward[0], listener.port)


async def test_clients_that_die_while_they_connect_are_counted_and_logged_once(
    log_events: list[MutableMapping[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    async with UCXXLink.open() as link:
        listener = await link.listen(0, lambda _: None)
        clients = [connecting(listener.port) for _ in range(3)]
        try:  # this loop does not turn meanwhile
            wait_until(lambda: begun_connections(listener.port) == 3, DEADLINE_S, what="three clients have begun")
        finally:
            for client in clients:
                client.kill()
                client.wait()
        await until(lambda: link.statistics().accepts_failed == 3)
        (event,) = (event for event in log_events if event["event"] == "accept_failed")
        assert (event["port"], event["peer"].partition(":")[0]) == (listener.port, HOST)
    assert "UCXPY" not in capfd.readouterr().err


def begun_connections(port: int) -> int:
    """How many connections that this process took at that port have sent something: tcpi_bytes_received, tcp(7)."""
    begun = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as probe:
                    if probe.getsockname()[1:2] == (port,):
                        info = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                        begun += int.from_bytes(info[128:136], "little") > 0
    return begun


def connecting(port: int) -> subprocess.Popen[bytes]:
    """A process that connects."""
    code = (
        "import asyncio, sys\n"
        "from ucxx_transport.link.ucxx import UCXXLink\n"
        "async def main():\n"
        "    async with UCXXLink.open() as link:\n"
        f"        await link.connect({HOST!r}, {port})\n"
        "asyncio.run(main())\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


async def test_idle_connections_sleep() -> None:
    accepted: list[Endpoint] = []
    async with UCXXLink.open() as server, UCXXLink.open() as client:
        listener = await server.listen(0, accepted.append)
        near = [await client.connect(HOST, listener.port) for _ in range(16)]
        await until(lambda: len(accepted) == 16)
        receives = [endpoint.post_receive(bytearray(100)) for endpoint in (*accepted, *near)]
        waits = [asyncio.create_task(outcome(receive)) for receive in receives]
        await anyio.sleep(0.3)
        before = [link.statistics().progress_turns for link in (server, client)]
        await anyio.sleep(1.0)
        after = [link.statistics().progress_turns for link in (server, client)]
        assert all(late - early < 20 for early, late in zip(before, after, strict=True))
        await client.aclose()
        await asyncio.gather(*waits)
