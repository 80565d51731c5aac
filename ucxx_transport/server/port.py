"""One port: a listener, its connections, and what they share, as callbacks of one reactor; and the thread that runs it.

| what                            | when                                                                              |
|---------------------------------|-----------------------------------------------------------------------------------|
| a frame of a connection         | as it arrives; a second one in the same turn of the reactor has the next turn     |
| time limits, beat, stuck sends  | every `SWEEP_INTERVAL_S`                                                          |
| slots of dead processes         | as often, by one port of a server                                                 |
| clients that wait for a payload | 0.5 ms after the last look, ever later up to 5 ms; soon again once one was served |
"""

from __future__ import annotations

import math
import secrets
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from threading import Thread
from typing import Final

from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.link.address import choose_address
from ucxx_transport.link.base import connection_budget, descriptors_in_use, raised_limit
from ucxx_transport.link.endpoint import Endpoint, Listener
from ucxx_transport.link.reactor import LinkFactory, Reactor, Timer
from ucxx_transport.link.ucx import UCXXLink
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.server.connection import Connection
from ucxx_transport.server.counters import BEAT, CONNECTIONS, PORT, PortCounters
from ucxx_transport.server.slots import Slots
from ucxx_transport.teardown import MARGIN_S
from ucxx_transport.wire.actions import Take
from ucxx_transport.wire.frames import NONCE_BYTES
from ucxx_transport.wire.server_side import ServerSession, SessionSource

_log = get_logger(__name__)

SWEEP_INTERVAL_S: Final = 1.0
"""At most. No limit needs to be kept more exactly, and a killed reader's slot is back this soon even if no writer asks
for it. A wake out of an idle core costs up to 1 ms of CPU."""
BEATS: Final = 4  # at least, within `stall_timeout_s`
# Connections above the limit that are still answered BUSY; beyond them a newcomer is closed without a word.
BUSY_ANSWERS: Final = 16
# The first and the longest pause between two looks for a payload that a client waits for.
SOON_S: Final = 0.5e-3
LATER_S: Final = 5e-3
LAST_FRAMES_S: Final = 0.1  # a port that is to stop takes in what had arrived: acknowledgements, above all


