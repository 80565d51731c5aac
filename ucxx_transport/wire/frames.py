"""Frames of the single-chunk protocol and its limits.

Client to server, one frame a message, always `REQUEST_BYTES` (128) little-endian bytes:

| offset | type | HELLO        | AUTH | READ, CONFIRM | ACK        | DESCRIBE | BYE |
|--------|------|--------------|------|---------------|------------|----------|-----|
| 0      | u32  | magic `UXTQ` in every frame                                         |
| 4      | u16  | protocol version                                                    |
| 6      | u16  | kind (`Kind`)                                                       |
| 8      | 16 B | –            | –    | ring_id       | –          | ring_id  | –   |
| 24     | u64  | –            | –    | generation    | generation | –        | –   |
| 32     | u64  | –            | –    | attempt       | attempt    | –        | –   |
| 40     | u64  | reader       | –    | nbytes        | –          | –        | –   |
| 48     | u32  | –            | –    | slot          | slot       | –        | –   |
| 52     | u32  | –            | –    | –             | delivered  | –        | –   |
| 56     | 32 B | nonce        | mac  | –             | –          | –        | –   |
| 120    | u64  | end mark: a shorter message than posted is a silent success in UCX  |

Server to client, one message a reply: a header of `HEADER_BYTES` (64), and after an OK status a body, zeros up to a
multiple of 8, and a trailer of `TRAILER_BYTES` (16); after any other status up to `ERROR_TEXT_BYTES` (1024) of UTF-8.

| offset | type | header                                        |
|--------|------|-----------------------------------------------|
| 0      | u32  | magic `UXTR`                                  |
| 4      | u16  | protocol version                              |
| 6      | u16  | status (`Status`)                             |
| 8      | u64  | generation                                    |
| 16     | u64  | nbytes of the body, or of the error text      |
| 24     | u64  | xxh3_64 of the body, if flag 1 is set         |
| 32     | 16 B | ring_id                                       |
| 48     | u32  | slot                                          |
| 52     | u32  | flags: 1 checksum present, 2 token required   |
| 56     | u64  | schema fingerprint (0: raw bytes)             |

The trailer is u64 `TRAILER_MAGIC ^ generation`, u64 nbytes. In front of a payload the header lies in the slot itself,
so a read is one message straight from the segment; every attempt on one payload writes the same bytes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

VERSION = 1
REQUEST_MAGIC = int.from_bytes(b"UXTQ", "little")
REPLY_MAGIC = int.from_bytes(b"UXTR", "little")
END_MARK = int.from_bytes(b"UXT-END.", "little")
TRAILER_MAGIC = int.from_bytes(b"uxttrail", "little")

REQUEST_BYTES = 128
HEADER_BYTES = 64
TRAILER_BYTES = 16
ERROR_TEXT_BYTES = 1024
NONCE_BYTES = 32
MAC_BYTES = 32
RING_ID_BYTES = 16
# A schema of 4096 fields with paths of ordinary length stays below this.
MAX_SCHEMA_BYTES = 1 << 20
# A client's id; one bit below a word, so that a ring can keep it beside a mark.
MAX_READER = (1 << 63) - 1
# A body length beyond this is a lie of any peer: no machine's segment is larger.
MAX_BODY_BYTES = 1 << 46

FLAG_CHECKSUM = 1
FLAG_TOKEN_REQUIRED = 2


class Kind(IntEnum):
    """What a client's frame asks."""

    HELLO = 1
    AUTH = 2
    READ = 3
    ACK = 4
    DESCRIBE = 5
    CONFIRM = 6
    BYE = 7


class Status(IntEnum):
    """How a server answers. Only OK is followed by a body."""

    OK = 0
    STALE = 1
    NOT_READY = 2
    BUSY = 3
    BAD_REQUEST = 4
    UNAUTHORIZED = 5
    INTERNAL = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First frame of a connection.

    Attributes:
        reader: the client's random id, 1 to 2**63 - 1; one reader counts once among a payload's `readers`.
        nonce: 32 random bytes, the client's half of the token challenge.
    """

    reader: int
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """The client's answer to the challenge: HMAC-SHA256 over both nonces, 32 bytes."""

    mac: bytes


class ReadRequest(NamedTuple):
    """Asks for one payload by name (READ), or says that it arrived after all (CONFIRM).

    Attributes:
        ring_id: 16 bytes, the incarnation of the ring.
        slot: index of the slot.
        generation: the slot's generation, never 0.
        attempt: the client's number for this attempt; its acknowledgement repeats it.
        nbytes: payload length the client was promised and has posted room for.
    """

    ring_id: bytes
    slot: int
    generation: int
    attempt: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirm:
    """A `ReadRequest` delivered earlier whose acknowledgement may have been lost."""

    request: ReadRequest


class Ack(NamedTuple):
    """Ends an attempt: `delivered` frees the slot, otherwise it is READY again."""

    slot: int
    generation: int
    attempt: int
    delivered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe:
    """Asks for the schema of a ring, as msgpack."""

    ring_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """Last frame of a connection; its answer proves that every frame before it was handled."""


Request = Hello | Auth | ReadRequest | Confirm | Ack | Describe | Bye


class ReadReply(NamedTuple):
    """The header of a reply.

    Attributes:
        status: OK, or why there is no body.
        nbytes: length of the body after OK; of the error text otherwise.
        ring_id: 16 bytes of the payload's name; zeros when the reply is about none, as the next two.
        slot: of its name.
        generation: of its name.
        checksum: xxh3_64 of the body, None when the ring keeps none.
        fingerprint: the schema's, 0 for raw bytes.
        token_required: in the answer to HELLO: an AUTH must follow.
    """

    status: Status
    nbytes: int = 0
    ring_id: bytes = bytes(RING_ID_BYTES)
    slot: int = 0
    generation: int = 0
    checksum: int | None = None
    fingerprint: int = 0
    token_required: bool = False


def padded(nbytes: int) -> int:
    """Length of a body with its zeros up to the next multiple of 8."""
    return (nbytes + 7) & ~7


def message_bytes(nbytes: int) -> int:
    """Length of an OK reply whose body has `nbytes` bytes."""
    return HEADER_BYTES + padded(nbytes) + TRAILER_BYTES


def receive_bytes(nbytes: int) -> int:
    """What a client posts for a reply whose body has `nbytes` bytes: room for an error text too."""
    return max(message_bytes(nbytes), HEADER_BYTES + ERROR_TEXT_BYTES)
