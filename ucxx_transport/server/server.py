"""The server: a ring's payloads in place, and on N ports, each a process of its own, or all threads of this one."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import DeadlineExceededError, TransportError
from ucxx_transport.link.address import choose_address, require_reachable
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.sources import Offer
from ucxx_transport.ring.owner import host_id
from ucxx_transport.server.counters import Binding, PortCounters, ServerStatistics
from ucxx_transport.server.port_thread import PortThread, number_of_ports, to_order
from ucxx_transport.sidecar.launch import Restarts, Sidecar
from ucxx_transport.teardown import MARGIN_S, Teardown

if TYPE_CHECKING:
    from collections.abc import Callable

    from ucxx_transport.link.base import LinkFactory
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
        config: settings; the default is 2 ports, each a supervised process.
        link_factory: opens one link a port, for `mode="thread"` only; the default is UCX.
    """

    def __init__(
        self, ring: SharedRingBuffer, config: ServerConfig | None = None, *, link_factory: LinkFactory | None = None
    ) -> None:
        super().__init__(ring)
        self._config = config if config is not None else ServerConfig()
        self._link_factory = link_factory
        self._sidecars: tuple[Sidecar, ...] = ()
        if self._config.mode == "process":
            self._sidecars = tuple(self._sidecar_of(index) for index in range(number_of_ports(self._config)))
        self._threads: list[PortThread] = []
        self._address: str | None = None
        self._ports: tuple[int, ...] = ()
        self._port_count = 0
        self._came_up: dict[int, int] = {}
        self._died_s: dict[int, float] = {}
        self._publishing = threading.Lock()  # each sidecar has a thread
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
        """The first port's process, which may renew a lease too; None with `mode="thread"`, and while not serving."""
        return self._sidecars[0] if self._sidecars and self._ports else None

    def start(self) -> None:
        """Listen on all ports and publish them in the segment; returns when clients can connect.

        Raises:
            ConfigError: a port is taken, clients cannot reach the address, or UCX does not start.
            DeadlineExceededError: not up within `start_timeout_s`.
            TransportError: the server is running already, or a port's process died at its start.
        """
        if self._ports:
            raise TransportError("the server is running already; stop() it first")
        self._pid = os.getpid()
        address = choose_address(self._config.host)
        until_s = time.monotonic() + self._config.start_timeout_s
        self._address = address
        try:
            ports = self._start_processes(until_s) if self._sidecars else self._start_threads(until_s)
        except BaseException:
            self._address = None
            raise
        try:
            if self._link_factory is None:
                require_reachable(address, ports[0])
            with self._publishing:  # one that died just now may be up again on another port
                self._publish(self._ports_up() if self._sidecars else ports)
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
        if any(sidecar.is_running for sidecar in self._sidecars):
            teardown.step("sidecars", lambda: self._end_processes(until_s), until_s)
        if self._threads:
            # its own bound is a later one, so that a port that hangs is seen hanging, with all stacks
            teardown.step("ports", lambda: self._end_threads(until_s + 2 * MARGIN_S), until_s)
        if self._ports:
            teardown.step("address", self._withdraw, until_s)

    def statistics(self) -> ServerStatistics:
        """Counts of all ports since the ring was created, and what runs now."""
        words, ports = self._ring.server_words, range(self._port_count)
        status = [sidecar.status for sidecar in self._sidecars]
        return ServerStatistics(
            host=self._address,
            pids=tuple(one.pid for one in status) if status else (os.getpid(),) * len(self._ports),
            restarts=sum(one.restarts for one in status),
            ports=tuple(PortCounters(words, index).snapshot() for index in ports),
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
        """Start, without blocking the event loop; what came up under a cancellation does not stay."""
        await _in_thread(self.start, undo=self.stop)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop, without blocking the event loop; not interrupted by a cancellation, and bounded."""
        await _in_thread(self.stop)

    def _start_processes(self, until_s: float) -> tuple[int, ...]:
        """All side by side: a process takes a second to be up."""
        try:
            self._came_up.clear()
            for sidecar in self._sidecars:
                sidecar.start()
            for sidecar in self._sidecars:
                sidecar.wait_up(until_s)
        except BaseException as error:
            self._end_processes(time.monotonic() + self._config.stop_timeout_s)
            if isinstance(error, DeadlineExceededError):
                message = "a port's process did not come up in time; see ServerConfig(start_timeout_s=…)"
                raise DeadlineExceededError(message) from None
            raise
        return self._ports_up()

    def _end_processes(self, until_s: float) -> None:
        for sidecar in self._sidecars:
            sidecar.begin_stop(until_s)
        for index, sidecar in enumerate(self._sidecars):
            sidecar.stop(until_s)
            self._note_gone(index)
        self._reclaim()

    def _start_threads(self, until_s: float) -> tuple[int, ...]:
        ports: list[int] = []
        try:
            for index in range(number_of_ports(self._config)):
                self._threads.append(PortThread(self._ring, self._config, index, self._link_factory))
                ports.append(self._threads[-1].start(until_s))
        except BaseException:
            self._end_threads(time.monotonic() + self._config.stop_timeout_s)
            raise
        return tuple(ports)

    def _end_threads(self, until_s: float) -> None:
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.begin_stop(until_s)
        for thread in threads:
            thread.stop(until_s)

    # in a sidecar's thread

    def _sidecar_of(self, index: int) -> Sidecar:
        return Sidecar(
            f"ucxx port {index}",
            serve=partial(self._order, index),
            restarts=Restarts(longest_s=1.0, healthy_after_s=1.0),
            start_timeout_s=self._config.start_timeout_s,
            on_up=partial(self._on_up, index),
            on_death=partial(self._on_death, index),
            is_stalled=partial(self._is_stalled, index),
        )

    def _order(self, index: int) -> dict[str, object]:
        """What a process is to serve: after another's death the very port that is published."""
        config = self._config
        if self._ports and time.monotonic() - self._died_s.get(index, 0.0) < SAME_PORTS_FOR_S:
            config = replace(config, ports=self._ports, base_port=None)
        return {
            "ring_name": self._ring.name,
            "ring_folder": str(self._ring.folder),
            "descriptor": self._ring.duplicate(),  # a cleaning program may have removed the name
            "index": index,
            "settings": to_order(config),
        }

    def _on_up(self, index: int, facts: dict[str, Any]) -> None:
        with self._publishing:
            self._came_up[index] = facts["port"]
            if self._ports and self._ports_up() != self._ports:
                self._publish(self._ports_up())

    def _on_death(self, index: int) -> None:
        self._died_s[index] = time.monotonic()
        self._note_gone(index)
        self._reclaim()

    def _note_gone(self, index: int) -> None:
        """Say what a killed port could not: it listens no longer."""
        if not self._ring.closed:
            PortCounters(self._ring.server_words, index).retire()

    def _is_stalled(self, index: int) -> bool:
        """Whether the port's loop has not turned for so long that it will not: it hangs inside UCX, say."""
        silent_ns = time.monotonic_ns() - PortCounters(self._ring.server_words, index).beat_ns
        return silent_ns > self._config.stall_timeout_s * 1e9

    def _ports_up(self) -> tuple[int, ...]:
        return tuple(port for _, port in sorted(self._came_up.items()))

    # the ring

    def _publish(self, ports: tuple[int, ...]) -> None:
        self._ring.publish_address(self._address, ports)
        self._ports = ports  # what the segment has: a failure is one of the process whose port it is
        self._port_count = max(self._port_count, len(ports))

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


async def _in_thread(call: Callable[[], None], undo: Callable[[], None] = lambda: None) -> None:
    """Run what is bounded in a thread, to its end even if this is cancelled; then `undo` what it did."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled() and running.exception() is None:
            await asyncio.to_thread(undo)
        raise
