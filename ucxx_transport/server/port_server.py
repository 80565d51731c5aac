"""One port: a listener, its connections, the sweep of their time limits. Lives in one event loop."""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.server.connection import Connection, ReadableRing, StuckSend
from ucxx_transport.server.session import Session, SessionLimits, SessionSource
from ucxx_transport.wire.frames import NONCE_BYTES

if TYPE_CHECKING:
    from ucxx_transport.config import ServerConfig
    from ucxx_transport.link.base import Endpoint, Link, Listener
    from ucxx_transport.server.counters import Binding, PortCounters

_log = get_logger(__name__)

# How often the time limits of connections are looked at: four wake-ups a second cost nothing that can be measured,
# and no limit needs to be kept more exactly.
SWEEP_INTERVAL_S = 0.25
# Sends that outlived their port: while UCX may read from a slot, its lease must not be dropped.
_NEVER_ENDED: list[StuckSend] = []
# A killed reader's slot is back this soon even if no writer asks for it.
RECLAIM_INTERVAL_S = 1.0
# Connections above the cap that are still answered BUSY; beyond them a newcomer is closed without a word.
BUSY_ANSWERS = 16


class PortServer:
    """Serves one port of a ring over one link; one port of a server also `reclaims` what killed processes held."""

    def __init__(
        self,
        ring: ReadableRing,
        source: SessionSource,
        settings: ServerConfig,
        counters: PortCounters,
        binding: Binding,
        *,
        reclaims: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ring = ring
        self._reclaims = reclaims
        self._clock = clock
        self._source = source
        self._settings = settings
        self._limits = SessionLimits(
            first_frame_timeout_s=settings.first_frame_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            send_timeout_s=settings.send_timeout_s,
            ack_timeout_s=settings.ack_timeout_s,
        )
        self._counters = counters
        self._binding = binding
        self._connections: set[Connection] = set()
        self._admitted = 0
        self._stuck: list[StuckSend] = []
        self._tasks: TaskGroup | None = None

    @asynccontextmanager
    async def listening(self, link: Link, candidates: Sequence[int]) -> AsyncIterator[int]:
        """Listen on the first of `candidates` that is free; yields the port, and closes everything on the way out.

        Raises:
            ConfigError: none of them can be bound.
        """
        listener = await listen_on_first_free(link, candidates, self._admit)
        self._counters.set("port", listener.port)
        self._counters.set("connections", 0)
        self._counters.beat(time.monotonic_ns())
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                tasks.start_soon(self._sweep, link)
                try:
                    yield listener.port
                finally:
                    self._tasks = None
                    with anyio.CancelScope(shield=True):
                        await listener.close()
                    tasks.cancel_scope.cancel()
        finally:
            self._counters.set("port", 0)
            self._release_parked()
            _NEVER_ENDED.extend(self._stuck)

    def _admit(self, endpoint: Endpoint) -> None:
        tasks = self._tasks
        if tasks is None:
            return
        self._counters.add("accepted")
        # Those that only wait to hear BUSY do not count.
        admitted = self._admitted < self._settings.max_connections
        if not admitted:
            self._counters.add("refused")
            if len(self._connections) - self._admitted >= BUSY_ANSWERS:
                tasks.start_soon(endpoint.close)
                return
        session = Session(
            self._source,
            self._limits,
            nonce=secrets.token_bytes(NONCE_BYTES),
            now=self._clock(),
            admitted=admitted,
        )
        connection = Connection(
            endpoint, session, self._ring, self._counters, self._keep_stuck, binding=self._binding, clock=self._clock
        )
        self._connections.add(connection)
        self._admitted += admitted
        self._counters.set("connections", len(self._connections))
        tasks.start_soon(self._serve, connection, admitted)

    async def _serve(self, connection: Connection, admitted: bool) -> None:  # noqa: FBT001 - start_soon passes no keywords
        try:
            await connection.serve()
        except Exception:  # noqa: BLE001 - the edge of a task: one connection's bug must not take the port down
            _log.exception("connection_crashed")
        finally:
            self._connections.discard(connection)
            self._admitted -= admitted
            self._counters.set("connections", len(self._connections))

    async def _sweep(self, link: Link) -> None:
        next_reclaim_s = self._clock()
        failed = 0
        while True:
            await anyio.sleep(SWEEP_INTERVAL_S)
            now = self._clock()
            before, failed = failed, link.statistics().accepts_failed
            self._counters.add("accepts_failed", failed - before)
            self._counters.beat(time.monotonic_ns())
            overdue = [connection for connection in self._connections if connection.expire(now)]
            for connection in overdue:
                self._start_closing(connection)
            self._release_parked()
            if now >= next_reclaim_s:
                next_reclaim_s = now + RECLAIM_INTERVAL_S
                self._reclaim()

    def _start_closing(self, connection: Connection) -> None:
        if self._tasks is not None:
            self._tasks.start_soon(connection.close)

    def _reclaim(self) -> None:
        if not self._reclaims:
            return
        try:
            self._ring.reclaim_dead()
        except TransportError as error:  # the ring's lock is held by a stopped process: the next sweep tries again
            _log.warning("reclaim_failed", reason=str(error))

    def _keep_stuck(self, send: StuckSend) -> None:
        _log.warning("send_stuck", slot=send.lease.slot, nbytes=send.lease.nbytes)
        self._stuck.append(send)

    def _release_parked(self) -> None:
        still = []
        for send in self._stuck:
            try:
                if not send.settle():
                    still.append(send)
            except TransportError as error:  # the ring's lock is held by a stopped process: the next sweep tries again
                _log.warning("slot_not_released", slot=send.lease.slot, reason=str(error))
                still.append(send)
        self._stuck = still


async def listen_on_first_free(
    link: Link, candidates: Sequence[int], on_endpoint: Callable[[Endpoint], None]
) -> Listener:
    """Bind the first port of `candidates` that is not in use; a ConfigError where every one is."""
    last: TransportError | None = None
    for port in candidates:
        try:
            return await link.listen(port, on_endpoint)
        except ConfigError as error:
            last = error
    raise ConfigError(
        f"no free port among {list(candidates)[:4]}… ({len(candidates)} tried); choose others with "
        "ServerConfig(ports=…) or 0 for any free one",
        errno=errno.EADDRINUSE,
    ) from last
