"""The blocking client: reads from threads without an event loop, and without a thread of its own."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

import ucxx_transport
from tests.support.interrupts import signalled_when
from tests.support.port_beside import PortBeside, port_beside
from tests.support.waiting import wait_until
from ucxx_transport.client import Payload, SyncUCXXClient
from ucxx_transport.client.jobs import Job
from ucxx_transport.client.reads import Reads
from ucxx_transport.errors import (
    ConfigError,
    DeadlineExceededError,
    PeerLostError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.ring import SlotState
from ucxx_transport.testing import Hold

EPISODE = bytes(range(256)) * 16


@pytest.fixture
def beside() -> Iterator[PortBeside]:
    with port_beside() as made:
        yield made


def test_a_read_over_the_link_blocks_until_the_payload_is_here(beside: PortBeside) -> None:
    with beside.client() as client:
        ref = beside.ring.write_raw(EPISODE)
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert payload.transport == "ucx"
        assert client.statistics().ucx == 1
    # Closing takes leave, so the end is under way at least; a lost one would make the slot READY.
    wait_until(lambda: beside.ring.slot_state(ref.slot) is SlotState.FREE, what="the end is in")


def test_errors_and_counts_are_those_of_the_core(beside: PortBeside) -> None:
    with beside.client() as client:
        ref = beside.ring.write_raw(EPISODE)
        beside.ring.discard(ref)
        with pytest.raises(StaleSlotError):
            client.read(ref)
        statistics = client.statistics()
        assert (statistics.failed, statistics.stale, statistics.lent_buffers) == (1, 1, 0)


def test_a_silent_server_costs_the_deadline(beside: PortBeside) -> None:
    with beside.client() as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        ref = beside.ring.write_raw(EPISODE)
        beside.faults.drop = 1000
        with pytest.raises(DeadlineExceededError):
            client.read(ref, deadline_s=0.1)
        beside.faults.drop = 0
        client.read(ref).release()


def test_many_threads_share_one_client_and_every_payload_comes_once(beside: PortBeside) -> None:
    refs = [beside.ring.write_raw(bytes([number]) * 1000) for number in range(16)]
    with beside.client() as client, ThreadPoolExecutor(8) as threads:

        def read(number: int) -> int:
            with client.read(refs[number % 16], deadline_s=30.0) as payload:
                assert bytes(payload.buffer) == bytes([number % 16]) * 1000
            return number

        readings = [threads.submit(read, number) for number in range(32)]
        errors = [reading.exception() for reading in readings]
        assert sum(error is None for error in errors) == 16
        assert all(isinstance(error, StaleSlotError) for error in errors if error is not None)
    assert beside.links_opened == 1


def test_threads_that_read_all_the_time_are_all_served(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client:
        writing = threading.Lock()

        def read() -> int:
            for _ in range(50):
                with writing:
                    ref = beside.ring.write_raw(EPISODE)
                with client.read(ref) as payload:
                    assert bytes(payload.buffer) == EPISODE
            return 50

        with ThreadPoolExecutor(4) as threads:
            assert [reading.result() for reading in [threads.submit(read) for _ in range(4)]] == [50] * 4
        assert client.statistics().reads == 200


def is_led(client: SyncUCXXClient) -> bool:
    """Whether a thread runs the client's reactor."""
    lock = client._lead.lock  # noqa: SLF001 - not to be seen otherwise
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def test_a_thread_that_follows_is_done_before_the_one_that_leads(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client, ThreadPoolExecutor(1) as threads:
        client.read(beside.ring.write_raw(EPISODE)).release()
        slow, fast = beside.ring.write_raw(EPISODE), beside.ring.write_raw(EPISODE)
        beside.faults.drop = 1
        leading = threads.submit(client.read, slow, deadline_s=600.0)
        wait_until(lambda: beside.ring.slot_state(slow.slot) is SlotState.READING, what="the first read is asked")
        client.read(fast).release()
        assert not leading.done()
        client.close()
        assert isinstance(leading.exception(), ConfigError | TransportError)


def test_a_thread_that_follows_leads_when_the_other_has_left(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client, ThreadPoolExecutor(1) as threads:
        client.read(beside.ring.write_raw(EPISODE)).release()
        hold = beside.faults.hold = Hold()
        first = threads.submit(client.read, beside.ring.write_raw(EPISODE), deadline_s=0.2)
        wait_until(lambda: first.done() or is_led(client), what="the first thread leads")
        first.add_done_callback(lambda _: hold.set())
        client.read(beside.ring.write_raw(EPISODE)).release()
        assert isinstance(first.exception(), DeadlineExceededError)


def test_a_batch_comes_in_order_with_its_errors_in_place(beside: PortBeside) -> None:
    refs = [beside.ring.write_raw(bytes([number]) * 100) for number in range(4)]
    beside.ring.discard(refs[2])
    with beside.client() as client:
        outcomes = client.read_many(refs)
        assert isinstance(outcomes[2], StaleSlotError)
        for number in (0, 1, 3):
            payload = outcomes[number]
            assert isinstance(payload, Payload)
            assert bytes(payload.buffer) == bytes([number]) * 100


def test_a_batch_mixes_this_host_and_others(beside: PortBeside) -> None:
    with beside.client(local="auto") as client:
        here, there = (beside.ring.write_raw(EPISODE) for _ in range(2))
        outcomes = client.read_many([here, replace(there, host_id="another host")])
        transports = [outcome.transport for outcome in outcomes if isinstance(outcome, Payload)]
        assert transports == ["view", "ucx"]


def test_no_thread_is_started_whatever_is_read(beside: PortBeside) -> None:
    before = set(threading.enumerate())
    with beside.client(local="auto") as client:
        here, there = (beside.ring.write_raw(EPISODE) for _ in range(2))
        client.read(here).release()
        assert beside.links_opened == 0
        client.read(replace(there, host_id="another host")).release()
        assert set(threading.enumerate()) <= before
    assert beside.links_opened == 1


def test_closed_twice_and_used_no_more(beside: PortBeside) -> None:
    client = beside.client()
    client.read(beside.ring.write_raw(EPISODE)).release()
    client.close()
    client.close()
    ref = beside.ring.write_raw(EPISODE)
    for call in (client.read, lambda ref: client.read_many([ref]), lambda ref: client.discard([ref])):
        with pytest.raises(ConfigError, match="closed"):
            call(ref)
    assert client.statistics().reads == 1


def test_a_client_takes_leave_of_a_server_once(beside: PortBeside) -> None:
    with beside.client() as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        wait_until(lambda: beside.ring.slot_state(0) is SlotState.FREE, what="the read's end is sent")
        beside.client_faults.spare = 100
    assert beside.client_faults.spare == 99


def test_an_interrupt_while_it_takes_leave_of_a_server_closes_a_client_all_the_same(beside: PortBeside) -> None:
    def interrupt() -> None:
        raise Interrupted

    client = beside.client()
    client.read(beside.ring.write_raw(EPISODE)).release()
    beside.faults.drop = 1000  # the server is stopped
    core = client._core  # noqa: SLF001 - an interrupt comes in its turn
    core.reactor.submit(interrupt)
    with pytest.raises(Interrupted):
        client.close()
    assert core.reactor.closed


def test_closing_while_other_threads_wait_ends_their_reads(beside: PortBeside) -> None:
    client = beside.client()
    client.read(beside.ring.write_raw(EPISODE)).release()
    refs = [beside.ring.write_raw(EPISODE) for _ in range(3)]
    beside.faults.drop = 1000
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(client.read, ref, deadline_s=60.0) for ref in refs]
        wait_until(lambda: client.statistics().lent_buffers == 3, what="the reads are under way")
        client.close()
        errors = [reading.exception(timeout=30.0) for reading in waiting]
    assert all(isinstance(error, PeerLostError | ConfigError) for error in errors)


def test_statistics_may_be_asked_for_while_other_threads_read(beside: PortBeside) -> None:
    with beside.client() as client:
        done = threading.Event()

        def read() -> None:
            try:
                for _ in range(60):
                    client.read(beside.ring.write_raw(b"x" * 100)).release()
            finally:
                done.set()

        thread = threading.Thread(target=read)
        thread.start()
        while not done.is_set():
            assert client.statistics().reads >= 0
        thread.join()
        assert client.statistics().reads == 60
    assert client.statistics().reads == 60


def test_a_forked_child_neither_uses_nor_ends_what_is_its_parents(beside: PortBeside) -> None:
    with beside.client() as client:
        client.read(beside.ring.write_raw(b"parent's")).release()
        child = os.fork()
        if child == 0:
            try:
                client.close()
                with pytest.raises(ConfigError, match="forked"):
                    client.read(beside.ring.write_raw(b"child's"))
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        client.read(beside.ring.write_raw(b"still the parent's")).release()


def test_an_interrupted_read_gives_its_payload_back_and_the_client_goes_on(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        ref = beside.ring.write_raw(EPISODE)
        hold = beside.faults.hold = Hold()
        with (
            pytest.raises(KeyboardInterrupt),
            signalled_when(lambda: beside.ring.slot_state(ref.slot) is SlotState.READING),
        ):
            client.read(ref)
        beside.faults.hold = None
        hold.set()
        with client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
        wait_until(lambda: client.statistics().lent_buffers == 0, what="the first read's buffer is back")


def test_an_interrupt_of_the_thread_that_leads_costs_the_others_nothing(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client, ThreadPoolExecutor(1) as threads:
        client.read(beside.ring.write_raw(EPISODE)).release()
        hold = beside.faults.hold = Hold()
        refs = [beside.ring.write_raw(EPISODE) for _ in range(2)]
        following: list[Future[Payload]] = []

        def followed() -> bool:
            if is_led(client) and not following:
                following.append(threads.submit(client.read, refs[1]))
            return len(client._lead.followers) == 1  # noqa: SLF001 - not to be seen otherwise

        with pytest.raises(KeyboardInterrupt), signalled_when(followed):
            client.read(refs[0])
        beside.faults.hold = None
        hold.set()
        with following[0].result(timeout=30) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_an_interrupt_of_the_thread_that_leads_while_it_starts_another_s_read_costs_that_one_nothing(
    beside: PortBeside, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_one, interrupts = Reads.start_one, [KeyboardInterrupt()]

    def interrupted_once(reads: Reads, job: Job) -> None:
        if job.refs[0] is refs[1] and interrupts:
            raise interrupts.pop()
        start_one(reads, job)

    with beside.client(deadline_s=30.0) as client, ThreadPoolExecutor(2) as threads:
        client.read(beside.ring.write_raw(EPISODE)).release()
        hold = beside.faults.hold = Hold()
        refs = [beside.ring.write_raw(EPISODE) for _ in range(2)]
        monkeypatch.setattr(Reads, "start_one", interrupted_once)
        leading = threads.submit(client.read, refs[0])
        wait_until(lambda: is_led(client), what="the other thread leads")
        following = threads.submit(client.read, refs[1])
        assert isinstance(leading.exception(60), KeyboardInterrupt)
        beside.faults.hold = None
        hold.set()
        with following.result(timeout=60) as payload:
            assert bytes(payload.buffer) == EPISODE


def test_an_interrupt_of_a_thread_that_leads_after_another_is_recovered_from(beside: PortBeside) -> None:
    def interrupt() -> None:
        raise Interrupted

    with beside.client(deadline_s=30.0) as client, ThreadPoolExecutor(2) as threads:
        core = client._core  # noqa: SLF001 - whose step is cut in two
        client.read(beside.ring.write_raw(EPISODE)).release()
        hold = beside.faults.hold = Hold()
        refs = [beside.ring.write_raw(EPISODE) for _ in range(2)]
        leading = threads.submit(client.read, refs[0], deadline_s=0.3)
        wait_until(lambda: leading.done() or is_led(client), what="another thread leads")
        leading.add_done_callback(lambda _: core.reactor.submit(interrupt))
        with pytest.raises(Interrupted):
            client.read(refs[1])
        assert isinstance(leading.exception(), DeadlineExceededError)
        assert core.damaged
        beside.faults.hold = None
        hold.set()
        with client.read(refs[1]) as payload:
            assert bytes(payload.buffer) == EPISODE
        assert not core.damaged


def test_a_discard_that_is_interrupted_goes_on_with_the_next_call(beside: PortBeside) -> None:
    def interrupt() -> None:
        raise Interrupted

    with beside.client(deadline_s=30.0) as client:
        refs = [beside.ring.write_raw(EPISODE) for _ in range(2)]
        client._core.reactor.submit(interrupt)  # noqa: SLF001 - it is cut in two while it connects
        with pytest.raises(Interrupted):
            client.discard(refs[:1])
        client.read(refs[1]).release()
        wait_until(lambda: beside.ring.slot_state(refs[0].slot) is SlotState.FREE, what="it is discarded")


OWN_CODE = str(Path(ucxx_transport.__file__).parent)


class Interrupted(BaseException):
    """What a signal handler of the test's own raises."""


def interrupted_at_random(beside: PortBeside, client: SyncUCXXClient, times: int) -> int:
    """Read while signals come, at any bytecode; returns how many reads succeeded."""
    interrupts = reads = 0
    on, over = threading.Event(), threading.Event()

    def handler(_signal: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        names = {each.f_code.co_name for each, _ in traceback.walk_stack(frame)}
        # Not while a link is opened or closed: nothing can keep an interrupt then from leaving a descriptor behind.
        is_own = frame is not None and frame.f_code.co_filename.startswith(OWN_CODE)
        if on.is_set() and is_own and not names & {"close", "repair", "_open_link"}:
            interrupts += 1
            raise Interrupted

    def send() -> None:
        chance = random.Random(5)
        while not over.wait(chance.random() * 0.004):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        while interrupts < times:
            ref = beside.ring.write_raw(EPISODE)
            with suppress(Interrupted):
                on.set()
                try:
                    with client.read(ref, deadline_s=30.0) as payload:
                        assert bytes(payload.buffer) == EPISODE
                    reads += 1
                finally:
                    on.clear()
            on.clear()
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    return reads


# An interrupt may come while a finaliser runs, where Python can only report it.
interrupts_finalisers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@interrupts_finalisers
def test_a_client_that_is_interrupted_anywhere_reads_on(beside: PortBeside) -> None:
    with beside.client() as client:
        interrupted_at_random(beside, client, 60)
        for _ in range(8):
            with client.read(beside.ring.write_raw(EPISODE), deadline_s=30.0) as payload:
                assert bytes(payload.buffer) == EPISODE
        gc.collect()
        wait_until(lambda: client.statistics().lent_buffers == 0, what="no buffer is kept")


@interrupts_finalisers
def test_interrupts_of_one_thread_cost_the_others_no_read() -> None:
    # What the interrupted reads leave unread never fills the ring: else it would overwrite what the others wrote.
    with port_beside(slots=64) as beside, beside.client(deadline_s=30.0) as client, ThreadPoolExecutor(2) as threads:
        over = threading.Event()

        def read() -> int:
            count = 0
            while not over.is_set():
                with client.read(beside.ring.write_raw(EPISODE)) as payload:
                    assert bytes(payload.buffer) == EPISODE
                count += 1
            return count

        readings = [threads.submit(read) for _ in range(2)]
        try:
            interrupted_at_random(beside, client, 40)
        finally:
            over.set()
        assert all(reading.result(timeout=60.0) > 0 for reading in readings)


def test_a_signal_handler_cannot_use_the_client_that_it_interrupts(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        hold = beside.faults.hold = Hold()
        refs = [beside.ring.write_raw(EPISODE) for _ in range(2)]
        refused: list[ConfigError] = []

        def handler(_signal: int, _frame: FrameType | None) -> None:
            try:
                client.read(refs[1])
            except ConfigError as error:
                refused.append(error)
            beside.faults.hold = None
            hold.set()

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with signalled_when(lambda: is_led(client), signal.SIGUSR1):
                client.read(refs[0]).release()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert "signal handler" in refused[0].message
        client.read(refs[1]).release()


def test_an_interrupt_of_a_start_is_none_of_a_sleep_because_the_one_before_it_was(
    beside: PortBeside, monkeypatch: pytest.MonkeyPatch
) -> None:
    with beside.client(deadline_s=30.0) as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        core, beside.faults.hold = client._core, Hold()  # noqa: SLF001 - whether it is damaged shows nowhere else
        with pytest.raises(KeyboardInterrupt), signalled_when(lambda: core.reactor.asleep):
            client.read(beside.ring.write_raw(EPISODE))
        beside.faults.hold.set()

        def cut_in_two(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(core.reads), "start_one", cut_in_two)
            with pytest.raises(KeyboardInterrupt):
                client.read(beside.ring.write_raw(EPISODE))
        assert core.damaged
        client.read(beside.ring.write_raw(EPISODE)).release()


def test_a_second_interrupt_before_the_first_is_dealt_with_leaves_a_client_that_repairs_itself(
    beside: PortBeside,
) -> None:
    with beside.client(deadline_s=30.0) as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        core, beside.faults.hold = client._core, Hold()  # noqa: SLF001 - whether it is damaged shows nowhere else

        def interrupt_again(frame: FrameType, *_: object) -> None:
            if frame.f_code.co_name == "_interrupted":  # where CPython looks for signals first
                raise KeyboardInterrupt

        def read() -> None:
            sys.settrace(interrupt_again)
            try:
                client.read(beside.ring.write_raw(EPISODE))
            finally:
                sys.settrace(None)

        with pytest.raises(KeyboardInterrupt), signalled_when(lambda: core.reactor.asleep):
            read()
        beside.faults.hold.set()
        assert core.damaged
        client.read(beside.ring.write_raw(EPISODE)).release()


def test_a_signal_handler_that_closes_the_client_which_it_interrupts_takes_no_leave(beside: PortBeside) -> None:
    with beside.client(deadline_s=30.0) as client:
        client.read(beside.ring.write_raw(EPISODE)).release()
        ref = beside.ring.write_raw(EPISODE)
        beside.faults.hold = Hold()

        def handler(_signal: int, _frame: FrameType | None) -> None:
            beside.client_faults.spare = 100
            client.close()

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            asked = signalled_when(lambda: beside.ring.slot_state(ref.slot) is SlotState.READING, signal.SIGUSR1)
            with pytest.raises((OSError, TransportError)), asked:
                client.read(ref)
        finally:
            signal.signal(signal.SIGUSR1, before)
            beside.faults.hold.set()
        assert beside.client_faults.spare == 100  # the reactor is not run inside of its own turn
