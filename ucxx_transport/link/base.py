"""The link, as Protocols: endpoints that carry ordered messages between two processes, without threads or event loops.

| object      | what it is                                      | ends when                               |
|-------------|-------------------------------------------------|-----------------------------------------|
| `Link`      | everything of one worker; driven by a `Reactor` | `close()`                               |
| `Listener`  | one port; hands over an endpoint per connection | `close()`: no further endpoint          |
| `Endpoint`  | one connection; messages on numbered channels   | `close()`, also after a loss            |
| `Operation` | one posted send or receive                      | it completes, or its endpoint is closed |

Rules that every link keeps, and that the conformance suite checks:

- Nothing blocks. Callbacks (`on_done`, `EndpointEvents`, `on_closed`, `on_endpoint`) run inside `Link.progress` or
  `Link.close`, never inside a `post_…`, `connect` or `Endpoint.close`, and must not raise: one that does ends that
  `progress` with its exception, and what was to be called after it is called by the next one. Inside a callback every
  call of the link is allowed but `progress`, `arm` and `Link.close`.
- A message of a channel fills exactly one receive posted on that channel, in order. Channels are independent of each
  other. A shorter message than the buffer is a silent success that leaves the tail as it was; a longer one fails that
  receive with `PeerLostError(reason="truncated")` and the endpoint lives on.
- A buffer belongs to the link from the post until its `Operation` is `completed`. The way to get the buffer of one that
  is in flight back is `Endpoint.close`.
- `on_done` is called once for each operation, in the order of their ends. Where `completed` is False by then, the link
  has given the operation up (its peer is lost, or its endpoint closed, and it never ended): its buffer is still in use.
- What is posted before the owner can have heard of a loss, or of `Link.close`, ends with an error in a turn: a callback
  without an error may always post. From `lost` or its own `close` on, posting raises the error.
- A send that is completed has left this side; only an answer of the peer proves that it arrived.
- Messages may be posted from the moment that `connect` returns: they leave when the connection is up.
- One thread at a time; which one may change between calls.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError

LostReason: TypeAlias = Literal["aborted", "cancelled", "closed", "refused", "reset", "truncated", "unreachable"]
"""`PeerLostError.facts["reason"]`.

`closed`: this side closed the endpoint. `reset`: the peer closed it, died, or the connection broke. `refused` and
`unreachable`: it was never up. `cancelled`: the operation was cut short, usually by the peer's death. `truncated`: the
message was longer than the posted buffer (the endpoint is still usable). `aborted`: anything else that UCX reports.
"""

_LOST: Final[dict[LostReason, str]] = {
    "aborted": "the connection broke",
    "cancelled": "the operation was cut short",
    "closed": "the endpoint is closed",
    "refused": "nothing accepts connections there, or a firewall refused what comes back",
    "reset": "the peer closed the connection or died",
    "truncated": "the message is longer than the buffer posted for it",
    "unreachable": "the address cannot be reached",
}


def lost(reason: LostReason, *, peer: str, **facts: object) -> PeerLostError:
    """A `PeerLostError` in the words of its reason."""
    hint = loopback_hint(peer) if reason in {"refused", "unreachable"} else ""
    return PeerLostError(f"{_LOST[reason]}{hint}", reason=reason, peer=peer, **facts)


def loopback_hint(address: str) -> str:
    """What is said further of an address where what was asked for does not answer, if it is this host's own."""
    if not address.startswith(("127.", "[::1]", "::1", "localhost")):
        return ""
    return "; this is loopback: a worker on another host needs a server with host= an address that is reached"


DATA_PORT_SILENT: Final = (
    "the listener answered, the data port did not: a firewall? UCX connects in both directions; set data_ports on both "
    "sides and open them"
)
"""What to add to the error of a connection that is not up in time, where `Endpoint.listener_has_answered`."""


@dataclass(slots=True, kw_only=True)
class LinkCounters:
    """Counts of one link since it was opened.

    Attributes:
        accepts_failed: connections that failed while its listeners took them.
        leaked_buffers: buffers whose operation never ended; kept referenced for the life of the process.
        unexpected_messages: messages that no receive had been posted for when their endpoint was closed.
    """

    accepts_failed: int = 0
    leaked_buffers: int = 0
    unexpected_messages: int = 0


class Operation(Protocol):
    """One posted send or receive.

    Attributes:
        completed: over, well or badly; from then on the link does not touch the buffer.
        error: why it failed, or was given up: PeerLostError with `facts["reason"]`, ProtocolError where what answered
            is not of this package, or BusyError. None in flight and after a success.
        nbytes: size of the buffer.
        on_done: what is called when it is over. Of a send it is set after the post, if that is not `completed`: what is
            over at once costs no call.
    """

    completed: bool
    error: TransportError | None
    nbytes: int
    on_done: OnDone | None


OnDone: TypeAlias = Callable[[Operation], None]

Message: TypeAlias = object
"""A buffer prepared for any number of sends: what UCX wants to know of it, worked out once."""


