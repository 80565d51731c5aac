"""The link, as Protocols: endpoints that carry ordered messages between two processes.

| object     | what it is                                       | ends when                                       |
|------------|--------------------------------------------------|-------------------------------------------------|
| `Link`     | everything of one event loop                     | `aclose()`: all of the below, in order, bounded |
| `Listener` | one port; hands over an endpoint per connection  | `close()`: no further endpoint, old ones stay   |
| `Endpoint` | one connection, ordered messages per direction   | `close()`, or the peer is lost                  |
| `Pending`  | one posted send or receive                       | it completes, or its endpoint is closed         |

Rules that every link keeps, and that the conformance suite checks:

- A message fills exactly one posted receive, in order. A shorter message than the buffer is a silent success that
  leaves the tail as it was; a longer one fails that receive with `PeerLostError(reason="truncated")` and the endpoint
  lives on.
- A buffer belongs to the link from the post until its `Pending` is `completed`. Cancelling `wait()` does not change
  that: the way to get the buffer back is `await endpoint.close()`, which returns True once nothing touches it any more.
- A send that is completed has left this side; only an answer of the peer proves that it arrived.
- Objects are bound to the thread and event loop of their link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from ucxx_transport.errors import ConfigError

LostReason: TypeAlias = Literal["aborted", "cancelled", "closed", "refused", "reset", "truncated", "unreachable"]
"""`PeerLostError.facts["reason"]`.

`closed`: this side closed the endpoint. `reset`: the peer closed it, died, or the connection broke. `refused` and
`unreachable`: it was never up. `cancelled`: the operation was cut short, usually by the peer's death. `truncated`: the
message was longer than the posted buffer (the endpoint is still usable). `aborted`: anything else that UCX reports.
"""


DATA_PORT_SILENT: Final = (
    "the listener answered, the data port did not: a firewall? UCX connects in both directions; set data_ports on both "
    "sides and open them"
)
"""A note on the CancelledError that ended `Link.connect`, where the peer's end of it was seen to answer."""


def was_data_port_silent(error: BaseException) -> bool:
    """Whether the cancellation behind a TimeoutError carries that note."""
    return DATA_PORT_SILENT in getattr(error.__cause__, "__notes__", ())


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """Counters of one link since it was opened.

    Attributes:
        endpoints_connected: connections this side opened.
        endpoints_accepted: connections its listeners took.
        accepts_failed: connections that failed while its listeners took them.
        endpoints_open: of both, those not closed yet.
        sends: sends posted.
        receives: receives posted.
        sent_bytes: bytes of the completed sends.
        posted_receive_bytes: sizes of the buffers of completed receives (messages may have been shorter).
        in_flight: operations posted and not completed.
        failed: operations that completed with an error, whatever its kind.
        truncated: of those, messages longer than their buffer.
        peers_lost: endpoints whose peer went away before this side closed them.
        leaked_buffers: buffers whose operation never ended; kept referenced for the life of the process.
        leaked_bytes: their size.
        progress_turns: turns of the progress driver.
        spins: waits that polled before they slept.
        inline_completions: of those, the ones whose operation ended meanwhile.
        sleeps: times the driver went to sleep on the event descriptor.
        wakeups: times that descriptor woke it.
        unexpected_messages: messages that no receive had been posted for when their endpoint was closed.
        suppressed_errors: errors of clean-up that no caller could be given.
    """

    endpoints_connected: int = 0
    endpoints_accepted: int = 0
    accepts_failed: int = 0
    endpoints_open: int = 0
    sends: int = 0
    receives: int = 0
    sent_bytes: int = 0
    posted_receive_bytes: int = 0
    in_flight: int = 0
    failed: int = 0
    truncated: int = 0
    peers_lost: int = 0
    leaked_buffers: int = 0
    leaked_bytes: int = 0
    progress_turns: int = 0
    inline_completions: int = 0
    sleeps: int = 0
    wakeups: int = 0
    spins: int = 0
    unexpected_messages: int = 0
    suppressed_errors: int = 0


class Counters:
    """The counts behind `LinkStatistics`, plain integers. One thread writes them; any may take a snapshot."""

    __slots__ = ("ended", *(name for name in LinkStatistics.__dataclass_fields__ if name != "in_flight"))

    endpoints_connected: int
    endpoints_accepted: int
    accepts_failed: int
    endpoints_open: int
    sends: int
    receives: int
    sent_bytes: int
    posted_receive_bytes: int
    ended: int
    failed: int
    truncated: int
    peers_lost: int
    leaked_buffers: int
    leaked_bytes: int
    progress_turns: int
    inline_completions: int
    sleeps: int
    wakeups: int
    spins: int
    unexpected_messages: int
    suppressed_errors: int

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    def snapshot(self) -> LinkStatistics:
        """The counters as they are now."""
        counted = {name: getattr(self, name) for name in self.__slots__ if name != "ended"}
        return LinkStatistics(in_flight=self.sends + self.receives - self.ended, **counted)


