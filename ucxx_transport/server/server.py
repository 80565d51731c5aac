"""The server: a ring's payloads in place, and on N ports from a process of its own or from threads of this one."""

from __future__ import annotations

import asyncio
import atexit
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import DeadlineExceededError, TransportError
from ucxx_transport.link.address import choose_address, require_reachable
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.publication import Offer
from ucxx_transport.ring.owner import host_id
from ucxx_transport.server.counters import Binding, PortCounters, ServerStatistics
from ucxx_transport.server.port_group import LinkFactory, PortGroup, to_order, ucxx_links
from ucxx_transport.sidecar.launch import Restarts, Sidecar
from ucxx_transport.teardown import MARGIN_S, Teardown

if TYPE_CHECKING:
    from ucxx_transport.ring import SharedRingBuffer

_log = get_logger(__name__)

SAME_PORTS_FOR_S: Final = 10.0
"""A port that something else took while the server was down is waited for this long; then any free ones do."""


class RingSource:
    """A ring as it is published: trainers of this host read it in place; `UCXXServer` puts ports in front of it.

    Args:
        ring: the ring; its creator keeps and closes it.
    """

    def __init__(self, ring: SharedRingBuffer) -> None:
        self._ring = ring
        self._binding = Binding(ring.server_words)
        self._last_old: int | None = None
        self._was_bound = False

    @property
    def sidecar(self) -> Sidecar | None:
        """A process beside this one that may renew its lease: a ring alone has none."""
        return None

    def offer(self) -> Offer:
        """What can be read now, and where."""
        host, ports = self._ring.address()
        return Offer(
            ring_id=self._ring.ring_id,
            ring_name=self._ring.name,
            host_id=host_id(self._ring.folder),
            host=host,
            ports=tuple(ports),
        )

    def hold(self) -> None:
        """Answer NOT_READY until it is bound; what is written up to now belongs to the epoch that ended, if any."""
        self._binding.awaited = True
        if self._was_bound:
            self._last_old = self._ring.write_sequence

    def bind(self) -> None:
        """Serve, without what was written under an epoch before.

        Raises:
            DeadlineExceededError: the ring's lock was not to be had in time; it still answers NOT_READY.
        """
        self.discard_old()
        self._was_bound = True
        self._binding.awaited = False

    def discard_old(self) -> int:
        """Drop what an epoch before has left and no one is reading now.

        Returns:
            How many of its payloads are still being read or written; call again until there are none.

        Raises:
            DeadlineExceededError: the ring's lock was not to be had in time.
        """
        if self._last_old is None:
            return 0
        left = self._ring.discard_until(self._last_old)
        if left == 0:
            self._last_old = None
        return left

    def release(self) -> None:
        """Published no longer: serve everyone who has a reference."""
        self._binding.awaited = False

    def is_healthy(self, within_s: float) -> bool:
        """Whether it can be read; `within_s` as for `UCXXServer.is_healthy`."""
        del within_s
        return not self._ring.closed


