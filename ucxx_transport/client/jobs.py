"""A job is one call of a client; a read is one of its payloads that comes over the link."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import DeadlineExceededError, PeerLostError, TransportError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ucxx_transport.client.attempts import Attempt
    from ucxx_transport.client.connection import Connection
    from ucxx_transport.client.ports import PortKey, Source
    from ucxx_transport.client.takes import Takeable
    from ucxx_transport.schema import SlotRef

Outcome = Payload | TransportError
OnJobDone = Callable[["Job"], object]
OnPayload = Callable[[int, Payload], Payload]
Place = Literal["queued", "asked", "waiting", "paused"]


class Job:
    """One call of a client.

    Attributes:
        refs: what it is to read.
        outcomes: one a reference, in order; None as long as there is none.
        left: how many have none.
        until_s: its deadline, on the reactor's clock.
        done: whether every outcome is there and what is to be said of the payloads has been sent.
        on_done: called once it is.
        on_payload: called with each payload that came over the link and its index; what it returns takes its place.
        into: the caller's memory for the payload; of a job of one.
        is_held: a payload is kept until `deliver` or `abandon`: one of a task that may be cancelled before it has it.
        held: that payload's attempt. Of a job of one, like `is_held`.
        began_s: of `perf_counter`.
        alone: whether all that it reads over the link is of one source: then nothing else waits for it.
        reads: those over the link.
    """

    __slots__ = (
        "alone", "began_s", "done", "held", "into", "is_held", "left", "on_done", "on_payload", "outcomes", "reads",
        "refs", "until_s",
    )  # fmt: skip

    def __init__(
        self,
        refs: Sequence[SlotRef],
        until_s: float,
        on_done: OnJobDone | None = None,
        on_payload: OnPayload | None = None,
        into: Buffer | None = None,
    ) -> None:
        self.refs = refs
        self.outcomes: list[Outcome | None] = [None] * len(refs)
        self.left = len(refs)
        self.until_s = until_s
        self.done = False
        self.on_done = on_done
        self.on_payload = on_payload
        self.into = into
        self.is_held = False
        self.held: Attempt | None = None
        self.began_s = time.perf_counter()
        self.alone = True
        self.reads: list[Read] = []


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

    __slots__ = (
        "alternate", "attempt", "call", "connection", "due_s", "index", "job", "limit_s", "place", "ref", "source",
    )  # fmt: skip

    def __init__(self, job: Job, index: int, ref: SlotRef, source: Source[Read]) -> None:
        self.job: Job | None = job
        self.index = index
        self.ref = ref
        self.source = source
        self.place: Place = "queued"
        self.connection: Connection | None = None
        self.attempt: Attempt | None = None
        self.alternate: PortKey | None = None
        self.call = 1
        self.limit_s = self.due_s = job.until_s


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