class Port:
    """Serves a ring at one port; number 0 of a server's also gives back what dead processes hold."""

    def __init__(self, ring: SharedRingBuffer, settings: ServerConfig, index: int, reactor: Reactor) -> None:
        self._reactor = reactor
        self._counters = PortCounters(ring.server_words, index)
        self.slots = Slots(ring, self._counters, reactor)
        schema = b"" if ring.schema is None else ring.schema.to_bytes()
        self._source = SessionSource(ring_id=ring.ring_id, fingerprint=ring.fingerprint, schema_bytes=schema)
        self._settings = settings
        self._reclaims = index == 0
        self._listener: Listener | None = None
        self._connections: dict[Connection, None] = {}
        self._waiting: list[tuple[Connection, Take]] = []
        self._sweeper: Timer | None = None
        self._accepts_failed = 0

    def start(self, *candidates: int) -> int:
        """Listen on the first of these that is free, 0 being any; returns the port. Errors as `Link.listen`."""
        link = self._reactor.link
        for candidate in candidates:
            try:
                self._listener = link.listen(candidate, self._admit)
                break
            except ConfigError as error:
                if len(candidates) == 1:
                    raise
                if candidate == candidates[-1]:
                    problem = f"none of {len(candidates)} ports from {min(candidates)} on can be listened on"
                    remedy = "choose another base_port, or leave it out for any free ones"
                    raise ConfigError(f"{problem}; {remedy}", field="base_port", last=str(error)) from error
        assert self._listener is not None
        port = self._counters.words[PORT] = self._listener.port
        self._counters.words[CONNECTIONS] = 0
        self._beat()
        return port

    def stop(self) -> None:
        """Take no further connection and close those there are; it has `stopped` some turns later."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._waiting.clear()
        for connection in list(self._connections):
            connection.close()

    @property
    def stopped(self) -> bool:
        """Whether every connection is closed, and what it held is given back."""
        return not self._connections

    def retire(self) -> None:
        """The link is closed, or given up: keep what UCX may still read from, for good."""
        self._counters.retire()
        self.slots.retire()

    def _admit(self, endpoint: Endpoint) -> Connection | None:
        if self._listener is None:
            return None
        self._counters.add("accepted")
        admitted = sum(connection.session.is_admitted for connection in self._connections)
        is_admitted = admitted < self._settings.max_connections
        if not is_admitted:
            self._counters.add("refused")
            if len(self._connections) - admitted >= BUSY_ANSWERS:
                return None
        now, nonce = self._reactor.now(), secrets.token_bytes(NONCE_BYTES)
        session = ServerSession(self._source, self._settings, nonce=nonce, now=now, is_admitted=is_admitted)
        connection = Connection(self.slots, session, endpoint, self._wait, self._forget)
        self._connections[connection] = None
        self._counters.words[CONNECTIONS] = len(self._connections)
        connection.take_in()
        return connection

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection]
        self._counters.words[CONNECTIONS] = len(self._connections)

    def _wait(self, connection: Connection, take: Take) -> None:
        if not self._waiting:
            self._look_in(SOON_S)
        self._waiting.append((connection, take))

    def _look_in(self, pause_s: float) -> None:
        self._reactor.call_at(self._reactor.now() + pause_s, partial(self._look, pause_s))

    def _look(self, pause_s: float) -> None:
        waiting, self._waiting = self._waiting, []
        for connection, take in waiting:
            try:
                if not connection.answer_take(take):
                    self._waiting.append((connection, take))
            except Exception as error:  # noqa: BLE001 - the edge of a callback
                connection.fail(error)
        if self._waiting:
            has_served = len(self._waiting) < len(waiting)
            self._look_in(SOON_S if has_served else min(2 * pause_s, LATER_S))

    def _sweep(self) -> None:
        self._beat()  # before the ring's lock is waited for, once a turn
        try:
            now = self._reactor.now()
            before, self._accepts_failed = self._accepts_failed, self._reactor.link.accepts_failed
            self._counters.add("accepts_failed", self._accepts_failed - before)
            for connection in list(self._connections):
                when_s, counter = connection.session.limit()
                if now >= when_s and not connection.is_closing:
                    if counter:
                        self._counters.add(counter)
                    connection.close()
            self.slots.settle_kept()
            if self._reclaims:
                self.slots.reclaim()
        except Exception:  # noqa: BLE001 - the edge of a callback: the port goes on serving
            _log.exception("sweep_failed")

    def _beat(self) -> None:
        self._counters.words[BEAT] = time.monotonic_ns()
        pause_s = min(SWEEP_INTERVAL_S, self._settings.stall_timeout_s / BEATS)
        self._sweeper = self._reactor.call_at(self._reactor.now() + pause_s, self._sweep)


class PortThread:
    """A `Port`, on `port` (0: by the settings), and the thread that runs it. One that does not come `up`: `stop` it."""

    def __init__(
        self,
        ring: SharedRingBuffer,
        settings: ServerConfig,
        index: int,
        port: int = 0,
        link_factory: LinkFactory | None = None,
    ) -> None:
        self._settings = replace(settings, max_connections=_max_connections(settings))
        self._candidates = [port] if port else settings.candidates(index)
        self._name = f"ucxx-port-{index}"
        self._reactor = Reactor(link_factory or _ucxx_links(settings), spin_s=settings.spin_s)
        self._port = Port(ring, self._settings, index, self._reactor)
        self.up: Future[int] = Future()  # the port that it listens on; or why it does not
        self._stop_by_s = math.inf
        self._thread: Thread | None = None

    def start(self) -> None:
        """Start, and return at once."""
        # A daemon: an embedding worker that forgets stop() must still be able to exit.
        self._thread = start_thread(self._run, name=self._name)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin_stop(self, until_s: float) -> None:
        """`stop` without its wait."""
        self._stop_by_s = min(self._stop_by_s, until_s)
        self._reactor.submit(lambda: None)  # the loop looks whether it is to stop

    def stop(self, until_s: float) -> None:
        """Close the port and its connections by `until_s` (monotonic)."""
        self.begin_stop(until_s)
        if self._thread is None:
            self._reactor.close()
            return
        # later than who waits for this does, so that a port that hangs is seen hanging, with all stacks
        self._thread.join(max(0.0, until_s + 2 * MARGIN_S - time.monotonic()))

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: its starter must get to know of it
            if self.up.done():
                _log.exception("port_died", thread=self._name)
            else:
                self.up.set_exception(error)

    def _serve(self) -> None:
        port, reactor = self._port, self._reactor
        try:
            self.up.set_result(port.start(*self._candidates))
            while self._stop_by_s == math.inf:
                reactor.run_once(math.inf)
                if port.slots.is_clogged and self._settings.mode == "process":
                    _log.error("port_clogged", see="stuck_sends")
                    self._stop_by_s = time.monotonic() + self._settings.stop_timeout_s
            heard_by_s = time.monotonic() + LAST_FRAMES_S
            while reactor.poll() and time.monotonic() < heard_by_s:
                pass
            port.stop()
            while not port.stopped and time.monotonic() < self._stop_by_s:
                reactor.run_once(self._stop_by_s)
        finally:
            reactor.close()
            port.retire()


def _max_connections(settings: ServerConfig) -> int:
    """The setting, or less where the process has no descriptors for so many; the ports in it share them."""
    asked, sharing = settings.max_connections, len(settings.numbered_ports) if settings.mode == "thread" else 1
    limit = raised_limit()
    budget = connection_budget(limit=limit, in_use=descriptors_in_use(), asked=asked * sharing) // sharing
    if budget < asked:
        _log.warning("connections_limited", connections=budget, asked=asked, descriptors=limit, see="ulimit -n")
    return max(1, budget)


def _ucxx_links(settings: ServerConfig) -> LinkFactory:
    address = choose_address(settings.host)
    ipv6 = address if ":" in address else None
    return partial(UCXXLink, shm_lanes=settings.shm_lanes, ucx=settings.link_settings, ipv6=ipv6)
