"""Operations beside a UCX request of the test's own: what ends them, and what those who wait are told."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.link.test_driver import Request, driving
from ucxx_transport.errors import PeerLostError, TransportError
from ucxx_transport.link.base import Counters
from ucxx_transport.link.driver import ProgressDriver
from ucxx_transport.link.pending import Operation, UCXXPending

pytestmark = pytest.mark.anyio


class Owner:
    """An endpoint, as its operations see it."""

    def __init__(self, driver: ProgressDriver, counters: Counters) -> None:
        self.driver = driver
        self.counters = counters
        self.in_flight: set[Operation] = set()
        self.ucx_error: type[Exception] = OSError

    def explain(self, exc: Exception) -> TransportError:
        return PeerLostError("lost", reason="reset", ucx=str(exc))


async def test_given_up_operation_wakes_who_waits_and_keeps_its_buffer_until_ucx_ends_it() -> None:
    async with driving() as (_worker, driver, counters):
        owner, request, into = Owner(driver, counters), Request(), bytearray(8)
        pending = UCXXPending(owner, memoryview(into), sending=False)
        pending.start(request)
        waiting = asyncio.ensure_future(pending.wait())
        await asyncio.sleep(0.001)
        assert not waiting.done()
        pending.give_up(PeerLostError("gone", reason="reset"))
        with pytest.raises(PeerLostError, match="gone"):
            await waiting
        with pytest.raises(PeerLostError, match="gone"):
            await pending.wait()
        assert owner.in_flight == {pending}
        with pytest.raises(BufferError):
            into.clear()  # still exported: UCX may write into it
        request.over = True
        assert pending.completed
        assert not owner.in_flight
        into.clear()


async def test_wait_ends_with_its_time_and_leaves_the_operation_in_flight() -> None:
    async with driving() as (_worker, driver, counters):
        owner, request = Owner(driver, counters), Request()
        pending = UCXXPending(owner, memoryview(bytearray(8)), sending=False)
        pending.start(request)
        with pytest.raises(TimeoutError):
            await pending.wait(asyncio.get_running_loop().time() + 0.001)
        assert owner.in_flight == {pending}
        request.over = True
        await pending.wait(asyncio.get_running_loop().time() + 60)
        assert not owner.in_flight
