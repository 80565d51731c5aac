"""What is in flight over one link, how it ends, and what else its endpoints and listeners share.

UCX calls `native/flight.c` back, which queues what has ended; each turn takes what is queued, in the order of the ends.
An operation is listed before UCX is asked, and until its end is taken: UCX points to its buffer, and an interrupt may
come between any two steps.
"""

from __future__ import annotations

import ctypes
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from typing import Any, Final

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.link.base import Message, Operation, Posted, Timers, Usable, keep_for_good
from ucxx_transport.native import load

CHANNEL_BITS: Final = 16  # channel `n` of an endpoint is the tag `base << 16 | n`
ENDS_AT_ONCE: Final = 64
"""Ends that are taken in one turn, so that callbacks which post what ends at once cannot hold the thread."""

STRAYS_EVERY: Final = 8
"""Turns in which something moved between two looks for unexpected messages: at 64 KiB each some 16 MiB of them."""

UNEXPECTED_AT_ONCE: Final = 4096
"""Unexpected messages are cleared away this many at a time, so that a flood cannot hold the thread."""

BUSY: Final = 32
"""So many progress calls in a row that moved something put off the end of a broken connection's operations."""

SPIN_NS: Final = 5_000_000  # the longest poll in one call, which no signal interrupts
PAUSE_S: Final = 1e-3  # pause between two turns of a close, so as not to burn a core
CLOSE_TIMEOUT_S: Final = 2.0
"""How long a close waits for operations to end. Measured: under 50 ms; what has not ended by then never does."""

INDEX, ENDPOINT, ADDRESS, BYTES, TAG, HANDLED, SPIN, FOUND_TAG, _, ENDED, ENDS = range(9, 20)
"""Words of `struct flight`, behind the worker and the functions."""

IN_PROGRESS, TRUNCATED, CANCELLED = 1, -9, -16
"""Of ucs/type/status.h; 0 is a success, an error is negative."""

FUNCTIONS: Final = (
    *("ucp_tag_send_nbx", "ucp_tag_recv_nbx", "ucp_stream_send_nbx", "ucp_stream_recv_nbx", "ucp_tag_probe_nb"),
    *("ucp_worker_progress", "ucp_request_cancel", "ucp_request_free"),
)
"""What `flight.c` calls of UCX, as its `struct ucp` has it."""


class Flight:
    """What is in flight with one worker; the calls of `flight.c`, which says what each does.

    Attributes:
        operations: by index. free: indices.
        ended: taken, and not called back yet. An operation may be in it twice, and is called back once. What else ends
            in a callback of UCX, inside its progress, is appended to it.
        handled: how many ends have been taken, ever.
        send, send_large, receive, receive_large, stream_send, stream_receive: to `post` by. The large ones release the
            interpreter's lock (GIL): UCX copies as much as the socket takes, or registers memory with a device.
    """

    def __init__(self, memory: ctypes.Array[ctypes.c_uint64], brief: Any, sleeping: Any) -> None:
        self._memory = memory
        self._words = memoryview(memory).cast("B").cast("Q")
        self._ends = self._words[ENDS : ENDS + ENDS_AT_ONCE].cast("B").cast("q")
        # Without argument types an array is passed as it is: a call takes 0.1 us, and 0.1 more for each typed argument.
        self.send, self.send_large = brief.flight_send, sleeping.flight_send
        self.receive, self.receive_large = brief.flight_receive, sleeping.flight_receive
        self.stream_send, self.stream_receive = brief.flight_stream_send, brief.flight_stream_receive
        self._sends = (self.send, self.send_large, self.stream_send)
        self._turn, self._has_ends = sleeping.flight_turn, brief.flight_has_ends
        self._cancel, self._probe, self._close = brief.flight_cancel, brief.flight_probe, brief.flight_close
        self.operations: dict[int, Operation] = {}
        self.free: list[int] = []
        self._made = 0
        self._taken: list[int] = []
        self.ended: deque[Operation] = deque()
        self.handled = 0

    def has_ends(self) -> bool:
        """Whether something has ended that is not taken or not called back yet."""
        self._words[HANDLED] = self.handled
        return bool(self.ended) or self._has_ends(self._memory) != 0

    def post(
        self, operation: Operation, begin: Callable[..., Any], endpoint: int, address: int | bytes, tag: int
    ) -> None:
        """Ask UCX for something, by one of the calls. What ends at once is `completed`; a receive is called back, too.

        The address is the buffer's, or bytes. A receive by its tag has no endpoint, what goes by the stream no tag: 0.
        """
        free, words = self.free, self._words
        if not free:
            free.append(self._made)
            self._made += 1
        operation.index = index = free.pop()
        words[INDEX], words[ENDPOINT], words[TAG], words[BYTES] = index, endpoint, tag, operation.nbytes
        posted = operation.owner.posted
        self.operations[index] = posted[operation] = operation
        if type(address) is int:
            words[ADDRESS] = address
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
        """Progress, for `spin_ns` while nothing moves; take what has ended, and call it back. Whether anything moved.

        An interrupt may come between any two steps: what was not taken is handed over again; a step may be taken twice.
        """
        words, operations, ended = self._words, self.operations, self.ended
        words[HANDLED], words[SPIN] = self.handled, spin_ns
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
                self._words[INDEX] = operation.index
                self._cancel(self._memory)
        return self._words[ENDED]

    def unexpected_tag(self) -> int | None:
        """The tag of a message that nothing has been posted for; None: there is none."""
        return self._words[FOUND_TAG] if self._probe(self._memory) else None

    def release(self) -> None:
        """Give back the memory, unless UCX may still refer to it."""
        if self.operations:
            keep_for_good(self)
        else:
            self._close(self._memory)


