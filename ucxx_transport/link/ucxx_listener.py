"""One UCX port.

UCX binds the wildcard address (0.0.0.0) and ucxx's API takes no other: narrow it outside, by a firewall or a network
namespace. UCX also keeps the port bound until the last endpoint accepted on it is closed.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress

from ucxx_transport.link.base import OnEndpoint, hand_over
from ucxx_transport.link.binding import UcxEndpoint, UcxListener
from ucxx_transport.link.native import endpoint_peer
from ucxx_transport.link.pending import LinkContext
from ucxx_transport.link.ucxx_endpoint import UCXXEndpoint


class UCXXListener:
    """See `base.Listener`. After `close()` the port stays bound until the endpoints accepted on it are closed too.

    Args:
        link: that owns it.
        port: 0 for any free one.
        on_endpoint: gets each connection, in the loop, outside of UCX's callbacks.
    """

    def __init__(self, link: LinkContext, port: int, on_endpoint: OnEndpoint) -> None:
        self._link = link
        self._on_endpoint = on_endpoint
        self._arrived: deque[UcxEndpoint] = deque()
        here = weakref.ref(self)
        self._ucx: UcxListener | None = link.binding.lib.UCXListener.create(
            link.worker, port, lambda ucx: _note_arrival(here, ucx), deliver_endpoint=True
        )
        self._closed = False
        self._open_endpoints = 0
        self.port: int = self._ucx.port

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        """The same, for clean-up without a loop."""
        if not self._closed:
            self._closed = True
            self.hand_over()
            self._link.forget_listener(self)
            self._release_if_unused()

    def _endpoint_closed(self) -> None:
        """One of the endpoints accepted here is closed."""
        self._open_endpoints -= 1
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self._closed and not self._open_endpoints:
            self._ucx = None

    def note_arrival(self, ucx: UcxEndpoint) -> None:
        """A connection came. Called inside progress: takes note, no more."""
        self._arrived.append(ucx)
        self._link.driver.soon(self.hand_over)

    def hand_over(self) -> None:
        """Give the connections that came to their owner."""
        while self._arrived:
            ucx = self._arrived.popleft()
            if not ucx.alive:
                continue
            if self._closed:
                with suppress(self._link.translator.root):
                    ucx.close_blocking()
                continue
            peer = endpoint_peer(ucx.handle) or f"a client of port {self.port}"
            endpoint = UCXXEndpoint(self._link, ucx, peer, self._endpoint_closed)
            self._open_endpoints += 1
            self._link.adopt(endpoint)
            self._link.counters.endpoints_accepted += 1
            failed = hand_over(endpoint, self._on_endpoint, self._link.driver.loop)
            if failed is not None:
                self._link.keep(failed)


def _note_arrival(listener: weakref.ref[UCXXListener], ucx: UcxEndpoint) -> None:
    alive = listener()
    if alive is not None:
        alive.note_arrival(ucx)
