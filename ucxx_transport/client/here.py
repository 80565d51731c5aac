"""Here: the part of a client that needs no link. Identity, settings, names, counts, and reads of this host's rings.

Thread-safe.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from typing_extensions import Buffer

from ucxx_transport.client.buffer_pool import BufferPool, PageLocker
from ucxx_transport.client.delivered import Deduplicator, clear_traceback_frames, without_traceback
from ucxx_transport.client.local import LocalReader
from ucxx_transport.client.payload import Payload, writable_bytes
from ucxx_transport.client.statistics import ClientCounters
from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError, StaleSlotError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.client.errands import Take
    from ucxx_transport.client.jobs import Job
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef

Into = Buffer

REMEMBERED_RINGS: Final = 1 << 16
"""Rings whose delivered names are remembered, 100 bytes and 50 a slot each: more than a job has sources at a time."""


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

    def read_here(self, job: Job) -> list[int]:
        """Read what a job reads on this host; returns the indices of the rest, for `Reads.start`."""
        remote: list[int] = []
        for index, ref in enumerate(job.refs):
            try:
                ring = self.admit(ref, job.into)
                if ring is None:
                    remote.append(index)
                    continue
                left_s = max(0.0, job.until_s - self._clock())
                payload = self.read_local(ring, ref, job.into, left_s, job.began_s)
                job.outcomes[index] = payload if job.on_payload is None else job.on_payload(index, payload)
            except TransportError as error:
                self.counters.failed(error)
                job.outcomes[index] = without_traceback(error)
            job.left -= 1
        return remote

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

    def discard_here(self, refs: Sequence[SlotRef], limit_s: float) -> tuple[int, list[list[SlotRef]]]:
        """Discard those of rings on this host: how many were still there; and the others by ring, their names taken."""
        self.require_usable()
        until_s = time.monotonic() + limit_s
        found = 0
        elsewhere: dict[bytes, list[SlotRef]] = {}
        for ref in refs:
            try:
                self.delivered.check(ref)
                ring = self.local.ring_of(ref)
            except TransportError:
                continue  # gone, delivered before, or out of this client's reach
            if ring is not None:
                found += self.local.discard(ring, ref, max(0.0, until_s - time.monotonic()))
            elif self.claim(ref):
                elsewhere.setdefault(ref.ring_id, []).append(ref)
        return found, list(elsewhere.values())

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
