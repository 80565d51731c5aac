"""Ports of a server in this process: one thread, one event loop and one link each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import fields
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any

import anyio

from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.logs import get_logger
from ucxx_transport.server.counters import Binding, PortCounters
from ucxx_transport.server.port_server import PortServer
from ucxx_transport.server.session import SessionSource

if TYPE_CHECKING:
    from ucxx_transport.link.base import Link
    from ucxx_transport.ring import SharedRingBuffer

_log = get_logger(__name__)

LinkFactory = Callable[[], AbstractAsyncContextManager["Link"]]


def to_order(config: ServerConfig) -> dict[str, object]:
    """The settings as plain JSON values; the token travels in a sidecar's pipe and nowhere else."""
    values = {spec.name: getattr(config, spec.name) for spec in fields(config)}
    token = config.token_bytes
    return {**values, "token": None if token is None else token.hex(), "ucx": dict(config.ucx)}


def of_order(order: Mapping[str, Any]) -> ServerConfig:
    """Rebuild them in the sidecar; its environment and files have no say."""
    token = order["token"]
    return ServerConfig(**{**order, "token": None if token is None else bytes.fromhex(token)})


def ucxx_links(settings: ServerConfig) -> LinkFactory:
    """Opens links over UCX."""
    from ucxx_transport.link.ucxx import UCXXLink

    return partial(UCXXLink.open, shm_lanes=settings.shm_lanes, spin_s=settings.spin_s, ucx=settings.link_settings)


def candidates_of(settings: ServerConfig, index: int) -> Sequence[int]:
    """The ports that the port number `index` of a server tries, in order; 0 is any free one.

    Ports that start side by side begin at different ones from `base_port` on, and each takes the next that is free.
    """
    wanted = 0 if isinstance(settings.ports, int) else settings.ports[index]
    base = settings.base_port
    if wanted or base is None:
        return (wanted,)
    every = range(base, min(65536, base + settings.port_attempts))
    return (*every[index:], *every[:index])


def number_of_ports(settings: ServerConfig) -> int:
    """How many ports a server has."""
    return settings.ports if isinstance(settings.ports, int) else len(settings.ports)


class PortThread:
    """Runs one `PortServer` in a thread of its own, on the first of the candidates that is to be had; 0 is any."""

    def __init__(self, server: PortServer, link_factory: LinkFactory, candidates: Sequence[int], name: str) -> None:
        self._server = server
        self._link_factory = link_factory
        self._candidates = candidates
        self._listening: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        # A daemon: an embedding worker that forgets stop() must still be able to exit.
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self, deadline_s: float) -> int:
        """Start and wait until the port listens; returns it.

        Raises:
            ConfigError: no candidate can be bound, or UCX is not installed.
            DeadlineExceededError: not listening by `deadline_s` (monotonic clock).
        """
        self._thread.start()
        try:
            return self._listening.result(max(0.0, deadline_s - time.monotonic()))
        except FutureTimeoutError:
            raise DeadlineExceededError(
                "a server port did not come up in time; see ServerConfig(start_timeout_s=…)"
            ) from None

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def stop(self, deadline_s: float) -> bool:
        """Stop; returns whether the thread had ended by `deadline_s` (monotonic clock)."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # the loop closed between the look and the call: it is stopping already
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: those who wait for the port must hear of it
            if not self._listening.done():
                self._listening.set_exception(error)
            else:
                _log.exception("port_died", thread=self._thread.name)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with self._link_factory() as link, self._server.listening(link, self._candidates) as port:
            self._listening.set_result(port)
            await self._stop.wait()


class PortGroup:
    """Ports over one ring, in this process, each with a link: all of a server's, or those of `indices`."""

    def __init__(
        self,
        ring: SharedRingBuffer,
        settings: ServerConfig,
        link_factory: LinkFactory,
        *,
        indices: Sequence[int] | None = None,
    ) -> None:
        self._ring = ring
        self._settings = settings
        self._indices = range(number_of_ports(settings)) if indices is None else indices
        self._link_factory = link_factory
        self._threads: list[PortThread] = []

    def start(self, deadline_s: float) -> tuple[int, ...]:
        """Bring all ports up, or none; returns them. Errors as `PortThread.start`."""
        ports: list[int] = []
        try:
            for index in self._indices:
                candidates = candidates_of(self._settings, index)
                thread = PortThread(self._port_server(index), self._link_factory, candidates, f"ucxx-port-{index}")
                self._threads.append(thread)
                ports.append(thread.start(deadline_s))
        except BaseException:
            self.stop(time.monotonic() + self._settings.stop_timeout_s)
            raise
        return tuple(ports)

    @property
    def all_alive(self) -> bool:
        """Whether every port that came up still runs."""
        return all(thread.alive for thread in self._threads)

    def stop(self, deadline_s: float) -> bool:
        """Stop all ports at once; returns whether every thread had ended by `deadline_s`."""
        for thread in self._threads:
            thread.stop(0.0)
        ended = [thread.stop(deadline_s) for thread in self._threads]
        self._threads = []
        return all(ended)

    def _port_server(self, index: int) -> PortServer:
        source = SessionSource(
            ring_id=self._ring.ring_id,
            fingerprint=self._ring.fingerprint,
            schema_bytes=self._ring.schema_bytes,
            token=self._settings.token_bytes,
        )
        counters = PortCounters(self._ring.server_words, index)
        binding = Binding(self._ring.server_words)
        return PortServer(self._ring, source, self._settings, counters, binding, reclaims=index == 0)
