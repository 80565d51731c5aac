"""Teardown: named steps in order, each with a deadline, so that a stop always returns.

| a step                | is     | logged as                  | then                                              |
|-----------------------|--------|----------------------------|---------------------------------------------------|
| returns               | done   | `teardown_done`, DEBUG     | the next one                                      |
| raises                | failed | `teardown_failed`, WARNING | the error is in the report; the next one          |
| misses its deadline   | hung   | `teardown_hung`, ERROR     | all stacks are dumped, it stays in its daemon     |
|                       |        |                            | thread; the next one                              |

Before each there is `teardown_step` at INFO, so that the last line of a process that was killed in its teardown says
where it was. The order is the caller's: stop taking work, join, notify the others, give back, close.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, NamedTuple, NoReturn, Self

from ucxx_transport.errors import ConfigError, TransportError, article
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import in_thread, start_thread

_log = get_logger(__name__)

MARGIN_S: Final = 0.5
"""A call that keeps its deadline itself returns just after it, and is not hanging yet."""


class StepReport(NamedTuple):
    """How a step ended, and what it raised."""

    outcome: Literal["done", "failed", "hung"]
    error: BaseException | None = None


def refuse_forked(pid: int, what: str) -> None:
    """Raise a ConfigError in a forked child of the process `pid`, which made `what`.

    Its threads did not come along, and its locks may be held for ever: so this comes before any of them is taken.
    """
    if os.getpid() != pid:
        words = f"{article(what)} cannot be used in a forked child; make one in the process that uses it"
        raise ConfigError(words, pid=pid)


class OfOneProcess:
    """What holds threads, memory or connections of one process, and so cannot be sent to another."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse it, by the TypeError that pickle and copy have for that."""
        raise TypeError(
            f"{article(type(self).__name__)} cannot be pickled or copied: send records, or a ring's name, and make one "
            "in each process"
        )


class Closing(OfOneProcess):
    """What `with` closes."""

    def close(self) -> object:
        """End it. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Running(OfOneProcess):
    """What `with` starts, and stops; `async with` too, without blocking the event loop."""

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """End it. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """Start, without blocking the event loop; what came up under a cancellation does not stay."""
        import asyncio  # ports have none

        from anyio import CancelScope

        starting = asyncio.ensure_future(in_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            with CancelScope(shield=True):  # a scope of anyio cancels again and again
                while not starting.done():
                    with suppress(asyncio.CancelledError):  # and a caller may
                        await asyncio.wait([starting])
            self.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop, without blocking the event loop; a cancellation does not wait for the end of it, which is bounded."""
        import asyncio

        await asyncio.shield(in_thread(self.stop))


def may_end(pid: int) -> bool:
    """Whether what the process `pid` made can be ended here.

    Not a forked child's copy: it is its parent's. Nor in the interpreter's last moments, as in a `__del__` when modules
    are torn down: daemon threads have stopped by then wherever they were, maybe with a lock, and end no more.
    """
    return os.getpid() == pid and not sys.is_finalizing()


def not_in_forks(call: Callable[[], None]) -> Callable[[], None]:
    """The same call, for an end: nothing in a forked child, where it would wait for a lock that is held for ever."""
    pid = os.getpid()
    return lambda: call() if may_end(pid) else None


def dump_stacks() -> None:
    """Write the stack of every thread to standard error; a thread inside a system call has one too."""
    try:
        faulthandler.dump_traceback(all_threads=True)
    except (AttributeError, RuntimeError, ValueError, OSError):
        if sys.__stderr__ is not None:  # sys.stderr is not a file; the process's own may still be
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)


class Teardown:
    """The end of one object, `step` by step.

    Each step runs in a daemon thread, so its call must take no lock that the caller of `step` holds.

    Args:
        name: of what ends, for the log.
        margin_s: how long after its deadline a step is taken for hanging.
        keys: further keys of every log event, such as `ring`.
    """

    def __init__(self, name: str, *, margin_s: float = MARGIN_S, **keys: object) -> None:
        self._margin_s = margin_s
        self._keys = {"teardown": name, **keys}

    def step(self, name: str, call: Callable[[], object], until_s: float) -> StepReport:
        """Run one step and wait for it; what it raises is logged and reported, not raised.

        Args:
            name: for the log.
            call: the work; what it returns is dropped.
            until_s: its deadline on `time.monotonic()`. One that has passed leaves the step the margin.
        """
        raised: list[BaseException | None] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - the edge of a thread; SystemExit here ends nothing
                raised.append(error)
            else:
                raised.append(None)

        began_s = time.monotonic()
        _log.info("teardown_step", step=name, limit_s=round(until_s - began_s, 3), **self._keys)
        try:
            start_thread(run, name=f"teardown-{name}").join(max(0.0, until_s - began_s) + self._margin_s)
        except TransportError:  # there can be no thread
            run()
        keys = {"step": name, "ms": round((time.monotonic() - began_s) * 1000), **self._keys}
        if not raised:
            _log.error("teardown_hung", **keys)
            dump_stacks()
            return StepReport("hung")
        if (error := raised[0]) is not None:
            _log.warning("teardown_failed", reason=f"{type(error).__name__}: {error}", **keys)
            return StepReport("failed", error)
        _log.debug("teardown_done", **keys)
        return StepReport("done")


def exit_on_sigterm(code: int = 128 + signal.SIGTERM) -> None:
    """From now on SIGTERM is `SystemExit(code)` in the main thread: `with` blocks and exit handlers run.

    By default it ends a Python program without any of its clean-up. A handler that the program has already is left
    alone. Call it in the main thread.

    Raises:
        ValueError: called in another thread.
    """

    def leave(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up is bounded; a second one must not cut it short
        sys.exit(code)

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
