"""Reads over UCX: the slot layer and the port layer of retry, under one deadline.

Decisions live in `ports`, `retry` and `exchange`; this shell carries them out in one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ucxx_transport.client import retry
from ucxx_transport.client.channel import Channel
from ucxx_transport.client.connections import Connections, LinkFactory
from ucxx_transport.client.exchange import ReadExchange
from ucxx_transport.client.local import verify_checksum
from ucxx_transport.client.ports import PortKey, Quarantine, Rotation
from ucxx_transport.client.results import clear_traceback_frames
from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    ChecksumError,
    ConfigError,
    DeadlineExceededError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    TransportError,
)
from ucxx_transport.link.base import DATA_PORT_SILENT, was_data_port_silent
from ucxx_transport.logs import get_logger
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.wire.codec import clear_ends
from ucxx_transport.wire.frames import HEADER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import BufferPool, Bytes
    from ucxx_transport.client.membership import Membership
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.membership.sources import SourceRecord


_log = get_logger(__name__)

DISCARD_PAUSE_S = 0.25
"""Between two tries to discard payloads: a server process that died is back after a second or two."""

HASH_INLINE_BYTES = 4 << 20
"""Above this, hashing a payload would hold the event loop longer than a hop to a thread costs."""

_REASONS: tuple[tuple[type[TransportError], str], ...] = (
    (PeerLostError, "peers_lost"),
    (DeadlineExceededError, "timeouts"),
    (BusyError, "busy"),
    (NotReadyError, "not_ready"),
    (ProtocolError, "protocol_errors"),
    (ChecksumError, "checksum_errors"),
    (AuthenticationError, "unauthorized"),
)


class RemoteReader:
    """Everything of a client that needs a link, which the first read opens. Bound to the event loop of that read."""

    def __init__(
        self,
        config: ClientConfig,
        link_factory: LinkFactory,
        *,
        reader: int,
        pool: BufferPool,
        counters: ClientCounters,
        membership: Membership | None = None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._counters = counters
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = FairGate(config.max_concurrent_reads)
        self._quarantine = Quarantine(config.port_quarantine_s)
        self._rotation = Rotation(reader)
        self._attempts = itertools.count(1)
        self.connections = Connections(config, link_factory, reader=reader, counters=counters)
        self._membership = membership
        if membership is not None:
            membership.subscribe(self._forget_source, self._welcome_source)

    async def read(self, ref: SlotRef, deadline_s: float) -> tuple[Bytes, Schema | None]:
        """The slot layer: fresh calls while failures are worth one, until `deadline_s` on the event loop's clock.

        Returns:
            The payload's bytes in a pooled buffer, and its schema.

        Raises:
            StaleSlotError, ProtocolError, AuthenticationError: at once. DeadlineExceededError: the deadline passed.
            PeerLostError, BusyError, NotReadyError, ChecksumError: still failing after the last attempt.
        """
        if self._membership is None:
            return await self._read(ref, deadline_s)
        return await self._membership.guarded(ref, lambda: self._read(ref, deadline_s))

    async def _read(self, ref: SlotRef, deadline_s: float) -> tuple[Bytes, Schema | None]:
        self._check_loop()
        if not ref.ports or not ref.host:
            raise ConfigError(
                "this reference carries no address to read from; start the UCXXServer before writing",
                ring=ref.ring_name,
            )
        loop = asyncio.get_running_loop()
        if not self._gate.try_acquire():
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._gate.acquire((ref.host, ref.ports))
            except TimeoutError:
                raise self._too_late(ref) from None
        try:
            if deadline_s - loop.time() <= retry.SHORTEST_ATTEMPT_S:
                raise self._too_late(ref)  # before any port is blamed for it
            for attempt in itertools.count(1):
                try:
                    return await self._call(ref, deadline_s, attempt)
                except TransportError as error:
                    remaining_s = deadline_s - loop.time()
                    again = retry.retries_slot(
                        error, attempt=attempt, read_attempts=self._config.read_attempts, remaining_s=remaining_s
                    )
                    if not again:
                        late = isinstance(error, DeadlineExceededError)
                        if remaining_s <= 0 and error.retryable and not late:
                            raise self._too_late(ref, last=error.message) from error
                        raise
                    self._counters.add("retries")
                    await asyncio.sleep(retry.backoff_s(error, attempt))
            raise AssertionError("unreachable")  # the loop above only leaves by return or raise
        finally:
            self._gate.release()

    async def discard(self, rings: Sequence[Sequence[SlotRef]], deadline_s: float) -> int:
        """Let payloads, by ring, go without fetching them, until `deadline_s` on the event loop's clock.

        Returns:
            How many were still there, as far as the servers could be asked.
        """
        self._check_loop()
        return sum(await asyncio.gather(*(self._discard_of_ring(refs, deadline_s) for refs in rings)))

    async def _discard_of_ring(self, refs: Sequence[SlotRef], deadline_s: float) -> int:
        source = refs[0]
        if not source.ports or not source.host:
            return 0
        waiting = deque(ReadExchange(ref, next(self._attempts)) for ref in refs)
        found: list[bool] = []
        loop = asyncio.get_running_loop()
        try:
            with self._rotation.turn(source.host, source.ports) as turn:
                while waiting and loop.time() < deadline_s:
                    key = turn.ports(self._quarantine, loop.time())[0]
                    try:
                        until_s = min(deadline_s, loop.time() + self._config.deadline_s)
                        await self.connections.discard(key, waiting, found, until_s)
                    except (TransportError, TimeoutError) as error:
                        if isinstance(error, TransportError) and not error.retryable:
                            break  # asking again would be refused again
                        turn.advance()
                        await asyncio.sleep(min(DISCARD_PAUSE_S, max(0.0, deadline_s - loop.time())))
        finally:
            self.connections.owe(waiting)
        return sum(found)

    def _check_loop(self) -> None:
        if self.connections.closed:
            raise ConfigError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise ConfigError("this client belongs to another event loop; make one client a loop")
            self._loop = loop

    async def _call(self, ref: SlotRef, deadline_s: float, attempt: int) -> tuple[Bytes, Schema | None]:
        """The port layer: the port that is due and, after a transport-class failure, the next one."""
        loop = asyncio.get_running_loop()
        assert ref.host is not None
        with self._rotation.turn(ref.host, ref.ports) as turn:
            keys = turn.ports(self._quarantine, loop.time())
            later = (self._config.read_attempts - attempt) * len(keys)
            for position, key in enumerate(keys):
                now = loop.time()
                budget_s = retry.attempt_budget_s(deadline_s - now, later + len(keys) - position)
                try:
                    return await self._attempt(ref, key, now + budget_s)
                except asyncio.CancelledError as error:
                    clear_traceback_frames(error)
                    raise
                except TransportError as error:
                    clear_traceback_frames(error)  # its buffer goes back now, not when the error is collected
                    self._count(error)
                    turn.advance()
                    verdict = retry.judge_port(error)
                    if verdict is retry.PortVerdict.ROTATE_AND_QUARANTINE:
                        self._quarantine_port(key, error)
                    last = position + 1 == len(keys) or loop.time() >= deadline_s
                    if verdict is retry.PortVerdict.PROPAGATE or last:
                        raise
                    self._counters.add("rotations")
            raise AssertionError("unreachable")  # keys is never empty and the loop only leaves by return or raise

    async def _attempt(self, ref: SlotRef, key: PortKey, until_s: float) -> tuple[Bytes, Schema | None]:
        exchange = ReadExchange(ref, next(self._attempts))
        lent = self._pool.lend(exchange.receive_nbytes)
        message = lent.data
        clear_ends(message, ref.nbytes)
        connections = self.connections
        channel = connections.at_hand(key, ref)
        try:
            if channel is None:
                async with asyncio.timeout_at(until_s):
                    channel = await connections.checkout(key, until_s)
                    await connections.settle(channel, ref.ring_id)
                    await connections.schema_of(channel, ref)
            await channel.fetch(exchange, message, until_s)
        except BaseException as error:
            if channel is not None:
                connections.close_aside((channel,))
            if isinstance(error, TimeoutError) and not isinstance(error, TransportError):
                last = {"last": DATA_PORT_SILENT} if was_data_port_silent(error) else {}
                raise self._too_late(ref, port=key[1], **last) from None
            raise
        try:
            exchange.verify(message)
            payload = lent[HEADER_BYTES : HEADER_BYTES + ref.nbytes]
            if self._config.verify_checksum and ref.checksum is not None:
                await self._check(payload, ref)
        except BaseException as error:
            self._refuse(channel, exchange, error)
            raise
        self._deliver(channel, exchange)
        return payload, connections.known_schema(ref)

    def _deliver(self, channel: Channel, exchange: ReadExchange) -> None:
        """Acknowledge. Nothing is awaited from here to the caller: a cancellation in between would lose the payload."""
        # If the connection is gone the payload is whole all the same: the next checkout settles it.
        with suppress(PeerLostError):
            channel.acknowledge(exchange, delivered=True)
        self.connections.checkin(channel)

    def _refuse(self, channel: Channel, exchange: ReadExchange, error: BaseException) -> None:
        """After an answer that cannot be delivered: keep the connection only if the peer played by the rules."""
        if isinstance(error, ChecksumError):
            try:
                channel.acknowledge(exchange, delivered=False)
            except PeerLostError:
                self.connections.close_aside((channel,))
                return
        elif not isinstance(error, TransportError) or isinstance(error, ProtocolError | AuthenticationError):
            self.connections.close_aside((channel,))
            return
        self.connections.checkin(channel)

    async def _check(self, payload: Bytes, ref: SlotRef) -> None:
        if ref.nbytes > HASH_INLINE_BYTES:
            await asyncio.to_thread(verify_checksum, payload, ref)
        else:
            verify_checksum(payload, ref)

    def _quarantine_port(self, key: PortKey, error: TransportError) -> None:
        self._counters.add("quarantined")
        now = asyncio.get_running_loop().time()
        self._quarantine.prune(now)
        if not self._quarantine.holds(key, now):  # each further failure prolongs it, and is counted
            _log.warning("port_quarantined", host=key[0], port=key[1], reason=error.message)
        self._quarantine.add(key, now)
        self.connections.evict(key)

    def _forget_source(self, record: SourceRecord) -> None:
        for key in _ports_of(record):
            self.connections.evict(key)

    def _welcome_source(self, record: SourceRecord) -> None:
        for key in _ports_of(record):
            self._quarantine.forgive(key)

    def _count(self, error: TransportError) -> None:
        for cls, reason in _REASONS:
            if isinstance(error, cls):
                self._counters.add(reason)
                return

    def _too_late(self, ref: SlotRef, **facts: object) -> DeadlineExceededError:
        message = "the payload did not arrive in time"
        return DeadlineExceededError(message, host=ref.host, slot=ref.slot, nbytes=ref.nbytes, **facts)


def _ports_of(record: SourceRecord) -> list[PortKey]:
    return [(record.host, port) for port in record.ports] if record.host is not None else []


class FairGate:
    """Lets at most `limit` holders in; waiting sources take turns, each serving its own callers in order."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    def try_acquire(self) -> bool:
        """Take a place if one is free now."""
        if self._free > 0:
            self._free -= 1
            return True
        return False

    async def acquire(self, source: Hashable) -> None:
        """Take a place, waiting for `source`'s turn. A cancelled wait takes none."""
        if self.try_acquire():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release()  # the place had been handed over in the same moment
            else:
                turn.cancel()
            raise

    def release(self) -> None:
        """Give a place back, to the next source in turn."""
        while self._waiting:
            source, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[source] = turns  # to the end of the line
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
