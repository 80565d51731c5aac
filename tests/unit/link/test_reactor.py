"""The reactor: timers, submissions from anywhere, sleeps that end in time, and a link only when one is needed."""

from __future__ import annotations

import gc
import math
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import pytest

from tests.support.interrupts import signalled_when
from tests.support.rows import row
from tests.support.waiting import is_asleep
from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.base import Operation
from ucxx_transport.link.endpoint import Link, OnEndpoint
from ucxx_transport.link.reactor import STALE_TIMERS, Reactor, Timer
from ucxx_transport.machine import Wakeup
from ucxx_transport.testing import MemoryNetwork

DEADLINE_S = 20.0


class Heard:
    """Numbers that a reactor has run, and a way to wait for each."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.one = threading.Semaphore(0)

    def say(self, number: int) -> None:
        """What is submitted."""
        self.numbers.append(number)
        self.one.release()


class Clock:
    """Stands still until it is moved, but for `step_s` at each look."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


class IdleLink:
    """A link on which nothing happens but what the test says.

    Attributes:
        spins: how long each `progress` was to poll.
        moves: how many further calls of `progress` move something.
        arms: whether `arm` allows a sleep.
    """

    def __init__(self, timers: Reactor) -> None:
        self.timers = timers
        self.spins: list[float] = []
        self.moves = 0
        self.arms = True
        self.closed = 0
        self._wakeup = Wakeup()

    def progress(self, spin_s: float = 0.0) -> bool:
        self.spins.append(spin_s)
        self.moves -= 1
        return self.moves >= 0

    def arm(self) -> bool:
        return self.arms

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def close(self) -> None:
        self.closed += 1

    def connect(self, host: str, port: int, events: object) -> Any: ...
    def listen(self, port: int, on_endpoint: OnEndpoint) -> Any: ...
    def message(self, buffer: object) -> Any: ...
    def transports(self) -> tuple[str, ...]:
        return ()


idle_link: Any = IdleLink


def no_link(_timers: Reactor) -> Link:
    raise AssertionError("no link is needed")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reactor(clock: Clock) -> Iterator[Reactor]:
    """One that opens no link, on a clock that stands still."""
    with closing(Reactor(no_link, clock=clock)) as reactor:
        yield reactor


@pytest.fixture
def awake() -> Iterator[Reactor]:
    """One that opens no link, on the real clock."""
    with closing(Reactor(no_link)) as reactor:
        yield reactor


@pytest.fixture
def linked(clock: Clock) -> Iterator[tuple[Reactor, IdleLink]]:
    """One with an idle link, on a clock that stands still."""
    with closing(Reactor(idle_link, spin_s=0.01, clock=clock)) as reactor:
        link: Any = reactor.link
        yield reactor, link


