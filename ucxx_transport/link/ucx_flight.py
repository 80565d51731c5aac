"""What is in flight over one link, how it ends, and what else its endpoints and listeners share.

UCX calls `native/flight.c` back, which queues what has ended; each turn takes what is queued, in the order of the ends.
An operation is listed before UCX is asked, and until its end is taken: UCX points to its buffer, and an interrupt may
come between any two steps.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.base import LinkCounters, OnDone, Usable, byte_view
from ucxx_transport.link.process import keep_for_good
from ucxx_transport.link.reactor import Reactor, Timer
from ucxx_transport.link.settings import limits_in_words, loopback_only
from ucxx_transport.link.ucx_api import Binding, UcxArray, UcxWorker
from ucxx_transport.native import load

CHANNEL_BITS: Final = 16
"""Channel `n` of an endpoint is the tag `base << 16 | n`."""

ENDS_AT_ONCE: Final = 64
"""Ends that are taken in one turn, so that callbacks which post what ends at once cannot hold the thread."""

STRAYS_EVERY: Final = 8
"""Turns in which something moved between two looks for unexpected messages: at 64 KiB each some 16 MiB of them."""

UNEXPECTED_AT_ONCE: Final = 4096
"""Unexpected messages are cleared away this many at a time, so that a flood cannot hold the thread."""

_INDEX, _ENDPOINT, _ADDRESS, _BYTES, _TAG, _HANDLED, _SPIN_NS, _FOUND_TAG, _, _ENDED, _ENDS = range(9, 20)
"""Words of `struct flight`, behind the worker and the functions."""

IN_PROGRESS: Final = 1  # UCS_INPROGRESS, ucs/type/status.h; 0 is a success, an error is negative

FUNCTIONS: Final = (
    *("ucp_tag_send_nbx", "ucp_tag_recv_nbx", "ucp_stream_send_nbx", "ucp_stream_recv_nbx", "ucp_tag_probe_nb"),
    *("ucp_worker_progress", "ucp_request_cancel", "ucp_request_free"),
)
"""What `flight.c` calls of UCX, as its `struct ucp` has it."""


class UCXXOperation:
    """Something that UCX is asked to do for an endpoint. See `base.Operation`.

    Its `index` is that in its flight, its `channel` that of one that is deferred, its `status` UCX's once it has ended.
    The buffer is pinned until UCX is done with it: dropping it sooner is a crash.
    """

    owner: Posted
    index: int
    buffer: object
    nbytes: int
    on_done: OnDone | None = None
    channel = status = 0
    completed = False
    error: TransportError | None = None


def operation_of(owner: Posted, buffer: object, nbytes: int, on_done: OnDone | None = None) -> UCXXOperation:
    """One to be posted."""
    operation = UCXXOperation()
    operation.owner, operation.buffer, operation.nbytes, operation.on_done = owner, buffer, nbytes, on_done
    return operation


class UCXXMessage:
    """See `base.Message`."""

    __slots__ = ("address", "array", "nbytes", "writable")

    def __init__(self, view: memoryview, array: UcxArray) -> None:
        self.array = array
        self.address: int = array.ptr
        self.nbytes = view.nbytes
        self.writable = not view.readonly


class Posted:
    """Something that operations are posted for; `posted` has those whose end has not been called back."""

    def __init__(self) -> None:
        self.posted: dict[UCXXOperation, UCXXOperation] = {}

    def note_failure(self, operation: UCXXOperation) -> None:
        """An operation has ended in an error."""


class Flight:
    """What is in flight with one UCX worker; the calls of `flight.c`, which says what each does.

    Args:
        worker: the `ucp_worker_h`.
        functions: addresses of `FUNCTIONS`.

    Attributes:
        operations: by index.
        free: indices.
        ended: taken, and not called back yet. An operation may be in it twice, and is called back once. What else ends
            in a callback of UCX, inside its progress, is appended to it.
        handled: how many ends have been taken, ever.
        send, send_large, receive, receive_large, stream_send, stream_receive: to `post` by. The large ones release the
            interpreter's lock (GIL): UCX copies as much as the socket takes, or registers memory with a device.
    """

    def __init__(self, worker: int, functions: Sequence[int]) -> None:
        brief, sleeping = load()
        words = brief.flight_words()
        self._memory = memory = (ctypes.c_uint64 * words)(worker, *functions)
        self._words = memoryview(memory).cast("B").cast("Q")
        self._ends = self._words[_ENDS : _ENDS + ENDS_AT_ONCE].cast("B").cast("q")
        # Without argument types an array is passed as it is: a call takes 0.1 us, and 0.1 more for each typed argument.
        self.send, self.send_large = brief.flight_send, sleeping.flight_send
        self.receive, self.receive_large = brief.flight_receive, sleeping.flight_receive
        self.stream_send, self.stream_receive = brief.flight_stream_send, brief.flight_stream_receive
        self._sends = (self.send, self.send_large, self.stream_send)
        self._turn, self._has_ends = sleeping.flight_turn, brief.flight_has_ends
        self._cancel, self._probe, self._close = brief.flight_cancel, brief.flight_probe, brief.flight_close
        self.operations: dict[int, UCXXOperation] = {}
        self.free: list[int] = []
        self._made = 0
        self._taken: list[int] = []
        self.ended: deque[UCXXOperation] = deque()
        self.handled = 0

    def has_ends(self) -> bool:
        """Whether something has ended that is not taken or not called back yet."""
        self._words[_HANDLED] = self.handled
        return bool(self.ended) or self._has_ends(self._memory) != 0

    def post(
        self, operation: UCXXOperation, begin: Callable[..., int], endpoint: int, address: int | bytes, tag: int
    ) -> None:
        """Ask UCX for something, by one of the calls. What ends at once is `completed`; a receive is called back, too.

        Args:
            operation: of its buffer.
            begin: one of the calls.
            endpoint: UCX's; 0 for a receive, which matches by the tag alone.
            address: of the buffer, or what it is.
            tag: 0 for what goes by the stream.
        """
        free, words = self.free, self._words
        if not free:
            free.append(self._made)
            self._made += 1
        operation.index = index = free.pop()
        words[_INDEX], words[_ENDPOINT], words[_TAG], words[_BYTES] = index, endpoint, tag, operation.nbytes
        posted = operation.owner.posted
        self.operations[index] = posted[operation] = operation
        if type(address) is int:
            words[_ADDRESS] = address
            status = begin(self._memory, None)
        else:
            status = begin(self._memory, address)
        if status != IN_PROGRESS:
            operation.status = status
            if begin in self._sends:
                del self.operations[index], posted[operation]
                free.append(index)
                if operation.on_done is not None:  # it had waited
                    self.ended.append(operation)
            operation.completed, operation.buffer = True, None
            if status:
                operation.owner.note_failure(operation)

    def turn(self, spin_ns: int) -> bool:
        """Progress; take what has ended, and call it back. Whether anything moved.

        An interrupt may come between any two steps: what was not taken is handed over again, and each step may be
        taken twice.

        Args:
            spin_ns: how long to poll while nothing moves.
        """
        words, operations, ended = self._words, self.operations, self.ended
        words[_HANDLED], words[_SPIN_NS] = self.handled, spin_ns
        found = self._turn(self._memory)
        if self._taken:  # the queue has them no more
            taken, self._taken = self._taken, []
            self.free += taken
        for end in self._ends[: max(found, 0)]:
            index = end >> 8
            operation = operations.get(index)
            if operation is not None:
                if not operation.completed:
                    status = end & 0xFF
                    operation.status = status - 256 if status > 127 else status
                ended.append(operation)
                operations.pop(index)
            self.handled += 1
            self._taken.append(index)
        moved: bool = found >= 0
        while ended:  # some may be left of a turn that a callback's exception has ended
            moved = True
            operation = ended[0]
            if not operation.completed:
                if operation.status:
                    operation.owner.note_failure(operation)
                operation.completed, operation.buffer = True, None
            operation.owner.posted.pop(operation, None)
            on_done, operation.on_done = operation.on_done, None
            if on_done is not None:
                on_done(operation)
            ended.popleft()
        return moved

    def cancel(self, owners: Iterable[Posted]) -> int:
        """End what is in flight for these, as far as UCX ends it; how many ends are `handled` when that is seen."""
        for owner in owners:
            for operation in owner.posted:
                self._words[_INDEX] = operation.index
                self._cancel(self._memory)
        return self._words[_ENDED]

    def unexpected_tag(self) -> int | None:
        """The tag of a message that nothing has been posted for; None: there is none."""
        return self._words[_FOUND_TAG] if self._probe(self._memory) else None

    def release(self) -> None:
        """Give back the memory, unless UCX may still refer to it."""
        if self.operations:
            keep_for_good(self)
        else:
            self._close(self._memory)


class LinkState(Usable, Posted):
    """A `UCXXLink`, as its endpoints and listeners see it; the owner of what takes in unexpected messages.

    Attributes:
        ipv6: an address that listeners listen on, too.
        make_array: UCX's.
        ready: what is to be called in the next turn.
        broken: endpoints whose connection is. Their operations are cancelled (None: not yet), and when so many ends are
            handled as there are then, what had arrived has been called back: those that live yet have lost their peer.
        ending: those that are being closed, and when they end anyway.
        endpoints: that are open, by the base of their tags. listeners: likewise.
        rdma: this host has a device for it.
    """

    worker: UcxWorker
    flight: Flight
    rdma: bool
    settings: Mapping[str, str]
    context: Any

    def __init__(self, timers: Reactor, binding: Binding, ipv6: str | None) -> None:
        self.timers = timers
        self.ipv6 = ipv6
        self.binding = binding
        self.make_array = binding.make_array
        self.counters = LinkCounters()
        self.ready: deque[Callable[[], object]] = deque()
        self.endpoints: dict[int, Any] = {}
        self.broken: dict[Any, int | None] = {}
        self.ending: dict[Any, Timer] = {}
        self.listeners: set[Any] = set()
        super().__init__()  # last: another thread may fork, and the child forgets what it finds

    def message(self, buffer: object, *, writable: bool = False) -> UCXXMessage:
        self.check_usable()
        view = byte_view(buffer, writable=writable)
        return UCXXMessage(view, self.make_array(view))

    def in_turn_after(self, delay_s: float, action: Callable[[], object]) -> Timer:
        """Call this in a turn, after a while."""
        return self.timers.call_at(self.timers.now() + delay_s, lambda: self.ready.append(action))

    def why_failed(
        self, exc: Exception, peer: str, address: tuple[str, int] | None, *, connected: bool
    ) -> TransportError:
        """Our error for UCX's; of this side's settings where they leave no way to another host, at the address."""
        error = self.binding.error(exc, peer=peer, connected=connected)
        if address is not None and isinstance(error, PeerLostError) and error.facts["reason"] == "unreachable":
            limits = limits_in_words(self.settings, os.environ)
            if limits and loopback_only(self.context.info) and not ipaddress.ip_address(address[0]).is_loopback:
                words = f"{limits} leaves UCX nothing but loopback; add an interface of this host"
                return ConfigError(words, host=address[0])
        return error

    def discard_unexpected(self) -> None:
        """Drop messages that no endpoint waits for: UCX would keep them until the worker's end.

        They are what came to an endpoint that has been closed, on a channel that it does not have, or under a tag that
        never was one's: tags are matched in the whole worker, so any peer may send such.
        """
        for _ in range(UNEXPECTED_AT_ONCE):
            tag = self.flight.unexpected_tag()
            if tag is None:
                return
            endpoint = self.endpoints.get(tag >> CHANNEL_BITS)
            if endpoint is not None and tag - (endpoint.base << CHANNEL_BITS) < endpoint.channels:
                return  # its receive is about to be posted; what lies behind it is seen to next time
            nowhere = self.message(bytearray(1))
            self.counters.unexpected_messages += 1
            self.flight.post(operation_of(self, nowhere, 1), self.flight.receive, 0, nowhere.address, tag)
