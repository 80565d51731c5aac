"""What a connection is needed for beside reads by name: payloads taken without their references, or discarded unread.

| a take's step              | of another host                            | of this host                     |
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from ucxx_transport.client.jobs import Call, Job, Read, Takeable
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import backoff_s, blames_port, retries_slot
from ucxx_transport.errors import BusyError, ConfigError, DeadlineExceededError, StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.envelope import checked_meta, meta_of, unpack_envelope
from ucxx_transport.schema.slot_ref import common_of, renumbered
from ucxx_transport.wire.frames import MAX_NAMES, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.client.jobs import Carrier
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.wire.actions import Asked, Offer

Selector = Literal["oldest", "newest"]
TakeIn = Callable[["Carrier", int, memoryview], None]

DEFAULT_MAX_PAYLOADS: Final = 16
DEFAULT_MAX_BYTES: Final = 256 << 20

PAUSE_S: Final = 0.1
"""A source none of whose ports could be asked is asked again after this."""

MAX_WAIT_S: Final = 60.0
"""How long a server waits on behalf of one request; a longer wait is several."""


class SourceCall(Call, ABC):
    """A call that asks one source, over one of its ports at a time, until it is answered. It is an `Errand`.

    A failure that may pass is retried until `wait_until_s`, and `read_attempts` times at least. The last is `error`.
    """

    def __init__(self, source: Takeable, until_s: float, wait_until_s: float) -> None:
        super().__init__(until_s)
        self.source = source
        self.wait_until_s = wait_until_s
        self.error: TransportError | None = None
        self.due_s = math.inf
        self._connection: Carrier | None = None
        self._call = 0

    def bind(self, dispatch: Dispatch) -> None:
        """It goes on with its connections, and is one of its `errands` until it is done."""
        self._dispatch = dispatch
        dispatch.errands.add(self)

    def ask(self) -> None:
        """Ask the port that is due."""
        dispatch, source, now = self._dispatch, self.source, self._dispatch.now()
        if source.host is None or not source.ports:
            self.fail(ConfigError("this source has no address to ask; start its UCXXServer", ring=source.ring_name))
            return
        self._call += 1
        is_last = self._call >= dispatch.read_attempts and now >= self.wait_until_s
        self._asked_until_s = self.until_s if is_last else (now + self.until_s) / 2
        self._look_at(self._asked_until_s)
        whose = dispatch.ports.source(source.host, tuple(source.ports))
        keys = dispatch.ports.healthy(whose, now) or whose.keys
        self._connection = connection = dispatch.connections.to(keys[whose.first(keys, alone=True)], now)
        whose.advance()
        connection.run(self)

    def start(self, connection: Carrier) -> None:
        """See `Errand`."""
        if connection is self._connection:
            self.say(connection)

    @abstractmethod
    def say(self, connection: Carrier) -> None:
        """The connection is open: `send` something."""

    def send(self, connection: Carrier, asked: Asked, take_in: TakeIn) -> None:
        """Send a frame; `take_in` is called with the connection, the frame's number and the answer."""
        connection.errands.append(self)
        connection.ask(asked, partial(self._answered, connection, take_in))

    def lost(self, connection: Carrier, error: TransportError) -> None:
        """See `Errand`: ask again a little later, another port where there is one."""
        if connection is not self._connection:
            return
        self._connection = None
        dispatch, call = self._dispatch, self._call
        if blames_port(error) and connection not in dispatch.connections.waiting:  # whose turn has not come
            dispatch.quarantine(connection.key, error)
        now = dispatch.now()
        attempt, attempts = 0 if now < self.wait_until_s else call, dispatch.read_attempts
        if retries_slot(error, attempt=attempt, read_attempts=attempts, remaining_s=self.until_s - now):
            self._look_at(now + (backoff_s(error, call) if call < attempts else PAUSE_S))
        else:
            self.end(error)

    def fail(self, error: TransportError) -> None:
        """It cannot succeed: its source is gone, or the client is closed."""
        if not self.done:
            self.end(error)

    def end(self, error: TransportError | None) -> None:
        """It is done."""
        self._connection = None
        self._dispatch.errands.discard(self)
        self.error = error
        self.finish()

    def _answered(self, connection: Carrier, take_in: TakeIn, asked: Asked, answer: memoryview) -> None:
        connection.errands.remove(self)
        try:
            take_in(connection, asked.attempt, answer)
        except TransportError as error:
            if connection.session.broken:
                connection.errands.append(self)  # it is lost with the connection
                raise
            self.lost(connection, error)
        connection.after_answers()

    def due(self) -> None:
        """See `Errand`: its port has not answered in time, or it has paused."""
        connection, host, ports = self._connection, self.source.host, self.source.ports
        self.due_s = math.inf
        if connection is None:
            self.ask()
        else:
            self.lost(connection, DeadlineExceededError("the source did not answer in time", host=host, ports=ports))

    def _look_at(self, when_s: float) -> None:
        self.due_s = when_s
        self._dispatch.look_at(when_s)