def until(reactor: Reactor, condition: Callable[[], object]) -> None:
    """The condition has become true in a turn."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        reactor.run_once(end)


# --- timers -----------------------------------------------------------------------------------------------------------


def test_timers_run_when_they_are_due_in_their_order(reactor: Reactor, clock: Clock) -> None:
    ran: list[str] = []
    for when, name in ((103.0, "c"), (101.0, "a"), (102.0, "b"), (101.0, "a again")):
        reactor.call_at(when, partial(ran.append, name))
    assert reactor.next_timer_s == 101.0
    for now, expected in ((100.5, []), (101.0, ["a", "a again"]), (102.5, ["a", "a again", "b"]), (200.0, None)):
        clock.now_s = now
        with row(now=now):
            reactor.poll()
            assert ran == (expected if expected is not None else ["a", "a again", "b", "c"])
    assert reactor.next_timer_s == math.inf


def test_cancelled_timer_never_runs(reactor: Reactor, clock: Clock) -> None:
    ran: list[int] = []
    timers = [reactor.call_at(101.0 + number, partial(ran.append, number)) for number in range(4)]
    timers[0].cancel()
    timers[0].cancel()
    assert reactor.next_timer_s == 102.0
    reactor.call_at(101.5, timers[2].cancel)
    clock.now_s = 200.0
    reactor.poll()
    timers[1].cancel()  # harmless afterwards
    assert ran == [1, 3]


def test_timer_that_a_timer_sets_has_the_next_turn(reactor: Reactor) -> None:
    ran: list[int] = []

    def again() -> None:
        ran.append(len(ran))
        reactor.call_at(0.0, again)

    reactor.call_at(0.0, again)
    for turns in range(1, 5):
        reactor.poll()
        assert len(ran) == turns == reactor.turns


def test_cancelled_timers_do_not_pile_up(reactor: Reactor) -> None:
    reactor.call_at(500.0, lambda: None)
    for _ in range(5000):
        reactor.call_at(1e9, lambda: None).cancel()
    gc.collect()
    # not `isinstance`, which asks foreign proxies for their class
    left = sum(type(thing) is Timer for thing in gc.get_objects())
    assert left <= 2 * STALE_TIMERS + 2
    assert reactor.next_timer_s == 500.0


# --- submissions ------------------------------------------------------------------------------------------------------


def test_submissions_run_in_their_order_and_theirs_in_the_next_turn(reactor: Reactor) -> None:
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        reactor.submit(lambda: ran.append("of the first"))

    reactor.submit(first)
    reactor.submit(lambda: ran.append("second"))
    assert reactor.poll()
    assert ran == ["first", "second"]
    assert reactor.poll()
    assert ran == ["first", "second", "of the first"]
    assert not reactor.poll()


def test_submission_from_another_thread_ends_a_sleep(awake: Reactor) -> None:
    heard = Heard()

    def ask() -> None:
        for number in range(500):
            awake.submit(partial(heard.say, number))
            assert heard.one.acquire(timeout=DEADLINE_S)

    thread = threading.Thread(target=ask)
    thread.start()
    until(awake, lambda: len(heard.numbers) == 500)
    thread.join()
    assert heard.numbers == list(range(500))


def test_submissions_from_many_threads_all_run_once(awake: Reactor) -> None:
    ran: list[tuple[int, int]] = []

    def ask(asker: int) -> None:
        rng = random.Random(asker)
        for number in range(2000):
            awake.submit(partial(ran.append, (asker, number)))
            if rng.random() < 0.01:
                time.sleep(0)

    threads = [threading.Thread(target=ask, args=(asker,)) for asker in range(4)]
    for thread in threads:
        thread.start()
    until(awake, lambda: len(ran) == 8000)
    for thread in threads:
        thread.join()
    assert sorted(ran) == [(asker, number) for asker in range(4) for number in range(2000)]


def test_submission_from_a_signal_handler_ends_a_sleep(awake: Reactor) -> None:
    ran: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: awake.submit(lambda: ran.append(number)))
    asleep = threading.Event()

    def interrupt() -> None:
        assert asleep.wait(DEADLINE_S)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        asleep.set()
        until(awake, lambda: ran)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ran == [signal.SIGUSR1]


def test_exception_of_a_signal_handler_comes_out_of_a_sleep(awake: Reactor) -> None:
    def fail(_number: int, _frame: object) -> None:
        raise InterruptedError("stop")

    before = signal.signal(signal.SIGUSR1, fail)
    main, turning = threading.get_native_id(), threading.Event()

    def never() -> bool:
        turning.set()
        return False

    try:
        with (
            pytest.raises(InterruptedError, match="stop"),
            signalled_when(lambda: turning.is_set() and is_asleep(main), signal.SIGUSR1),
        ):
            until(awake, never)
    finally:
        signal.signal(signal.SIGUSR1, before)
    ran: list[int] = []
    awake.submit(lambda: ran.append(1))
    awake.run_once(math.inf)
    assert ran == [1]


def test_action_that_raises_ends_its_turn_and_the_next_one_goes_on(reactor: Reactor) -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    ran: list[str] = []
    reactor.submit(fail)
    reactor.submit(lambda: ran.append("submitted"))
    reactor.call_at(0.0, fail)
    reactor.call_at(1.0, lambda: ran.append("timer"))
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            reactor.poll()
    reactor.poll()
    assert ran == ["submitted", "timer"]


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_turn_sleeps_until_the_next_timer(awake: Reactor) -> None:
    ran: list[float] = []
    due = awake.now() + 0.05
    awake.call_at(due, lambda: ran.append(awake.now()))
    turns = 0
    while not ran:
        awake.run_once(math.inf)
        turns += 1
    assert ran[0] >= due
    assert turns < 20  # it did not poll


def test_turn_without_time_left_does_not_sleep(linked: tuple[Reactor, IdleLink], clock: Clock) -> None:
    reactor, link = linked  # on this clock a sleep would never be seen to end, so each of these has to return
    for until_s in (clock.now_s, clock.now_s - 1, -math.inf):
        reactor.run_once(until_s)
    reactor.call_at(clock.now_s + 1e-9, lambda: None)
    reactor.run_once(math.inf)
    assert link.spins[:3] == [0.0] * 3


def test_spin_ends_before_the_next_timer_and_before_the_caller_s_time(
    linked: tuple[Reactor, IdleLink], clock: Clock
) -> None:
    reactor, link = linked
    link.arms = False  # no sleep: it is the spin that is looked at
    rows: list[tuple[float, float | None, float]] = [
        (math.inf, None, 0.01),
        (clock.now_s + 0.25, None, 0.01),
        (clock.now_s + 0.0078125, None, 0.0078125),
        (clock.now_s - 1, None, 0.0),
        (math.inf, clock.now_s + 0.00390625, 0.00390625),
    ]
    for until_s, timer_s, spin_s in rows:
        with row(until_s=until_s, timer_s=timer_s):
            timer = None if timer_s is None else reactor.call_at(timer_s, lambda: None)
            reactor.run_once(until_s)
            assert link.spins[-1] == spin_s
            if timer is not None:
                timer.cancel()


def test_turn_in_which_something_ran_neither_spins_nor_sleeps(linked: tuple[Reactor, IdleLink]) -> None:
    reactor, link = linked
    reactor.submit(lambda: None)
    reactor.run_once(math.inf)
    reactor.call_at(0.0, lambda: None)
    reactor.run_once(math.inf)
    assert link.spins == [0.0, 0.0]
    link.moves = 1
    reactor.run_once(math.inf)
    link.arms = False  # something has happened meanwhile
    reactor.run_once(math.inf)
    assert link.spins[2:] == [0.0, 0.01]  # nor does the turn after timers alone: nothing is on its way


def test_link_is_polled_unless_the_last_sleep_was_longer_than_a_poll(
    linked: tuple[Reactor, IdleLink], clock: Clock
) -> None:
    reactor, link = linked
    for step_s, spin_s in ((0.0, 0.01), (0.02, 0.01), (0.02, 0.0), (0.0, 0.0), (0.0, 0.01)):
        with row(step_s=step_s):
            clock.step_s = step_s
            reactor.run_once(clock.now_s + 10 * step_s + 0.02)  # each sleeps, for as long as the clock says
            assert link.spins[-1] == spin_s


def test_no_wake_up_is_lost_to_a_front_that_waits_for_the_descriptor(awake: Reactor) -> None:
    """A front arms and then waits without any limit of its own: what was submitted in between must wake it."""
    waiting = select.poll()
    waiting.register(awake.fileno(), select.POLLIN)
    heard = Heard()
    ran = heard.numbers

    def ask() -> None:
        rng = random.Random(3)
        for number in range(5000):
            awake.submit(partial(heard.say, number))
            assert heard.one.acquire(timeout=DEADLINE_S)
            for _ in range(rng.randrange(40)):  # hits every moment of the front's turn
                pass

    thread = threading.Thread(target=ask)
    thread.start()
    while len(ran) < 5000:
        awake.poll()
        if len(ran) < 5000 and awake.arm():
            assert waiting.poll(DEADLINE_S * 1000), f"no wake-up for the one after {len(ran)}"
    thread.join()


def test_no_wake_up_of_a_link_is_lost_to_a_front() -> None:
    network = MemoryNetwork()
    with closing(Reactor(network.link)) as server, closing(Reactor(network.link)) as client:
        echoes = Echo(server)
        port = server.link.listen(0, echoes.accept).port
        stop = threading.Event()

        def serve() -> None:
            waiting = select.poll()
            waiting.register(server.fileno(), select.POLLIN)
            while not stop.is_set():
                server.poll()
                if not stop.is_set() and server.arm():
                    assert waiting.poll(DEADLINE_S * 1000)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            near = client.link.connect("here", port, echoes)
            for number in range(1500):
                got = bytearray(8)
                over: list[Operation] = []
                near.post_receive(got, over.append, channel=1)
                near.post_send(number.to_bytes(8, "little"))
                until(client, partial(bool, over))
                assert int.from_bytes(got, "little") == number
        finally:
            stop.set()
            server.submit(lambda: None)
            thread.join()


class Echo:
    """Sends back each message of 8 bytes, on channel 1."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def accept(self, endpoint: Any) -> Echo:
        asked = bytearray(8)

        def answer(operation: Any) -> None:
            if operation.error is None:
                endpoint.post_send(bytes(asked), channel=1)
                endpoint.post_receive(asked, answer)

        endpoint.post_receive(asked, answer)
        return self

    def lost(self, error: Exception) -> None: ...


