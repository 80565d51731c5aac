"""What a source is asked beside payloads by name: for payloads without their references, or to discard some unread.

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
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from ucxx_transport.client.jobs import Carrier, Job, Outcome, Read, Takeable, too_late
from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import BusyError, ConfigError, StaleSlotError, TransportError
from ucxx_transport.schema.slot_ref import Common, renumbered
from ucxx_transport.schema.wire_form import record_and_meta, refuse
from ucxx_transport.wire.frames import MAX_NAMES, Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.wire.client_side import Asked, Offer

Selector = Literal["oldest", "newest"]

DEFAULT_MAX_PAYLOADS: Final = 16
DEFAULT_MAX_BYTES: Final = 256 << 20

MAX_WAIT_S: Final = 60.0
"""How long a server waits on behalf of one request; a longer wait is several."""


class Request(Read):
    """Something else than a payload that a source is asked: it goes the way of a read, and before those that wait.

    Its errand's `frame` is what to ask a port. `take_in` gets the answer, if only when another request has taken the
    place of this one, and raises what it says. `names`: of a discard, those that it asks for.
    """

    goes_first = True
    job: Errand | None
    names: tuple[SlotRef, ...] = ()

    @property
    def is_current(self) -> bool:
        """Whether its errand waits for this answer."""
        return self.job is not None and not self.late


class Take(Job):
    """One call that takes payloads: once something was picked, it is a job that reads it.

    `engine`: once it is begun. `records`: of what was picked; None before.
    """

    engine: Dispatch
    counts = False
    records: Sequence[Mapping[str, object] | None] | None = None

    def __init__(
        self, source: Takeable, until_s: float, wait_until_s: float, *, max_payloads: int, max_bytes: int, selector: str
    ) -> None:
        super().__init__([renumbered(_common(source, source.ring_id, 0), 0, 0, 0, None, None)], until_s)
        self.source, self.wait_until_s = source, wait_until_s
        for field, value, most in (("max_payloads", max_payloads, 64), ("max_bytes", max_bytes, 1 << 46)):
            if type(value) is not int or not 1 <= value <= most:
                refuse(field, value, f"1 to {most}")
        if selector not in ("oldest", "newest"):
            refuse("selector", selector, "'oldest' or 'newest'")
        self.max_payloads = max_payloads
        self.max_bytes = max_bytes
        self.newest = selector == "newest"

    def frame(self, connection: Carrier, request: Request) -> Asked:
        now = self.engine.now()
        wait_ms = math.ceil(1000 * max(0.0, min(self.wait_until_s - now, MAX_WAIT_S, (request.due_s - now) / 2)))
        return connection.session.take(self.max_payloads, self.max_bytes, newest=self.newest, wait_ms=wait_ms)

    def take_in(self, connection: Carrier, request: Request, number: int, answer: memoryview) -> None:
        offer = connection.session.on_offer(number, answer)
        if offer.payloads:
            self._receive(connection, offer, request)
        elif not request.is_current:
            return
        elif offer.reason:
            self.engine.fail(request, ConfigError(f"{offer.reason}; raise max_bytes", field="max_bytes"))
        elif self.engine.now() < self.wait_until_s:
            request.call, request.limit_s = 1, self.until_s
            request.source.advance()
            self.engine.reassign((request,))
        else:
            self.records = ()
            self.engine.over(request, too_late(request.ref))

    def result(self) -> list[Payload]:
        """What has come, once it is done, or the error."""
        if self.records == ():
            return []  # nothing was there in time
        payloads, error = [], None
        for outcome, record in zip(self.outcomes, self.records or (None,), strict=True):
            if isinstance(outcome, Payload):
                outcome.record = record
                payloads.append(outcome)
            elif self.records is None or not isinstance(outcome, StaleSlotError):
                error = error or outcome
        if error is not None and not payloads:
            raise error
        return payloads

    def _receive(self, connection: Carrier, offer: Offer, request: Request) -> None:
        """Payloads are on their way: they are the reads of this job, or of none, and are given back."""
        engine, source, job = self.engine, request.source, self if request.is_current else None
        alternate = next((key for key in source.keys if key != connection.key), None)
        common = _common(self.source, offer.ring_id, offer.fingerprint)
        reads: list[Read] = []
        refs, records = [], []
        try:
            for index, (slot, generation, nbytes, checksum, _, envelope) in enumerate(offer.payloads):
                record, meta = record_and_meta(envelope)
                ref = renumbered(common, slot, generation, nbytes, checksum, meta)
                read = Read(job, index, ref, source, self.until_s)
                read.alternate = alternate
                reads.append(read)
                refs.append(ref)
                records.append(record)
        except TransportError as error:
            if job is not None:
                engine.fail(request, error)
            connection.lost(error)
            return
        if job is not None:
            self.reads, self.refs, self.left = dict(enumerate(reads)), refs, len(reads)
            self.began_s = time.perf_counter()
            outcomes: list[Outcome | None] = [None] * self.left
            # no call in between, at which an interrupt comes: `result` and `repair` need all three
            self.records, self.outcomes, self.counts = records, outcomes, True
            request.job = None
            source.under_way += len(reads) - 1
        connection.receive(offer, reads)


class Discard(Job):
    """One call that discards payloads. A ring of another host is one of its references, and has one request.

    `unheard`: by such ring, what its server has not heard of; in the end that goes along with the next read.
    `engine`: once it is begun. `found`: how many were still there.
    """

    engine: Dispatch
    counts = False
    found = 0

    def __init__(
        self, refs: list[SlotRef], until_s: float, unheard: Mapping[bytes, dict[tuple[int, int], SlotRef]]
    ) -> None:
        super().__init__(refs, until_s)
        self.unheard, self.wait_until_s = unheard, until_s

    def frame(self, connection: Carrier, request: Request) -> Asked:
        # Where an interrupt has come when none was left, one of them is asked for again, and is stale.
        request.names = tuple(self.unheard[request.ref.ring_id].values())[:MAX_NAMES] or (request.ref,)
        return connection.session.confirm(request.names)

    def finish(self) -> None:
        if not self.done:
            for names in self.unheard.values():
                self.engine.connections.owe(names.values())
        super().finish()  # not before: an interrupt must not lose what is owed

    def take_in(self, connection: Carrier, request: Request, number: int, answer: memoryview) -> None:
        """A server has heard of these; those that it could not look at come last."""
        statuses = connection.session.confirmed(number, answer)
        unheard = self.unheard[request.ref.ring_id]
        for ref, status in zip(request.names, statuses, strict=True):
            name = (ref.slot, ref.generation)
            if unheard.pop(name, None) is not None:
                if status is Status.OK:
                    self.found += 1
                    self.engine.counters.add("discarded")
                elif status is Status.BUSY:
                    unheard[name] = ref
        if not request.is_current:
            return
        if not unheard:
            self.engine.over(request, StaleSlotError("discarded"))
        elif Status.BUSY in statuses:
            raise BusyError("the server could not look at every payload")
        else:
            self.engine.reassign((request,), connection.key)


Errand: TypeAlias = Take | Discard


def _common(source: Takeable, ring_id: bytes, fingerprint: int) -> Common:
    """What all references to payloads of a source have in common."""
    return ring_id, source.ring_name, source.host_id, source.host, tuple(source.ports), fingerprint
