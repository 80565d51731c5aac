"""What is in flight over one link, how its ends are found, and what else its endpoints and listeners share.

UCX's requests say whether they are over when asked, so they are asked after progress moved something. That is bounded:

- endpoints with something in flight, in the order of their last post; the search ends `IDLE_ENDPOINTS` after the last
  find, and after `HOT_ENDPOINTS` without one;
- of each endpoint the oldest receive of each channel and the sends, the oldest first, until `MISSES` of either are
  still in progress; of those that follow on a channel, until `ENDS_AT_ONCE` have been called back: callbacks may post
  what ends at once;
- all of them every `FULL_EVERY` searches, and whenever progress moves nothing: so also before every sleep.
"""

from __future__ import annotations

import ipaddress
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.base import LinkCounters, OnDone, Usable, byte_view
from ucxx_transport.link.libraries import IN_PROGRESS, TaggedSends
from ucxx_transport.link.process import keep_for_good
from ucxx_transport.link.reactor import Reactor, Timer
from ucxx_transport.link.settings import limits_in_words, loopback_only
from ucxx_transport.link.ucx_api import Binding, UcxArray, UcxEndpoint, UcxRequest, UcxWorker
from ucxx_transport.link.ucx_hello import CHANNEL_BITS

IDLE_ENDPOINTS: Final = 4
HOT_ENDPOINTS: Final = 64
MISSES: Final = 4
FULL_EVERY: Final = 16
ENDS_AT_ONCE: Final = 64
EVERYTHING: Final = 1 << 30

STRAYS_EVERY: Final = 8
"""Turns in which something moved between two looks for unexpected messages: at 64 KiB each some 16 MiB of them."""

UNEXPECTED_AT_ONCE: Final = 4096
"""Unexpected messages are cleared away this many at a time, so that a flood cannot hold the thread."""


class UCXXOperation:
    """Something that UCX was asked to do for an endpoint. See `base.Operation`.

    Attributes:
        request: UCX's; None before it was asked, and when it is over.
        array: the buffer, pinned until UCX is done with it: dropping it sooner is a crash.
        channel: of a receive; -1 else.
        follower: the next receive of its channel.
    """

    array: UcxArray | None = None
    nbytes = 0
    on_done: OnDone | None = None
    request: UcxRequest | None = None
    channel = -1
    completed = False
    error: TransportError | None = None
    follower: UCXXOperation | None = None


def operation_of(
    array: UcxArray, nbytes: int, on_done: OnDone | None, request: UcxRequest | None, channel: int = -1
) -> UCXXOperation:
    """One in flight."""
    operation = UCXXOperation()
    operation.array, operation.nbytes, operation.on_done = array, nbytes, on_done
    operation.request, operation.channel = request, channel
    return operation


class UCXXMessage:
    """See `base.Message`.

    Attributes:
        array: UCX's. address: where it lies.
        sent: what a send of it that has left at once is.
    """

    __slots__ = ("address", "array", "nbytes", "sent", "writable")

    def __init__(self, view: memoryview, array: UcxArray) -> None:
        self.array = array
        self.address: int = array.ptr
        self.nbytes = view.nbytes
        self.writable = not view.readonly
        self.sent = UCXXOperation()
        self.sent.nbytes, self.sent.completed = view.nbytes, True


class Posted:
    """What is in flight of one endpoint.

    Attributes:
        receives: the oldest of each channel, oldest first; the others are its followers, since they end in order.
        sends: oldest first.
        newest: of the receives of each channel.
        flights: sends and receives: an answer shows that what it answers has left.
    """

    def __init__(self) -> None:
        self.receives: list[UCXXOperation] = []
        self.sends: list[UCXXOperation] = []
        self.newest: dict[int, UCXXOperation] = {}
        self.flights = (self.sends, self.receives)

    def note_failure(self, operation: UCXXOperation, request: UcxRequest) -> None:
        """An operation has ended in an error."""
        raise NotImplementedError

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

    def search(self, only: Posted | None = None, *, everywhere: bool) -> bool:  # noqa: C901, PLR0912, PLR0915 - a call more costs
        """Call back what has ended; whether anything has. See the module.

        Args:
            only: of this endpoint alone.
            everywhere: look at everything.
        """
        self.searches = searches = self.searches + 1
        order, misses = self.order, MISSES
        endpoints, overlooked = ([*reversed(order)], False) if only is None else ([only], self.overlooked)
        if everywhere or not searches % FULL_EVERY:
            misses = EVERYTHING
        elif len(endpoints) > HOT_ENDPOINTS:
            del endpoints[HOT_ENDPOINTS:]
            overlooked = True
        self.overlooked = True  # until it is through: a callback may raise
        found = idle = 0
        for endpoint in endpoints:
            before = found
            for flight in endpoint.flights:
                missed = 0
                for first in tuple(flight):
                    operation = first
                    while (status := (request := operation.request).status) != IN_PROGRESS:
                        found += 1
                        follower = operation.follower
                        while follower is not None and follower.completed:
                            follower = follower.follower
                        if follower is None:
                            flight.remove(operation)
                            endpoint.newest.pop(operation.channel, None)
                        else:
                            flight[flight.index(operation)] = follower
                        operation.request = operation.array = operation.follower = None
                        operation.completed = True
                        if status:
                            endpoint.note_failure(operation, request)
                        on_done, operation.on_done = operation.on_done, None
                        if on_done is not None:
                            on_done(operation)
                        if follower is None or found - before >= ENDS_AT_ONCE:
                            break
                        operation = follower
                    else:
                        missed += 1
                        if missed > misses:
                            overlooked = True
                            break
            if found > before:
                overlooked = overlooked or found - before >= ENDS_AT_ONCE
                idle = 0
                if not (endpoint.receives or endpoint.sends):
                    order.pop(endpoint, None)
            elif found and misses == MISSES:
                idle += 1
                if idle == IDLE_ENDPOINTS:
                    overlooked = True
                    break
        self.overlooked = overlooked
        if not searches % STRAYS_EVERY:
            self.discard_unexpected()
        return found > 0

    def discard_unexpected(self) -> None:
        """Drop messages that no endpoint waits for."""


