"""The server: a ring's payloads in place, and on N ports, each a process of its own, or all threads of this one."""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import DeadlineExceededError, TransportError
from ucxx_transport.link.address import choose_address
from ucxx_transport.link.reactor import LinkFactory
from ucxx_transport.link.ucx import may_share_ports
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.sources import RingSource
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.server.counters import BEAT, PORT, PortCounters, ServerStatistics
from ucxx_transport.server.port import PortThread
from ucxx_transport.settings import made_of
from ucxx_transport.sidecar.launch import Sidecar
from ucxx_transport.teardown import Running, Teardown, may_end, refuse_forked

_log = get_logger(__name__)


class UCXXServer(RingSource, Running):
    """Serves a ring to trainers on other hosts (or to those that will not read in place).

    Its address and ports are written into the segment once it listens; a `SlotRef` made after that carries them.
    Use it as `async with UCXXServer(ring, config)`, as `with`, or by `start()` and `stop()`.

    Args:
        ring: the ring to serve; its creator keeps and closes it.
        config: settings, a dict or a `ServerConfig`; the default is 2 ports, each a supervised process.
        link_factory: opens one link a port, for `mode="thread"` only; the default is UCX.

    Attributes:
        address: as published; None while not serving.
        ports: that listen; empty while not serving.

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        ring: SharedRingBuffer,
        config: ServerConfig | Mapping[str, object] | None = None,
        *,
        link_factory: LinkFactory | None = None,
    ) -> None:
        super().__init__(ring)
        self._config = made_of(ServerConfig, config, "config")
        self._link_factory = link_factory
        indices = range(len(self._config.numbered_ports))
        self._counters = [PortCounters(ring.server_words, index) for index in indices]
        self._sidecars = [self._sidecar_of(index) for index in indices if self._config.mode == "process"]
        self._running: Sequence[Sidecar | PortThread] = ()
        self._reserved: dict[int, socket.socket] = {}
        self.address: str | None = None
        self.ports: tuple[int, ...] = ()
        self._pid = os.getpid()

    def start(self) -> None:
        """Listen on all ports and publish them in the segment; returns when clients can connect.

        Raises:
            ConfigError: a port is taken, clients cannot reach the address, or UCX does not start.
            DeadlineExceededError: not up within `start_timeout_s`.
            TransportError: the server is running already, or a port's process died at its start.
        """
        if self.ports:
            refuse_forked(self._pid, "UCXXServer")
            raise TransportError("the server is running already; stop() it first")
        self._pid = os.getpid()
        until_s = time.monotonic() + self._config.start_timeout_s
        own = choose_address(self._config.host)
        address = self._config.publish_host or own
        try:
            ports = self._start_ports(until_s)
            self._ring.publish_address(address, ports)
        except BaseException:
            self.stop()
            raise
        self.address, self.ports = address, ports
        self.sidecar = self._sidecars[0] if self._sidecars else None
        if (self._config.host, self._config.publish_host) == (None, None) and address.startswith("127."):
            _log.warning("loopback_published", address=address, ring=self._ring.name)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop listening, end every connection, withdraw the address. Bounded by `stop_timeout_s`; idempotent."""
        if not may_end(self._pid):
            return
        atexit.unregister(self.stop)
        until_s = time.monotonic() + self._config.stop_timeout_s
        teardown = Teardown("server", ring=self._ring.name)
        if self._running:
            teardown.step("ports", lambda: self._end_ports(until_s), until_s)
        if self.ports and not self._ring.closed:  # else no one can attach any more
            teardown.step("address", lambda: self._ring.publish_address(None, ()), until_s)
        self._running, self.address, self.ports, self.sidecar = (), None, (), None
        for held in self._reserved.values():
            held.close()
        self._reserved = {}

    def statistics(self) -> ServerStatistics:
        """Counts of all ports since the ring was created, and what runs now."""
        refuse_forked(self._pid, "UCXXServer")
        pids = tuple(one.pid for one in self._sidecars)
        return ServerStatistics(
            host=self.address,
            pids=pids or (os.getpid(),) * len(self.ports),
            restarts=sum(one.restarts for one in self._sidecars),
            ports=tuple(one.snapshot() for one in self._counters),
        )

    def is_healthy(self, within_s: float) -> bool:
        """Whether every port listens and its loop has turned.

        Args:
            within_s: seconds; a loop turns once a second, later on a busy host.
        """
        refuse_forked(self._pid, "UCXXServer")
        oldest_ns = time.monotonic_ns() - int(within_s * 1e9)
        serves = bool(self.ports) and not self._ring.closed
        return serves and all(one.words[PORT] and one.words[BEAT] >= oldest_ns for one in self._counters)

    def _start_ports(self, until_s: float) -> tuple[int, ...]:
        """All side by side: a process takes a second to be up."""
        if self._sidecars and may_share_ports(self._config.link_settings, os.environ):
            for index in range(len(self._sidecars)):
                if self._config.candidates(index) == [0]:
                    with suppress(OSError):  # no descriptor is left, say: what needs one says so
                        self._reserved[index] = _reserved_port()
        self._running = self._sidecars or [
            PortThread(self._ring, self._config, index, link_factory=self._link_factory)
            for index in range(len(self._counters))
        ]
        for port in self._running:
            port.start()
        try:
            return tuple(port.up.result(max(0.0, until_s - time.monotonic())) for port in self._running)
        except DeadlineExceededError:
            raise  # a port's own, which says why
        except TimeoutError:
            raise DeadlineExceededError("a port did not come up in time; see ServerConfig(start_timeout_s=…)") from None

    def _end_ports(self, until_s: float) -> None:
        for port in self._running:
            port.begin_stop(until_s)
        for port in self._running:
            port.stop(until_s)
        self._clean_up(*self._counters)

    def _sidecar_of(self, index: int) -> Sidecar:
        """A port's process; what it calls, it calls in its own thread."""
        counters = self._counters[index]

        def order() -> dict[str, object]:
            held = self._reserved.get(index)
            again = sidecar.up.result() if sidecar.up.done() else 0  # after another's death the very port that it had
            return {
                "ring_name": self._ring.name,
                "ring_folder": self._ring.folder,
                "descriptor": self._ring.duplicate(),  # a cleaning program may have removed the name
                "index": index,
                "port": again if held is None else held.getsockname()[1],
                "settings": self._config,
            }

        def is_stalled() -> bool:
            """Its loop has not turned for so long that it will not: it hangs inside UCX, say."""
            return time.monotonic_ns() - counters.words[BEAT] > self._config.stall_timeout_s * 1e9

        sidecar = Sidecar(
            f"ucxx port {index}",
            serve=order,
            pauses_s=(0.1, 1.0),
            start_timeout_s=self._config.start_timeout_s,
            on_death=lambda: self._clean_up(counters),
            is_stalled=is_stalled,
        )
        return sidecar

    def _clean_up(self, *ports: PortCounters) -> None:
        """Do what killed ports could not: say that they listen no longer, and give back what they held."""
        if self._ring.closed:
            return
        for counters in ports:
            counters.retire()
        try:
            self._ring.reclaim_dead()
        except TransportError as error:  # the new process's sweep does it
            _log.warning("reclaim_failed", ring=self._ring.name, reason=str(error))


def _reserved_port() -> socket.socket:
    """A free port that no other program is given while it is bound here, also while a port's process is replaced.

    UCX may listen on it: with SO_REUSEADDR on both (socket(7)) a bound socket that does not listen is in no one's way.
    It is set once the port is bound, so that two programs never have the same.
    """
    held = socket.socket()
    held.bind(("", 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held
