"""What is in flight with UCX: each end is handed over once, in order, whatever interrupts its taking."""

from __future__ import annotations

import ctypes
import dis
import sys
from collections import deque
from types import FrameType
from typing import Any

import pytest

from ucxx_transport.link.base import Operation, Posted
from ucxx_transport.link.flight import ENDS_AT_ONCE, FUNCTIONS, Flight, native_flight

POINTER, SIZE, WORD, NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_int
WORKER = 0x1000
TRUNCATED = -9


def steps_of_a_callback() -> set[int]:
    """The bytecodes of a turn between an `on_done` that is taken and its call: as if in the callback."""
    steps = list(dis.get_instructions(Flight.turn))
    taken = next(i for i, step in enumerate(steps) if (step.opname, step.argval) == ("STORE_ATTR", "on_done"))
    called = next(i for i, step in enumerate(steps) if i > taken and step.opname == "CALL")
    return {step.offset for step in steps[taken + 1 : called + 1]}


STEPS_OF_A_CALLBACK = steps_of_a_callback()


class Parameters(ctypes.Structure):
    """The beginning of `ucp_request_param_t`."""

    _fields_ = (
        *(("mask", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("request", POINTER), ("callback", POINTER)),
        *(("datatype", WORD), ("user_data", POINTER)),
    )


class FakeUCX:
    """UCX's functions: what is posted ends when the test says so, in a later progress."""

    def __init__(self) -> None:
        self.posted: list[tuple[int, int]] = []  # callback, user_data
        self.to_end: deque[tuple[int, int]] = deque()  # request, status
        self.freed: list[int] = []
        self.cancelled: list[int] = []
        self.at_once: int | None = None
        self.moves = 0
        types: tuple[Any, ...] = (
            ctypes.CFUNCTYPE(POINTER, POINTER, POINTER, SIZE, WORD, ctypes.POINTER(Parameters)),
            ctypes.CFUNCTYPE(POINTER, POINTER, POINTER, SIZE, WORD, WORD, ctypes.POINTER(Parameters)),
            ctypes.CFUNCTYPE(POINTER, POINTER, POINTER, SIZE, ctypes.POINTER(Parameters)),
            ctypes.CFUNCTYPE(POINTER, POINTER, POINTER, SIZE, POINTER, ctypes.POINTER(Parameters)),
            ctypes.CFUNCTYPE(POINTER, POINTER, WORD, WORD, NUMBER, ctypes.POINTER(WORD)),
            ctypes.CFUNCTYPE(ctypes.c_uint, POINTER),
            ctypes.CFUNCTYPE(None, POINTER, POINTER),
            ctypes.CFUNCTYPE(None, POINTER),
        )
        calls = (
            *(self._post, self._post, self._post, self._post),
            *(self._probe, self.progress, lambda _, request: self.cancelled.append(request), self.freed.append),
        )
        self._kept: list[Any] = [make(call) for make, call in zip(types, calls, strict=True)]
        assert len(self._kept) == len(FUNCTIONS)
        self.functions = [ctypes.cast(function, POINTER).value or 0 for function in self._kept]
        self.unexpected: int | None = None

    def _post(self, *words: Any) -> int | None:
        if self.at_once is not None:
            return self.at_once % (1 << 64) or None
        parameters = words[-1].contents
        self.posted.append((parameters.callback, parameters.user_data))
        return len(self.posted)

    def _probe(self, *words: Any) -> int | None:
        info = words[-1]
        if self.unexpected is None:
            return None
        info[0] = self.unexpected
        return 1

    def progress(self, worker: int) -> int:
        assert worker == WORKER
        ends = len(self.to_end)
        while self.to_end:
            request, status = self.to_end.popleft()
            callback, user_data = self.posted[request - 1]
            if request % 2:  # sends and receives have other callbacks
                ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int8, POINTER)(callback)(request, status, user_data)
            else:
                ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int8, POINTER, POINTER)(callback)(
                    request, status, None, user_data
                )
        moved, self.moves = ends + self.moves, 0
        return moved


class Owner(Posted):
    """Notes what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def note_failure(self, operation: Operation) -> None:
        self.heard.append(operation.status)


class Bench:
    """A flight over a UCX of the test's."""

    def __init__(self) -> None:
        self.ucx = FakeUCX()
        self.flight = native_flight(WORKER, self.ucx.functions)
        self.owner = Owner()

    def post(self, name: object, on_done: Any = None) -> Operation:
        """A send and a receive in turn."""
        operation = Operation.of(self.owner, b"", 0, on_done or (lambda _: self.owner.heard.append(name)))
        is_send = len(self.ucx.posted) % 2 == 0
        begin = self.flight.send if is_send else self.flight.receive
        self.flight.post(operation, begin, 7, b"" if is_send else 0, 1 << 63)
        return operation

    def end(self, *requests: int, status: int = 0) -> None:
        """In the next progress; the first request is 1."""
        self.ucx.to_end.extend((request, status) for request in requests)


def test_what_has_ended_is_called_back_in_the_order_of_its_ends() -> None:
    bench = Bench()
    operations = [bench.post(number) for number in range(5)]
    assert list(bench.owner.posted) == operations
    assert not bench.flight.turn(0)
    bench.end(4, 1, 3)
    assert bench.flight.turn(0)
    assert bench.owner.heard == [3, 0, 2]
    assert [operation.completed for operation in operations] == [True, False, True, True, False]
    assert bench.ucx.freed == [4, 1, 3]
    assert list(bench.owner.posted) == [operations[1], operations[4]]


