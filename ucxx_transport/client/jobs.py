"""What the parts of a client share: its base; jobs, which are its calls; reads, their payloads over the link."""

from __future__ import annotations

import secrets
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from ucxx_transport.client.payload import BufferPool, Deduplicator, Payload
from ucxx_transport.client.statistics import ClientCounters
from ucxx_transport.errors import DeadlineExceededError, PeerLostError, TransportError
from ucxx_transport.link.base import EndpointEvents
from ucxx_transport.wire.client_side import Asked, Attempt, ClientSession, Offer
from ucxx_transport.wire.frames import HEADER_BYTES, MAX_BODY_BYTES, MAX_NAMES, PACK_BYTES, TRAILER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.payload import Bytes, PageLocker
    from ucxx_transport.client.ports import PortKey, Source
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.endpoint import Endpoint
    from ucxx_transport.membership.sources import SourceRecord
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef

REMEMBERED_RINGS: Final = 1 << 16
"""Rings whose delivered names are remembered, 100 bytes and 50 a slot each: more than a job has sources at a time."""

OWN_WINDOW_BYTES: Final = 2 << 20
"""In flight on one connection, unless two payloads are more: large ones would only hinder each other."""

SMALL_BYTES: Final = PACK_BYTES // 2
"""Answers up to this size share a message."""

FRAMING_BYTES: Final = HEADER_BYTES + TRAILER_BYTES

Outcome = Payload | TransportError
_OWN_CODE: Final = str(Path(__file__).parent)

OnPayload = Callable[[int, Payload], Payload]

Takeable: TypeAlias = "SlotRef | SourceRecord"
"""What names a ring and says where it is served."""

Entry: TypeAlias = "tuple[int, SharedRingBuffer]"
"""The index of a call's reference, and its ring, of this host."""


class ClientBase:
    """What every part of a client uses; `reader` is its random id. `closed`: nothing is to begin any more."""

    closed = False

    def __init__(self, config: ClientConfig, page_locker: PageLocker | None, clock: Callable[[], float]) -> None:
        self.config = config
        self.reader = secrets.randbits(63) + 1
        self.counters = ClientCounters()
        self.buffers = BufferPool(config.buffer_pool_bytes, page_locker)
        self.delivered = Deduplicator(REMEMBERED_RINGS)
        self.clock = clock


class Call:
    """What is started, and done some turns later; `until_s` is its deadline, on the reactor's clock."""

    done = False
    on_done: Callable[[Any], object] | None = None  # called with it once it is done

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s

    def finish(self) -> None:
        """It is done. Idempotent."""
        on_done, self.on_done, self.done = self.on_done, None, True
        if on_done is not None:
            on_done(self)


class Job(Call):
    """One call of a client that reads. It is done when every outcome is there and what is to be said of it is sent.

    Attributes:
        refs: what it is to read.
        outcomes: one a reference, in order; None as long as there is none. left: how many have none.
        reads: those over the link, by index, as long as they have none.
        here: those in rings of this host that have none, because the locks are held or others leave first.
        on_payload: called with each payload that came over the link and its index; what it returns takes its place.
        is_held: a payload is kept until `deliver` or `abandon`: one of a task that may be cancelled before it has it.
        held: that payload's read. Of a job of one, like `is_held`.
        alone: whether all that it reads over the link is of one source: then nothing else waits for it.
        counts: whether its reads are of payloads by name, whose errors are counted as failed reads.
        wait_until_s: what may pass is tried again so long, however often. began_s: of `perf_counter`.
    """

    on_payload: OnPayload | None = None
    is_held = False
    held: Read | None = None
    alone = counts = True
    wait_until_s = 0.0
    here: Sequence[Entry] = ()

    def __init__(self, refs: list[SlotRef], until_s: float) -> None:
        self.until_s = until_s
        self.refs = refs
        self.left = left = len(refs)
        self.outcomes: list[Outcome | None] = [None] * left
        self.reads: dict[int, Read] = {}
        self.began_s = time.perf_counter()

    @property
    def missing(self) -> list[int]:
        """The indices of those that have no outcome."""
        return [index for index, outcome in enumerate(self.outcomes) if outcome is None]

    def results(self) -> list[Outcome]:
        """All outcomes, once it is done."""
        return [outcome for outcome in self.outcomes if outcome is not None]

    def payload(self) -> Payload:
        """What a job of one has read, once it is done; or raises its error."""
        outcome = self.outcomes.pop()
        if isinstance(outcome, Payload):
            return outcome
        assert outcome is not None
        try:
            raise outcome
        finally:
            del outcome  # which would refer to itself, by this frame