class Take(SourceCall):
    """One call that takes payloads, as `SyncUCXXClient.take`. Its `job` reads what a server has picked."""

    def __init__(
        self, source: Takeable, until_s: float, wait_until_s: float, *, max_payloads: int, max_bytes: int, selector: str
    ) -> None:
        super().__init__(source, until_s, wait_until_s)
        for field, value, most in (("max_payloads", max_payloads, 64), ("max_bytes", max_bytes, 1 << 46)):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{field} = {value!r}: expected 1 to {most}", field=field, value=value)
        if selector not in ("oldest", "newest"):
            message = f"selector = {selector!r}: expected 'oldest' or 'newest'"
            raise ConfigError(message, field="selector", value=selector)
        self.max_payloads = max_payloads
        self.max_bytes = max_bytes
        self.newest = selector == "newest"
        self.job: Job | None = None
        self.payloads: list[Payload] = []

    def say(self, connection: Carrier) -> None:
        """See `SourceCall`."""
        now = self._dispatch.now()
        wait_s = max(0.0, min(self.wait_until_s - now, MAX_WAIT_S, (self._asked_until_s - now) / 2))
        wait_ms = math.ceil(wait_s * 1000)
        asked = connection.session.take(self.max_payloads, self.max_bytes, newest=self.newest, wait_ms=wait_ms)
        self.send(connection, asked, self._offered)

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
            self._dispatch.abandon(job)
        for payload in self.payloads:
            payload.release()
        self.fail(DeadlineExceededError("abandoned"))

    def _offered(self, connection: Carrier, attempt: int, answer: memoryview) -> None:
        """A server has answered, with what it has picked or why it has picked nothing."""
        offer, is_wanted = connection.session.on_offer(attempt, answer), connection is self._connection
        if offer.payloads and is_wanted:
            self._receive(connection, offer)
        elif offer.payloads:
            refs = self._references(offer, [None] * len(offer.payloads))
            source = self._dispatch.ports.source(connection.key[0], refs[0].ports)
            reads = [Read(None, index, ref, source, self.until_s) for index, ref in enumerate(refs)]
            connection.receive(offer, reads)  # to be given back
        elif offer.reason and is_wanted:
            self.end(ConfigError(f"{offer.reason}; raise max_bytes", field="max_bytes"))
        elif is_wanted and self._dispatch.now() < self.wait_until_s:
            self._call = 0
            self.ask()
        elif is_wanted:
            self.end(None)

    def _receive(self, connection: Carrier, offer: Offer) -> None:
        """Payloads are on their way: they are the reads of a job."""
        self._connection, self.due_s = None, math.inf
        try:
            records = [unpack_envelope(each.envelope) for each in offer.payloads]
            refs = self._references(offer, records)
        except TransportError as error:
            self.end(error)
            connection.fail(error)
            return
        job = self.job = Job(refs, self.until_s, partial(self._came, records))
        source = self._dispatch.ports.source(connection.key[0], refs[0].ports)
        others = [key for key in source.keys if key != connection.key]
        for index, ref in enumerate(refs):
            job.reads[index] = read = Read(job, index, ref, source, self.until_s)
            read.alternate = others[0] if others else None
        source.under_way += len(refs)
        self._dispatch.jobs.add(job)
        connection.receive(offer, [*job.reads.values()])

    def _references(self, offer: Offer, records: Sequence[Mapping[str, object] | None]) -> list[SlotRef]:
        """What was picked, by reference; a ProtocolError where what its writer said is malformed."""
        source = self.source
        if isinstance(source, SlotRef) and (source.ring_id, source.fingerprint) == (offer.ring_id, offer.fingerprint):
            template = source
        else:
            template = SlotRef(
                ring_id=offer.ring_id,
                ring_name=source.ring_name,
                slot=0,
                generation=0,
                nbytes=0,
                host_id=source.host_id,
                host=source.host,
                ports=tuple(source.ports),
                fingerprint=offer.fingerprint,
            )
        common = common_of(template)
        return [
            renumbered(common, each.slot, each.generation, each.nbytes, each.checksum, checked_meta(meta_of(record))[0])
            for each, record in zip(offer.payloads, records, strict=True)
        ]

    def _came(self, records: Sequence[Mapping[str, object] | None], job: Job) -> None:
        """Every payload that was picked has come, or will not."""
        errors = []
        for outcome, record in zip(job.outcomes, records, strict=True):
            if isinstance(outcome, Payload):
                outcome.record = record
                self.payloads.append(outcome)
            elif isinstance(outcome, TransportError) and not isinstance(outcome, StaleSlotError):
                errors.append(outcome)
        job.outcomes.clear()
        self.job = None
        self.end(None if self.payloads or not errors else errors[0])


