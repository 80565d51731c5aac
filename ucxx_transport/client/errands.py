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
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from ucxx_transport.client.jobs import Call, Job, Read, Takeable
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import backoff_s, blames_port, retries_slot
from ucxx_transport.errors import BusyError, ConfigError, DeadlineExceededError, StaleSlotError, TransportError
from ucxx_transport.schema.slot_ref import renumbered
from ucxx_transport.schema.wire_form import record_and_meta
from ucxx_transport.wire.frames import MAX_NAMES, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.client.jobs import Carrier, Entry
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.wire.actions import Asked, Offer

Selector = Literal["oldest", "newest"]
TakeIn = Callable[["Carrier", int, memoryview], None]

DEFAULT_MAX_PAYLOADS: Final = 16
DEFAULT_MAX_BYTES: Final = 256 << 20

PAUSE_S: Final = 0.1
"""A source none of whose ports could be asked is asked again after this."""

MAX_WAIT_S: Final = 60.0
"""How long a server waits on behalf of one request; a longer wait is several."""


class SourceErrand(ABC):
    """An `Errand`: it asks one source, over one of its ports at a time, until it is answered.

    A failure that may pass is retried until `wait_until_s`, and `read_attempts` times at least.

    Attributes:
        done: whether it is over. due_s: when it is to be called again.
    """

    done = False
    due_s = math.inf
    _connection: Carrier | None = None
    _call = 0

    def __init__(self, source: Takeable, until_s: float, wait_until_s: float) -> None:
        self.source = source
        self.until_s = until_s
        self.wait_until_s = wait_until_s

    @abstractmethod
    def say(self, connection: Carrier) -> None:
        """The connection is open: `send` something."""

    @abstractmethod
    def over(self, error: TransportError | None) -> None:
        """It is `done`: answered, or failed."""

    def bind(self, engine: Dispatch) -> None:
        """It goes on with these connections, and is one of the `errands` until it is over."""
        self._engine = engine
        engine.errands.add(self)

    def ask(self) -> None:
        """Ask the port that is due."""
        engine, source, now = self._engine, self.source, self._engine.now()
        if source.host is None or not source.ports:
            self.end(ConfigError("this source has no address to ask; start its UCXXServer", ring=source.ring_name))
            return
        self._call += 1
        is_last = self._call >= engine.read_attempts and now >= self.wait_until_s
        self._asked_until_s = self.until_s if is_last else (now + self.until_s) / 2
        self._look_at(self._asked_until_s)
        whose = engine.ports.source(source.host, tuple(source.ports))
        keys = (engine.ports.wary and engine.ports.healthy(whose, now)) or whose.keys
        self._connection = connection = engine.connections.to(keys[whose.first(keys, alone=True)], now)
        whose.advance()
        connection.run(self)

    def start(self, connection: Carrier) -> None:
        if self._is_asked(connection):
            self.say(connection)

    def send(self, connection: Carrier, asked: Asked, take_in: TakeIn) -> None:
        """Send a frame; `take_in` is called with the connection, the frame's number and the answer."""
        connection.errands.append(self)
        connection.ask(asked, partial(self._answered, connection, take_in))

    def lost(self, connection: Carrier, error: TransportError) -> None:
        """It failed, or was never open: ask again a little later, another port where there is one."""
        if not self._is_asked(connection):
            return
        self._connection = None
        engine, call = self._engine, self._call
        if blames_port(error) and connection not in engine.connections.waiting:  # whose turn has not come
            engine.quarantine(connection.key, error)
        now = engine.now()
        attempt, attempts = 0 if now < self.wait_until_s else call, engine.read_attempts
        if retries_slot(error, attempt=attempt, read_attempts=attempts, remaining_s=self.until_s - now):
            self._look_at(now + (backoff_s(error, call) if call < attempts else PAUSE_S))
        else:
            self.end(error)

    def end(self, error: TransportError | None) -> None:
        """It is answered, or cannot be. Idempotent."""
        if not self.done:
            self._connection = None
            self.over(error)
            self._engine.errands.discard(self)  # not before: an interrupt must not lose it

    def due(self) -> None:
        """Its port has not answered in time, or it has paused."""
        connection, host, ports = self._connection, self.source.host, self.source.ports
        self.due_s = math.inf
        if connection is None:
            self.ask()
        else:
            self.lost(connection, DeadlineExceededError("the source did not answer in time", host=host, ports=ports))

    def _is_asked(self, connection: Carrier) -> bool:
        """Whether it waits for this connection, and not for another one since."""
        return connection is self._connection and not self.done

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

    def _look_at(self, when_s: float) -> None:
        self.due_s = when_s
        self._engine.look_at(when_s)


