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
from ucxx_transport.link.libraries import IPv6Listener, request_peer
from ucxx_transport.link.ucx_api import UcxEndpoint, UcxListener
from ucxx_transport.link.ucx_endpoint import UCXXEndpoint
from ucxx_transport.link.ucx_flight import LinkState
from ucxx_transport.logs import get_logger

_log = get_logger(__name__)

QUIET_S: Final = 60.0
"""After one event about connections that fail while they are accepted, further ones are only counted for so long."""


class UCXXListener:
    """See `base.Listener`. `on_endpoint` gets each connection in a turn of the link, outside of UCX's callbacks."""

    def __init__(self, link: LinkState, port: int, on_endpoint: OnEndpoint) -> None:
        self._link = link
        self._on_endpoint = on_endpoint
        here = weakref.WeakMethod(self._note_request)  # UCX keeps its listener, which keeps what it calls

        def note(request: int) -> None:
            call = here()
            if call is not None:
                call(request)

        ucx: UcxListener = link.binding.lib.UCXListener.create(link.worker, port, note)
        self.port: int = ucx.port
        self._ucx = deque([ucx])  # shared with the endpoints, which keep it when this one does no more
        self._bound = weakref.ref(self._ucx)
        if link.ipv6 is not None:
            self._ucx.append(IPv6Listener(link.worker.handle, link.ipv6, self.port, note))
        self._closed = False
        self._quiet_until_s = 0.0

    def close(self) -> None:
        if not self._closed:
            self._link.check_usable()
            self._closed = True
            self._ucx = deque()
            self._link.listeners.discard(self)

    def _note_request(self, request: int) -> None:
        """A client connects, by a `ucp_conn_request_h`. Called inside UCX's progress: takes note, no more."""
        bound = self._bound()
        assert bound is not None  # else UCX does not listen any more
        peer = request_peer(request) or f"a client of port {self.port}"
        try:
            ucx = bound[0].create_endpoint_from_conn_request(request, True)  # noqa: FBT003
        except self._link.binding.root as exc:  # it has gone already, or its address cannot be reached
            self._link.ready.append((self._note_failed, (peer, f"{type(exc).__name__}: {exc}")))
        else:
            self._link.ready.append((self._hand_over, (ucx, peer, bound)))

    def _hand_over(self, accepted: tuple[UcxEndpoint, str, deque[UcxListener]]) -> None:
        """Give a connection that came to its owner."""
        ucx, peer, bound = accepted
        if self._closed:
            with suppress(self._link.binding.root):
                ucx.close_blocking()
        elif ucx.alive:
            endpoint = UCXXEndpoint(self._link, ucx, peer, accepted_by=bound)
            self._link.adopt(endpoint)
            try:
                endpoint.events = self._on_endpoint(endpoint)
            finally:
                if endpoint.events is None:
                    endpoint.close()
        else:
            self._note_failed((peer, "it was gone before it was handed over"))

    def _note_failed(self, failed: tuple[str, str]) -> None:
        self._link.counters.accepts_failed += 1
        now = self._link.timers.now()
        if now >= self._quiet_until_s:
            self._quiet_until_s = now + QUIET_S
            peer, reason = failed
            count = self._link.counters.accepts_failed
            _log.warning("accept_failed", port=self.port, peer=peer, reason=reason, failed=count)
