"""The progress driver beside a worker of the test's own: when it polls, scans, arms and sleeps."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from ucxx_transport.link.base import Counters
from ucxx_transport.link.binding import UcxArray, UcxProbe, UcxRequest, UcxTag
from ucxx_transport.link.driver import BURST, STRETCH, TURN_S, ProgressDriver

pytestmark = pytest.mark.anyio

SPIN_S = 50.5e-6  # neither it nor a long spin is a multiple of the 10 us that each look at the clock takes here


class BrokenError(Exception):
    """What this worker's UCX raises."""


class Request:
    """Completes when told to; counts how often it is asked."""

    def __init__(self) -> None:
        self.over = False
        self.asked = 0

    @property
    def completed(self) -> bool:
        self.asked += 1
        return self.over

    def check_error(self) -> None:
        pass


class Operation:
    """As the driver sees one."""

    def __init__(self) -> None:
        self.fake = Request()
        self.request: UcxRequest | None = self.fake

    def poll(self) -> bool:
        if self.request is not None and self.request.completed:
            self.request = None
        return self.request is None


class Worker:
    """A UCX worker that moves `steps` times, and notes what is asked of it."""

    def __init__(self) -> None:
        self.epoll_file_descriptor = os.eventfd(0)
        self.steps = 0
        self.completes: dict[int, Request] = {}
        self.calls = 0
        self.armed = 0
        self.missed = 0
        self.cancelled = 0
        self.error: BrokenError | None = None

    def init_blocking_progress_mode(self) -> None:
        pass

    def progress_once(self) -> bool:
        self.calls += 1
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.calls in self.completes:
            self.completes[self.calls].over = True
            return True
        if self.steps > 0:
            self.steps -= 1
            return True
        return False

    def cancel_inflight_requests(self) -> int:
        self.cancelled += 1
        return 1

    def arm(self) -> bool:
        self.armed += 1
        if self.missed:
            self.missed -= 1
            return False
        return True

    def tag_probe(self, tag: UcxTag, tag_mask: object) -> UcxProbe:
        raise NotImplementedError

    def tag_recv(self, arr: UcxArray, tag: UcxTag) -> UcxRequest:
        raise NotImplementedError

    def wake(self) -> None:
        os.eventfd_write(self.epoll_file_descriptor, 1)

    def quiet(self) -> None:
        os.eventfd_read(self.epoll_file_descriptor)