class Read(Attempt):
    """One payload of a job that comes over the link, and its attempt in flight.

    One whose attempt has exceeded its time is *late*: a read of the same payload takes its place in the job, and the
    attempt is kept: if its answer comes after all, and there is no outcome yet, it is delivered.

    Attributes:
        job: whose; None once it has its outcome, and of an attempt that has no use. index: in the job.
        message: the buffer that its answer lies in, from `start` on. view: the answer. whole_bytes: how long it is.
        alternate: the port that this call may still rotate to.
        call: number of the slot layer's call, from 1. limit_s: when this call is over at the latest.
        connection: where it is queued or asked. due_s: when to look at it again.
        before: the late one that it took the place of. goes_first: before others that are queued.
    """

    alternate: PortKey | None = None
    call = 1
    late = goes_first = False
    before: Read | None = None
    start = whole_bytes = 0
    ref: SlotRef
    connection: Carrier
    message: Bytes
    view: memoryview

    def __init__(self, job: Job | None, index: int, ref: SlotRef, source: Source, limit_s: float) -> None:
        self.job = job
        self.index = index
        self.ref = ref
        self.source = source
        self.limit_s = self.due_s = limit_s

    def successor(self) -> Read:
        """The read that goes on while this one is late."""
        read = type(self)(self.job, self.index, self.ref, self.source, self.limit_s)
        read.alternate, read.call, read.before = self.alternate, self.call, self
        return read


def next_request(queue: deque[Read], session: ClientSession) -> tuple[list[Read], int]:
    """Take from a connection's queue what the next frame asks for, and drop what is over.

    All names of a frame are of one ring; it takes as many as the windows have room for. Small ones that follow each
    other share one message as their answer, of at most `PACK_BYTES`; each other one has a message of its own.
    Beside the reads, in order, it returns the length of that message; 0 when each has its own.
    """
    named = session.named
    names = min(MAX_NAMES, session.window.attempts - named)
    server_bytes = session.window.nbytes - session.named_bytes
    own_bytes = OWN_WINDOW_BYTES - session.named_bytes
    reads: list[Read] = []
    ring_id = b""
    total = shared_bytes = count = 0
    is_shared = False
    while queue and count < names:
        read = queue[0]
        if read.job is None:
            queue.popleft()
            continue
        ref = read.ref
        nbytes = ref.nbytes
        total += nbytes
        read.whole_bytes = whole = FRAMING_BYTES + ((nbytes + 7) & ~7)
        is_small = whole <= SMALL_BYTES
        # One alone there may exceed the server's bytes, and two alone the client's.
        before = named + count
        if total > min(server_bytes if before else MAX_BODY_BYTES, own_bytes if before > 1 else MAX_BODY_BYTES):
            break
        if not count:
            ring_id, is_shared = ref.ring_id, is_small
        elif ref.ring_id != ring_id or is_small is not is_shared or shared_bytes + whole * is_small > PACK_BYTES:
            break  # it begins the next frame
        shared_bytes += whole * is_small
        count += 1
        reads.append(queue.popleft())
    return reads, shared_bytes if count > 1 else 0


class Carrier(EndpointEvents, Protocol):
    """A `Connection`, as its reads, errands and the pool see it; what each is, is said there."""

    key: PortKey
    endpoint: Endpoint | None
    session: ClientSession
    queue: deque[Read]
    attempts: set[Read]
    late: int
    is_open: bool
    closed: bool
    rested: bool
    used_s: float

    @property
    def idle(self) -> bool: ...
    def ask(self, asked: Asked, on_answer: Callable[[Asked, memoryview], None], /) -> None: ...
    def pump(self) -> None: ...
    def ask_one(self, read: Read, now: float) -> bool: ...
    def receive(self, offer: Offer, reads: list[Read]) -> None: ...
    def after_answers(self) -> None: ...
    def send_ends(self) -> None: ...
    def end_held(self, read: Read, *, delivered: bool) -> None: ...
    def close(self) -> None: ...


def removed(source: Takeable) -> PeerLostError:
    """The error of a read whose source is known to be gone."""
    message = "the source of this payload is gone: its worker died, left, or published itself again"
    return PeerLostError(message, host=source.host, ring=source.ring_name, reason="removed")


def too_late(ref: SlotRef, **facts: object) -> DeadlineExceededError:
    """The error of a read whose time is up; generation 0 names no payload, but its source."""
    if not ref.generation:
        return DeadlineExceededError("the source did not answer in time", host=ref.host, ports=ref.ports, **facts)
    message = "the payload did not arrive in time"
    return DeadlineExceededError(message, host=ref.host, slot=ref.slot, nbytes=ref.nbytes, **facts)


def clear_frames(error: BaseException) -> None:
    """Empty the variables of the frames that `error` has left behind, from this package on downwards.

    They refer to receive buffers of any size, which an error that is kept must not keep. Frames of the package's
    callers, and those that still run, stay as they are; so do the traceback's lines.
    """
    link: BaseException | None = error
    while link is not None:
        trace = link.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
            trace = trace.tb_next
        traceback.clear_frames(trace)
        link = link.__context__


def clear_traceback(error: TransportError) -> None:
    """An error is kept as a value: its frames, and those they were called from, would keep a whole batch."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
