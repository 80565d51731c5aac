"""UCXXListener: one port.

UCX binds the wildcard address (0.0.0.0) and ucxx's API takes no other: narrow it outside, by a firewall or a network
namespace. An IPv6 address besides is bound through UCX's own `ucp_listener_create`. UCX keeps the port bound until the
last endpoint accepted on it is closed.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from typing import Final

from ucxx_transport.link.base import OnEndpoint
from ucxx_transport.link.libraries import IPv6Listener, endpoint_peer, request_peer
from ucxx_transport.link.ucx_api import UcxEndpoint, UcxListener
from ucxx_transport.link.ucx_endpoint import UCXXEndpoint
from ucxx_transport.link.ucx_flight import LinkState
from ucxx_transport.logs import get_logger

_log = get_logger(__name__)

QUIET_S: Final = 60.0
"""After one event about connections that fail while they are accepted, further ones are only counted for so long."""


class UCXXListener:
    """See `base.Listener`. After `close()` the port stays bound until the endpoints accepted on it are closed too.

    Args:
        link: that owns it.
        port: 0 for any free one.
        on_endpoint: gets each connection, in a turn of the link, outside of UCX's callbacks.
    """

    def __init__(self, link: LinkState, port: int, on_endpoint: OnEndpoint) -> None:
        self._link = link
        self._on_endpoint = on_endpoint
        self._arrived: deque[UcxEndpoint] = deque()
        here = weakref.ref(self)
        self._ucx: UcxListener | None = link.binding.lib.UCXListener.create(
            link.worker, port, lambda request: _note_request(here, request)
        )
        self._ipv6: IPv6Listener | None = None
        if link.ipv6 is not None:
            self._ipv6 = IPv6Listener(
                link.worker.handle, link.ipv6, self._ucx.port, lambda request: _note_request(here, request)
            )
        self._closed = False
        self._failed: tuple[str | None, str] | None = None
        self._quiet_until_s = 0.0
        self._open_endpoints = 0
        self.port: int = self._ucx.port

    def close(self) -> None:
        if not self._closed:
            self._link.check_usable()
            self._closed = True
            self.hand_over()
            self._link.listeners.discard(self)
            self._release_if_unused()

    def note_request(self, request: int) -> None:
        """A client connects. Called inside UCX's progress: takes note, no more.

        Args:
            request: the `ucp_conn_request_h`, which the endpoint takes over.
        """
        assert self._ucx is not None
        peer = request_peer(request)
        try:
            self._arrived.append(self._ucx.create_endpoint_from_conn_request(request, True))  # noqa: FBT003
        except self._link.translator.root as exc:  # it has gone already, or its address cannot be reached
            self._link.counters.accepts_failed += 1
            self._failed = (peer, f"{type(exc).__name__}: {exc}")
        self._link.ready.append((UCXXListener.hand_over, self))

    def hand_over(self) -> None:
        """Give the connections that came to their owner."""
        self._log_failed()
        while self._arrived:
            ucx = self._arrived.popleft()
            if not ucx.alive:
                continue
            if self._closed:
                with suppress(self._link.translator.root):
                    ucx.close_blocking()
                continue
            peer = endpoint_peer(ucx.handle) or f"a client of port {self.port}"
            endpoint = UCXXEndpoint(self._link, ucx, peer, on_ended=self._endpoint_ended)
            self._open_endpoints += 1
            self._link.adopt(endpoint)
            try:
                endpoint.events = self._on_endpoint(endpoint)
            finally:
                if endpoint.events is None:
                    endpoint.close()

    def _endpoint_ended(self) -> None:
        """One of the endpoints accepted here is closed."""
        self._open_endpoints -= 1
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self._closed and not self._open_endpoints:
            if self._ipv6 is not None:
                self._ipv6.close()
            self._ucx = self._ipv6 = None

    def _log_failed(self) -> None:
        now = self._link.timers.now()
        if self._failed is not None and now >= self._quiet_until_s:
            self._quiet_until_s = now + QUIET_S
            peer, reason = self._failed
            failed = self._link.counters.accepts_failed
            _log.warning("accept_failed", port=self.port, peer=peer, reason=reason, failed=failed)
        self._failed = None


def _note_request(listener: weakref.ref[UCXXListener], request: int) -> None:
    alive = listener()
    if alive is not None:
        alive.note_request(request)
