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
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from ucxx_transport.client.connections import UNSETTLED_PER_RING
from ucxx_transport.client.jobs import Call, Job, Read, Takeable
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import backoff_s, blames_port, retries_slot
from ucxx_transport.errors import ConfigError, DeadlineExceededError, StaleSlotError, TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.envelope import meta_of, unpack_envelope
from ucxx_transport.wire.frames import Status, offer_receive_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.client.jobs import Carrier, Engine
    from ucxx_transport.link.reactor import Timer
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.wire.actions import Asked, Offered
    from ucxx_transport.wire.answers import Named

Selector = Literal["oldest", "newest"]

DEFAULT_MAX_PAYLOADS: Final = 16
DEFAULT_MAX_BYTES: Final = 256 << 20

MAX_WAIT_S: Final = 60.0
"""How long a server waits on behalf of one request; a longer wait is several."""

DISCARD_PAUSE_S: Final = 0.25
"""Between two tries to discard payloads: a server process that died is back after a second or two."""


class Take(Call):
    """One call that takes payloads. Over the link it is an `Errand` of one connection at a time.

    Args:
        source: from whom.
        max_payloads: how many at most, 1 to 64.
        max_bytes: of them all.
        selector: "oldest" or "newest" first.
        wait_s: how long to wait for a first one.
        until_s: when the whole call is over, on the reactor's clock.

    Attributes:
        job: reads what a server has picked; None before.
        payloads: what has come, once it is done.
        error: why nothing has, then.

    Raises:
        ConfigError: an argument is out of its range.
    """

    def __init__(
        self,
        source: Takeable,
        *,
        max_payloads: int,
        max_bytes: int,
        selector: str,
        wait_s: float,
        until_s: float,
    ) -> None:
        super().__init__(until_s)
        for field, value, most in (("max_payloads", max_payloads, 64), ("max_bytes", max_bytes, 1 << 46)):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{field} = {value!r}: expected 1 to {most}", field=field, value=value)
        if selector not in ("oldest", "newest"):
            message = f"selector = {selector!r}: expected 'oldest' or 'newest'"
            raise ConfigError(message, field="selector", value=selector)
        self.source = source
        self.max_payloads = max_payloads
        self.max_bytes = max_bytes
        self.newest = selector == "newest"
        self.wait_s = wait_s
        self.job: Job | None = None
        self.payloads: list[Payload] = []
        self.error: TransportError | None = None
        self._records: list[Mapping[str, object] | None] = []
        self._connection: Carrier | None = None
        self._takes: set[Take] = set()
        self._timer: Timer | None = None
        self._call = 0

    def bind(self, engine: Engine, dispatch: Dispatch, takes: set[Take]) -> None:
        """It goes on with these reads, and is one of `takes` until it is done."""
        self._engine, self._dispatch, self._takes = engine, dispatch, takes
        takes.add(self)

    def begin(self) -> None:
        """Ask a first port."""
        if self.source.host is None or not self.source.ports:
            message = "this source has no address to take from; start its UCXXServer"
            self.fail(ConfigError(message, ring=self.source.ring_name))
            return
        self._wait_until_s = self._dispatch.now() + self.wait_s
        self._ask()

    def start(self, connection: Carrier) -> None:
        """See `Errand`."""
        if self.done or connection is not self._connection:
            return
        now = self._dispatch.now()
        wait_s = max(0.0, min(self._wait_until_s - now, MAX_WAIT_S, (self._asked_until_s - now) / 2))
        asked = connection.session.take(
            self.max_payloads, self.max_bytes, newest=self.newest, wait_ms=math.ceil(wait_s * 1000)
        )
        connection.running.append(self)
        connection.ask(asked, offer_receive_bytes(self.max_payloads), partial(self._answered, connection))

    def lost(self, error: TransportError) -> None:
        """See `Errand`: what was picked is there again; ask another port, or again a little later."""
        connection, self._connection = self._connection, None
        if self.done or connection is None:
            return
        dispatch = self._dispatch
        if blames_port(error) and connection not in dispatch.connections.waiting:  # whose turn has not come
            dispatch.quarantine(connection.key, error)
        now = dispatch.now()
        if retries_slot(
            error, attempt=self._call, read_attempts=dispatch.read_attempts, remaining_s=self.until_s - now
        ):
            self._set_timer(now + backoff_s(error, self._call), self._ask)
        else:
            self._end(error)

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
            self._engine.abandon(job)
        for payload in self.payloads:
            payload.release()
        if not self.done:
            self._end(DeadlineExceededError("abandoned"))

    def fail(self, error: TransportError) -> None:
        """It cannot succeed: its source is gone, or the client is closed."""
        self._connection = None
        if not self.done:
            self._end(error)

    def _ask(self) -> None:
        """Ask the port that is due."""
        dispatch, now = self._dispatch, self._dispatch.now()
        self._call += 1
        limit_s = self.until_s if self._call >= dispatch.read_attempts else (now + self.until_s) / 2
        self._asked_until_s = limit_s
        self._set_timer(limit_s, self._too_late)
        assert self.source.host is not None  # checked where the call begins
        key = dispatch.next_port(self.source.host, self.source.ports)
        self._connection = dispatch.connections.to(key, now)
        self._connection.run(self)

    def _answered(self, connection: Carrier, asked: Asked, answer: bytearray) -> None:
        connection.running.remove(self)
        is_wanted = connection is self._connection and not self.done
        try:
            offer = connection.session.on_offer(asked.attempt, answer)
        except TransportError as error:
            if connection.session.broken:
                raise
            if is_wanted:
                self.lost(error)
        else:
            if not is_wanted and offer.payloads:
                connection.receive(offer.payloads, [None] * len(offer.payloads))  # to be given back
            elif is_wanted:
                self._offered(connection, offer.payloads, offer.reason)
        connection.after_answers()

    def _offered(self, connection: Carrier, offered: Sequence[Offered], reason: str) -> None:
        """A server has answered, with what it has picked or why it has picked nothing."""
        self._connection = None
        if offered:
            self._receive(connection, offered)
        elif reason:
            self._end(ConfigError(f"{reason}; raise max_bytes", field="max_bytes"))
        elif self._dispatch.now() < min(self._wait_until_s, self.until_s):
            self._call = 0
            self._ask()
        else:
            self._end(None)

    def _receive(self, connection: Carrier, offered: Sequence[Offered]) -> None:
        """Payloads are on their way: they are the reads of a job."""
        self._set_timer(None)
        try:
            refs = [self._reference(each) for each in offered]
        except TransportError as error:
            self._end(error)
            raise
        job = self.job = Job(refs, self.until_s, self._came)
        source = self._dispatch.ports.source(connection.key[0], refs[0].ports)
        others = [key for key in source.keys if key != connection.key]
        for index, ref in enumerate(refs):
            read = Read(job, index, ref, source)
            read.alternate = others[0] if others else None
            job.reads.append(read)
        source.under_way += len(refs)
        self._engine.jobs.add(job)
        connection.receive(offered, job.reads)

    def _reference(self, offered: Offered) -> SlotRef:
        """What was picked, by reference; a ProtocolError where what its writer said is malformed."""
        source, record = self.source, unpack_envelope(offered.envelope)
        self._records.append(record)
        return SlotRef(
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

    def _came(self, job: Job) -> None:
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

    def _too_late(self) -> None:
        host, ports = self.source.host, self.source.ports
        self.lost(DeadlineExceededError("the source did not answer in time", host=host, ports=ports))

    def _set_timer(self, when_s: float | None, action: Callable[[], None] | None = None) -> None:
        """What is to happen next, if nothing comes before; None: nothing."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when_s is None or action is None else self._dispatch.call_at(when_s, action)

    def _end(self, error: TransportError | None) -> None:
        self._set_timer(None)
        self._takes.discard(self)
        self.error = error
        self.finish()


class Discard(Call):
    """One call that discards payloads.

    Attributes:
        found: how many were still there.
        rings: those of other hosts, by ring. here: those in rings of this host whose locks are held.
        left: rings that are not over, and one until all have been started.
    """

    def __init__(self, until_s: float) -> None:
        super().__init__(until_s)
        self.found = 0
        self.rings: Sequence[Sequence[SlotRef]] = ()
        self.here: Sequence[tuple[SlotRef, SharedRingBuffer]] = ()
        self.left = 1

    def begin(self, dispatch: Dispatch) -> None:
        """Ask a port of each ring."""
        for refs in self.rings:
            host, ports = refs[0].host, refs[0].ports
            if host is not None and ports:
                self.left += 1
                _RingDiscard(self, refs, dispatch).ask()
        self.one_over()

    def one_over(self) -> None:
        """One ring's part is over."""
        self.left -= 1
        if not self.left:
            self.finish()


class _RingDiscard:
    """The part of a discard that is of one ring. It is an `Errand` of one connection at a time.

    What cannot be said by the deadline is owed: the ring hears of it with the next read.
    """

    def __init__(self, call: Discard, refs: Sequence[SlotRef], dispatch: Dispatch) -> None:
        self._call = call
        self._ring_id = refs[0].ring_id
        self._host, self._ports = str(refs[0].host), refs[0].ports
        self._waiting: deque[SlotRef] = deque(refs)
        self._pending: set[tuple[int, int]] = set()
        self._dispatch = dispatch
        self._connections: Connections = dispatch.connections
        self._timer: Timer | None = None
        self._connections.listeners.append(self)

    def ask(self) -> None:
        """Ask a port; again after a pause, until the deadline."""
        now = self._dispatch.now()
        if now >= self._call.until_s:
            self.end()
            return
        if not self._pending:
            some = [self._waiting.popleft() for _ in range(min(len(self._waiting), UNSETTLED_PER_RING // 2))]
            self._pending.update((ref.slot, ref.generation) for ref in some)
            self._connections.owe(some)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._dispatch.call_at(min(now + DISCARD_PAUSE_S, self._call.until_s), self.ask)
        self._connections.to(self._dispatch.next_port(self._host, self._ports), now).run(self)

    def start(self, connection: Carrier) -> None:
        """See `Errand`."""
        if self._pending:
            self._connections.settle(connection, self._ring_id)

    def lost(self, error: TransportError) -> None:
        """See `Errand`: what was not heard is owed, and said again after the pause."""
        if self._pending and not error.retryable:
            self.end()  # asking again would be refused again

    def confirmed(self, names: Sequence[Named], statuses: Sequence[Status]) -> int:
        """See `Listener`."""
        if names[0].ring_id != self._ring_id:
            return 0
        found = 0
        for name, status in zip(names, statuses, strict=True):
            key = (name.slot, name.generation)
            if key in self._pending:
                self._pending.discard(key)
                found += status is Status.OK
        self._call.found += found
        self._connections.counters.add("discarded", found)
        if not self._pending:
            if self._waiting:
                self.ask()
            else:
                self.end()
        return found

    def end(self) -> None:
        """See `Listener`."""
        self._pending.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._connections.owe(self._waiting)
        self._connections.listeners.remove(self)
        self._call.one_over()
