"""Payloads without references: what a ring has ready, taken by a client that names only their source.

| step                       | of another host                            | of this host                     |
|----------------------------|--------------------------------------------|----------------------------------|
| something is asked for     | TAKE, over one of the source's ports       | `SharedRingBuffer.take`          |
| nothing is there           | the server waits, up to the caller's time  | a wait for the ring's word       |
| something has been picked  | an offer: names, what their writers said   | leases                           |
| each payload               | comes as after a FETCH; if its connection  | is a view of its slot, or a copy |
|                            | is lost, it is asked for elsewhere by name |                                  |

Everything of another host runs in the thread that runs the reactor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

from ucxx_transport.client.jobs import Job, Read
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import Takeable, backoff_s, retries_slot
from ucxx_transport.errors import ConfigError, DeadlineExceededError, StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.envelope import meta_of, unpack_envelope
from ucxx_transport.wire.frames import offer_receive_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ucxx_transport.client.connection import Connection
    from ucxx_transport.client.ports import PortKey, Source
    from ucxx_transport.link.base import Timer
    from ucxx_transport.wire.actions import Asked, Offer, Offered

Selector = Literal["oldest", "newest"]

DEFAULT_MAX_PAYLOADS: Final = 16
DEFAULT_MAX_BYTES: Final = 256 << 20

MAX_WAIT_S: Final = 60.0
"""How long a server waits on behalf of one request; a longer wait is several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeRequest:
    """What to take.

    Attributes:
        source: from whom.
        max_payloads: how many at most, 1 to 64.
        max_bytes: of them all.
        newest: the newest first, else the oldest.
        wait_s: how long to wait for a first one.
        until_s: when the whole call is over, on the reactor's clock.

    Raises:
        ConfigError: a number is out of its range.
    """

    source: Takeable
    max_payloads: int
    max_bytes: int
    newest: bool
    wait_s: float
    until_s: float

    def __post_init__(self) -> None:
        for field, value, most in (("max_payloads", self.max_payloads, 64), ("max_bytes", self.max_bytes, 1 << 46)):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{field} = {value!r}: expected 1 to {most}", field=field, value=value)


def newest_of(selector: str) -> bool:
    """Whether a selector is "newest"; a ConfigError when it is not "oldest" either."""
    if selector not in ("oldest", "newest"):
        raise ConfigError(f"selector = {selector!r}: expected 'oldest' or 'newest'", field="selector", value=selector)
    return selector == "newest"


def take_some(connection: Connection, take: Take, wait_s: float) -> None:
    """Ask for what the ring behind a connection has ready; the server waits for a first payload so long."""
    session, request = connection.session, take.request
    connection.running.append(take)

    def answered(asked: Asked, answer: bytearray) -> None:
        connection.running.remove(take)
        try:
            offer = session.on_offer(asked.attempt, answer)
        except TransportError as error:
            if session.broken:
                raise
            take.lost(error)
        else:
            wanted = take.offered(connection, offer)
            if offer.payloads:
                _receive(connection, offer.payloads, take if wanted else None)
        connection.after_answers()

    asked = session.take(
        request.max_payloads, request.max_bytes, newest=request.newest, wait_ms=math.ceil(wait_s * 1000)
    )
    connection.ask(asked, offer_receive_bytes(request.max_payloads), answered)


def _receive(connection: Connection, offered: Sequence[Offered], take: Take | None) -> None:
    """Payloads that a server has picked are on their way: the reads of a job, or, without a take, to be given back."""
    if take is None:
        connection.receive(offered, [None] * len(offered))
        return
    refs = take.references(offered)
    job = take.job = Job(refs, take.until_s, take.came)
    host = refs[0].host
    assert host is not None  # checked where the call began
    source = take.reads.source_of(host, refs[0].ports)
    others = [key for key in source.keys if key != connection.key]
    for index, ref in enumerate(refs):
        read = Read(job, index, ref, source)
        read.alternate = others[0] if others else None
        job.reads.append(read)
    take.reads.begin_taken(job, source)
    connection.receive(offered, job.reads)


class Taking(Protocol):
    """What a take needs of the client's `Reads`."""

    takes: set[Take]
    now: Callable[[], float]
    read_attempts: int

    def call_at(self, when_s: float, action: Callable[[], None], /) -> Timer: ...
    def next_port(self, host: str, ports: tuple[int, ...]) -> PortKey: ...
    def connection_to(self, key: PortKey) -> Connection: ...
    def blame(self, key: PortKey, error: TransportError) -> None: ...
    def source_of(self, host: str, ports: tuple[int, ...]) -> Source[Read]: ...
    def begin_taken(self, job: Job, source: Source[Read]) -> None: ...
    def abandon(self, job: Job) -> None: ...