class UCXXServer(RingSource):
    """Serves a ring to trainers on other hosts (or to those that will not read in place).

    Its address and ports are written into the segment once it listens; a `SlotRef` made after that carries them.
    Use it as `async with UCXXServer(ring, config)`, as `with`, or by `start()` and `stop()`.

    Args:
        ring: the ring to serve; its creator keeps and closes it.
        config: settings; the default is 4 ports served by a supervised process.
        link_factory: opens one link a port, for `mode="thread"` only; the default is UCX.
    """

    def __init__(
        self, ring: SharedRingBuffer, config: ServerConfig | None = None, *, link_factory: LinkFactory | None = None
    ) -> None:
        super().__init__(ring)
        self._config = config if config is not None else ServerConfig()
        self._link_factory = link_factory
        self._sidecar: Sidecar | None = None
        if self._config.mode == "process":
            self._sidecar = Sidecar(
                "ucxx server",
                serve=self._order,
                restarts=Restarts(longest_s=1.0, healthy_after_s=1.0),
                start_timeout_s=self._config.start_timeout_s,
                on_up=self._on_up,
                on_death=self._on_death,
            )
        self._group: PortGroup | None = None
        self._address: str | None = None
        self._ports: tuple[int, ...] = ()
        self._port_count = 0
        self._died_s = 0.0
        self._pid = os.getpid()

    @property
    def address(self) -> str | None:
        """The published address; None while not serving."""
        return self._address

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports that listen; empty while not serving."""
        return self._ports

    @property
    def sidecar(self) -> Sidecar | None:
        """The process that serves, which may renew a lease too; None with `mode="thread"`, and while not serving."""
        return self._sidecar if self._ports else None

    def start(self) -> None:
        """Listen on all ports and publish them in the segment; returns when clients can connect.

        Raises:
            ConfigError: a port is taken, clients cannot reach the address, or UCX does not start.
            DeadlineExceededError: not up within `start_timeout_s`.
            TransportError: the server is running already, or its process died at its start.
        """
        if self._ports:
            raise TransportError("the server is running already; stop() it first")
        self._pid = os.getpid()
        address = choose_address(self._config.host)
        until_s = time.monotonic() + self._config.start_timeout_s
        self._address = address
        try:
            sidecar = self._sidecar
            ports = self._start_threads(until_s) if sidecar is None else self._start_process(sidecar, until_s)
        except BaseException:
            self._address = None
            raise
        try:
            if self._link_factory is None:
                require_reachable(address, ports[0])
            self._publish(ports)
        except BaseException:
            self.stop()
            self._address = None
            raise
        if self._config.host is None and address.startswith("127."):
            _log.warning("loopback_published", address=address, ring=self._ring.name)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop listening, end every connection, withdraw the address. Bounded by `stop_timeout_s`; idempotent."""
        if os.getpid() != self._pid:
            return  # a forked child's copy: the server is its parent's
        atexit.unregister(self.stop)
        until_s = time.monotonic() + self._config.stop_timeout_s
        teardown = Teardown("server", ring=self._ring.name)
        group, self._group = self._group, None
        if self._sidecar is not None and self._sidecar.is_running:
            teardown.step("sidecar", lambda: self._end_process(until_s), until_s)
        if group is not None:
            # its own bound is a later one, so that a port that hangs is seen hanging, with all stacks
            teardown.step("ports", lambda: group.stop(until_s + 2 * MARGIN_S), until_s)
        if self._ports:
            teardown.step("address", self._withdraw, until_s)

    def statistics(self) -> ServerStatistics:
        """Counts of all ports since the ring was created, and what runs now."""
        words = self._ring.server_words
        pid, restarts = (None, 0) if self._sidecar is None else self._sidecar.status
        return ServerStatistics(
            host=self._address,
            pid=os.getpid() if self._group is not None else pid,
            restarts=restarts,
            ports=tuple(PortCounters(words, index).snapshot() for index in range(self._port_count)),
        )

    def is_healthy(self, within_s: float) -> bool:
        """Whether every port listens and its loop has turned.

        Args:
            within_s: seconds; a loop turns four times a second, later on a busy host.
        """
        if not self._ports or self._ring.closed:
            return False
        oldest_ns = time.monotonic_ns() - int(within_s * 1e9)
        counters = [PortCounters(self._ring.server_words, index) for index in range(len(self._ports))]
        return all(one.snapshot().port and one.beat_ns >= oldest_ns for one in counters)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self.stop()

    async def __aenter__(self) -> Self:
        """Start, without blocking the event loop."""
        starting = asyncio.ensure_future(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])  # bounded by start_timeout_s; what came up must not stay
            if not starting.cancelled() and starting.exception() is None:
                await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop, without blocking the event loop; not interrupted by a cancellation, and bounded."""
        stopping = asyncio.ensure_future(asyncio.to_thread(self.stop))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await asyncio.wait([stopping])
            raise

    def _start_process(self, sidecar: Sidecar, until_s: float) -> tuple[int, ...]:
        sidecar.start()
        try:
            return tuple(sidecar.wait_up(until_s)["ports"])
        except BaseException as error:
            sidecar.stop(time.monotonic() + self._config.stop_timeout_s)
            if isinstance(error, DeadlineExceededError):
                message = "the server process did not come up in time; see ServerConfig(start_timeout_s=…)"
                raise DeadlineExceededError(message) from None
            raise

    def _end_process(self, until_s: float) -> None:
        assert self._sidecar is not None
        self._sidecar.stop(until_s)
        self._reclaim()

    def _start_threads(self, until_s: float) -> tuple[int, ...]:
        group = PortGroup(self._ring, self._config, self._link_factory or ucxx_links(self._config))
        ports = group.start(until_s)
        self._group = group
        return ports

    # in the sidecar's thread

    def _order(self) -> dict[str, object]:
        """What a process is to serve: after another's death the very ports that are published."""
        config = self._config
        if self._ports and time.monotonic() - self._died_s < SAME_PORTS_FOR_S:
            config = replace(config, ports=self._ports, base_port=None)
        return {
            "ring_name": self._ring.name,
            "ring_folder": str(self._ring.folder),
            "descriptor": self._ring.duplicate(),  # a cleaning program may have removed the name
            "settings": to_order(config),
        }

    def _on_up(self, facts: dict[str, Any]) -> None:
        ports = tuple(facts["ports"])
        if self._ports and ports != self._ports:
            self._publish(ports)

    def _on_death(self) -> None:
        self._died_s = time.monotonic()
        self._reclaim()

    # the ring

    def _publish(self, ports: tuple[int, ...]) -> None:
        self._ports = ports
        self._port_count = max(self._port_count, len(ports))
        self._ring.publish_address(self._address if ports else None, ports)

    def _withdraw(self) -> None:
        self._address, self._ports = None, ()
        if self._ring.closed:
            return  # its creator was faster; no one can attach any more
        try:
            self._ring.publish_address(None, ())
        except TransportError as error:  # the server has stopped all the same
            _log.warning("address_not_withdrawn", ring=self._ring.name, reason=str(error))

    def _reclaim(self) -> None:
        try:
            self._ring.reclaim_dead()
        except TransportError as error:  # the new process's sweep does it
            _log.warning("reclaim_failed", ring=self._ring.name, reason=str(error))
