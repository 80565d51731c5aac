"""What every link does the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import mmap
import random
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from tests.conformance.conftest import HOST, Sides
from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.base import Endpoint, Pending
from ucxx_transport.link.ucxx import UCXXLink

pytestmark = pytest.mark.anyio

DEADLINE_S = 20.0
LARGE_BYTES = 64 << 20


async def ended(pending: Pending) -> None:
    """The operation is over; its error is raised."""
    with anyio.fail_after(DEADLINE_S):
        await pending.wait()


async def outcome(pending: Pending) -> str:
    """`ok`, or the reason it failed with."""
    try:
        await ended(pending)
    except PeerLostError as exc:
        return str(exc.facts["reason"])
    return "ok"


async def until(condition: Callable[[], bool]) -> None:
    """The condition has become true."""
    end = anyio.current_time() + DEADLINE_S
    while not condition():
        assert anyio.current_time() < end, "not in time"
        await anyio.sleep(0.001)


def pattern(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


async def test_message_arrives_as_it_was_sent(sides: Sides) -> None:
    near, far = await sides.connect()
    for nbytes, first in itertools.product((1, 128, 8191, 8192, 65536, 300_000, 1 << 20), ("receive", "send")):
        sent, got = pattern(nbytes, 1), bytearray(nbytes)
        if first == "receive":
            receive = far.post_receive(got)
            send = near.post_send(sent)
        else:
            send = near.post_send(sent)
            await anyio.lowlevel.checkpoint()
            receive = far.post_receive(got)
        await ended(receive)
        await ended(send)
        assert (got == sent, receive.completed, send.completed) == (True,) * 3, f"{nbytes} bytes, {first} first"


async def test_messages_of_one_direction_keep_their_order(sides: Sides) -> None:
    near, far = await sides.connect()
    sizes = [random.Random(seed).choice([1, 100, 9000, 70_000, 600_000]) for seed in range(40)]
    sent = [pattern(nbytes, seed) for seed, nbytes in enumerate(sizes)]
    got = [bytearray(nbytes) for nbytes in sizes]
    receives = [far.post_receive(buffer) for buffer in got[:20]]
    sends = [near.post_send(buffer) for buffer in sent]
    receives += [far.post_receive(buffer) for buffer in got[20:]]
    for pending in (*receives, *sends):
        await ended(pending)
    assert [bytes(buffer) for buffer in got] == sent


async def test_large_message_is_exact(sides: Sides) -> None:
    near, far = await sides.connect()
    sent = np.random.default_rng(7).integers(0, 256, LARGE_BYTES, dtype=np.uint8)
    got = np.zeros(LARGE_BYTES, dtype=np.uint8)
    receive, send = far.post_receive(got), near.post_send(sent)
    await ended(receive)
    await ended(send)
    assert np.array_equal(got, sent)


async def test_shorter_message_is_a_silent_success_that_leaves_the_tail(sides: Sides) -> None:
    near, far = await sides.connect()
    for nbytes in (10, 300_000):
        got = bytearray(b"\xaa" * (2 * nbytes))
        receive = far.post_receive(got)
        near_send = near.post_send(b"\x55" * nbytes)
        await ended(receive)
        await ended(near_send)
        assert got == b"\x55" * nbytes + b"\xaa" * nbytes


async def test_empty_message_fills_one_receive(sides: Sides) -> None:
    near, far = await sides.connect()
    first, second = bytearray(4), bytearray(4)
    receives = [far.post_receive(first), far.post_receive(second)]
    for pending in (near.post_send(b""), near.post_send(b"next")):
        await ended(pending)
    for pending in receives:
        await ended(pending)
    assert (first, second) == (bytearray(4), bytearray(b"next"))


@pytest.mark.parametrize(("posted", "sent"), [(10, 100), (128, 65536), (1000, 3 << 20)])
async def test_longer_message_is_truncated_and_the_endpoint_lives(sides: Sides, posted: int, sent: int) -> None:
    near, far = await sides.connect()
    guard = bytearray(posted + 64)
    receive = far.post_receive(memoryview(guard)[:posted])
    near.post_send(b"\x77" * sent)
    assert await outcome(receive) == "truncated"
    assert guard[posted:] == bytes(64)
    assert far.alive
    got = bytearray(5)
    receive = far.post_receive(got)
    near.post_send(b"still")
    await ended(receive)
    assert got == b"still"
    assert sides.server.statistics().truncated == 1


async def test_both_directions_at_once(sides: Sides) -> None:
    near, far = await sides.connect()
    up, down = pattern(2 << 20, 3), pattern(3 << 20, 4)
    got_up, got_down = bytearray(len(up)), bytearray(len(down))
    pendings = [
        near.post_receive(got_down),
        far.post_receive(got_up),
        near.post_send(up),
        far.post_send(down),
    ]
    for pending in pendings:
        await ended(pending)
    assert (bytes(got_up), bytes(got_down)) == (up, down)


async def test_many_endpoints_never_mix(sides: Sides) -> None:
    pairs = [await sides.connect() for _ in range(20)]

    async def serve(number: int, far: Endpoint) -> None:
        request = bytearray(8)
        for turn in range(10):
            await ended(far.post_receive(request))
            assert int.from_bytes(request, "little") == 1000 * number + turn
            await ended(far.post_send(pattern(20_000, 1000 * number + turn)))

    async def ask(number: int, near: Endpoint) -> None:
        for turn in range(10):
            got = bytearray(20_000)
            receive = near.post_receive(got)
            send = near.post_send((1000 * number + turn).to_bytes(8, "little"))
            await ended(receive)
            await ended(send)
            assert got == pattern(20_000, 1000 * number + turn)

    async with asyncio.TaskGroup() as group:
        for number, (near, far) in enumerate(pairs):
            group.create_task(serve(number, far))
            group.create_task(ask(number, near))
    assert sides.client.statistics().endpoints_open == 20


async def test_cancelled_wait_leaves_the_operation_in_flight(sides: Sides) -> None:
    near, far = await sides.connect()
    got = bytearray(6)
    receive = far.post_receive(got)
    with anyio.move_on_after(0.01):
        await receive.wait()
    assert not receive.completed
    near.post_send(b"later!")
    await ended(receive)
    assert got == b"later!"


async def test_several_tasks_may_wait_for_one_operation(sides: Sides) -> None:
    near, far = await sides.connect()
    receive = far.post_receive(bytearray(1))
    tasks = [asyncio.create_task(receive.wait()) for _ in range(3)]
    await anyio.sleep(0.005)
    tasks[0].cancel()
    near.post_send(b"x")
    await ended(receive)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]


@pytest.mark.parametrize("nbytes", [100, 200_000, 8 << 20])
async def test_buffer_is_untouched_after_close_even_by_a_late_sender(sides: Sides, nbytes: int) -> None:
    near, far = await sides.connect()
    buffer = bytearray(nbytes)
    receive = far.post_receive(buffer)
    with anyio.move_on_after(0.005):
        await receive.wait()
    assert await far.close()
    assert receive.completed
    buffer[:] = b"\xee" * nbytes
    with contextlib.suppress(PeerLostError):  # it may have been seen already
        near.post_send(b"\x11" * nbytes)
    await until(lambda: not near.alive)
    assert buffer == b"\xee" * nbytes


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_buffer_is_untouched_after_close_in_the_middle_of_a_transfer(sides: Sides, turns: int) -> None:
    near, far = await sides.connect()
    buffer = bytearray(LARGE_BYTES)
    receive, send = far.post_receive(buffer), near.post_send(b"\x11" * LARGE_BYTES)
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    assert await far.close()
    assert receive.completed
    was = bytes(buffer)
    assert await outcome(send) in {"ok", "reset"}
    await until(lambda: not near.alive)
    assert buffer == was
    assert await near.close()


async def test_send_cut_off_by_close_lets_its_buffer_go(sides: Sides) -> None:
    near, _far = await sides.connect()
    source = bytearray(LARGE_BYTES)
    send = near.post_send(source)
    with pytest.raises(BufferError):
        source.extend(b"x")  # pinned while in flight
    assert await near.close()
    assert send.completed
    source.extend(b"x")


async def test_close_ends_what_is_in_flight(sides: Sides) -> None:
    near, far = await sides.connect()
    receives = [near.post_receive(bytearray(100)) for _ in range(5)]
    waits = [asyncio.create_task(outcome(pending)) for pending in receives]
    await anyio.lowlevel.checkpoint()
    assert await near.close()
    assert [await wait for wait in waits] == ["closed"] * 5
    assert sides.client.statistics().in_flight == 0
    await far.close()


async def test_close_is_idempotent_also_at_once(sides: Sides) -> None:
    near, _far = await sides.connect()
    assert await asyncio.gather(*(near.close() for _ in range(5))) == [True] * 5
    assert await near.close()
    assert near.closed
    assert not near.alive


async def test_close_goes_on_when_its_caller_is_cancelled(sides: Sides) -> None:
    near, far = await sides.connect()
    near.post_receive(bytearray(10))
    task = asyncio.create_task(near.close())
    await anyio.lowlevel.checkpoint()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not far.alive)
    assert await near.close()


async def test_closed_endpoint_refuses_operations(sides: Sides) -> None:
    near, _far = await sides.connect()
    await near.close()
    posts: list[Callable[[], Pending]] = [lambda: near.post_receive(bytearray(1)), lambda: near.post_send(b"x")]
    for post in posts:
        with pytest.raises(PeerLostError) as caught:
            post()
        assert caught.value.facts["reason"] == "closed"


async def test_peers_close_wakes_a_pending_receive(sides: Sides) -> None:
    near, far = await sides.connect()
    receive = far.post_receive(bytearray(100))
    wait = asyncio.create_task(outcome(receive))
    await anyio.lowlevel.checkpoint()
    await near.close()
    assert await wait == "reset"
    assert not far.alive
    with pytest.raises(PeerLostError):
        far.post_receive(bytearray(1))
    assert sides.server.statistics().peers_lost == 1
    assert await far.close()


async def test_peers_close_ends_a_send_nobody_received(sides: Sides) -> None:
    near, far = await sides.connect()
    send = near.post_send(bytearray(LARGE_BYTES))
    await anyio.sleep(0.01)
    await far.close()
    assert await outcome(send) == "reset"
    assert await near.close()


async def test_last_words_before_a_close_arrive(sides: Sides) -> None:
    for nbytes in (64, 1024, 8000):
        near, far = await sides.connect()
        got = bytearray(nbytes)
        receive = near.post_receive(got)
        await ended(far.post_send(pattern(nbytes, nbytes)))
        await far.close()
        await ended(receive)
        assert got == pattern(nbytes, nbytes)
        await near.close()


async def test_closed_listener_takes_no_further_connection(sides: Sides) -> None:
    near, far = await sides.connect()
    assert sides.listener is not None
    await sides.listener.close()
    await sides.listener.close()
    with pytest.raises((PeerLostError, TimeoutError)):
        with anyio.fail_after(2):
            await sides.client.connect(HOST, sides.port)
    assert len(sides.accepted) == 1
    receive = far.post_receive(bytearray(2))
    await ended(near.post_send(b"ok"))
    await ended(receive)


async def test_closed_link_has_given_its_port_back_without_a_collector(sides: Sides) -> None:
    near, far = await sides.connect()
    far.post_receive(bytearray(10))
    near.post_send(bytearray(LARGE_BYTES))
    gc.disable()
    try:
        await sides.server.aclose()
        again = await sides.client.listen(sides.port, sides.accepted.append)
    finally:
        gc.enable()
    assert again.port == sides.port


async def test_port_is_free_again_once_listener_and_endpoints_are_closed(sides: Sides) -> None:
    near, far = await sides.connect()
    assert sides.listener is not None
    port = sides.port
    await sides.listener.close()
    await near.close()
    await far.close()
    again = await sides.server.listen(port, sides.accepted.append)
    assert again.port == port


async def test_connecting_to_nothing_ends_with_a_clear_error_or_the_callers_own_timeout(sides: Sides) -> None:
    _near, _far = await sides.connect()
    for _ in range(5):
        with pytest.raises((PeerLostError, TimeoutError)) as caught:
            with anyio.fail_after(2):
                await sides.client.connect(HOST, 1)
        if isinstance(caught.value, PeerLostError):
            assert caught.value.facts["reason"] in {"refused", "unreachable", "reset"}
            assert caught.value.facts["peer"] == f"{HOST}:1"
    assert sides.client.statistics().endpoints_open == 1


async def test_cancelled_connect_leaves_nothing(sides: Sides) -> None:
    await sides.connect()
    for _ in range(10):
        task = asyncio.create_task(sides.client.connect(HOST, sides.port))
        await anyio.lowlevel.checkpoint()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: sides.client.statistics().endpoints_open <= 1 + (sides.kind == "memory") * 10)
    near, far = await sides.connect()
    receive = far.post_receive(bytearray(1))
    await ended(near.post_send(b"x"))
    await ended(receive)


async def test_port_in_use_is_a_configuration_error_that_names_it(sides: Sides) -> None:
    await sides.connect()
    for link in (sides.server, sides.client):
        with pytest.raises(ConfigError) as caught:
            await link.listen(sides.port, sides.accepted.append)
        assert caught.value.facts["port"] == sides.port


@pytest.mark.parametrize("port", [-1, 65536, 1 << 20])
async def test_impossible_port_is_a_configuration_error(sides: Sides, port: int) -> None:
    with pytest.raises(ConfigError):
        await sides.server.listen(port, sides.accepted.append)
    with pytest.raises(ConfigError):
        await sides.client.connect(HOST, port)


async def test_aclose_ends_everything_in_flight(sides: Sides) -> None:
    pairs = [await sides.connect() for _ in range(4)]
    pendings = [near.post_receive(bytearray(1000)) for near, _far in pairs]
    pendings += [near.post_send(bytearray(LARGE_BYTES)) for near, _far in pairs[:2]]
    waits = [asyncio.create_task(outcome(pending)) for pending in pendings]
    await anyio.sleep(0.002)
    with anyio.fail_after(DEADLINE_S):
        await asyncio.gather(sides.client.aclose(), sides.client.aclose())
        await sides.client.aclose()
    assert {await wait for wait in waits} <= {"closed", "reset"}
    assert sides.client.statistics().in_flight == 0
    assert sides.client.statistics().endpoints_open == 0
    assert sides.client.statistics().leaked_buffers == 0
    await until(lambda: not any(far.alive for _near, far in pairs))


async def test_closed_link_refuses_everything(sides: Sides) -> None:
    await sides.connect()
    await sides.client.aclose()
    with pytest.raises(ConfigError):
        await sides.client.connect(HOST, sides.port)
    with pytest.raises(ConfigError):
        await sides.client.listen(0, sides.accepted.append)


async def test_another_thread_is_refused(sides: Sides) -> None:
    near, _far = await sides.connect()
    caught: list[type[BaseException]] = []

    uses: list[Callable[[], Pending]] = [lambda: near.post_send(b"x"), lambda: near.post_receive(bytearray(1))]

    def elsewhere() -> None:
        for use in uses:
            try:
                use()
            except TransportError as exc:
                caught.append(type(exc))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert caught == [ConfigError, ConfigError]
    assert near.alive


async def test_messages_that_nobody_received_do_not_outlive_their_endpoint(sides: Sides) -> None:
    near, far = await sides.connect()
    for _ in range(20):
        near.post_send(bytes(1000))
    receive = far.post_receive(bytearray(1000))
    await ended(receive)
    if isinstance(sides.server, UCXXLink):
        tag, mask = sides.server.binding.lib.UCXXTag(0), sides.server.binding.lib.UCXXTagMask(0)
        worker: Any = sides.server.worker
        await until(lambda: worker.tag_probe(tag, mask).matched)
        await far.close()
        assert not worker.tag_probe(tag, mask).matched
    else:
        await far.close()
    assert 0 < sides.server.statistics().unexpected_messages < 20


async def test_statistics_count_exactly(sides: Sides) -> None:
    near, far = await sides.connect()
    receive = far.post_receive(bytearray(1000))
    await ended(near.post_send(bytes(600)))
    await ended(receive)
    open_receive = far.post_receive(bytearray(10))
    client, server = sides.client.statistics(), sides.server.statistics()
    assert (client.endpoints_connected, client.endpoints_accepted, client.endpoints_open) == (1, 0, 1)
    assert (server.endpoints_connected, server.endpoints_accepted, server.endpoints_open) == (0, 1, 1)
    assert (client.sends, client.receives, client.sent_bytes, client.in_flight, client.failed) == (1, 0, 600, 0, 0)
    assert (server.sends, server.receives, server.posted_receive_bytes, server.in_flight) == (0, 2, 1000, 1)
    await near.close()
    assert await outcome(open_receive) == "reset"
    server = sides.server.statistics()
    assert (server.in_flight, server.failed, server.peers_lost, server.leaked_buffers) == (0, 1, 1, 0)


async def test_buffers_of_every_kind_are_taken(sides: Sides) -> None:
    near, far = await sides.connect()
    region = mmap.mmap(-1, 8192)
    sources: list[Any] = [
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"xbytesx")[1:6],
        np.frombuffer(b"bytes", dtype=np.uint8),
        memoryview(region)[100:105],
        np.arange(6, dtype=np.float32).reshape(2, 3),
    ]
    region[100:105] = b"bytes"
    targets: list[Any] = [
        bytearray(5),
        memoryview(bytearray(9))[2:7],
        np.zeros(5, dtype=np.uint8),
        memoryview(region)[4096:4101],
        bytearray(5),
        np.zeros((3, 2), dtype=np.float32),
    ]
    for source, target in zip(sources, targets, strict=True):
        receive = far.post_receive(target)
        await ended(near.post_send(source))
        await ended(receive)
        assert bytes(memoryview(target).cast("B")) == bytes(memoryview(source).cast("B"))
    del sources, targets, source, target
    region.close()  # nothing pins it any more


async def test_unusable_buffers_are_refused_with_the_reason(sides: Sides) -> None:
    near, _far = await sides.connect()
    uses: list[Callable[[], Pending]] = [
        lambda: near.post_receive(b"read-only"),
        lambda: near.post_receive(memoryview(bytearray(10)).toreadonly()),
        lambda: near.post_receive(np.zeros((4, 4))[:, 1]),
        lambda: near.post_send(np.zeros((4, 4))[:, 1]),
        lambda: near.post_send([1, 2, 3]),
        lambda: near.post_send("text"),
    ]
    for use in uses:
        with pytest.raises(ConfigError):
            use()
    assert sides.client.statistics().in_flight == 0


async def test_owner_that_fails_costs_only_its_own_connection(sides: Sides) -> None:
    await sides.connect()
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context["exception"]))

    def refuse(_endpoint: Endpoint) -> None:
        raise RuntimeError("no thanks")

    other = await sides.server.listen(0, refuse)
    with contextlib.suppress(PeerLostError):
        near = await sides.client.connect(HOST, other.port)
        await until(lambda: not near.alive)
    assert [str(exc) for exc in reported] == ["no thanks"]
    near, far = await sides.connect()
    receive = far.post_receive(bytearray(1))
    await ended(near.post_send(b"x"))
    await ended(receive)


async def test_transports_in_use_are_named(sides: Sides) -> None:
    await sides.connect()
    names = sides.client.transports()
    expected = {"memory": "memory", "ucx-tcp": "tcp", "ucx-shm": "sysv"}[sides.kind]
    assert names[0] in {expected, "unknown", "posix"}


async def test_each_end_names_its_peer(sides: Sides) -> None:
    near, far = await sides.connect()
    assert near.peer == f"{HOST}:{sides.port}"
    assert far.peer