class Clock:
    """Each look at it takes 10 microseconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10e-6
        return self.now


@asynccontextmanager
async def driving(spin_s: float = SPIN_S) -> AsyncIterator[tuple[Worker, ProgressDriver, Counters]]:
    """A driver that has gone to sleep after its first turn."""
    worker, counters = Worker(), Counters()
    driver = ProgressDriver(
        worker=worker,
        loop=asyncio.get_running_loop(),
        spin_s=spin_s,
        counters=counters,
        ucx_error=BrokenError,
        clock=Clock(),
    )
    await turns(3)
    assert counters.sleeps >= 1
    try:
        yield worker, driver, counters
    finally:
        driver.stop()
        os.close(worker.epoll_file_descriptor)


async def turns(number: int) -> None:
    """The loop has turned that often."""
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


async def test_idle_driver_does_nothing_at_all() -> None:
    async with driving() as (worker, driver, counters):
        operation = Operation()
        driver.watch(operation)
        await turns(20)
        calls, asked, sleeps = worker.calls, operation.fake.asked, counters.sleeps
        await turns(50)
        assert (worker.calls, operation.fake.asked, counters.sleeps) == (calls, asked, sleeps)


async def test_event_wakes_it_and_what_ended_is_found() -> None:
    async with driving() as (worker, driver, counters):
        operation = Operation()
        driver.watch(operation)
        await turns(20)
        worker.completes[worker.calls + 1] = operation.fake
        worker.wake()
        await turns(3)
        assert operation.request is None
        assert counters.wakeups >= 1
        worker.quiet()


async def test_turn_is_bounded_so_that_others_run_during_a_transfer() -> None:
    async with driving() as (worker, driver, _counters):
        worker.steps = 10 * BURST
        driver.kick()
        for _ in range(5):
            calls = worker.calls
            await turns(1)
            assert worker.calls - calls <= BURST
        assert worker.steps > 0


async def test_pending_operations_are_looked_at_only_after_progress() -> None:
    async with driving() as (worker, driver, _counters):
        operation = Operation()
        driver.watch(operation)
        await turns(20)
        asked = operation.fake.asked
        for _ in range(5):
            driver.kick()
            await turns(2)
        assert operation.fake.asked == asked
        worker.steps = 1
        driver.kick()
        await turns(2)
        assert operation.fake.asked > asked


async def test_event_between_the_last_progress_and_arming_is_not_missed() -> None:
    async with driving() as (worker, driver, _counters):
        operation = Operation()
        driver.watch(operation)
        await turns(20)
        worker.missed = 1
        worker.completes[worker.calls + 2] = operation.fake
        driver.kick()
        await turns(5)
        assert operation.request is None


async def test_lost_endpoint_is_cancelled_only_after_what_had_arrived() -> None:
    async with driving() as (worker, driver, _counters):
        worker.steps = 2 * BURST
        driver.cancel_soon()
        driver.kick()
        await turns(1)
        assert worker.cancelled == 0
        await turns(5)
        assert worker.cancelled == 1
        assert worker.steps == 0


async def test_wait_that_spins_ends_without_a_turn_of_the_loop() -> None:
    async with driving() as (worker, driver, counters):
        operation = Operation()
        driver.watch(operation)
        worker.completes[worker.calls + 3] = operation.fake
        assert driver.spin_for(operation)
        assert operation.request is None
        assert (counters.spins, counters.inline_completions) == (1, 1)


async def test_spin_ends_after_its_window_counted_from_the_last_progress() -> None:
    async with driving() as (worker, driver, _counters):
        operation = Operation()
        driver.watch(operation)
        calls = worker.calls
        assert not driver.spin_for(operation)
        idle = worker.calls - calls
        assert idle <= STRETCH * SPIN_S / 10e-6 + 1
        worker.steps = 7
        calls = worker.calls
        assert not driver.spin_for(operation)
        assert worker.calls - calls >= idle + 7 - 1


async def test_spin_ends_while_everything_moves_and_nothing_is_over() -> None:
    async with driving() as (worker, driver, _counters):
        operation = Operation()
        driver.watch(operation)
        worker.steps = 1_000_000
        assert not driver.spin_for(operation)
        assert worker.steps > 900_000


async def test_spins_are_given_up_when_they_do_not_pay_and_tried_again_now_and_then() -> None:
    async with driving() as (worker, driver, _counters):
        operation = Operation()
        driver.watch(operation)
        lengths = []
        for _ in range(60):
            calls = worker.calls
            assert not driver.spin_for(operation)
            lengths.append(worker.calls - calls)
        assert lengths[0] == max(lengths)
        assert lengths[20] == min(lengths) == 1  # one look, no more
        assert max(lengths[20:]) == max(lengths)
        assert lengths.count(max(lengths)) < 20


async def test_spin_stops_for_what_others_wait_for() -> None:
    async with driving() as (worker, driver, _counters):
        own, other = Operation(), Operation()
        driver.watch(own)
        driver.watch(other)
        worker.completes[worker.calls + 2] = other.fake
        calls = worker.calls
        assert not driver.spin_for(own)
        assert worker.calls - calls <= 4
        assert other.request is None
        assert driver.turn_is_over()


async def test_no_spin_at_all_when_told_so() -> None:
    async with driving(spin_s=0.0) as (worker, driver, counters):
        operation = Operation()
        driver.watch(operation)
        calls = worker.calls
        assert not driver.spin_for(operation)
        assert worker.calls == calls
        assert counters.spins == 0


async def test_inline_completions_give_the_loop_back_in_time() -> None:
    async with driving() as (worker, driver, _counters):
        rounds = 0
        while not driver.turn_is_over():
            rounds += 1
            operation = Operation()
            driver.watch(operation)
            worker.completes[worker.calls + 1] = operation.fake
            assert driver.spin_for(operation)
        assert rounds <= TURN_S / 10e-6
        armed = worker.armed
        await driver.take_turn()
        assert worker.armed == armed
        assert not driver.turn_is_over()


async def test_error_of_ucx_in_a_turn_is_counted_and_progress_goes_on() -> None:
    async with driving() as (worker, driver, counters):
        operation = Operation()
        driver.watch(operation)
        await turns(20)
        worker.error = BrokenError("now and then")
        driver.kick()
        await turns(2)
        assert counters.suppressed_errors == 1
        worker.wake()  # and what is readable does not wake the loop without end meanwhile
        calls = worker.calls
        await turns(50)
        assert worker.calls == calls
        assert driver.loop.remove_reader(worker.epoll_file_descriptor) is False
        worker.quiet()
        worker.completes[worker.calls + 1] = operation.fake
        end = anyio.current_time() + 10
        while operation.request is not None:
            assert anyio.current_time() < end, "progress has stopped"
            await anyio.sleep(0.005)


async def test_stopped_driver_leaves_the_loop() -> None:
    async with driving() as (worker, driver, _counters):
        driver.stop()
        driver.stop()
        driver.kick()
        worker.wake()
        calls = worker.calls
        await turns(10)
        assert worker.calls == calls
        worker.quiet()