# --- the link ---------------------------------------------------------------------------------------------------------


def test_link_is_opened_when_it_is_needed_and_closed_with_the_reactor(clock: Clock) -> None:
    opened: list[Any] = []

    def factory(timers: Reactor) -> Any:
        opened.append(IdleLink(timers))
        return opened[-1]

    reactor = Reactor(factory, clock=clock)
    reactor.poll()
    assert [reactor.has_link, *opened] == [False]
    assert reactor.link is reactor.link is opened[0]
    assert opened[0].timers is reactor
    assert reactor.has_link
    reactor.close()
    reactor.close()
    assert (reactor.closed, opened[0].closed) == (True, 1)


def test_link_that_cannot_be_opened_is_tried_again_at_the_next_use(clock: Clock) -> None:
    tries: list[int] = []

    def factory(timers: Reactor) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise ConfigError("not yet")
        return IdleLink(timers)

    with closing(Reactor(factory, clock=clock)) as reactor:
        with pytest.raises(ConfigError, match="not yet"):
            assert reactor.link is None
        reactor.poll()
        assert reactor.link.transports() == ()


def test_descriptor_of_a_link_that_is_opened_later_is_waited_for(clock: Clock) -> None:
    with closing(Reactor(idle_link, clock=clock)) as reactor:
        descriptor = reactor.fileno()
        link: Any = reactor.link
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        assert reactor.arm()
        assert not waiting.poll(0)
        os.eventfd_write(link.fileno(), 1)
        assert waiting.poll(DEADLINE_S * 1000)


