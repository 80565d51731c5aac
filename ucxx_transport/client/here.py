"""Here: the part of a client that needs no link. Identity, settings, names, counts, and reads of this host's rings.

Thread-safe.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from typing_extensions import Buffer

from ucxx_transport.client.buffer_pool import BufferPool, PageLocker
from ucxx_transport.client.delivered import Deduplicator, clear_traceback_frames, without_traceback
from ucxx_transport.client.local import LocalReader
from ucxx_transport.client.payload import Payload, writable_bytes
from ucxx_transport.client.statistics import ClientCounters
from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError, DeadlineExceededError, StaleSlotError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.client.errands import Discard, Take
    from ucxx_transport.client.jobs import Job
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef

Into = Buffer

REMEMBERED_RINGS: Final = 1 << 16
"""Rings whose delivered names are remembered, 100 bytes and 50 a slot each: more than a job has sources at a time."""

LOCK_TURN_S: Final = 0.003
"""How long a ring's lock is waited for while other rings wait their turn. It is held for microseconds: a holder that
takes longer is stopped, or without a core."""

Entry = TypeVar("Entry")


def in_turn(
    entries: Iterable[tuple[Entry, SharedRingBuffer]], visit: Callable[[Entry, SharedRingBuffer], bool]
) -> list[tuple[Entry, SharedRingBuffer]]:
    """Visit rings in turn, and none again whose lock was not to be had; returns what is left of the entries."""
    left: list[tuple[Entry, SharedRingBuffer]] = []
    held: set[int] = set()
    for entry in entries:
        if id(entry[1]) in held or not visit(*entry):
            held.add(id(entry[1]))
            left.append(entry)
    return left


class Here:
    """See the module; arguments and errors as `UCXXClient`.

    Args:
        config: settings.
        page_locker: page-locks the memory that payloads are received in; payloads of this host's rings are then copied
            into such memory too.
        in_place: beside a page_locker: of which rings payloads may stay in their slots all the same.
        clock: of every deadline.

    Attributes:
        config: the settings. reader: this client's random id. counters: its counts. pool: its buffers.
        local: reads of this host's rings. delivered: the names of what it has delivered.
        closed: whether the client is. pid: of the process that made it.
    """

    def __init__(
        self,
        config: ClientConfig | None,
        *,
        page_locker: PageLocker | None,
        in_place: Callable[[SharedRingBuffer], bool] | None,
        clock: Callable[[], float],
    ) -> None:
        self.config = config if config is not None else ClientConfig()
        if page_locker is not None and self.config.local == "view":
            raise ConfigError(
                "local='view' reads in place, but a GPU takes payloads from page-locked buffers: leave local at "
                "'auto', which then copies into those, or receive with device='cpu'",
                field="local",
            )
        self.reader = secrets.randbits(63) + 1
        self.counters = ClientCounters()
        self.pool = BufferPool(self.config.buffer_pool_bytes, page_locker)
        self.closed = False
        self._clock = clock
        self.delivered = Deduplicator(REMEMBERED_RINGS)
        self.pid = os.getpid()
        stays: bool | Callable[[SharedRingBuffer], bool] = self.config.local != "copy"
        if page_locker is not None:
            stays = in_place if in_place is not None and self.config.local != "copy" else False
        self.local = LocalReader(
            self.config.local,
            in_place=stays,
            reader=self.reader,
            pool=self.pool,
            max_rings=self.config.max_attached_rings,
            verify=self.config.verify_checksum,
            on_fallback=partial(self.counters.add, "fallbacks"),
            claim=self.delivered.claim,
        )

    def limit_s(self, deadline_s: float | str | None) -> float:
        """The seconds that a call may take; a ConfigError when they are no duration."""
        return self.config.deadline_s if deadline_s is None else checked_seconds(deadline_s, "deadline_s")

    def admit(self, ref: SlotRef, into: Into | None) -> SharedRingBuffer | None:
        """First look at a reference: refuse what must not be read; returns its ring if it is read locally.

        Raises:
            StaleSlotError: delivered before, or its ring on this host is gone.
            ConfigError: the payload is larger than `max_payload_bytes` or does not fit `into`.
        """
        if ref.nbytes > self.config.max_payload_bytes:
            raise ConfigError(
                f"ref.nbytes = {ref.nbytes} is larger than client.max_payload_bytes = "
                f"{self.config.max_payload_bytes}; raise the setting if such payloads are real",
                field="max_payload_bytes",
                value=self.config.max_payload_bytes,
            )
        if into is not None:
            writable_bytes(into, ref.nbytes)
        slots = self.delivered.rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            self.delivered.check(ref)
        local = self.local
        return None if local.is_off or ref.host_id != local.host_id else local.ring_of(ref)

    def look_at(self, job: Job, indices: Iterable[int]) -> tuple[list[int], list[tuple[int, SharedRingBuffer]]]:
        """Read what a job reads on this host, unless there is more to read: that is asked for first.

        Returns:
            Which of the payloads are to be read over the link, and which are still to be read here, from which ring.
        """
        remote: list[int] = []
        here: list[tuple[int, SharedRingBuffer]] = []
        for index in indices:
            try:
                ring = self.admit(job.refs[index], job.into)
            except TransportError as error:
                self._over(job, index, error)
                continue
            if ring is None:
                remote.append(index)
            else:
                here.append((index, ring))
        return (remote, here) if remote else (remote, in_turn(here, partial(self.read_at, job)))

    def read_at(self, job: Job, index: int, ring: SharedRingBuffer) -> bool:
        """Read a payload of a job from an attached ring; False if it is to be tried again, since the lock is held."""
        ref, left_s = job.refs[index], job.until_s - self._clock()
        outcome: Payload | TransportError
        try:
            self.delivered.check(ref)  # one that the job names twice
            payload = self.read_local(ring, ref, job.into, max(0.0, min(left_s, LOCK_TURN_S)), job.began_s)
            outcome = payload if job.on_payload is None else job.on_payload(index, payload)
        except DeadlineExceededError as error:
            if left_s > LOCK_TURN_S:
                return False
            outcome = error
        except TransportError as error:
            outcome = error
        self._over(job, index, outcome)
        return True

    def _over(self, job: Job, index: int, outcome: Payload | TransportError) -> None:
        if isinstance(outcome, TransportError):
            self.counters.failed(outcome)
            outcome = without_traceback(outcome)
        job.outcomes[index] = outcome
        job.left -= 1

    def require_usable(self) -> None:
        """Refuse a closed client, and a forked copy of one, by a ConfigError."""
        if self.closed:
            raise ConfigError("the client is closed; make another")
        if os.getpid() != self.pid:
            raise ConfigError("a client cannot be used in a forked child; make one in the process that reads")

    def read_local(
        self, ring: SharedRingBuffer, ref: SlotRef, into: Into | None, limit_s: float, began_s: float
    ) -> Payload:
        """Read from an attached ring, counted from `began_s` (`perf_counter`); `limit_s` is for the ring's lock."""
        payload = self.local.finish(ref, *self.local.begin(ring, ref, limit_s))
        if into is not None:
            payload = payload.copied_into(into)
        self.counters.delivered(payload.transport, ref.nbytes, time.perf_counter() - began_s)
        return payload

    def deliver(self, payload: Payload, into: Into | None, began_s: float) -> Payload:
        """A payload of this host as its caller wants it, counted."""
        if into is not None:
            payload = payload.copied_into(into)
        self.counters.delivered(payload.transport, payload.nbytes, time.perf_counter() - began_s)
        return payload

    def take_here(self, ring: SharedRingBuffer, request: Take, limit_s: float) -> list[Payload]:
        """Take what a ring of this host has ready now; `limit_s` is for its lock."""
        began_s = time.perf_counter()
        payloads = []
        for lease in ring.take(
            request.max_payloads,
            max_bytes=request.max_bytes,
            newest=request.newest,
            reader=self.reader,
            deadline_s=limit_s,
        ):
            try:
                payload = self.local.taken(ring, lease)
            except TransportError as error:  # a duplicate, or its bytes have changed: the others are none the worse
                self.count_failure(error)
                continue
            self.counters.delivered(payload.transport, payload.nbytes, time.perf_counter() - began_s)
            payloads.append(payload)
        return payloads

    def look_at_discards(
        self, call: Discard, refs: Sequence[SlotRef]
    ) -> tuple[list[list[SlotRef]], list[tuple[SlotRef, SharedRingBuffer]]]:
        """Discard those of rings on this host.

        Returns:
            Those of other hosts by ring, their names taken; and those still to be discarded here, from which ring.
        """
        self.require_usable()
        here: list[tuple[SlotRef, SharedRingBuffer]] = []
        elsewhere: dict[bytes, list[SlotRef]] = {}
        for ref in refs:
            try:
                ring = self.local.ring_of(ref)
            except TransportError:
                continue  # gone, or out of this client's reach
            if ring is not None:
                here.append((ref, ring))
            elif self.claim(ref):
                elsewhere.setdefault(ref.ring_id, []).append(ref)
        return list(elsewhere.values()), in_turn(here, partial(self.discard_at, call))

    def discard_at(self, call: Discard, ref: SlotRef, ring: SharedRingBuffer) -> bool:
        """Discard a payload of an attached ring; False if it is to be tried again, since the lock is held."""
        left_s = call.until_s - self._clock()
        try:
            self.delivered.check(ref)
            found = self.local.discard(ring, ref, max(0.0, min(left_s, LOCK_TURN_S)))
            call.found += found
            self.counters.add("discarded", found)
        except StaleSlotError:
            pass  # delivered before
        except DeadlineExceededError:
            return left_s <= LOCK_TURN_S
        return True

    def claim(self, ref: SlotRef) -> bool:
        """Take a payload's name, so that this client never delivers it; whether it was not taken yet."""
        try:
            self.delivered.claim(ref)
        except StaleSlotError:
            return False
        return True

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: connections are its parent's."""
        return os.getpid() != self.pid

    def count_failure(self, error: TransportError) -> None:
        """Count a read that raised; the error may be kept, its buffers are not."""
        clear_traceback_frames(error)
        self.counters.failed(error)