class EndpointEvents(Protocol):
    """What the owner of an endpoint hears."""

    def connected(self) -> None:
        """The peer's hello has come. Called once, for an accepted endpoint too."""

    def lost(self, error: TransportError) -> None:
        """The peer is gone, or was never reached. Called once, and not after `close()`.

        What arrived before has been called back by then. What is in flight ends by itself, before or after. The
        endpoint still has to be closed. A PeerLostError with `facts["reason"]`, a ProtocolError where what answers is
        not of this package or of another version, a ConfigError where this side's settings leave no way there, a
        BusyError where the process has no file descriptors for it.
        """


class Endpoint(Protocol):
    """One connection. Both ways to post raise PeerLostError once it is closed or lost, and ConfigError for a buffer.

    Attributes:
        peer: `host:port` of the other end where it is known, for messages and logs.
        channels: receives are posted on this many, 65536 unless the owner says so: messages of others are discarded,
            which would pile up otherwise.
    """

    peer: str
    channels: int

    @property
    def alive(self) -> bool:
        """Neither lost nor closed; may still be connecting."""

    def post_receive(self, buffer: object, on_done: OnDone, *, channel: int = 0) -> Operation:
        """Receive the next message of a channel (0 to 65535) that no earlier receive has taken.

        All of the buffer is offered, which is writable, contiguous, of the buffer protocol; or a `Message` of such.
        """

    def post_send(self, buffer: object, *, channel: int = 0) -> Operation:
        """Send the buffer as one message, straight from its memory, which is kept referenced until completion.

        It is contiguous, of the buffer protocol, or a `Message` of this link, and must not change before completion.
        Small sends often are `completed` already when this returns; of others `on_done` may be set.
        """

    def close(self, on_closed: Callable[[bool], None] | None = None) -> None:
        """Close the connection and end what is in flight on it. Idempotent; each caller's `on_closed` is called.

        That is when no operation of this endpoint will touch any buffer again (True), each of them having had its
        `on_done`; or, within a bound, when one has never ended (False): its buffer stays with the link for good.
        """

    def listener_has_answered(self) -> bool:
        """Of an endpoint that is not connected yet: whether the peer's listener has said anything. Some 100 us."""


class Listener(Protocol):
    """One port that takes connections; `port` is the one really bound."""

    port: int

    def close(self) -> None:
        """Take no further connection. Idempotent. Endpoints handed over before live on."""


OnEndpoint: TypeAlias = Callable[[Endpoint], EndpointEvents | None]
"""Called for each accepted connection, before its hello has come; None: it is refused, and the link closes it."""


class Link(Protocol):
    """Everything of one worker: its listeners and endpoints."""

    counters: LinkCounters

    def connect(self, host: str, port: int, events: EndpointEvents) -> Endpoint:
        """Open a connection to a numeric address; see `Reactor.resolve` for names.

        Returns at once; the outcome is `events.connected` or `events.lost`. With UCX, nothing listening may also be
        neither of them: the caller bounds it in time, and closes the endpoint. A ConfigError: the port is none, or the
        link is closed or of another process.
        """

    def listen(self, port: int, on_endpoint: OnEndpoint) -> Listener:
        """Take connections on a port, 0 for any free one; a ConfigError where it is in use or forbidden."""

    def message(self, buffer: object) -> Message:
        """The buffer, prepared for sends. It must live, and stay where it is, as long as the message does."""

    def progress(self, spin_s: float = 0.0) -> bool:
        """Take in what has arrived, and call back; bounded, some milliseconds at most. Whether anything moved.

        It polls for `spin_s` while nothing moves.
        """

    def arm(self) -> bool:
        """Make `fileno()` become readable when something happens. False: it has already, so progress first."""

    def fileno(self) -> int:
        """The descriptor to sleep on once `arm()` was True."""

    def transports(self) -> tuple[str, ...]:
        """The transports that open endpoints really use, such as `("tcp",)`; `("unknown",)` where it is unknown."""

    def close(self) -> None:
        """End endpoints, listeners and operations, and give back the resources. Idempotent, bounded (3 s)."""


def byte_view(buffer: object, *, writable: bool) -> memoryview:
    """A view of the buffer that pins it until released: a bytearray cannot be resized, an mmap not closed.

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


FORKED: Final = "UCX does not survive a fork; start the process by spawn, or fork before the first link"


_usables: weakref.WeakSet[Usable] = weakref.WeakSet()


class Usable:
    """Whether a link, or its reactor, may be used.

    Attributes:
        closing: a link that is being closed, which the owners of its endpoints hear by their operations' ends alone.
        closed: it has been.
        forked: it is of the process that this one is a fork of.
    """

    closing = closed = forked = False

    def __init__(self) -> None:
        super().__init__()
        _usables.add(self)

    def check_usable(self) -> None:
        """Refuse what is closed, and what is a parent process's, with a ConfigError."""
        if self.forked:
            raise ConfigError(FORKED)
        if self.closed:
            raise ConfigError("this link is closed; open another")

    def forget(self) -> None:
        """This process is a fork: every later use is an error, and nothing of the parent's is touched or freed."""
        self.forked = True


def _in_forked_child() -> None:
    for usable in list(_usables):
        usable.forget()


os.register_at_fork(after_in_child=_in_forked_child)
