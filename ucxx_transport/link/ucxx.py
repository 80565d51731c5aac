"""The link over UCX: one context and one worker per event loop.

Nothing here changes `os.environ`; `settings` says which settings a context gets and why.

What outlives a link:

- One that is never closed stays until the interpreter ends, and is closed then: an operation in flight whose buffer the
  interpreter frees first would be a crash. A link whose thread still runs then (a daemon's) is left as it is.
- UCX does not survive a fork. In the child, what the parent had is never freed, so that nothing closes the parent's
  connections, and every use is an error that says so.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import ipaddress
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.address import list_interfaces
from ucxx_transport.link.base import DATA_PORT_SILENT, Counters, LinkStatistics, OnEndpoint, checked_port
from ucxx_transport.link.binding import UcxEndpoint, UcxWorker, load_binding
from ucxx_transport.link.driver import ProgressDriver
from ucxx_transport.link.native import listener_has_answered, quiet_ucxx_log
from ucxx_transport.link.pending import Operation
from ucxx_transport.link.settings import (
    context_settings,
    limits_in_words,
    loopback_only,
    rdma_devices,
    require_free_port,
    require_network,
)
from ucxx_transport.link.translate import Translator, lost
from ucxx_transport.link.ucxx_endpoint import UCXXEndpoint, UCXXListener

UNEXPECTED_AT_ONCE = 4096
"""Unexpected messages are cleared away this many at a time, so that a flood cannot hold the loop."""

DRAIN_TIMEOUT_S = 1.0

_links: set[UCXXLink] = set()
_leaked: list[object] = []
"""What UCX may still write to: kept for the life of the process."""

_pids_that_used_ucx: set[int] = set()


class UCXXLink:
    """See `base.Link`. Bound to the thread and running loop it is made in; made by `open()` or `create()`."""

    def __init__(self, *, shm_lanes: bool, spin_s: float, ucx: Mapping[str, str]) -> None:
        _check_not_forked()
        self.binding = load_binding()
        quiet_ucxx_log()
        lib = self.binding.lib
        self.translator = Translator(lib)
        self.counters = Counters()
        settings = context_settings(shm_lanes=shm_lanes, rdma=bool(rdma_devices()), ucx=ucx, environment=os.environ)
        port_range = os.environ.get("UCX_TCP_PORT_RANGE", settings.get("TCP_PORT_RANGE"))
        if port_range is not None:
            require_free_port(port_range, [one.address for one in list_interfaces() if one.up])
        features = (lib.Feature.TAG, lib.Feature.STREAM, lib.Feature.WAKEUP)
        self._settings = settings
        try:
            self._context: Any = lib.UCXContext(settings, features)
            require_network(self._context.info, settings, os.environ)
            self.worker: UcxWorker = lib.UCXWorker(
                self._context, enable_delayed_submission=False, enable_python_future=False
            )
            self.worker.init_blocking_progress_mode()
        except self.translator.root as exc:
            raise ConfigError(
                "UCX does not start with these settings",
                ucx=f"{type(exc).__name__}: {exc}",
                environment={name: value for name, value in os.environ.items() if name.startswith("UCX_")},
                settings=settings,
            ) from exc
        self.driver = ProgressDriver(
            worker=self.worker,
            loop=asyncio.get_running_loop(),
            spin_s=spin_s,
            counters=self.counters,
            ucx_error=self.translator.root,
        )
        self.thread = threading.get_ident()
        self._any_tag, self._any_mask = lib.UCXXTag(0), lib.UCXXTagMask(0)
        self.driver.on_turns = self.discard_unexpected
        self._closed = False
        self._endpoints: set[UCXXEndpoint] = set()
        self._listeners: set[UCXXListener] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        _pids_that_used_ucx.add(os.getpid())
        _links.add(self)

    @classmethod
    def create(cls, *, shm_lanes: bool = False, spin_s: float = 50e-6, ucx: Mapping[str, str] | None = None) -> Self:
        """A link for the running loop; `aclose()` it.

        Args:
            shm_lanes: let same-host connections use shared memory instead of TCP; both sides must.
            spin_s: how long to poll after the last progress before sleeping.
            ucx: further UCX settings, such as `{"TLS": "tcp"}`.

        Raises:
            ConfigError: ucxx is missing, UCX refuses a setting, or this is a fork of a process that used UCX.
        """
        return cls(shm_lanes=shm_lanes, spin_s=spin_s, ucx=ucx or {})

    @classmethod
    @asynccontextmanager
    async def open(
        cls, *, shm_lanes: bool = False, spin_s: float = 50e-6, ucx: Mapping[str, str] | None = None
    ) -> AsyncIterator[Self]:
        """`create()` and `aclose()` as a context manager; the same arguments."""
        link = cls.create(shm_lanes=shm_lanes, spin_s=spin_s, ucx=ucx)
        try:
            yield link
        finally:
            await link.aclose()

    async def connect(self, host: str, port: int) -> UCXXEndpoint:
        """See `base.Link.connect`. Returns when the peer has said hello."""
        self.check_owner()
        peer = f"{host}:{checked_port(port, lowest=1)}"
        address = await self._resolve(host, port, peer)
        self.check_owner()  # it may have been closed meanwhile
        try:
            ucx: UcxEndpoint = self.binding.lib.UCXEndpoint.create(
                self.worker, address, port, endpoint_error_handling=True
            )
        except self.translator.root as exc:
            raise self.translator.error(exc, peer=peer, connected=False) from exc
        endpoint = UCXXEndpoint(self, ucx, peer)
        self.adopt(endpoint)
        self.counters.endpoints_connected += 1
        try:
            await endpoint.connected()
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and listener_has_answered(address, port):
                exc.add_note(DATA_PORT_SILENT)
            await endpoint.close()
            if isinstance(exc, PeerLostError) and exc.facts["reason"] == "unreachable":
                self._require_way_out(address)
            raise
        return endpoint

    def _require_way_out(self, address: str) -> None:
        limits = limits_in_words(self._settings, os.environ)
        if limits and loopback_only(self._context.info) and not ipaddress.ip_address(address).is_loopback:
            raise ConfigError(f"{limits} leaves UCX nothing but loopback; add an interface of this host", host=address)

    async def listen(self, port: int, on_endpoint: OnEndpoint) -> UCXXListener:
        """See `base.Link.listen`. Binds 0.0.0.0: UCX's Python API takes no address."""
        self.check_owner()
        checked_port(port, lowest=0)
        try:
            listener = UCXXListener(self, port, on_endpoint)
        except self.binding.lib.UCXBusyError as exc:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=port) from exc
        except self.translator.root as exc:
            raise ConfigError("UCX cannot listen on this port", port=port, ucx=f"{type(exc).__name__}: {exc}") from exc
        self._listeners.add(listener)
        return listener

    def statistics(self) -> LinkStatistics:
        self.counters.endpoints_open = len(self._endpoints)
        return self.counters.snapshot()

    def transports(self) -> tuple[str, ...]:
        lanes = [lane for endpoint in self._endpoints for lane in endpoint.lanes()]
        names = dict.fromkeys(transport for transport, device in lanes if device)  # without a device: connection set-up
        return tuple(names) or ("unknown",)

    async def aclose(self) -> None:
        """See `base.Link.aclose`: cancel, drain, stop, destroy."""
        self.check_thread()
        if self.driver.loop.is_closed():
            self.close_now()
            return
        if self._closing is None:
            self._closing = self.driver.loop.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._closed = True
        for listener in list(self._listeners):
            listener.close_now()
        while self._endpoints:  # one that is just being made is adopted late
            await asyncio.gather(*(endpoint.close() for endpoint in list(self._endpoints)))
        self._destroy()

    def close_now(self) -> None:
        """The same without a loop: for the end of the interpreter, or when the loop has been closed before."""
        if self.driver.stopped:
            return
        self._closed = True
        self.driver.stop()
        for listener in list(self._listeners):
            listener.close_now()
        endpoints = list(self._endpoints)
        for endpoint in endpoints:
            endpoint.begin_close()
        _drain(self.driver, [operation for endpoint in endpoints for operation in endpoint.in_flight])
        for endpoint in endpoints:
            endpoint.end_close()
        self._destroy()

    def _destroy(self) -> None:
        self.driver.stop()
        self.worker.cancel_inflight_requests()  # also releases those that it has cancelled before
        _links.discard(self)
        self.driver.release_worker()
        del self.worker, self._context

    def check_thread(self) -> None:
        """Refuse another thread than the owner's, and a forked child.

        Raises:
            ConfigError: this is one of these.
        """
        if threading.get_ident() != self.thread:
            _check_not_forked()
            raise ConfigError("this link belongs to another thread; open one per event loop")

    def check_owner(self) -> None:
        """The same, and refuse a closed link or loop."""
        self.check_thread()
        if self._closed:
            raise ConfigError("this link is closed; open another")
        if self.driver.loop.is_closed():
            raise ConfigError("the event loop of this link is closed; open one per event loop")

    def disown(self) -> None:
        """This process is a fork of the one whose link it is: every use is an error from now on."""
        self.thread = 0
        self.driver.freeze()
        for endpoint in self._endpoints:
            endpoint.thread = 0

    def adopt(self, endpoint: UCXXEndpoint) -> None:
        """Count an endpoint among the open ones."""
        self._endpoints.add(endpoint)

    def forget(self, endpoint: UCXXEndpoint) -> None:
        """An endpoint is closed."""
        self._endpoints.discard(endpoint)
        self.discard_unexpected()

    def discard_unexpected(self) -> None:
        """Drop messages that no endpoint waits for, which UCX would keep until the worker's end.

        They are what came to an endpoint that has been closed, or under a tag that never was one's: tags are matched in
        the whole worker, so any peer may send such.
        """
        if self.driver.stopped:
            return
        found = self.worker.tag_probe(self._any_tag, self._any_mask)
        if not found.matched:
            return
        nowhere = self.binding.make_array(bytearray(1))
        awaited = {endpoint.receive_tag for endpoint in self._endpoints}
        for _ in range(UNEXPECTED_AT_ONCE):
            tag = found.sender_tag
            if tag.value in awaited:
                return  # its receive is about to be posted; what lies behind it is seen to next time
            request = self.worker.tag_recv(nowhere, tag)
            self.counters.unexpected_messages += 1
            if not request.completed:  # UCX still refers to it: dropping it, or the array, could be a crash
                _leaked.extend((request, nowhere))
            found = self.worker.tag_probe(self._any_tag, self._any_mask)
            if not found.matched:
                return

    def forget_listener(self, listener: UCXXListener) -> None:
        """A listener is closed."""
        self._listeners.discard(listener)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a task of clean-up until it is done."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def leak(self, operation: Operation, ucx: UcxEndpoint | None) -> None:
        """Keep the buffer of an operation that never ends, for good."""
        self.counters.leaked_buffers += 1
        self.counters.leaked_bytes += operation.nbytes
        _leaked.extend((operation, ucx))

    async def _resolve(self, host: str, port: int, peer: str) -> str:
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            pass
        try:
            found = await self.driver.loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:  # UnicodeError: no name that can be looked up, such as "a..b"
            raise lost("unreachable", peer=peer) from exc
        return str(found[0][4][0])


def _check_not_forked() -> None:
    """Refuse to use UCX in a fork of a process that has used it.

    Raises:
        ConfigError: this is one.
    """
    if _pids_that_used_ucx - {os.getpid()}:
        raise ConfigError("UCX does not survive a fork; start the process by spawn, or fork before the first link")


def _drain(driver: ProgressDriver, operations: Iterable[Operation]) -> None:
    """Progress until the operations have ended, for a second at most."""
    left = list(operations)
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while left and time.monotonic() < deadline:
        driver.progress_now()
        left = [operation for operation in left if not operation.poll()]


@atexit.register
def _close_all() -> None:
    running = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    for link in list(_links):
        if _pids_that_used_ucx - {os.getpid()} or link.thread in running:
            _never_free(link)
        else:
            link.close_now()
    for thing in _leaked:
        _never_free(thing)


def _in_forked_child() -> None:
    for thing in (*_links, *_leaked):
        _never_free(thing)
    for link in _links:
        link.disown()


def _never_free(thing: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_in_forked_child)