class Take(Job, SourceErrand):
    """One call that takes payloads, as `SyncUCXXClient.take`: an errand first, and a job once something was picked."""

    def __init__(
        self, source: Takeable, until_s: float, wait_until_s: float, *, max_payloads: int, max_bytes: int, selector: str
    ) -> None:
        Job.__init__(self, [], until_s)
        SourceErrand.__init__(self, source, until_s, wait_until_s)
        for field, value, most in (("max_payloads", max_payloads, 64), ("max_bytes", max_bytes, 1 << 46)):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{field} = {value!r}: expected 1 to {most}", field=field, value=value)
        if selector not in ("oldest", "newest"):
            message = f"selector = {selector!r}: expected 'oldest' or 'newest'"
            raise ConfigError(message, field="selector", value=selector)
        self.max_payloads = max_payloads
        self.max_bytes = max_bytes
        self.newest = selector == "newest"
        self._error: TransportError | None = None
        self._records: Sequence[Mapping[str, object] | None] = ()

    def say(self, connection: Carrier) -> None:
        now = self._engine.now()
        wait_s = max(0.0, min(self.wait_until_s - now, MAX_WAIT_S, (self._asked_until_s - now) / 2))
        wait_ms = math.ceil(wait_s * 1000)
        asked = connection.session.take(self.max_payloads, self.max_bytes, newest=self.newest, wait_ms=wait_ms)
        self.send(connection, asked, self._offered)

    def over(self, error: TransportError | None) -> None:
        self._error = error
        self.finish()

    def result(self) -> list[Payload]:
        """What has come, once it is done, or the error."""
        payloads, error = [], self._error
        for outcome, record in zip(self.outcomes, self._records, strict=True):
            if isinstance(outcome, Payload):
                outcome.record = record
                payloads.append(outcome)
            elif not isinstance(outcome, StaleSlotError):
                error = error or outcome
        if error is not None and not payloads:
            raise error
        return payloads

    def _offered(self, connection: Carrier, attempt: int, answer: memoryview) -> None:
        """A server has answered, with what it has picked or why it has picked nothing."""
        offer, is_wanted = connection.session.on_offer(attempt, answer), self._is_asked(connection)
        if offer.payloads:
            self._receive(connection, offer, self if is_wanted else None)
        elif offer.reason and is_wanted:
            self.end(ConfigError(f"{offer.reason}; raise max_bytes", field="max_bytes"))
        elif is_wanted and self._engine.now() < self.wait_until_s:
            self._call = 0
            self.ask()
        elif is_wanted:
            self.end(None)

    def _receive(self, connection: Carrier, offer: Offer, job: Take | None) -> None:
        """Payloads are on their way: they are the reads of this job, or of none, and are given back."""
        engine = self._engine
        source = engine.ports.source(connection.key[0], tuple(self.source.ports))
        alternate = next((key for key in source.keys if key != connection.key), None)
        reads: list[Read] = []
        records = []
        asked = self.source
        common = (offer.ring_id, asked.ring_name, asked.host_id, asked.host, tuple(asked.ports), offer.fingerprint)
        try:
            for index, (slot, generation, nbytes, checksum, _, envelope) in enumerate(offer.payloads):
                record, meta = record_and_meta(envelope)
                ref = renumbered(common, slot, generation, nbytes, checksum, meta)
                read = Read(job, index, ref, source, self.until_s)
                read.alternate = alternate
                reads.append(read)
                records.append(record)
        except TransportError as error:
            if job is not None:
                self.end(error)
            connection.fail(error)
            return
        if job is not None:
            self._connection, self.due_s = None, math.inf
            self.reads, self.refs, self.left = dict(enumerate(reads)), [read.ref for read in reads], len(reads)
            self.began_s = time.perf_counter()
            # no call in between, at which an interrupt comes: `result` needs both
            self._records, self.outcomes = records, [None] * self.left
            source.under_way += len(reads)
            engine.jobs.add(self)
            engine.errands.discard(self)
        connection.receive(offer, reads)


class RingDiscard(SourceErrand):
    """The part of a discard that is of one ring. What cannot be said by its deadline goes along with the next read."""

    def __init__(self, call: Discard, refs: Sequence[SlotRef]) -> None:
        super().__init__(refs[0], call.until_s, call.until_s)
        self._whole = call
        self._left = {(ref.slot, ref.generation): ref for ref in refs}

    def say(self, connection: Carrier) -> None:
        names = tuple(self._left.values())[:MAX_NAMES]
        asked = connection.session.confirm(names)
        self.send(connection, asked, partial(self._confirmed, names))

    def over(self, error: TransportError | None) -> None:  # noqa: ARG002 - a discard never fails
        self._engine.connections.owe(self._left.values())
        self.done = True
        self._whole.part_over()

    def _confirmed(self, names: Sequence[SlotRef], connection: Carrier, attempt: int, answer: memoryview) -> None:
        """A server has heard of these; those that it could not look at come last."""
        statuses = connection.session.confirmed(attempt, answer)
        for ref, status in zip(names, statuses, strict=True):
            name = (ref.slot, ref.generation)
            if self._left.pop(name, None) is not None:
                if status is Status.OK:
                    self._whole.found += 1
                    self._engine.counters.add("discarded")
                elif status is Status.BUSY:
                    self._left[name] = ref
        if not self._is_asked(connection):
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

    def __init__(self, refs: list[SlotRef], until_s: float) -> None:
        super().__init__(until_s)
        self.refs = refs
        self.found = 0
        self.elsewhere: dict[bytes, list[SlotRef]] = {}
        self.here: Sequence[Entry] = ()
        self.left = 1

    def part_over(self) -> None:
        self.left -= 1
        if not self.left:
            self.finish()
