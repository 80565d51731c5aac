"""Teardown: named steps in order, each under a bound of its own, so that the end of a process always comes.

| a step      | outcome  | what follows                                                                      |
|-------------|----------|-----------------------------------------------------------------------------------|
| returns     | `DONE`   | the next one                                                                      |
| raises      | `FAILED` | logged, kept in the report; the next one                                          |
| hangs       | `HUNG`   | all stacks are dumped, it is left behind in its daemon thread; the next one       |

Before and after each step there is a line in the log, so that the last line of a process that was killed while it ended
says where it was. The order is the caller's: flag, join, tell the others, give back, close.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from inspect import isawaitable, iscoroutinefunction
from typing import Final

import anyio

from ucxx_transport.logs import get_logger

__all__ = ["Step", "StepOutcome", "StepReport", "TeardownReport", "dump_stacks", "teardown", "teardown_async"]

_log = get_logger(__name__)

CANCEL_S: Final = 0.1
"""How long a coroutine that was cancelled for hanging may take to end, before it is left behind."""


class StepOutcome(Enum):
    """What became of a step."""

    DONE = "done"
    FAILED = "failed"
    HUNG = "hung"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do.

    Attributes:
        name: for the log and the report.
        call: takes nothing; what it returns is dropped. `teardown_async` awaits it if it is awaitable.
        bound_s: how long it may take.
    """

    name: str
    call: Callable[[], object]
    bound_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What became of a step.

    Attributes:
        name: the step's.
        outcome: DONE, FAILED or HUNG.
        elapsed_s: how long it took, or was waited for.
        error: what it raised, if it FAILED.
    """

    name: str
    outcome: StepOutcome
    elapsed_s: float
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeardownReport:
    """What became of a teardown.

    Attributes:
        name: the teardown's.
        steps: of each, in order.
    """

    name: str
    steps: tuple[StepReport, ...]

    @property
    def is_clean(self) -> bool:
        """Whether every step was done."""
        return all(step.outcome is StepOutcome.DONE for step in self.steps)

    @property
    def elapsed_s(self) -> float:
        """How long all of it took."""
        return sum(step.elapsed_s for step in self.steps)

    def of(self, name: str) -> StepReport:
        """A step's report.

        Raises:
            KeyError: there was no such step.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)


Steps = Iterable[Step | tuple[str, Callable[[], object], float]]


def dump_stacks() -> None:
    """Write the stack of every thread to standard error, wherever each of them is, also inside a system call."""
    try:
        faulthandler.dump_traceback(all_threads=True)
    except (AttributeError, ValueError, OSError, io.UnsupportedOperation):
        if sys.__stderr__ is not None:  # sys.stderr is not a file; the process's own may still be
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)


def teardown(steps: Steps, *, name: str = "teardown", dump: Callable[[], None] = dump_stacks) -> TeardownReport:
    """Run the steps, in order, for no longer than their bounds together.

    Each runs in a daemon thread of its own. One that hangs is left behind there, and what it does later is not heard.

    Args:
        steps: `Step`s, or tuples of name, call and bound in seconds.
        name: for the log.
        dump: called when a step hangs.

    Returns:
        What became of each; nothing that a step raises is raised.
    """
    reports = []
    for step in _steps_of(steps):
        _log.info("teardown step begins", teardown=name, step=step.name, bound_s=step.bound_s)
        call = _Call(step)
        call.start()
        call.wait(step.bound_s)
        reports.append(_reported(name, step, call, dump))
    return TeardownReport(name=name, steps=tuple(reports))


async def teardown_async(
    steps: Steps, *, name: str = "teardown", dump: Callable[[], None] = dump_stacks
) -> TeardownReport:
    """`teardown` for an event loop, which goes on meanwhile; cancelled, it still gives every step its turn first.

    A coroutine function runs in the loop and is cancelled when it hangs; one that blocks the loop blocks this too. Any
    other call runs in a daemon thread; what it returns is awaited if it can be.
    """
    work = asyncio.ensure_future(_all_async(_steps_of(steps), name, dump))
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):  # keeps off anyio's cancellations, which come again and again
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError as error:  # asyncio's own come once each
                cancelled = error
    if cancelled is not None:
        raise cancelled
    return work.result()