def test_closed_reactor_runs_nothing_and_says_so(reactor: Reactor) -> None:
    ran: list[int] = []
    reactor.submit(lambda: ran.append(1))
    reactor.call_at(0.0, lambda: ran.append(2))
    reactor.close()
    reactor.submit(lambda: ran.append(3))  # dropped, since others may not know yet
    uses: list[Callable[[], object]] = [
        reactor.poll,
        lambda: reactor.run_once(math.inf),
        lambda: reactor.link,
        reactor.fileno,
        lambda: reactor.resolve("localhost", lambda _: None),
    ]
    for number, use in enumerate(uses):
        with row(number=number), pytest.raises(ConfigError, match="closed"):
            use()
    assert ran == []


# --- names ------------------------------------------------------------------------------------------------------------


def test_numeric_address_needs_no_look_up(reactor: Reactor) -> None:
    for host, address in (("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("fd00:0::2", "fd00::2")):
        resolved: list[object] = []
        reactor.resolve(host, resolved.append)
        assert resolved == [address]


def test_name_is_looked_up_beside_the_turns(awake: Reactor) -> None:
    resolved: list[object] = []
    awake.resolve("localhost", resolved.append)
    assert resolved == []
    until(awake, lambda: resolved)
    assert resolved == ["127.0.0.1"]


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "no such host", ""])
def test_name_that_cannot_be_looked_up_is_unreachable(awake: Reactor, host: str) -> None:
    resolved: list[object] = []
    awake.resolve(host, resolved.append)
    until(awake, lambda: resolved)
    (error,) = resolved
    assert isinstance(error, PeerLostError)
    assert error.facts["reason"] == "unreachable"
