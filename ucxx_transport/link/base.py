"""The link's contract: endpoints carry ordered messages between two processes, without threads or event loops.

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

And what a process has of its links: file descriptors, and what outlives a link.

- A link that is never closed stays until the interpreter ends, and is closed then: an operation in flight whose buffer
  the interpreter frees first would be a crash. One whose last thread still runs then (a daemon's) is left as it is.
- UCX does not survive a fork. In the child, a link of the parent is kept for good, so that nothing closes the parent's
  connections.
- The buffer of an operation that never ends is kept for good, too: UCX may still write to it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Literal, Protocol, TypeAlias

from ucxx_transport.errors import BusyError, ConfigError, PeerLostError, TransportError

LostReason: TypeAlias = Literal["aborted", "cancelled", "closed", "refused", "reset", "truncated", "unreachable"]
"""`PeerLostError.facts["reason"]`. `closed` is this side's doing; after `truncated` the endpoint is still usable.

`refused` and `unreachable`: it was never up. `cancelled`: usually by the peer's death. `aborted`: anything else.
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


class Posted:
    """Something that operations are posted for; `posted` has those whose end has not been called back."""

    def __init__(self) -> None:
        self.posted: dict[Operation, Operation] = {}

    def note_failure(self, operation: Operation) -> None:
        """An operation has ended in an error."""


class Operation:
    """One posted send or receive.

    Attributes:
        completed: over, well or badly; from then on the link does not touch the buffer.
        error: why it failed, or was given up: PeerLostError with `facts["reason"]`, ProtocolError where what answered
            is not of this package, or BusyError. None in flight and after a success.
        on_done: what is called when it is over. Of a send it is set after the post, if that is not `completed`: what is
            over at once costs no call.
        buffer: its `nbytes` are pinned until the link is done with it: dropping it sooner is a crash.
        owner, index, status, channel: the link's; the index in its flight, UCX's status, the channel of a deferred one.
    """

    owner: Posted
    index: int
    buffer: object
    nbytes: int
    on_done: OnDone | None = None
    channel = status = 0
    completed = False
    error: TransportError | None = None

    @staticmethod
    def of(owner: Posted, buffer: object, nbytes: int, on_done: OnDone | None = None) -> Operation:
        """One to be posted."""
        operation = Operation()
        operation.owner, operation.buffer, operation.nbytes, operation.on_done = owner, buffer, nbytes, on_done
        return operation


OnDone: TypeAlias = Callable[[Operation], None]


class Message:
    """A buffer prepared for any number of posts: what UCX wants to know of it, worked out once."""

    __slots__ = ("address", "array", "nbytes", "view", "writable")

    def __init__(self, view: memoryview, array: Any) -> None:
        self.view, self.array = view, array
        self.address: int = array.ptr
        self.nbytes = view.nbytes
        self.writable = not view.readonly


class EndpointEvents(Protocol):
    """What the owner of an endpoint hears."""

    def lost(self, error: TransportError) -> None:
        """The peer is gone, or was never reached. Called once, and not after `close()`.

        What arrived before has been called back by then. What is in flight ends by itself, before or after. The
        endpoint still has to be closed. A PeerLostError with `facts["reason"]`, a ProtocolError where what answers is
        not of this package or of another version, a ConfigError where this side's settings leave no way there, a
        BusyError where the process has no file descriptors for it.
        """


class Timers(Protocol):
    """Those of a `Reactor`."""

    now: Callable[[], float]

    def call_at(self, when_s: float, action: Callable[[], None]) -> Any:
        """Call this in a turn, not before `when_s`, unless what is returned is cancelled by then."""


FORKED: Final = "UCX does not survive a fork; start the process by spawn, or fork before the first link"

_usables: weakref.WeakSet[Usable] = weakref.WeakSet()


class Usable:
    """Whether a link, or its reactor, may be used: not once it is `closed`, nor in a fork of its process.

    That a link is `closing` the owners of its endpoints hear by their operations' ends alone.
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

PER_CONNECTION: Final = 3  # descriptors that UCX takes for one over TCP, on each side
SPARE: Final = 64  # left for everything else that the process opens later
RESERVE: Final = 3 * PER_CONNECTION
"""What is free before UCX is asked for a connection: where it runs out in the middle of one, it may end the process."""


def connection_budget(*, limit: int, in_use: int, asked: int | None) -> int:
    """How many connections there may be, at least one: of a limit of descriptors, and the setting's bound."""
    room = max(1, (limit - in_use - SPARE) // PER_CONNECTION)
    return room if asked is None else min(asked, room)


def raised_limit() -> int:
    """The process's limit of descriptors, raised as far as it goes without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # where a sandbox forbids it, the limit stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def descriptors_in_use() -> int:
    """How many descriptors the process has open; the limit where there is not even one for this look."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def shortage(begun: int) -> BusyError | None:
    """Why there can be none beside so many connections that have not taken all their descriptors yet; None: it can."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = descriptors_in_use()
    if limit == resource.RLIM_INFINITY or limit - in_use >= RESERVE + begun * PER_CONNECTION:
        return None
    words = "this process has no file descriptors for another connection; close some, or raise its limit (ulimit -n)"
    return BusyError(words, in_use=in_use, limit=limit)


open_links: Final[set[Any]] = set()  # of UCXXLink, each kept until it is closed


def keep_for_good(*things: object) -> None:
    """Never free these, not even at the interpreter's end: UCX may still use them."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@atexit.register
def _close_all() -> None:
    running = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    for link in list(open_links):
        if link.forked or link.thread in running:
            keep_for_good(link)
        else:
            link.close()
