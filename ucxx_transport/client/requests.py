"""What one frame asks for: as much of a queue as the windows have room for, and whether answers share a message.

| names that follow each other in the queue | asked for by                                                          |
|-------------------------------------------|-----------------------------------------------------------------------|
| small ones, at least two                  | one frame whose answers share a message of at most `PACK_BYTES`       |
| others, up to `MAX_NAMES`                 | one frame, each answer a message of its own                           |

All names of a frame are of one ring. Decisions: nothing is sent here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from ucxx_transport.errors import ProtocolError
from ucxx_transport.schema import Schema
from ucxx_transport.wire.codec import Named
from ucxx_transport.wire.frames import ERROR_TEXT_BYTES, HEADER_BYTES, MAX_NAMES, PACK_BYTES, TRAILER_BYTES

OWN_WINDOW_BYTES: Final = 2 << 20
"""In flight on one connection, unless two payloads are more: large ones would only hinder each other."""

SMALL_BYTES: Final = PACK_BYTES // 2
"""Answers up to this size share a message."""

FRAMING_BYTES: Final = HEADER_BYTES + TRAILER_BYTES
SHORTEST_BYTES: Final = HEADER_BYTES + ERROR_TEXT_BYTES
"""What is posted for an answer has room for an error's text."""


class Queued(Protocol):
    """A read in a connection's queue; without a job it is over."""

    @property
    def job(self) -> object | None: ...
    @property
    def ref(self) -> Named: ...


ReadT = TypeVar("ReadT", bound=Queued)


def next_request(
    queue: deque[ReadT], asked: int, asked_bytes: int, room: Callable[[int, int], bool]
) -> tuple[list[ReadT], int]:
    """Take from the queue what the next frame asks for; no reads when there is no room.

    Args:
        queue: of one connection; reads that are over are dropped.
        asked: attempts in flight there.
        asked_bytes: their payloads.
        room: whether the server's window has room for so many bytes and names.

    Returns:
        The reads, in order, and the length of the message that all answers share; 0 when each has its own.
    """
    reads: list[ReadT] = []
    ring_id = b""
    total = shared_bytes = 0
    while queue and len(reads) < MAX_NAMES:
        read = queue[0]
        ref = read.ref
        nbytes = ref.nbytes
        count = len(reads)
        whole = FRAMING_BYTES + ((nbytes + 7) & ~7)
        is_small = whole <= SMALL_BYTES
        if read.job is None:
            queue.popleft()
            continue
        if count and (
            ref.ring_id != ring_id or is_small is not bool(shared_bytes) or shared_bytes + whole * is_small > PACK_BYTES
        ):
            break  # it begins the next frame
        if asked + count > 1 and asked_bytes + total + nbytes > OWN_WINDOW_BYTES:
            break
        if not room(total + nbytes, count + 1):
            break
        ring_id = ref.ring_id
        shared_bytes += whole * is_small
        total += nbytes
        reads.append(queue.popleft())
    return reads, shared_bytes if len(reads) > 1 else 0


def schema_in(encoded: bytes, fingerprint: int) -> Schema:
    """What a server has described; a ProtocolError where it is not what references name."""
    schema = Schema.from_bytes(encoded)
    if schema.fingerprint != fingerprint:
        raise ProtocolError(
            "the server's schema is not the one the reference names",
            expected=f"{fingerprint:#018x}",
            found=f"{schema.fingerprint:#018x}",
        )
    return schema