class LinkState(Usable, Flight):
    """A `UCXXLink`, as its endpoints and listeners see it.

    Attributes:
        ipv6: an address that listeners listen on, too.
        make_array, make_tag: UCX's. sends: tagged ones.
        copies: by length, memory that small messages are sent from: UCX has taken them when a post returns.
        ready: what is to be called in the next turn, with its argument.
        cancel_due: operations of a broken connection are to be ended in the next turn.
        lost: endpoints whose owners are to hear so. ending: those that are being closed, and when they end anyway.
        listeners: that are open.
    """

    worker: UcxWorker
    settings: Mapping[str, str]
    context: Any

    def __init__(self, timers: Reactor, binding: Binding, ipv6: str | None) -> None:
        super().__init__()
        self.timers = timers
        self.ipv6 = ipv6
        self.binding = binding
        self.make_array = binding.make_array
        self.make_tag = binding.lib.UCXXTag
        self.sends = TaggedSends()
        self.counters = LinkCounters()
        self.copies: dict[int, tuple[bytearray, UCXXMessage]] = {}
        self.ready: deque[tuple[Callable[[Any], object], object]] = deque()
        self.cancel_due = False
        self.lost: deque[Any] = deque()
        self.ending: dict[Any, Timer] = {}
        self.listeners: set[Any] = set()
        self._any_tag, self._any_mask = binding.lib.UCXXTag(0), binding.lib.UCXXTagMask(0)
        self._by_base: dict[int, Any] = {}
        self.strays: list[tuple[UcxRequest, UcxArray]] = []

    def message(self, buffer: object) -> UCXXMessage:
        self.check_usable()
        view = byte_view(buffer, writable=False)
        return UCXXMessage(view, self.make_array(view))

    def adopt(self, endpoint: Any) -> None:
        """Count an endpoint among the open ones."""
        self.endpoints[endpoint] = self.order[endpoint] = None
        self._by_base[endpoint.base] = endpoint

    def note_lost(self, endpoint: Any) -> None:
        """An endpoint's peer is gone: the next turn says so to its owner, when what had arrived is called back."""
        self.lost.append(endpoint)
        self.cancel_due = True

    def in_turn_after(self, delay_s: float, action: Callable[[Any], object], argument: object) -> Timer:
        """Call this in a turn, after a while."""
        call = (action, argument)
        return self.timers.call_at(self.timers.now() + delay_s, lambda: self.ready.append(call))

    def forget_endpoint(self, endpoint: Any) -> None:
        """An endpoint is closed."""
        del self.endpoints[endpoint]
        self.order.pop(endpoint, None)
        del self._by_base[endpoint.base]
        self.discard_unexpected()

    def leak(self, operation: UCXXOperation, ucx: UcxEndpoint | None) -> None:
        """Keep the buffer of an operation that never ends, for good."""
        self.counters.leaked_buffers += 1
        keep_for_good(operation, ucx)

    def explain_unreachable(self, error: TransportError, address: tuple[str, int] | None) -> TransportError:
        """The same error, or a ConfigError where it is this side's settings that leave no way to another host."""
        if address is None or not isinstance(error, PeerLostError) or error.facts["reason"] != "unreachable":
            return error
        limits = limits_in_words(self.settings, os.environ)
        if limits and loopback_only(self.context.info) and not ipaddress.ip_address(address[0]).is_loopback:
            return ConfigError(
                f"{limits} leaves UCX nothing but loopback; add an interface of this host", host=address[0]
            )
        return error

    def discard_unexpected(self) -> None:
        """Drop messages that no endpoint waits for: UCX would keep them until the worker's end.

        They are what came to an endpoint that has been closed, on a channel that it does not have, or under a tag that
        never was one's: tags are matched in the whole worker, so any peer may send such.
        """
        if self.strays:
            self.strays = [stray for stray in self.strays if stray[0].status == IN_PROGRESS]
        found = self.worker.tag_probe(self._any_tag, self._any_mask)
        if not found.matched:
            return
        nowhere = self.make_array(bytearray(1))
        for _ in range(UNEXPECTED_AT_ONCE):
            tag = found.sender_tag
            endpoint = self._by_base.get(tag.value >> CHANNEL_BITS)
            if endpoint is not None and tag.value - (endpoint.base << CHANNEL_BITS) < endpoint.channels:
                return  # its receive is about to be posted; what lies behind it is seen to next time
            request = self.worker.tag_recv(nowhere, tag)
            self.counters.unexpected_messages += 1
            if request.status == IN_PROGRESS:  # UCX still refers to it: dropping it, or the array, could be a crash
                self.strays.append((request, nowhere))
            found = self.worker.tag_probe(self._any_tag, self._any_mask)
            if not found.matched:
                return