class Take:
    """One call that takes payloads over the link. It is an `Errand` of one connection at a time.

    Attributes:
        request: what is to be taken. until_s: the deadline, on the reactor's clock.
        job: reads what a server has picked; None before.
        payloads: what has come, once it is done.
        error: why nothing has, then.
        done: whether it is over.
        on_done: called once it is.

    Raises:
        ConfigError: the source has no address.
    """

    __slots__ = (
        "_asked_until_s", "_call", "_connection", "_key", "_reads", "_records", "_timer", "_wait_until_s", "done",
        "error", "job", "on_done", "payloads", "request", "until_s",
    )  # fmt: skip

    def __init__(self, request: TakeRequest, on_done: Callable[[Take], object] | None = None) -> None:
        source = request.source
        if source.host is None or not source.ports:
            raise ConfigError("this source has no address to take from; start its UCXXServer", ring=source.ring_name)
        self.request = request
        self.until_s = request.until_s
        self._reads: Taking | None = None
        self._records: list[Mapping[str, object] | None] = []
        self._connection: Connection | None = None
        self._key: PortKey | None = None
        self._timer: Timer | None = None
        self._call = 0
        self._wait_until_s = self._asked_until_s = 0.0
        self.job: Job | None = None
        self.payloads: list[Payload] = []
        self.error: TransportError | None = None
        self.done = False
        self.on_done = on_done

    @property
    def reads(self) -> Taking:
        """Of the client, once it has begun."""
        assert self._reads is not None
        return self._reads

    def begin(self, reads: Taking) -> None:
        """Ask a first port."""
        self._reads = reads
        self._wait_until_s = reads.now() + self.request.wait_s
        self.ask()

    def ask(self) -> None:
        """Ask a port."""
        self._stop_timer()
        if self.done:
            return
        self._call += 1
        reads = self.reads
        now = reads.now()
        limit_s = self.until_s if self._call >= reads.read_attempts else (now + self.until_s) / 2
        self._asked_until_s = limit_s
        self._timer = reads.call_at(limit_s, self._too_late)
        source = self.request.source
        assert source.host is not None  # checked where the call begins
        self._key = reads.next_port(source.host, source.ports)
        self._connection = reads.connection_to(self._key)
        self._connection.run(self)

    def start(self, connection: Connection) -> None:
        """See `Errand`."""
        if self.done or connection is not self._connection:
            return
        now = self.reads.now()
        wait_s = min(max(0.0, self._wait_until_s - now), MAX_WAIT_S, max(0.0, (self._asked_until_s - now) / 2))
        take_some(connection, self, wait_s)

    def offered(self, connection: Connection, offer: Offer) -> bool:
        """A server has picked payloads; whether they are still wanted: then their attempts are `adopted`."""
        if self.done or connection is not self._connection:
            return False
        self._connection = None
        if not offer.payloads:
            if offer.reason:
                self._end(ConfigError(f"{offer.reason}; raise max_bytes", field="max_bytes"))
            elif self.reads.now() < min(self._wait_until_s, self.until_s):
                self._call = 0
                self.ask()
            else:
                self._end(None)
            return False
        self._stop_timer()
        return True

    def references(self, payloads: Sequence[Offered]) -> list[SlotRef]:
        """References of what was picked; a ProtocolError where what their writers said is malformed."""
        source = self.request.source
        refs = []
        for offered in payloads:
            record = unpack_envelope(offered.envelope)
            self._records.append(record)
            refs.append(
                SlotRef(
                    ring_id=offered.ring_id,
                    ring_name=source.ring_name,
                    slot=offered.slot,
                    generation=offered.generation,
                    nbytes=offered.nbytes,
                    host_id=source.host_id,
                    host=source.host,
                    ports=tuple(source.ports),
                    fingerprint=offered.fingerprint,
                    checksum=offered.checksum,
                    meta=meta_of(record),
                )
            )
        return refs

    def came(self, job: Job) -> None:
        """Every payload that was picked has come, or will not."""
        errors = []
        for outcome, record in zip(job.outcomes, self._records, strict=True):
            if isinstance(outcome, Payload):
                outcome.record = record
                self.payloads.append(outcome)
            elif isinstance(outcome, TransportError) and not isinstance(outcome, StaleSlotError):
                errors.append(outcome)
        job.outcomes.clear()
        self.job = None
        self._end(None if self.payloads or not errors else errors[0])

    def lost(self, error: TransportError) -> None:
        """See `Errand`: what was picked is there again; ask another port, or again a little later."""
        if self.done or self._connection is None:
            return
        self._connection = None
        reads, now = self.reads, self.reads.now()
        if self._key is not None:
            reads.blame(self._key, error)
        remaining_s = self.until_s - now
        if not retries_slot(error, attempt=self._call, read_attempts=reads.read_attempts, remaining_s=remaining_s):
            self._end(error)
            return
        self._stop_timer()
        self._timer = reads.call_at(now + backoff_s(error, self._call), self.ask)

    def result(self) -> list[Payload]:
        """What has come, once it is done, or the error."""
        if self.error is not None:
            raise self.error
        return self.payloads

    def abandon(self) -> None:
        """Nobody wants it any more: what has been picked is given back."""
        self.on_done = None
        job, self.job = self.job, None
        if job is not None:
            self.reads.abandon(job)
        for payload in self.payloads:
            payload.release()
        self._end(DeadlineExceededError("abandoned"))

    def goes_on(self, reads: Taking) -> None:
        """Its job was begun again by other reads, after an interrupt."""
        self._reads = reads
        reads.takes.add(self)

    def fail(self, error: TransportError) -> None:
        """It cannot succeed: its source is gone, or the client is closed."""
        self._connection = None
        self._end(error)

    def _too_late(self) -> None:
        host, ports = self.request.source.host, self.request.source.ports
        self.lost(DeadlineExceededError("the source did not answer in time", host=host, ports=ports))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, error: TransportError | None) -> None:
        self._stop_timer()
        if self.done:
            return
        self.error = error
        self.done = True
        if self._reads is not None:
            self._reads.takes.discard(self)
        if self.on_done is not None:
            self.on_done(self)
