"""Progress of one UCX worker from one asyncio event loop.

```
 post ──► spin_for(): poll inside the waiting task ──completed──► task goes on, no loop turn
              │ inline_s is over                                     │ turn_s is over: one loop turn
              ▼                                                      ▼
          _turn(): progress ≤ burst ──► scan what is pending ──► wake waiters
              │ nothing moved for spin_s
              ▼
          arm() ──► sleep in the loop's selector ──event fd──► _turn()
```

Whenever control is with the loop, either a turn is scheduled or the worker is armed: otherwise an event is missed.
A scan costs O(pending), so it happens only after progress was made.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

from ucxx_transport.link.base import Counters
from ucxx_transport.link.binding import UcxRequest, UcxWorker

BURST = 32
"""Progress calls in one turn: at 512 KiB a segment some 2 ms, so that other tasks need not wait for a transfer."""

TURN_S = 1e-3
"""How long inline completions may keep a task on the loop when no other operation has ended: some ten 64 KiB reads."""

STRETCH = 10
"""A spin lasts this many times `spin_s` as long as that pays: where system calls are slow, a read of 1 MiB over TCP
takes 850 us, and a wait that is not over within the window costs a sleep and a wake-up besides."""

CREDIT = 8
"""Spins that may fail in a row before none are made: beside a busy core the peer may be waiting for this very one."""

PROBE_EVERY = 8
"""Waits without a spin before one is tried again."""

LONGEST_SPIN_S = 4e-3
"""A spin ends after this even while something moves: timers and other tasks wait meanwhile. 16 MiB take as long."""

STRAYS_EVERY = 8
"""Turns with progress between two looks for unexpected messages: at 64 KiB each some 16 MiB of them."""

RETRY_S = 0.05
"""Pause after an error of UCX itself in a turn, so that a lasting one does not burn a core."""


class Watched(Protocol):
    """An operation, as the driver sees it."""

    request: UcxRequest | None

    def poll(self) -> bool:
        """Ask UCX; ends the operation if it is over."""


class ProgressDriver:
    """Owns the event descriptor of a worker in blocking progress mode, in the running loop.

    Args:
        worker: in that mode.
        loop: the running one.
        spin_s: how long to poll after the last progress before sleeping.
        counters: of the link.
        ucx_error: root class of UCX's errors.
        clock: seconds.

    Attributes:
        on_turns: called now and then between turns in which something moved.
    """

    def __init__(
        self,
        *,
        worker: UcxWorker,
        loop: asyncio.AbstractEventLoop,
        spin_s: float,
        counters: Counters,
        ucx_error: type[Exception],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.loop = loop
        self._worker = worker
        self._progress_once = worker.progress_once
        self._spin_s = spin_s
        self._counters = counters
        self._ucx_error = ucx_error
        self.clock = clock
        self._watched: list[Watched] = []
        self._scheduled = False
        self._scan_due = False
        self._cancel_due = False
        self.stopped = False
        self._guests = 0
        self.on_turns: Callable[[], None] = lambda: None
        self._moved_turns = 0
        self._window_s = spin_s * STRETCH
        self._credit = CREDIT
        self._misses = 0
        self._last_progress = clock()
        self._turn_began = self._last_progress
        self._descriptor = worker.epoll_file_descriptor
        loop.add_reader(self._descriptor, self._on_event)
        self.kick()

    def watch(self, operation: Watched) -> None:
        """Wake the operation's waiters when it ends."""
        self._watched.append(operation)
        self.kick()

    def kick(self) -> None:
        """Make sure that a turn follows."""
        if not self._scheduled and not self.stopped:
            self._scheduled = True
            self.loop.call_soon(self._turn)

    def soon(self, action: Callable[[], None]) -> None:
        """Do this in the loop's next turn; safe inside UCX's callbacks, and nothing once stopped."""
        if not self.stopped:
            self.loop.call_soon(action)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do this after a while; safe inside UCX's callbacks, and nothing once stopped."""
        if not self.stopped:
            self.loop.call_later(delay_s, action)

    def cancel_soon(self) -> None:
        """An endpoint was lost: end what is in flight on it, at the end of this turn. Safe inside UCX's callbacks."""
        self._cancel_due = True

    def turn_is_over(self) -> bool:
        """Whether the running task has had the loop long enough."""
        return self.clock() - self._turn_began > TURN_S

    def spin_for(self, operation: Watched) -> bool:
        """Poll for one operation inside the task that waits for it; False: the time is up, or others have work."""
        request = operation.request
        if request is None or self.stopped or not self._spin_s:
            return operation.poll()
        self._counters.spins += 1
        progress_once, clock, window = self._progress_once, self.clock, self._window_s
        began = clock()
        end = began + LONGEST_SPIN_S
        moved = 0
        while True:
            if progress_once():  # only this can complete it, so an idle poll costs one call
                self._scan_due = True
                moved += 1
                if request.completed or (moved % BURST == 0 and clock() > end):
                    break
                continue
            now = clock()
            if now > end:
                break
            if moved:
                moved = 0
                began = self._last_progress = now
                if len(self._watched) > 1 and self._scan() > 0:
                    self._turn_began = -math.inf  # others have work now: let them have the loop
                    break
            if now - began >= window or self._cancel_due:
                break
        paid = operation.poll()
        self._spun(paid=paid)
        if not paid:
            return False
        self._forget(operation)
        self._last_progress = clock()
        self._counters.inline_completions += 1
        self.kick()  # the worker is no longer armed, and others may be done too
        return True

    async def take_turn(self) -> None:
        """Let the loop turn once; the worker is not armed for it, as the caller goes on at once."""
        self._guests += 1
        try:
            await asyncio.sleep(0)
        finally:
            self._guests -= 1

    def _forget(self, operation: Watched) -> None:
        if self._watched and self._watched[-1] is operation:
            self._watched.pop()
        elif operation in self._watched:
            self._watched.remove(operation)

    def _spun(self, *, paid: bool) -> None:
        """Learn whether spins pay: they go on while they do, and are tried again now and then."""
        if paid:
            self._credit = CREDIT
        elif self._credit > 0:
            self._credit -= 1
        else:
            self._misses += 1
            if self._misses % PROBE_EVERY == 0:
                self._credit = 1
        self._window_s = self._spin_s * STRETCH if self._credit > 0 else 0.0

    def stop(self) -> None:
        """Leave the loop. What is pending stays so."""
        if not self.stopped:
            self.stopped = True
            if not self.loop.is_closed():
                self.loop.remove_reader(self._descriptor)

    def freeze(self) -> None:
        """Never progress again, in a forked child: its turns would take messages out of the parent's memory.

        The reader stays: the selector's epoll is shared with the parent, who would lose it too.
        """
        self.stopped = True

    def release_worker(self) -> None:
        """Drop the worker, once stopped: UCX gives its ports and descriptors back with the last reference to it."""
        del self._worker, self._progress_once, self.on_turns

    def progress_now(self, turns: int = BURST) -> int:
        """Progress outside the loop's turns, for clean-up; returns how many calls moved something."""
        moved = 0
        while moved < turns and self._progress_once():
            moved += 1
        if self._cancel_due:
            self._cancel_due = False
            self._worker.cancel_inflight_requests()
            moved += 1
        self._scan()
        return moved

    def _on_event(self) -> None:
        if not self._scheduled and not self.stopped:
            self._counters.wakeups += 1
            self._turn()

    def _turn(self) -> None:
        self._scheduled = False
        if self.stopped:
            return
        try:
            self._advance()
        except self._ucx_error:
            self._counters.suppressed_errors += 1
            self._scheduled = True
            self.loop.remove_reader(self._descriptor)  # it stays readable, and would wake the loop without end
            self.loop.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        if not self.stopped:
            self.loop.add_reader(self._descriptor, self._on_event)
            self._turn()

    def _advance(self) -> None:
        self._counters.progress_turns += 1
        progress_once = self._progress_once
        moved = 0
        while moved < BURST and progress_once():
            moved += 1
        if self._cancel_due and moved < BURST:
            # What had arrived has been taken in; the rest of a lost endpoint's operations will never come.
            self._cancel_due = False
            self._worker.cancel_inflight_requests()
            moved += 1
        if moved or self._scan_due:
            self._scan()
            self._moved_turns += 1
            if self._moved_turns % STRAYS_EVERY == 0:
                self.on_turns()
        now = self._turn_began = self.clock()
        if moved:
            self._last_progress = now
        spinning = self._watched and now - self._last_progress < self._spin_s
        if moved >= BURST or spinning or self._cancel_due or self._guests:
            self.kick()
        elif self._worker.arm():
            self._counters.sleeps += 1
        else:
            self.kick()  # an event slipped in between the last progress and arming

    def _scan(self) -> int:
        self._scan_due = False
        ended = 0
        for operation in self._watched:
            if operation.poll():
                ended += 1
        if ended:
            self._watched = [operation for operation in self._watched if operation.request is not None]
        return ended
