"""What is in flight over one link, and how its ends are found.

UCX's requests say whether they are over when asked, so they are asked after progress moved something. That is bounded:

- endpoints with something in flight, in the order of their last post; the search ends `IDLE_ENDPOINTS` after the last
  find, and after `HOT_ENDPOINTS` without one;
- of each endpoint the oldest receive of each channel and the sends, the oldest first, until `MISSES` of either are
  still in progress, or `ENDS_AT_ONCE` have been called back: those may post what ends at once;
- all of them every `FULL_EVERY` searches, and whenever progress moves nothing: so also before every sleep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, Protocol

from ucxx_transport.errors import TransportError
from ucxx_transport.link.base import Counters, OnDone, Timer, Timers
from ucxx_transport.link.translate import Translator
from ucxx_transport.link.ucx_api import IN_PROGRESS, Binding, UcxArray, UcxEndpoint, UcxRequest, UcxWorker

IDLE_ENDPOINTS: Final = 4
HOT_ENDPOINTS: Final = 64
MISSES: Final = 4
FULL_EVERY: Final = 16
ENDS_AT_ONCE: Final = 64
EVERYTHING: Final = 1 << 30

RECEIVE, SEND, HELLO = range(3)


class UCXXMessage:
    """See `base.Message`."""

    __slots__ = ("array", "nbytes", "writable")

    def __init__(self, view: memoryview, array: UcxArray) -> None:
        self.array = array
        self.nbytes = view.nbytes
        self.writable = not view.readonly


class UCXXOperation:
    """Something that UCX was asked to do for an endpoint. See `base.Operation`.

    Attributes:
        request: UCX's; None before it was asked, and when it is over.
        array: the buffer, pinned until UCX is done with it: dropping it sooner is a crash.
        kind: RECEIVE, SEND or HELLO; of the last, either direction, nothing is counted.
        channel: of a receive; -1 else.
        follower: the next receive of its channel.
    """

    __slots__ = ("array", "channel", "completed", "error", "follower", "kind", "nbytes", "on_done", "request")

    def __init__(
        self,
        kind: int,
        array: UcxArray,
        nbytes: int,
        on_done: OnDone | None,
        request: UcxRequest | None,
    ) -> None:
        self.kind = kind
        self.array: UcxArray | None = array
        self.nbytes = nbytes
        self.on_done = on_done
        self.request = request
        self.channel = -1
        self.completed = False
        self.error: TransportError | None = None
        self.follower: UCXXOperation | None = None


class Posted:
    """What is in flight of one endpoint.

    Attributes:
        receives: the oldest of each channel, oldest first; the others are its followers, since they end in order.
        sends: oldest first.
        newest: of the receives of each channel.
        cut_short: the last search found so much that it did not go on.
    """

    def __init__(self) -> None:
        self.cut_short = False
        self.receives: list[UCXXOperation] = []
        self.sends: list[UCXXOperation] = []
        self.newest: dict[int, UCXXOperation] = {}

    def take_outcome(self, operation: UCXXOperation) -> None:
        """An operation is over: its buffer is free."""
        raise NotImplementedError

    def search(self, misses: int) -> bool:
        """Call back what has ended; whether anything has. See `ucx_flight`.

        Args:
            misses: how many of the receives, and of the sends, may be in progress.
        """
        found = 0
        for flight in (self.receives, self.sends):
            index = 0
            while index < len(flight):
                operation = flight[index]
                request = operation.request
                assert request is not None  # in flight
                if request.status == IN_PROGRESS:
                    index += 1
                    if index > misses:
                        break
                    continue
                found += 1
                if operation.follower is None:
                    del flight[index]
                    self.newest.pop(operation.channel, None)
                else:
                    self._replace(flight, index, operation)
                self.take_outcome(operation)
                on_done, operation.on_done = operation.on_done, None
                if on_done is not None:
                    on_done(operation)
                if found == ENDS_AT_ONCE:
                    self.cut_short = True
                    return True
        return found > 0

    def _replace(self, flight: list[UCXXOperation], index: int, operation: UCXXOperation) -> None:
        """An operation is over: the next one of its channel takes its place."""
        follower, operation.follower = operation.follower, None
        while follower is not None and follower.completed:
            follower = follower.follower
        if follower is not None:
            flight[index] = follower
        else:
            del flight[index]
            del self.newest[operation.channel]

    def in_flight(self) -> list[UCXXOperation]:
        """All that has not ended."""
        found = list(self.sends)
        for head in self.receives:
            operation: UCXXOperation | None = head
            while operation is not None:
                if not operation.completed:
                    found.append(operation)
                operation = operation.follower
        return found


class Flight:
    """The open endpoints of one link.

    Attributes:
        endpoints: all of them.
        order: those with something in flight, most recently used last; `pop` and set with every post.
        overlooked: the last search did not look at all of them.
        searches: so far.
    """

    def __init__(self) -> None:
        self.endpoints: dict[Any, None] = {}
        self.order: dict[Any, None] = {}
        self.overlooked = False
        self.searches = 0

    def add(self, endpoint: Posted) -> None:
        """Look at this one, too."""
        self.endpoints[endpoint] = self.order[endpoint] = None

    def remove(self, endpoint: Posted) -> None:
        """It is closed."""
        del self.endpoints[endpoint]
        self.order.pop(endpoint, None)

    def search(self, *, everywhere: bool) -> bool:
        """Call back what has ended; whether anything has.

        Args:
            everywhere: look at everything.
        """
        self.searches += 1
        order = self.order
        if everywhere or self.searches % FULL_EVERY == 0:
            misses, endpoints = EVERYTHING, tuple(reversed(order))
        else:
            misses, endpoints = MISSES, tuple(islice(reversed(order), HOT_ENDPOINTS))
        overlooked = len(endpoints) < len(order)
        self.overlooked = True  # until it is through: a callback may raise
        found, idle = False, 0
        for endpoint in endpoints:
            if endpoint.search(misses):
                found, idle = True, 0
                if endpoint.cut_short:
                    endpoint.cut_short, overlooked = False, True
                if not (endpoint.receives or endpoint.sends):
                    order.pop(endpoint, None)
            elif found and misses == MISSES:
                idle += 1
                if idle == IDLE_ENDPOINTS:
                    overlooked = True
                    break
            if len(endpoint.receives) > misses or len(endpoint.sends) > misses:
                overlooked = True
        self.overlooked = overlooked
        return found


class LinkContext(Protocol):
    """A `UCXXLink`, as its endpoints and listeners see it.

    Attributes:
        ipv6: an address that listeners listen on, too.
        ready: what is to be called in the next turn, with its argument.
        cancel_due: operations of a broken connection are to be ended in the next turn.
        closing: the link is being closed, which the owners of its endpoints hear by their operations' ends alone.
    """

    binding: Binding
    worker: UcxWorker
    ipv6: str | None
    translator: Translator
    counters: Counters
    timers: Timers
    flight: Flight
    ready: deque[tuple[Callable[[Any], object], object]]
    cancel_due: bool
    closing: bool

    def check_usable(self) -> None: ...
    def message(self, buffer: object, /) -> UCXXMessage: ...
    def adopt(self, endpoint: Any, /) -> None: ...
    def note_lost(self, endpoint: Any, /) -> None: ...
    def note_closing(self, endpoint: Any, /) -> None: ...
    def forget_endpoint(self, endpoint: Any, /) -> None: ...
    def forget_listener(self, listener: Any, /) -> None: ...
    def in_turn_after(self, delay_s: float, action: Callable[[Any], object], argument: object, /) -> Timer: ...
    def leak(self, operation: UCXXOperation, ucx: UcxEndpoint | None, /) -> None: ...
    def explain_unreachable(self, error: TransportError, address: tuple[str, int] | None, /) -> TransportError: ...
