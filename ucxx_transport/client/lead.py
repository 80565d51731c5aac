"""Lead: several threads share one reactor, and one of them at a time runs it, for the others too.

The one that runs it *leads*. The others follow: they wait, each for a lock of its own, until their call is done or the
lead is free. No wake-up is lost: one that follows first joins the line and then looks whether the lead is free; one
that leaves the lead first releases it and then looks at the line. Each one that leaves wakes the next.

An interrupt (Ctrl-C) may come between any two steps of Python. While the reactor sleeps it has cut nothing in two: the
call that was interrupted is abandoned, and the others go on. Anywhere else it may have: then the next thread that leads
repairs the core first (`ClientCore.repair`).
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from ucxx_transport.errors import ConfigError, DeadlineExceededError

if TYPE_CHECKING:
    from types import FrameType

    from ucxx_transport.client.core import ClientCore
    from ucxx_transport.client.jobs import Call

LOOK_S: Final = 1.0
"""A thread that follows looks this often whether there is a lead to take; it is woken long before."""

OVERDUE_S: Final = 5.0
"""One that follows gives up so long after its deadline: the one that leads hangs in a callback of the application."""


class Lead:
    """See the module."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self._lock = threading.RLock()  # which tells, even after an interrupt at the worst moment, whose it is
        self._followers: dict[threading.Lock, None] = {}  # each waits for its own to be released

    def perform(self, call: Call, start: Callable[..., object], *arguments: object) -> None:
        """Start a call by `start(reads, *arguments)` and run the reactor until it is done, or let the leader do so.

        Raises:
            ConfigError: it was interrupted by a signal handler that calls this client itself.
        """
        lock, core = self._lock, self._core
        if lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - as `threading.Condition` asks
            self._recover()
        if not lock.acquire(blocking=False):
            self._follow(call, start, arguments)
            return
        try:
            if core.damaged:
                core.repair()
            start(core.reads, *arguments)
            run_once = core.reactor.run_once
            while not call.done:
                run_once(math.inf)  # the deadline is a timer of the reactor
        except BaseException:
            self._interrupted(call)
            raise
        finally:
            lock.release()
            if self._followers:
                self._wake_next()

    def try_to_lead(self, timeout_s: float) -> bool:
        """Take the lead for good, as far as it can be had in time: the client is being closed."""
        return self._lock.acquire(timeout=timeout_s)

    def leave(self) -> None:
        """Leave the lead, and let every thread that follows look."""
        self._lock.release()
        for follower in tuple(self._followers):
            _wake(follower)

    @property
    def is_led(self) -> bool:
        """Whether a thread leads. Not to be relied on: it may have left by now."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return False
        return True

    @property
    def following(self) -> int:
        """How many threads follow."""
        return len(self._followers)

    def _follow(self, call: Call, start: Callable[..., object], arguments: tuple[object, ...]) -> None:
        """Let the thread that leads start a call, and lead when it has left."""
        core, lock, follower = self._core, self._lock, threading.Lock()
        follower.acquire()
        call.on_done = partial(_wake, follower)
        self._followers[follower] = None
        started: list[bool] = []

        def begin() -> None:
            if not started:
                started.append(True)
                start(core.reads, *arguments)

        reactor = None
        try:
            while not call.done:
                if not started and reactor is not core.reactor:  # at first; and when what was submitted is gone
                    reactor = core.reactor
                    reactor.submit(begin)
                if lock.acquire(blocking=False):
                    self._lead_on(call)
                else:
                    follower.acquire(timeout=LOOK_S)
                    _check_overdue(core.reactor.now() - call.until_s)
        except BaseException:
            started.append(False)
            with suppress(ConfigError):
                core.reactor.submit(partial(core.abandon, call))
            raise
        finally:
            del self._followers[follower]
            self._wake_next()

    def _lead_on(self, call: Call) -> None:
        """With the lead: repair the core, or run the reactor until a call is done; then leave."""
        core = self._core
        try:
            if core.damaged:
                core.repair()
            else:
                while not call.done:
                    core.reactor.run_once(math.inf)
        except BaseException:
            self._interrupted(call)
            raise
        finally:
            self._lock.release()

    def _interrupted(self, call: Call) -> None:
        core = self._core
        is_whole = core.reactor.asleep
        core.damaged = True  # also if a second interrupt comes now
        if is_whole:
            core.abandon(call)
            core.damaged = False
        else:
            call.done = True  # nothing is done for it any more

    def _wake_next(self) -> None:
        """Have one of those that follow take the lead, if it is free."""
        for follower in tuple(self._followers):
            _wake(follower)
            return

    def _recover(self) -> None:
        """This thread has the lead already: it was interrupted between taking it and using it, or between two uses."""
        frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - the only way to know whether a signal handler asks
        while frame is not None:
            if frame.f_code in _LEADING and frame.f_locals.get("self") is self:
                raise ConfigError("a signal handler has interrupted this client, and cannot use it; use another client")
            frame = frame.f_back
        while self._lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - see above
            self._lock.release()


_LEADING: Final = frozenset({Lead.perform.__code__, Lead._follow.__code__})  # noqa: SLF001 - its own


def _wake(follower: threading.Lock, _: object = None) -> None:
    """Let a thread that follows look again."""
    with suppress(RuntimeError):  # it has been woken already
        follower.release()


def _check_overdue(seconds: float) -> None:
    if seconds > OVERDUE_S:
        raise DeadlineExceededError("the thread that runs this client's connections does not get on")