def test_a_status_is_known_before_the_owner_of_the_operation_hears_of_its_end() -> None:
    bench = Bench()
    bench.post("failed")
    bench.end(1, status=TRUNCATED)
    bench.flight.turn(0)
    assert bench.owner.heard == [TRUNCATED, "failed"]


def test_what_ends_at_once_and_is_not_asked_for_is_over_when_the_post_returns() -> None:
    bench = Bench()
    for status in (0, TRUNCATED):
        bench.ucx.at_once = status
        operation = Operation.of(bench.owner, b"x", 1)
        bench.flight.post(operation, bench.flight.send, 7, b"x", 1)
        assert (operation.status, operation.completed, operation.buffer) == (status, True, None)
    assert (bench.owner.heard, bench.flight.operations, bench.owner.posted) == ([TRUNCATED], {}, {})
    assert not bench.flight.has_ends()


def test_what_ends_at_once_is_called_back_behind_what_ended_before() -> None:
    bench = Bench()
    bench.post("first")
    bench.end(1)
    bench.ucx.progress(WORKER)  # as when UCX closes an endpoint
    bench.ucx.at_once = TRUNCATED
    at_once = bench.post("second")
    assert (at_once.completed, bench.owner.heard, at_once in bench.owner.posted) == (True, [TRUNCATED], True)
    bench.flight.turn(0)
    assert (bench.owner.heard, bench.owner.posted) == ([TRUNCATED, "first", "second"], {})


def test_more_ends_than_a_turn_takes_are_left_for_the_next() -> None:
    bench = Bench()
    count = 2 * ENDS_AT_ONCE + 1
    for number in range(count):
        bench.post(number)
    bench.end(*range(1, count + 1))
    turns = 0
    while bench.flight.has_ends() or not turns:
        bench.flight.turn(0)
        turns += 1
    assert (turns, bench.owner.heard) == (3, list(range(count)))


def test_an_index_is_not_used_again_while_its_end_is_queued() -> None:
    """UCX may end what a callback posts before the next turn, as when it closes an endpoint."""
    bench = Bench()

    def post_again(_: object) -> None:
        bench.post("again")
        bench.end(len(bench.ucx.posted))
        bench.ucx.progress(WORKER)

    bench.post("first", post_again)
    bench.post("second")
    bench.end(1, 2)
    bench.flight.turn(0)
    bench.flight.turn(0)
    assert bench.owner.heard == ["second", "again"]
    assert not bench.flight.has_ends()


def test_a_callback_that_raises_takes_no_other_end_along() -> None:
    bench = Bench()

    def fail(_: object) -> None:
        raise KeyboardInterrupt

    bench.post("fails", fail)
    bench.post("second")
    bench.end(1, 2)
    with pytest.raises(KeyboardInterrupt):
        bench.flight.turn(0)
    assert bench.flight.has_ends()
    assert bench.flight.turn(0)
    assert bench.owner.heard == ["second"]


def turn_interrupted(bench: Bench, at: int) -> bool:
    """A turn, with an interrupt before its bytecode of this number; whether there are so many.

    Between the queue and the callback; what interrupts a callback itself is its own matter.
    """
    code, seen = Flight.turn.__code__, 0

    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if frame.f_code is not code:
            return None
        frame.f_trace = interrupt  # before the next: see tests/support/interrupts.py
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == at + 1 and frame.f_lasti not in STEPS_OF_A_CALLBACK:
                raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        bench.flight.turn(0)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return seen > at


def test_an_interrupt_at_any_bytecode_of_a_turn_loses_and_doubles_no_end() -> None:
    at = 0
    while True:
        bench = Bench()
        for name in "ab":
            bench.post(name)
        bench.end(1, 2)
        if not turn_interrupted(bench, at):
            break
        bench.flight.turn(0)
        bench.flight.turn(0)
        assert (bench.owner.heard, bench.owner.posted) == (["a", "b"], {}), at
        assert not bench.flight.has_ends()
        assert len(set(bench.flight.free)) == len(bench.flight.free)
        at += 1
    assert at > 100


def test_owners_are_cancelled_alone() -> None:
    bench = Bench()
    other = Owner()
    bench.post("ours")
    mine = bench.owner
    bench.owner = other
    bench.post("other's")
    bench.flight.cancel({mine: None})
    assert bench.ucx.cancelled == [1]


def test_a_message_that_nothing_waits_for_is_named_by_its_whole_tag() -> None:
    bench = Bench()
    assert bench.flight.unexpected_tag() is None
    bench.ucx.unexpected = (1 << 64) - 1
    assert bench.flight.unexpected_tag() == (1 << 64) - 1


def test_a_turn_polls_while_nothing_moves_and_goes_on_while_something_does() -> None:
    bench = Bench()
    assert not bench.flight.turn(1000)
    bench.ucx.moves = 1
    assert bench.flight.turn(0)  # something moved, and ended nothing
    bench.post("done")
    bench.end(1)
    assert bench.flight.turn(1_000_000)
    assert bench.owner.heard == ["done"]
