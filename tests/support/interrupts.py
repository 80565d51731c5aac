"""KeyboardInterrupt at every bytecode at which CPython can raise it, in the code that is looked at.

A trace function stands in for the signal: CPython handles signals at the start of a function, at a backward jump, and
after a call that is a bytecode of its own, so these are the points. A point is left out where the exception of a signal
would be looked up in the exception table at the call, and that of the trace function at the bytecode behind it, with
another result.
"""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import CodeType, FrameType
from typing import Any

from tests.support.waiting import wait_until

__all__ = ["Interrupter", "every_point", "signalled_when"]

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
    """Raises KeyboardInterrupt at the `at`-th point of what runs under it, within files of these paths."""

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
        frame.f_trace = self._on_event  # before the next: else Python 3.13 shows no opcode of the first call of all
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            self._on_opcode(frame)
        elif event == "call" and handlers_of(frame.f_code).names.get(frame.f_lasti) == "RESUME":
            self._point(frame)  # which has no event as an opcode; a generator that is closed is not at one
        elif event == "return":
            self._last.pop(frame, None)
        return self._on_event

    def _on_opcode(self, frame: FrameType) -> None:
        handlers = handlers_of(frame.f_code)
        last = self._last.get(frame)
        self._last[frame] = frame.f_lasti
        if last is None or handlers.names.get(last) not in CHECKING or handlers.of(last) != handlers.of(frame.f_lasti):
            return
        self._point(frame)

    def _point(self, frame: FrameType) -> None:
        self._points += 1
        if self._points > self._at:
            self.where = (frame.f_code.co_qualname, frame.f_lineno)
            raise KeyboardInterrupt


def every_point(run: Callable[[], object], within: tuple[str, ...]) -> Iterator[tuple[str, int]]:
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


@contextmanager
def signalled_when(
    condition: Callable[[], object], number: signal.Signals = signal.SIGINT, *, deadline_s: float = 60.0
) -> Iterator[None]:
    """The main thread, which runs the block, gets a signal when the condition has become true."""

    def send() -> None:
        wait_until(condition, deadline_s, what="the moment of the signal")
        signal.pthread_kill(main, number)

    main = threading.get_ident()
    thread = threading.Thread(target=send, name="signals")
    thread.start()
    try:
        yield
    finally:
        thread.join()
