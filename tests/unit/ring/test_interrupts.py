"""KeyboardInterrupt at every bytecode at which CPython can raise it, in every call of the ring.

A trace function stands in for the signal: CPython handles signals at the start of a function, at a backward jump, and
after a call that is a bytecode of its own, so these are the points. A point is left out where the exception of a signal
would be looked up in the exception table at the call, and that of the trace function at the bytecode behind it, with
another result.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.unit.ring.conftest import MakeRing
from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.ring.segment import list_segments

CHECKING = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME", "JUMP_BACKWARD"}


class Handlers:
    """For each bytecode of a function: what it is, and where an exception at it goes."""

    def __init__(self, code: CodeType) -> None:
        self.names = {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}
        self._ranges = [
            (entry.start, entry.end, entry.target)
            for entry in dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]  # missing from typeshed
        ]

    def of(self, offset: int) -> int:
        return next((target for start, end, target in self._ranges if start <= offset < end), -1)


handlers_of = cache(Handlers)


class Interrupter:
    """Raises KeyboardInterrupt at the `at`-th point of what runs under it, in the ring's own code."""

    def __init__(self, at: int, within: tuple[str, ...]) -> None:
        self._at = at
        self._within = within
        self._points = 0
        self._last: dict[FrameType, int] = {}
        self.where: tuple[str, int] | None = None

    def __enter__(self) -> None:
        sys.settrace(self._on_event)

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)
        self._last.clear()  # frames keep their leases

    def _on_event(self, frame: FrameType, event: str, arg: object) -> Any:
        del arg
        if self.where is not None or not any(part in frame.f_code.co_filename for part in self._within):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self._on_opcode(frame)
        elif event == "return":
            self._last.pop(frame, None)
        return self._on_event

    def _on_opcode(self, frame: FrameType) -> None:
        handlers = handlers_of(frame.f_code)
        last = self._last.get(frame)
        self._last[frame] = frame.f_lasti
        if last is None or handlers.names.get(last) not in CHECKING or handlers.of(last) != handlers.of(frame.f_lasti):
            return
        self._points += 1
        if self._points > self._at:
            self.where = (frame.f_code.co_qualname, frame.f_lineno)
            raise KeyboardInterrupt


def every_point(
    run: Callable[[], object], within: tuple[str, ...] = ("ucxx_transport/ring/",)
) -> Iterator[tuple[str, int]]:
    """Run it again and again, interrupted at one point later each time, until it comes through."""
    at = 0
    while True:
        interrupter = Interrupter(at, within)
        with suppress(KeyboardInterrupt), interrupter:
            run()
        if interrupter.where is None:
            return
        yield interrupter.where
        at += 1


def write(ring: SharedRingBuffer) -> None:
    ring.write_raw(b"payload", meta={"n": 1})


def reserve_and_commit(ring: SharedRingBuffer) -> None:
    with ring.reserve() as lease:
        lease.buffer[:3] = b"abc"


def reserve_and_abort(ring: SharedRingBuffer) -> None:
    ring.reserve().abort()


def reserve_and_forget(ring: SharedRingBuffer) -> None:
    ring.reserve()


def acquire_and_consume(ring: SharedRingBuffer) -> None:
    with ring.acquire(ring.ready_refs()[0]) as lease:
        lease.mark_consumed()


def acquire_and_release(ring: SharedRingBuffer) -> None:
    with ring.acquire(ring.ready_refs()[0]):
        pass


def acquire_and_detach(ring: SharedRingBuffer) -> None:
    ring.acquire(ring.ready_refs()[0]).detach()


def read(ring: SharedRingBuffer) -> None:
    ring.read(ring.ready_refs()[0])


def discard(ring: SharedRingBuffer) -> None:
    ring.discard(ring.ready_refs()[0])


def publish(ring: SharedRingBuffer) -> None:
    ring.publish_address("host", [1, 2])
    ring.address()


def reclaim(ring: SharedRingBuffer) -> None:
    ring.reclaim_dead()
    ring.statistics()


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """A collection looks at what the test made, not at all that pytest has: 2 ms instead of 50."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def forgetful_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt within a finaliser cannot be raised: CPython reports it and keeps nothing of it; pytest does."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.usefixtures("quick_collections", "forgetful_hook")
@pytest.mark.parametrize(
    "call",
    [
        write,
        reserve_and_commit,
        reserve_and_abort,
        reserve_and_forget,
        acquire_and_consume,
        acquire_and_release,
        acquire_and_detach,
        read,
        discard,
        publish,
        reclaim,
    ],
)
def test_an_interrupt_at_any_bytecode_wedges_nothing(
    make_ring: MakeRing, call: Callable[[SharedRingBuffer], None]
) -> None:
    ring = make_ring(slots=3)
    with SharedRingBuffer.attach(ring.name) as other:
        points = 0

        def prepared() -> None:
            call(ring)

        for slot in range(2):
            ring.write_raw(bytes([slot]))
        for where in every_point(prepared):
            points += 1
            gc.collect()
            ring.reclaim_dead()
            states = other.slot_states()
            assert not {SlotState.WRITING, SlotState.READING} & set(states), where
            # the lock is free, the headers make sense, and the ring works in another process's eyes
            assert other.read(other.write_raw(b"next"))["data"].tobytes() == b"next", where
            for ref in other.ready_refs():
                assert other.discard(ref), where
            for slot in range(2):
                other.write_raw(bytes([slot]))
        assert points > 5
        assert other.statistics().lock_recoveries == 0


@pytest.mark.may_leave(
    "descriptors", reason="an interrupt between os.open and the store of its result loses the number"
)
@pytest.mark.usefixtures("quick_collections", "forgetful_hook")
def test_an_interrupt_at_any_bytecode_of_a_creation_leaves_no_segment() -> None:
    def create() -> None:
        SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=8, name="interrupted", prefault=False)).close()

    points = 0
    for where in every_point(create, ("ring/segment.py", "ring/shared_ring_buffer.py", "ring/handle.py")):
        points += 1
        gc.collect()
        assert not list_segments(), where
    assert points > 20