class RingDiscard(SourceCall):
    """The part of a discard that is of one ring. What cannot be said by its deadline goes along with the next read."""

    def __init__(self, call: Discard, refs: Sequence[SlotRef]) -> None:
        super().__init__(refs[0], call.until_s, call.until_s)
        self._whole = call
        self._left = {(ref.slot, ref.generation): ref for ref in refs}

    def say(self, connection: Carrier) -> None:
        """See `SourceCall`."""
        names = tuple(self._left.values())[:MAX_NAMES]
        asked = connection.session.confirm(names)
        self.send(connection, asked, partial(self._confirmed, names))

    def end(self, error: TransportError | None) -> None:
        """See `SourceCall`."""
        self._dispatch.connections.owe(self._left.values())
        super().end(error)
        self._whole.part_over()

    def _confirmed(self, names: Sequence[SlotRef], connection: Carrier, attempt: int, answer: memoryview) -> None:
        """A server has heard of these; those that it could not look at come last."""
        statuses = connection.session.confirmed(attempt, answer)
        for ref, status in zip(names, statuses, strict=True):
            name = (ref.slot, ref.generation)
            if self._left.pop(name, None) is not None:
                if status is Status.OK:
                    self._whole.found += 1
                    self._dispatch.connections.counters.add("discarded")
                elif status is Status.BUSY:
                    self._left[name] = ref
        if connection is not self._connection:
            return
        if not self._left:
            self.end(None)
        elif Status.BUSY in statuses:
            raise BusyError("the server could not look at every payload")
        else:
            self.say(connection)


class Discard(Call):
    """One call that discards payloads.

    Attributes:
        refs: what it discards. found: how many were still there.
        elsewhere: those of other hosts, by ring. here: those in rings of this host whose locks are held.
        left: rings that are not over, and one for those of this host.
    """

    def __init__(self, refs: Sequence[SlotRef], until_s: float) -> None:
        super().__init__(until_s)
        self.refs = refs
        self.found = 0
        self.elsewhere: dict[bytes, list[SlotRef]] = {}
        self.here: Sequence[tuple[int, SharedRingBuffer]] = ()
        self.left = 1

    def part_over(self) -> None:
        """A ring of another host is over, or are those of this host."""
        self.left -= 1
        if not self.left:
            self.finish()
