"""How a task waits for a reactor: it hangs in an asyncio loop, or is run by whichever task waits on another backend.

| backend             | the reactor's descriptor            | its next timer     | who runs it                         |
|---------------------|-------------------------------------|--------------------|-------------------------------------|
| asyncio, uvloop     | `loop.add_reader`                   | `loop.call_later`  | the loop; a lone read itself, first |
| others of anyio     | `anyio.wait_readable`               | the wait's bound   | one of the tasks that wait          |
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from ucxx_transport.client.jobs import Call
    from ucxx_transport.link.reactor import Reactor

TURN_S: Final = 0.001
"""The reactor gives the loop back after this at the latest."""


class Waiter(Protocol):
    """What `waiter_of` makes."""

    def bind(self) -> None:
        """It belongs to the running loop from the first call on; a ConfigError in another one."""

    async def wait(self, call: Call, *, alone: bool) -> None:
        """Return when the call is done; `alone` when nothing else is waited for."""

    def unbind(self) -> None:
        """Leave the loop."""


def waiter_of(reactor: Reactor, spin_s: float) -> Waiter:
    """A waiter for the running loop, whatever it is."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return TaskWaiter(reactor)
    return LoopWaiter(reactor, spin_s)


class LoopWaiter:
    """Runs a reactor within an asyncio loop."""

    def __init__(self, reactor: Reactor, spin_s: float) -> None:
        self._reactor = reactor
        self._spin_s = spin_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptor = -1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._soon: asyncio.Handle | None = None

    def bind(self) -> None:
        """See `Waiter`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise ConfigError("this client belongs to another event loop; make one client a loop")
            self._loop = loop

    async def wait(self, call: Call, *, alone: bool) -> None:
        """See `Waiter`."""
        reactor = self._reactor
        if alone:
            give_up_s = reactor.now() + TURN_S
            while reactor.poll(self._spin_s):
                if call.done:
                    break
                if reactor.now() > give_up_s:
                    break
            if call.done:
                self._look_later()
                return
        self.bind()
        came = asyncio.get_running_loop().create_future()

        def on_done(_: object) -> None:
            if not came.done():
                came.set_result(None)

        call.on_done = on_done
        self.turn()
        await came

    def unbind(self) -> None:
        """See `Waiter`."""
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed():
            return
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        if self._descriptor >= 0:
            loop.remove_reader(self._descriptor)
            self._descriptor = -1

    def _look_later(self) -> None:
        """Nothing is waited for; what happens now is looked at when the loop gets round to it."""
        if self._descriptor < 0:
            self.turn()
        elif self._soon is None:
            assert self._loop is not None
            self._soon = self._loop.call_soon(self.turn)

    def turn(self) -> None:
        """Run the reactor until it has nothing to do, or `TURN_S`; then wait for its descriptor and its next timer."""
        reactor, loop = self._reactor, self._loop
        self._soon = None
        if loop is None or reactor.closed:
            return
        give_up_s = reactor.now() + TURN_S
        while reactor.poll() or not reactor.arm():
            if reactor.now() > give_up_s:
                self._soon = loop.call_soon(self.turn)
                return
        if self._descriptor < 0:
            self._descriptor = reactor.fileno()
            loop.add_reader(self._descriptor, self.turn)
        next_s = reactor.next_timer_s
        if next_s != self._timer_s:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._timer_s = next_s
            if next_s != math.inf:
                self._timer = loop.call_later(max(0.0, next_s - reactor.now()), self._timer_due)

    def _timer_due(self) -> None:
        self._timer = None
        self._timer_s = math.inf
        self.turn()


class TaskWaiter:
    """Runs a reactor in one of the tasks that wait for it."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._is_run = False
        self._others: deque[anyio.Event] = deque()

    def bind(self) -> None:
        """Nothing: only a task that waits touches its backend."""

    def unbind(self) -> None:
        """Nothing: nothing is left in a backend."""

    async def wait(self, call: Call, *, alone: bool) -> None:
        """See `Waiter`."""
        del alone
        event = anyio.Event()
        call.on_done = lambda _: event.set()
        while not call.done:
            if self._is_run:
                self._others.append(event)
                try:
                    await event.wait()  # for the call, or because the task that ran the reactor has left
                finally:
                    self._others.remove(event)
                if not call.done:
                    event = anyio.Event()
                    call.on_done = lambda _, event=event: event.set()
                continue
            self._is_run = True
            try:
                await self._run(call)
            finally:
                self._is_run = False
                if self._others:
                    self._others[0].set()

    async def _run(self, call: Call) -> None:
        reactor = self._reactor
        give_up_s = reactor.now() + TURN_S
        while not call.done:
            if reactor.poll() or not reactor.arm():
                if reactor.now() > give_up_s:
                    await anyio.lowlevel.checkpoint()
                    give_up_s = reactor.now() + TURN_S
                continue
            left_s = reactor.next_timer_s - reactor.now()
            with anyio.move_on_after(max(0.0, left_s)):
                await anyio.wait_readable(reactor.fileno())
            give_up_s = reactor.now() + TURN_S
