"""Reactor: what one thread does with one link. Progress, callbacks, timers, and sleeping in between.

```
 run_once(until_s) ──► what was submitted ──► timers that are due ──► link.progress(spin_s) ──moved──► return
                                                                           │ nothing for spin_s
                                                                           ▼
                                    return ◄── sleep: link's descriptor, wake-up, next timer, until_s ◄── link.arm()
```

A reactor has no thread of its own. Three kinds of callers run it:

| who waits               | how                                                                        |
|-------------------------|----------------------------------------------------------------------------|
| a blocking client       | `run_once(its deadline)` in the calling thread until its answer is there   |
| a port, or a prefetcher | `run_once(inf)` in a thread of its own until it is stopped                 |
| an event loop           | `poll()`; then `arm()`, and a wait for `fileno()` and until `next_timer_s` |

One thread runs it at a time. `submit` alone may be called from any thread, and from signal handlers. No wake-up is
lost: `arm` first says that it is about to sleep, then looks for submissions; `submit` adds one, then looks whether
to wake a sleeper. A callback that raises ends its turn with its exception; the next turn goes on behind it.
"""

from __future__ import annotations

import heapq
import ipaddress
import math
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.base import FORKED, Usable, lost
from ucxx_transport.machine import Wakeup, start_thread

if TYPE_CHECKING:
    from ucxx_transport.link.endpoint import Link

LONGEST_SLEEP_S: Final = 1.0
"""A sleep ends after this at the latest: a signal may come between Python's look for it and the sleep."""

STALE_TIMERS: Final = 64  # the heap of timers is first looked through for cancelled ones when there are so many


