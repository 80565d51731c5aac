"""What is in flight over one link, and how its ends are found.

UCX's requests say whether they are over when asked, so they are asked after progress moved something. That is bounded:

- endpoints in the order of their last post; the search ends `IDLE_ENDPOINTS` after the last find, and after
  `HOT_ENDPOINTS` without one;
- of each endpoint the oldest first, until `MISSES` of its receives, and of its sends, are still in progress;
- all of them every `FULL_EVERY` searches, and whenever progress moves nothing: so also before every sleep.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, Protocol

from ucxx_transport.errors import TransportError
from ucxx_transport.link.base import Counters, OnDone, Timer, Timers
from ucxx_transport.link.translate import Translator
from ucxx_transport.link.ucx_api import Binding, UcxArray, UcxEndpoint, UcxRequest, UcxWorker

IDLE_ENDPOINTS: Final = 4
HOT_ENDPOINTS: Final = 64
MISSES: Final = 4
FULL_EVERY: Final = 16
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
    """

    __slots__ = ("array", "completed", "error", "kind", "nbytes", "on_done", "request")

    def __init__(
        self, kind: int, array: UcxArray, nbytes: int, on_done: OnDone | None, request: UcxRequest | None
    ) -> None:
        self.kind = kind
        self.array: UcxArray | None = array
        self.nbytes = nbytes
        self.on_done = on_done
        self.request = request
        self.completed = False
        self.error: TransportError | None = None


class Searched(Protocol):
    """A `UCXXEndpoint`, as the search sees it."""

    receives: list[UCXXOperation]
    sends: list[UCXXOperation]

    def search(self, misses: int) -> bool: ...


class Flight:
    """The open endpoints of one link.

    Attributes:
        order: most recently used first; `order.move_to_end(endpoint, last=False)` with every post.
        overlooked: the last search did not look at all of them.
        searches: so far.
    """

    def __init__(self) -> None:
        self.order: OrderedDict[Any, None] = OrderedDict()
        self.overlooked = False
        self.searches = 0

    def add(self, endpoint: Searched) -> None:
        """Look at this one, too."""
        self.order[endpoint] = None
        self.order.move_to_end(endpoint, last=False)

    def search(self, *, everywhere: bool) -> bool:
        """Call back what has ended; whether anything has.

        Args:
            everywhere: look at everything.
        """
        self.searches += 1
        order = self.order
        if everywhere or self.searches % FULL_EVERY == 0:
            misses, endpoints = EVERYTHING, tuple(order)
        else:
            misses, endpoints = MISSES, tuple(islice(order, HOT_ENDPOINTS))
        overlooked = len(endpoints) < len(order)
        self.overlooked = True  # until it is through: a callback may raise
        found, idle = False, 0
        for endpoint in endpoints:
            if endpoint.search(misses):
                found, idle = True, 0
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