class Pending(Protocol):
    """One posted operation."""

    @property
    def completed(self) -> bool:
        """Whether the operation is over, well or badly. From then on the link does not touch the buffer."""

    async def wait(self, until_s: float | None = None) -> None:
        """Return when the operation has succeeded. Ends with its endpoint's `close()` at the latest.

        Args:
            until_s: how long to wait, on the event loop's clock; None: for ever. What is over soon needs no timer.

        Cancelling this call, or its time running out, leaves the operation in flight: close the endpoint before the
        buffer is used again.

        Raises:
            PeerLostError: the operation failed; `facts["reason"]` is a `LostReason`.
            BusyError: UCX is out of resources that will come back.
            TimeoutError: not within `until_s`.
        """


class Endpoint(Protocol):
    """One connection."""

    @property
    def peer(self) -> str:
        """`host:port` of the other end where it is known, for messages and logs."""

    @property
    def alive(self) -> bool:
        """False once the peer is known to be lost, or this side has closed."""

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called."""

    def post_receive(self, buffer: object) -> Pending:
        """Receive the next message that no earlier receive has taken.

        Args:
            buffer: writable, contiguous, of the buffer protocol; all of it is offered.

        Raises:
            PeerLostError: the endpoint is closed, or its peer lost.
            ConfigError: the buffer cannot be written or is not contiguous, or this is another thread.
        """

    def post_send(self, buffer: object) -> Pending:
        """Send the buffer as one message, straight from its memory, which is kept referenced until completion.

        Args:
            buffer: contiguous, of the buffer protocol; may be read-only. It must not change before completion.

        Raises:
            PeerLostError: the endpoint is closed, or its peer lost.
            ConfigError: the buffer is not contiguous, or this is another thread.
        """

    async def close(self) -> bool:
        """Close the connection and end what is in flight on it.

        Idempotent, shielded from the caller's cancellation, and bounded.

        Returns:
            True when no operation of this endpoint will touch any buffer again. False when one never ended within the
            bound: its buffer stays referenced by the link for good, and must not be reused by the caller.
        """


OnEndpoint: TypeAlias = Callable[[Endpoint], None]
"""Called in the link's event loop for each accepted connection; must not block. It owns the endpoint it gets."""


class Listener(Protocol):
    """One port that takes connections."""

    @property
    def port(self) -> int:
        """The port really bound."""

    async def close(self) -> None:
        """Take no further connection. Idempotent. Endpoints handed over before live on."""


class Link(Protocol):
    """Everything of one event loop: its listeners and endpoints."""

    async def connect(self, host: str, port: int) -> Endpoint:
        """Open a connection. The caller bounds it in time; cancelling it leaves nothing behind.

        Raises:
            PeerLostError: refused, reset or unreachable (with UCX, nothing listening may also just take for ever).
            ProtocolError: something else than this package answers there.
        """

    async def listen(self, port: int, on_endpoint: OnEndpoint) -> Listener:
        """Take connections on a port.

        Args:
            port: 0 for any free one.
            on_endpoint: called once for each connection.

        Raises:
            ConfigError: the port is in use or forbidden; `facts["port"]`.
        """

    def statistics(self) -> LinkStatistics:
        """A snapshot of the counters."""

    def transports(self) -> tuple[str, ...]:
        """The transports that open endpoints really use, such as `("tcp",)`; `("unknown",)` where it is unknown."""

    async def aclose(self) -> None:
        """Close listeners and endpoints, end what is in flight, give back the resources. Idempotent, bounded."""


def byte_view(buffer: object, *, writable: bool) -> memoryview:
    """A view of the buffer that pins it until released: a bytearray cannot be resized, an mmap not closed.

    Args:
        buffer: bytes (to send), bytearray, memoryview, mmap or array; C-contiguous.
        writable: True to receive into it.

    Raises:
        ConfigError: it has no buffer protocol, is not contiguous, or is read-only where it must be written.
    """
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]  # the failure is the check
    except (TypeError, ValueError) as exc:
        # ml_dtypes arrays land here too: numpy exports no buffer for them, but does for `.view(np.uint8)`.
        raise ConfigError(
            "buffer has no usable buffer protocol; pass its bytes, such as array.view(numpy.uint8)",
            type=type(buffer).__name__,
        ) from exc
    if writable and view.readonly:
        raise ConfigError("buffer is read-only; a receive needs a writable one", type=type(buffer).__name__)
    if not view.c_contiguous:
        raise ConfigError("buffer is not C-contiguous; pass a contiguous copy", type=type(buffer).__name__)
    return view


def checked_port(port: int, *, lowest: int) -> int:
    """The port; a ConfigError below `lowest` (0 to listen on any, 1 to connect to), or above 65535."""
    if not lowest <= port <= 65535:
        raise ConfigError(f"port is not between {lowest} and 65535", port=port)
    return port


def hand_over(
    endpoint: Endpoint, on_endpoint: OnEndpoint, loop: asyncio.AbstractEventLoop
) -> asyncio.Task[bool] | None:
    """Give an accepted endpoint to its owner, at the edge between the link and foreign code.

    An owner that raises is reported to the loop's exception handler; the task that closes the endpoint is returned.
    """
    try:
        on_endpoint(endpoint)
    except Exception as exc:  # noqa: BLE001  # the edge to the owner's code; reported there
        loop.call_exception_handler({"message": "on_endpoint failed; its endpoint is closed", "exception": exc})
        return loop.create_task(endpoint.close())
    return None