class Timer:
    """One action to come."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """The action is not called. Idempotent, and harmless afterwards."""
        self.action = None


class Reactor(Usable):
    """See the module. It works without a link until one is needed, so that timers and submissions alone import no UCX.

    Args:
        spin_s: how long to poll after the last progress before sleeping; not after a sleep that was longer than that:
            of many ports that share a host, each polling while the others have work, none would be faster for it.

    Attributes:
        asleep: it sleeps, or is about to: an interrupt has then cut no step in two.
    """

    def __init__(
        self, link_factory: LinkFactory, *, spin_s: float = 200e-6, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self.now = clock
        self.turns = 0  # of `run_once` and `poll`, so far
        self.asleep = False
        self._link_factory = link_factory
        self._spin_s = spin_s
        self._link: Link | None = None
        self._submitted: deque[Callable[[], object]] = deque()
        self._heap: list[tuple[float, int, Timer]] = []
        self._made = 0
        self._prune_at = STALE_TIMERS
        self._rests = False  # timers alone have run: no reason to poll for what comes next
        self._polls = True  # the last sleep was so short that polling would have met its end
        self._wakeup: Wakeup | None = Wakeup()
        self._epoll = select.epoll()
        self._epoll.register(self._wakeup.fileno(), select.EPOLLIN)

    @property
    def link(self) -> Link:
        """The link, opened at first use; a ConfigError where it cannot be, or the reactor cannot be used."""
        if self._link is None:
            self.check_usable()
            self._link = self._link_factory(self)
            self._epoll.register(self._link.fileno(), select.EPOLLIN)
        return self._link

    @property
    def has_link(self) -> bool:
        """Whether the link has been opened."""
        return self._link is not None

    @property
    def next_timer_s(self) -> float:
        """When the next timer is due; inf when there is none."""
        heap = self._heap
        while heap and heap[0][2].action is None:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def call_at(self, when_s: float, action: Callable[[], None]) -> Timer:
        """Call this in a turn, not before `when_s`. By the thread that runs the reactor."""
        if len(self._heap) >= self._prune_at:
            left = [entry for entry in self._heap if entry[2].action is not None]
            heapq.heapify(left)
            self._heap[:] = left
            self._prune_at = max(STALE_TIMERS, 2 * len(left))
        timer = Timer(action)
        self._made += 1
        heapq.heappush(self._heap, (when_s, self._made, timer))
        return timer

    def submit(self, action: Callable[[], object]) -> None:
        """Call this in the next turn. From any thread and any signal handler; after `close()` it is dropped."""
        if self.forked:
            raise ConfigError(FORKED)
        self._submitted.append(action)
        wakeup = self._wakeup
        if self.asleep and wakeup is not None:
            wakeup.notify()

    def resolve(self, host: str, on_resolved: Callable[[str | PeerLostError], None]) -> None:
        """Find the numeric address of a host, without a wait. By the thread that runs the reactor.

        It calls back with it, at once where the host is one, else in a later turn; or with an error, `unreachable`, at
        once where no thread can be started.
        """
        try:
            address = str(ipaddress.ip_address(host))
        except ValueError:
            self.check_usable()
            try:
                start_thread(self._look_up, host, on_resolved, name="ucxx-resolve")
            except TransportError as error:
                on_resolved(lost("unreachable", peer=host, resolver=str(error)))
        else:
            on_resolved(address)

    def _look_up(self, host: str, on_resolved: Callable[[str | PeerLostError], None]) -> None:
        result: str | PeerLostError
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            result = str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])  # IPv4 first
        except (OSError, UnicodeError) as exc:  # UnicodeError: no name that can be looked up, such as "a..b"
            result = lost("unreachable", peer=host, resolver=str(exc))
        self.submit(lambda: on_resolved(result))

    def run_once(self, until_s: float, spin_s: float | None = None, *, sleeps: bool = True) -> bool:
        """One turn; where nothing is to be done, it sleeps, to the next timer or `until_s` at the latest, in whole ms.

        It polls the link for `spin_s` while nothing moves, but not beyond the next timer, nor `until_s` (on the
        reactor's clock; inf is a second). Whether anything was done.
        """
        if self.asleep:  # an event loop, or an interrupt, has ended the last sleep
            self.asleep = False
            if self._wakeup is not None:
                self._wakeup.drain()
        if self.closed or self.forked:
            self.check_usable()
        self.turns += 1
        heap, now = self._heap, self.now()
        due = bool(heap) and heap[0][0] <= now
        ran = bool(self._submitted) and self._run_submitted()
        rests = due and not ran
        if due:
            ran = self._run_due(now) or ran
        link = self._link
        if link is not None:
            spin_s = self._spin_s if spin_s is None else spin_s
            limit_s = min(until_s, heap[0][0]) if heap else until_s
            if ran or self._rests or not self._polls:
                spin_s = 0.0
            elif limit_s - now < spin_s:
                spin_s = max(0.0, limit_s - now)
            moved = link.progress(spin_s)
            self._rests = rests and not moved
            ran = ran or moved
        if sleeps and not ran and self.arm():
            self._sleep(min(self.next_timer_s, until_s))
        return ran

    def poll(self, spin_s: float = 0.0) -> bool:
        """A turn without the sleep; whether anything was done."""
        return self.run_once(math.inf, spin_s, sleeps=False)

    def _sleep(self, until_s: float) -> None:
        began_s = self.now()
        if until_s > began_s:
            awake = self._epoll.poll(min(until_s - began_s, LONGEST_SLEEP_S), 2)
            if self._wakeup is not None and (self._wakeup.fileno(), select.EPOLLIN) in awake:
                self._wakeup.drain()
            self._polls = self.now() - began_s < self._spin_s
        self.asleep = False

    def arm(self) -> bool:
        """Before a sleep on `fileno()`, which is then readable when there is work. False: there is; poll first."""
        self.asleep = True
        if self._submitted or (self._link is not None and not self._link.arm()):
            self.asleep = False
        return self.asleep

    def fileno(self) -> int:
        """One descriptor for all that wakes the reactor, but for its timers: see `next_timer_s`."""
        self.check_usable()
        return self._epoll.fileno()

    def close(self) -> None:
        """Close the link; nothing is run any more. Idempotent, bounded. Not while another thread runs the reactor."""
        if self.closed or self.forked:
            return
        self.closed = True
        if self._link is not None:
            self._link.close()
        self._submitted.clear()
        self._heap.clear()
        self._epoll.close()
        self._wakeup = None

    def _run_submitted(self) -> bool:
        for _ in range(len(self._submitted)):  # what these submit in their turn has the next one
            self._submitted.popleft()()
        return True

    def _run_due(self, now: float) -> bool:
        ran = False
        newest = self._made  # those that these add have the next turn, even if they are due
        while self._heap and self._heap[0][0] <= now and self._heap[0][1] <= newest:
            timer = heapq.heappop(self._heap)[2]
            action, timer.action = timer.action, None
            if action is not None:
                ran = True
                action()
        return ran


LinkFactory: TypeAlias = Callable[[Reactor], "Link"]
