"""A job is one call of a client, a read one of its payloads that comes over the link, an attempt its way there."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import DeadlineExceededError, PeerLostError, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.ports import PortKey, Source
    from ucxx_transport.link.base import Operation
    from ucxx_transport.membership.sources import SourceRecord
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.wire.actions import Asked, Offered
    from ucxx_transport.wire.client_side import ClientSession
    from ucxx_transport.wire.codec import Named, Seal

Outcome = Payload | TransportError
_OWN_CODE: Final = str(Path(__file__).parent)

OnPayload = Callable[[int, Payload], Payload]
Place = Literal["queued", "asked", "paused"]

Takeable: TypeAlias = "SlotRef | SourceRecord"
"""What names a ring and says where it is served."""


class Call:
    """What is started, and done some turns later.

    Attributes:
        until_s: its deadline, on the reactor's clock.
        done: whether it is over.
        on_done: called with it once it is.
    """

    done = False
    on_done: Callable[[Any], object] | None = None

    def __init__(self, until_s: float, on_done: Callable[[Any], object] | None = None) -> None:
        self.until_s = until_s
        self.on_done = on_done

    def finish(self) -> None:
        """It is done. Idempotent."""
        on_done, self.on_done, self.done = self.on_done, None, True
        if on_done is not None:
            on_done(self)


class Job(Call):
    """One call of a client that reads. It is done when every outcome is there and what is to be said of it is sent.

    Attributes:
        refs: what it is to read.
        outcomes: one a reference, in order; None as long as there is none.
        left: how many have none.
        on_payload: called with each payload that came over the link and its index; what it returns takes its place.
        into: the caller's memory for the payload; of a job of one.
        is_held: a payload is kept until `deliver` or `abandon`: one of a task that may be cancelled before it has it.
        held: that payload's attempt. Of a job of one, like `is_held`.
        began_s: of `perf_counter`.
        alone: whether all that it reads over the link is of one source: then nothing else waits for it.
        reads: those over the link.
    """

    on_payload: OnPayload | None = None
    into: Buffer | None = None
    is_held = False
    held: Attempt | None = None
    alone = True

    def __init__(self, refs: list[SlotRef], until_s: float, on_done: Callable[[Any], object] | None = None) -> None:
        self.until_s = until_s
        self.on_done = on_done
        self.refs = refs
        self.outcomes: list[Outcome | None] = [None] * len(refs)
        self.left = len(refs)
        self.began_s = time.perf_counter()
        self.reads: list[Read] = []


class Engine(Protocol):
    """All reads of a client, `Reads`, as its other parts see them.

    Attributes:
        reader: the client's id. jobs: those with reads that have no outcome. finished: jobs whose outcomes are there.
        orphans: attempts in flight that no read waits for, and late ones.
    """

    reader: int
    jobs: set[Job]
    finished: list[Job]
    orphans: set[Attempt]

    def arrived(self, attempt: Attempt) -> bool | None: ...
    def refused(self, attempt: Attempt, error: TransportError) -> None: ...
    def no_memory(self, read: Read, error: TransportError) -> None: ...
    def fail(self, read: Read, error: TransportError) -> None: ...
    def abandon(self, job: Job) -> None: ...
    def settle(self) -> None: ...


class Errand(Protocol):
    """Something else than reads by name that a source is asked."""

    def start(self, connection: Carrier, /) -> None:
        """The connection is open."""

    def lost(self, connection: Carrier, error: TransportError, /) -> None:
        """It failed, or was never open."""


class Carrier(Protocol):
    """A `Connection`, as its reads and errands, and the pool, see it; what each is, is said there."""

    key: PortKey
    session: ClientSession
    queue: deque[Read]
    running: list[Errand]
    attempts: dict[int, Attempt]
    late: int
    is_open: bool
    closed: bool
    used_s: float

    @property
    def idle(self) -> bool: ...
    def start(self) -> None: ...
    def ask(self, asked: Asked, receive_bytes: int, on_answer: Callable[[Asked, bytearray], None], /) -> None: ...
    def run(self, errand: Errand) -> None: ...
    def pump(self) -> None: ...
    def ask_one(self, job: Job, source: Source, now: float) -> None: ...
    def receive(self, offered: Sequence[Offered], reads: Sequence[Read | None]) -> None: ...
    def take(self, attempt: Attempt, *, is_last: bool) -> None: ...
    def after_answers(self) -> None: ...
    def send_ends(self) -> None: ...
    def end_held(self, attempt: Attempt, *, delivered: bool) -> None: ...
    def fail(self, error: TransportError) -> None: ...
    def close(self) -> None: ...


class Read:
    """One payload of a job that comes over the link.

    Attributes:
        job: whose; None once it has its outcome.
        index: in the job. ref: the payload. source: where it is.
        place: see `reads`. connection: where it is queued or asked. attempt: its attempt in flight.
        alternate: the port that this call may still rotate to.
        call: number of the slot layer's call, from 1.
        limit_s: when this call is over at the latest.
        due_s: when to look at it again.
    """

    place: Place = "queued"
    connection: Carrier | None = None
    attempt: Attempt | None = None
    alternate: PortKey | None = None
    call = 1

    def __init__(self, job: Job, index: int, ref: SlotRef, source: Source) -> None:
        self.job: Job | None = job
        self.index = index
        self.ref = ref
        self.source = source
        self.limit_s = self.due_s = job.until_s


class Attempt:
    """One payload asked for over one connection.

    Attributes:
        read: who waits for it; None: the answer is not wanted any more, and ended as not delivered.
        ref: the payload.
        number: the session's.
        message: the buffer, or part of one, that its answer lies in.
        seal: what that has to look like, where there was time to work it out.
        due_s: when it has taken too long.
        late: it has.
    """

    late = False
    seal: Seal | None = None

    def __init__(  # noqa: PLR0917 - a keyword costs on this path
        self, connection: Carrier, read: Read | None, ref: Named, number: int, message: Bytes, due_s: float
    ) -> None:
        self.connection = connection
        self.read = read
        self.ref = ref
        self.number = number
        self.message = message
        self.due_s = due_s

    def arrived(self, operation: Operation) -> None:
        """Its receive is over."""
        connection = self.connection
        if operation.error is not None:
            connection.fail(operation.error)
        elif not connection.closed:  # by a callback before: what had arrived by then is called back all the same
            connection.take(self, is_last=True)


class SharedMessage:
    """One message that brings the answers to several attempts."""

    __slots__ = ("attempts",)

    def __init__(self, attempts: list[Attempt]) -> None:
        self.attempts = attempts

    def arrived(self, operation: Operation) -> None:
        """The receive is over."""
        connection = self.attempts[0].connection
        if operation.error is not None:
            connection.fail(operation.error)
            return
        for attempt in self.attempts:
            if connection.closed:
                return  # before, or since the answer before was not as the protocol has it
            connection.take(attempt, is_last=attempt is self.attempts[-1])


def removed(source: Takeable) -> PeerLostError:
    """The error of a read whose source is known to be gone."""
    message = "the source of this payload is gone: its worker died, left, or published itself again"
    return PeerLostError(message, host=source.host, ring=source.ring_name, reason="removed")


def too_late(ref: SlotRef, **facts: object) -> DeadlineExceededError:
    """The error of a read whose time is up."""
    message = "the payload did not arrive in time"
    return DeadlineExceededError(message, host=ref.host, slot=ref.slot, nbytes=ref.nbytes, **facts)


def copy_of(error: TransportError) -> TransportError:
    """An error of a read's own: several fail by one event, and each is raised somewhere else."""
    return type(error)(error.message, **error.facts)


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
