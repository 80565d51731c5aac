"""The asyncio client's calls in event loops that are not asyncio's own."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

import anyio
import pytest

from tests.support.port_beside import PortBeside, port_beside
from ucxx_transport.client import Payload, UCXXClient
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.testing import Hold

EPISODE = bytes(range(256)) * 16

in_trio = functools.partial(anyio.run, backend="trio")
in_uvloop = functools.partial(anyio.run, backend="asyncio", backend_options={"use_uvloop": True})
Runs = Callable[[Callable[[PortBeside], Awaitable[None]], PortBeside], None]
keeps_pipe = pytest.mark.may_leave("descriptors", reason="libuv keeps a pipe for signals as long as the process lives")
either = pytest.mark.parametrize("runs", [in_trio, pytest.param(in_uvloop, marks=keeps_pipe)], ids=["trio", "uvloop"])


async def until(beside: PortBeside, state: SlotState, *refs: SlotRef) -> None:
    with anyio.fail_after(30):
        while {beside.ring.slot_state(ref.slot) for ref in refs} != {state}:  # noqa: ASYNC110 - another thread's doing
            await anyio.sleep(0.0005)


@pytest.mark.may_leave("threads", reason="trio keeps a worker thread for ten seconds")
@either
def test_reads_one_by_one_together_and_in_a_batch(runs: Runs) -> None:
    async def main(beside: PortBeside) -> None:
        async with beside.async_client() as client:
            for _ in range(5):
                ref = beside.ring.write_raw(EPISODE)
                with await client.read(ref) as payload:
                    assert bytes(payload.buffer) == EPISODE
                await until(beside, SlotState.FREE, ref)
            seen: list[bytes] = []

            async def read(number: int) -> None:
                with await client.read(beside.ring.write_raw(bytes([number]) * 100)) as payload:
                    seen.append(bytes(payload.buffer)[:1])

            async with anyio.create_task_group() as tasks:
                for number in range(6):
                    tasks.start_soon(read, number)
            assert sorted(seen) == [bytes([number]) for number in range(6)]
            outcomes = await client.read_many([beside.ring.write_raw(EPISODE) for _ in range(4)])
            assert all(isinstance(outcome, Payload) for outcome in outcomes)
            assert await client.discard([beside.ring.write_raw(EPISODE)]) == 1
            (taken,) = await client.take(beside.ring.write_raw(EPISODE, meta={"number": 1}))
            assert taken.record == {"number": 1}

    with port_beside() as beside:
        runs(main, beside)


@either
def test_a_task_that_leaves_hands_the_reactor_on(runs: Runs) -> None:
    async def main(beside: PortBeside) -> None:
        async with beside.async_client(deadline_s=60.0) as client:
            (await client.read(beside.ring.write_raw(EPISODE))).release()
            hold = beside.faults.hold = Hold()
            refs = [beside.ring.write_raw(EPISODE) for _ in range(3)]
            came: list[int] = []

            async def read(number: int) -> None:
                (await client.read(refs[number])).release()
                came.append(number)

            async def cancel_when_all_are_asked(scope: anyio.CancelScope) -> None:
                await until(beside, SlotState.READING, *refs)
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as first:
                    tasks.start_soon(read, 1)
                    tasks.start_soon(read, 2)
                    tasks.start_soon(cancel_when_all_are_asked, first)
                    await client.read(refs[0])  # runs the reactor, until it is cancelled
                assert first.cancelled_caught
                beside.faults.hold = None
                hold.set()
            assert sorted(came) == [1, 2]
            with await client.read(refs[0]) as payload:
                assert bytes(payload.buffer) == EPISODE

    with port_beside() as beside:
        runs(main, beside)


@either
def test_a_deadline_is_kept(runs: Runs) -> None:
    async def main(beside: PortBeside) -> None:
        async with beside.async_client() as client:
            (await client.read(beside.ring.write_raw(EPISODE))).release()
            beside.faults.drop = 1000
            with pytest.raises(DeadlineExceededError):
                await client.read(beside.ring.write_raw(EPISODE), deadline_s=0.05)
            beside.faults.drop = 0

    with port_beside() as beside:
        runs(main, beside)


@either
def test_a_cancelled_read_loses_no_payload(runs: Runs) -> None:
    async def main(beside: PortBeside) -> None:
        async with beside.async_client(deadline_s=60.0) as client:
            (await client.read(beside.ring.write_raw(EPISODE))).release()
            for steps in range(10):
                ref = beside.ring.write_raw(EPISODE)
                payload = None
                with anyio.move_on_after(steps * 0.0002):
                    payload = await client.read(ref)
                if payload is None:
                    payload = await client.read(ref)
                assert bytes(payload.buffer) == EPISODE
                del payload
            assert (client.statistics().reads, client.statistics().lent_buffers) == (11, 0)

    with port_beside() as beside:
        runs(main, beside)


def test_a_client_of_another_loop_closes_cleanly_without_a_read() -> None:
    async def main() -> None:
        async with UCXXClient() as client:
            assert client.statistics().reads == 0

    in_trio(main)