def native_flight(worker: int, functions: Sequence[int]) -> Flight:
    """Of a `ucp_worker_h`, by the addresses of `FUNCTIONS`."""
    brief, sleeping = load()
    return Flight((ctypes.c_uint64 * brief.flight_words())(worker, *functions), brief, sleeping)


class LinkCore(Usable, Posted):
    """What links have in common, above what carries their messages: turns, and how connections end.

    It is the owner of what takes in unexpected messages.

    Attributes:
        ready: what is to be called in the next turn.
        broken: endpoints whose connection is. Their operations are cancelled (None: not yet), and when so many ends are
            handled as there are then, what had arrived has been called back: those that live yet have lost their peer.
        ending: those that are being closed, each with the timer that ends it anyway.
        endpoints: those that are open, by the base of their tags. thread: that had the last turn.
        worker: UCX's. root: the class of its errors, from which `why_failed` makes ours. rdma: the host has devices.
        leaked_buffers: those whose operation never ended; they are kept for good.
    """

    worker: Any
    root: type[Exception]
    rdma = False
    accepts_failed = leaked_buffers = unexpected_messages = 0

    def __init__(self, timers: Timers, flight: Flight, make_array: Callable[[Any], Any], descriptor: int) -> None:
        self.timers = timers
        self.flight = flight
        self.make_array = make_array
        self.ready: deque[Callable[[], object]] = deque()
        self.endpoints: dict[int, Any] = {}
        self.broken: dict[Any, int | None] = {}
        self.ending: dict[Any, Any] = {}
        self.listeners: set[Any] = set()
        self.thread = get_ident()
        self._descriptor = descriptor
        self._busy = self._moves = 0
        super().__init__()  # last: another thread may fork, and the child forgets what it finds

    def message(self, buffer: object) -> Message:
        """The buffer, prepared for posts. It is pinned as long as the message lives: not resized, nor unmapped."""
        self.check_usable()
        view = memoryview(buffer)  # type: ignore[arg-type]  # the failure, a TypeError or ValueError, is the check
        if not view.c_contiguous:
            raise ConfigError("buffer is not C-contiguous; pass a contiguous copy", type=type(buffer).__name__)
        return Message(view, self.make_array(view))

    def in_turn_after(self, delay_s: float, action: Callable[[], object]) -> Any:
        """Call this in a turn, after a while."""
        return self.timers.call_at(self.timers.now() + delay_s, lambda: self.ready.append(action))

    def progress(self, spin_s: float = 0.0) -> bool:
        """Take in what has arrived, and call back, some ms at most; it polls for `spin_s` while nothing moves."""
        if self.forked or self.closed:
            self.check_usable()
        self.thread = get_ident()
        left_ns = 0 if self.ready or self.broken else int(spin_s * 1e9)
        moved = self.flight.turn(min(left_ns, SPIN_NS))
        while not moved and left_ns > SPIN_NS and not self.ready:
            left_ns -= SPIN_NS
            moved = self.flight.turn(min(left_ns, SPIN_NS))
        if moved:
            self._busy += 1
            self._moves += 1
            if not self._moves % STRAYS_EVERY:
                self.discard_unexpected()
        else:
            self._busy = 0
        if self.ready or self.ending or self.broken:
            return self._call_back() or moved
        return moved

    def arm(self) -> bool:
        """Make `fileno()` become readable when something happens. False: it has already, so progress first."""
        if self.forked or self.closed:
            self.check_usable()
        waits = self.ready or self.broken or self.flight.has_ends()
        return not waits and bool(self.worker.arm())

    def fileno(self) -> int:
        """The descriptor to sleep on once `arm()` was True."""
        return self._descriptor

    def close(self) -> None:
        """End endpoints, listeners and operations, and give back the resources. Idempotent, bounded (3 s)."""
        if self.closed or self.forked:
            return
        self.closing = True
        failure: Exception | None = None
        late_s = time.monotonic() + CLOSE_TIMEOUT_S
        while time.monotonic() < late_s + PAUSE_S * 100:
            self.discard_unexpected()
            if not (self.endpoints or self.listeners or self.ready or self.posted):
                break
            late = time.monotonic() > late_s  # before the closes: each has a turn to end its operations
            try:
                for listener in list(self.listeners):
                    listener.close()
                for endpoint in list(self.endpoints.values()):
                    endpoint.close()
                    if late:
                        endpoint.end_close()
                if not self.progress():
                    time.sleep(PAUSE_S)
            except Exception as exc:  # noqa: BLE001  # of a callback; raised when all is closed
                failure = failure or exc
        self.closed = True
        self.closing = False
        self.release()
        self.flight.release()
        if failure is not None:
            raise failure

    @abstractmethod
    def why_failed(self, exc: Any, peer: str, address: tuple[str, int] | None, *, connected: bool) -> TransportError:
        """Our error for one of `root`, of a connection to the address that had been up or not."""

    @abstractmethod
    def release(self) -> None:
        """Nothing is open any more: give back the worker."""

    def forget(self) -> None:
        super().forget()
        for endpoint in self.endpoints.values():
            endpoint.alive = endpoint.usable = False

    def discard_unexpected(self) -> None:
        """Drop messages that no endpoint waits for: UCX would keep them until the worker's end.

        They came to a closed endpoint, on a channel that one does not have, or under any tag: tags are matched in the
        whole worker.
        """
        for _ in range(UNEXPECTED_AT_ONCE):
            tag = self.flight.unexpected_tag()
            if tag is None:
                return
            endpoint = self.endpoints.get(tag >> CHANNEL_BITS)
            if endpoint is not None and tag - (endpoint.base << CHANNEL_BITS) < endpoint.channels:
                return  # its receive is about to be posted; what lies behind it is seen to next time
            nowhere = self.message(bytearray(1))
            self.unexpected_messages += 1
            self.flight.post(Operation.of(self, nowhere, 1), self.flight.receive, 0, nowhere.address, tag)

    def _call_back(self) -> bool:
        """Call what is ready, those who have lost their peer, and who is closed; whether anything was called."""
        called = bool(self.ready)
        for _ in range(len(self.ready)):
            self.ready.popleft()()
        cut_off = [endpoint for endpoint, handled in self.broken.items() if handled is None]
        if cut_off and self._busy % BUSY == 0:
            # What had arrived has been taken in; the rest of a broken connection's operations will never come.
            self.broken.update(dict.fromkeys(cut_off, self.flight.cancel(cut_off)))
            called = self.flight.turn(0) or called
        for endpoint in tuple(self.ending):
            if not (endpoint.posted or endpoint.deferred):
                called = True
                endpoint.end_close()
        for endpoint, handled in tuple(self.broken.items()):
            if handled is not None and self.flight.handled >= handled:
                called = True
                if endpoint.alive:
                    endpoint.lose()
                else:
                    del self.broken[endpoint]
        return called
