"""A port in a thread of this process: its reactor runs there, and nothing else does.

A server with `mode="thread"` has one for each port; the process of a port (`ucxx_transport.sidecar`) has this one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import fields, replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.link.address import choose_address
from ucxx_transport.link.process import connection_budget, descriptors_in_use, raised_limit
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.logs import get_logger
from ucxx_transport.server.port import Port
from ucxx_transport.teardown import MARGIN_S

if TYPE_CHECKING:
    from ucxx_transport.link.reactor import LinkFactory
    from ucxx_transport.ring import SharedRingBuffer

_log = get_logger(__name__)

LAST_FRAMES_S: Final = 0.1
"""How long a port that is to stop takes in what had arrived: acknowledgements, above all."""


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
    from ucxx_transport.link.ucx import UCXXLink

    address = choose_address(settings.host)
    ipv6 = address if ":" in address else None
    return partial(UCXXLink, shm_lanes=settings.shm_lanes, ucx=settings.link_settings, ipv6=ipv6)


class PortThread:
    """Serves the port number `index` of a server; the first of them also reclaims what dead processes hold.

    Args:
        ring: the ring.
        settings: of the server.
        index: of the port among the server's.
        candidates: the ports that it tries, in order; 0 is any free one.
        link_factory: opens its link; None for one over UCX.
    """

    def __init__(
        self,
        ring: SharedRingBuffer,
        settings: ServerConfig,
        index: int,
        candidates: Sequence[int],
        link_factory: LinkFactory | None = None,
    ) -> None:
        self._ring = ring
        self._settings = settings
        self._index = index
        self._candidates = candidates
        self._reactor = Reactor(link_factory or ucxx_links(settings), spin_s=settings.spin_s)
        self._up: Future[int] = Future()
        self._stop_by_s = math.inf
        # A daemon: an embedding worker that forgets stop() must still be able to exit.
        self._thread = Thread(target=self._run, name=f"ucxx-port-{index}", daemon=True)

    def start(self) -> None:
        """Start, and return at once."""
        self._thread.start()

    def wait_up(self, until_s: float) -> int:
        """Wait until the port listens; returns it. After an error `stop` it.

        Args:
            until_s: on `time.monotonic()`.

        Raises:
            ConfigError: no candidate can be bound, or UCX is not installed.
            DeadlineExceededError: it does not listen in time.
        """
        try:
            return self._up.result(max(0.0, until_s - time.monotonic()))
        except FutureTimeoutError:
            raise DeadlineExceededError("a server's port did not come up in time", index=self._index) from None

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def begin_stop(self, until_s: float) -> None:
        """`stop` without its wait."""
        self._stop_by_s = min(self._stop_by_s, until_s)
        self._reactor.submit(lambda: None)  # the loop looks whether it is to stop

    def stop(self, until_s: float) -> bool:
        """Close the port and its connections by `until_s` (monotonic); returns whether the thread has ended."""
        self.begin_stop(until_s)
        if self._thread.ident is None:
            self._reactor.close()
            return True
        # later than who waits for this does, so that a port that hangs is seen hanging, with all stacks
        self._thread.join(max(0.0, until_s + 2 * MARGIN_S - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            settings = replace(self._settings, max_connections=self._max_connections())
            self._serve(Port(self._ring, settings, self._index, self._reactor))
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: its starter must get to know of it
            if self._up.done():
                _log.exception("port_died", thread=self._thread.name)
            else:
                self._up.set_exception(error)
        finally:
            self._reactor.close()

    def _serve(self, port: Port) -> None:
        reactor = self._reactor
        try:
            self._up.set_result(port.start(self._candidates))
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

    def _max_connections(self) -> int:
        """The setting, or less where the process has no descriptors for so many; the ports in it share them."""
        asked, ports = self._settings.max_connections, self._settings.ports
        sharing = 1
        if self._settings.mode == "thread":
            sharing = ports if isinstance(ports, int) else len(ports)
        limit = raised_limit()
        budget = connection_budget(limit=limit, in_use=descriptors_in_use(), asked=asked * sharing) // sharing
        if budget < asked:
            _log.warning("connections_limited", connections=budget, asked=asked, descriptors=limit, see="ulimit -n")
        return max(1, budget)