async def _all_async(steps: Sequence[Step], name: str, dump: Callable[[], None]) -> TeardownReport:
    reports = []
    for step in steps:
        _log.info("teardown step begins", teardown=name, step=step.name, bound_s=step.bound_s)
        call = _Call(step)
        await _call_async(call, step)
        reports.append(_reported(name, step, call, dump))
        await call.abandon()
    return TeardownReport(name=name, steps=tuple(reports))


async def _call_async(call: _Call, step: Step) -> None:
    if not iscoroutinefunction(step.call):
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        call.start(lambda: loop.call_soon_threadsafe(ended.set))
        with anyio.move_on_after(step.bound_s):
            await ended.wait()
        if not call.has_ended or not isawaitable(call.result):
            return
    await call.wait_async(step.bound_s)


def _steps_of(steps: Steps) -> Sequence[Step]:
    return [step if isinstance(step, Step) else Step(name=step[0], call=step[1], bound_s=step[2]) for step in steps]


def _reported(name: str, step: Step, call: _Call, dump: Callable[[], None]) -> StepReport:
    elapsed_s = call.elapsed_s
    facts = {"teardown": name, "step": step.name, "elapsed_s": round(elapsed_s, 3)}
    if not call.has_ended:
        _log.error("teardown step hangs; going on without it", bound_s=step.bound_s, **facts)
        dump()
        return StepReport(name=step.name, outcome=StepOutcome.HUNG, elapsed_s=elapsed_s)
    if call.error is not None:
        _log.warning("teardown step failed", reason=f"{type(call.error).__name__}: {call.error}", **facts)
        return StepReport(name=step.name, outcome=StepOutcome.FAILED, elapsed_s=elapsed_s, error=call.error)
    _log.info("teardown step done", **facts)
    return StepReport(name=step.name, outcome=StepOutcome.DONE, elapsed_s=elapsed_s)


class _Call:
    """A step's call, in a daemon thread or as a task."""

    def __init__(self, step: Step) -> None:
        self._call = step.call
        self._thread = threading.Thread(target=self._run, name=f"teardown-{step.name}", daemon=True)
        self._task: asyncio.Future[object] | None = None
        self._on_end: Callable[[], object] = lambda: None
        self._began_s = time.monotonic()
        self.has_ended = False
        self.result: object = None
        self.error: BaseException | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def start(self, on_end: Callable[[], object] = lambda: None) -> None:
        """Call it in the thread."""
        self._on_end = on_end
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be started: too many, or the interpreter is ending
            self._end(error)

    def wait(self, bound_s: float) -> None:
        if self._thread.ident is not None:
            self._thread.join(bound_s)

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - the edge of a thread; SystemExit here ends nothing
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self.error = error
        self.has_ended = True
        with suppress(RuntimeError):  # the loop that wanted to know has ended
            self._on_end()

    async def wait_async(self, bound_s: float) -> None:
        """Await what the call returned, or what a coroutine function returns, in the loop."""
        left_s = max(0.0, bound_s - self.elapsed_s)
        self.has_ended = False
        try:
            waited = self.result if isawaitable(self.result) else self._call()
            assert isawaitable(waited)
            self._task = asyncio.ensure_future(waited)
            await asyncio.wait({self._task}, timeout=left_s)
        except Exception as error:  # noqa: BLE001 - it could not even begin
            self._end(error)
            return
        if self._task.done():
            self._end(asyncio.CancelledError() if self._task.cancelled() else self._task.exception())

    async def abandon(self) -> None:
        """Cancel what hangs in the loop; it gets a moment to end."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CANCEL_S)
