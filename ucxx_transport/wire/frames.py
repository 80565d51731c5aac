"""Frames of the protocol, version 2, and its limits. All words are little-endian and unsigned.

A connection has numbered channels. The client's frames come on channel 0, in order. Everything a server answers belongs
to an *attempt*, a number that the client chose (from 1 on, growing), and comes on the channel `attempt & 0xFFFF`;
numbers whose channel is 0 or still awaits an answer are skipped. Many attempts are in flight at once.

Client to server: a frame is a head of 96 bytes, the *names* of payloads, the *ends* of attempts, and an end mark.

| offset | type | what               | in which kinds                                                             |
|--------|------|--------------------|----------------------------------------------------------------------------|
| 0      | u32  | magic `UXTQ`       | all                                                                        |
| 4      | u16  | protocol version   | all                                                                        |
| 6      | u16  | kind (`Kind`)      | all                                                                        |
| 8      | u64  | sequence           | all: 1, 2, 3 … on this connection                                          |
| 16     | 16 B | ring_id            | FETCH, TAKE, CONFIRM, DESCRIBE                                             |
| 32     | u16  | number of names    | FETCH: 0 to 64; CONFIRM: 1 to 64                                           |
| 34     | u16  | number of ends     | all: 0 to 128                                                              |
| 36     | u32  | flags              | FETCH: 1, the answers share a message; TAKE: 1, newest first               |
| 40     | u64  | attempt            | all but FETCH: of the answer; FETCH with flag 1: of the shared message     |
| 48     | u64  | word               | HELLO: reader, 1 to 2^63 - 1; TAKE: bytes at most                          |
| 56     | u32  | payloads           | TAKE: payloads at most, 1 to 64                                            |
| 60     | u32  | wait               | TAKE: ms to wait for a first payload, at most 60000                        |
| 64     | 32 B | secret             | HELLO: nonce; AUTH: mac                                                    |
| 96     | 32 B | a name, each       | u32 slot, u32 zero, u64 generation, u64 attempt, u64 nbytes                |
| …      | u64  | an end, each       | 2 × attempt + (1: delivered, 0: not)                                       |
| …      | u64  | end mark           | XOR sequence: a message cut short leaves an older frame's tail in a buffer |

Server to client: a header of 64 bytes, and after OK a body, zeros up to a multiple of 8, and a trailer of 16 bytes;
after any other status up to 1024 bytes of UTF-8.

| offset | type | header                                         |
|--------|------|------------------------------------------------|
| 0      | u32  | magic `UXTR`                                   |
| 4      | u16  | protocol version                               |
| 6      | u16  | status (`Status`)                              |
| 8      | u64  | generation                                     |
| 16     | u64  | nbytes of the body, or of the error text       |
| 24     | u64  | xxh3_64 of the body, if flag 1 is set          |
| 32     | 16 B | ring_id                                        |
| 48     | u32  | slot                                           |
| 52     | u32  | flags: 1 checksum present, 2 token required    |
| 56     | u64  | schema fingerprint (0: raw bytes)              |

The trailer is u64 `uxttrail` XOR generation, u64 nbytes. In front of a payload the header lies in the slot itself, so a
read is one message straight from the segment; the channel alone says which attempt it answers.

| answer to | body                                                                                                    |
|-----------|---------------------------------------------------------------------------------------------------------|
| HELLO     | 32 B nonce, u32 attempts, u32 zero, u64 bytes: the *window*, what may be named and not ended            |
| AUTH      | 32 B mac of the server                                                                                  |
| FETCH     | the payload, one message a name; with flag 1 one message, each answer behind the one before |
| TAKE      | the *offer*: u32 count, u32 zero, then as below; or status EMPTY. Payload i follows as attempt + 1 + i  |
| CONFIRM   | one byte a name: OK, STALE or BUSY                                                                      |
| DESCRIBE  | the schema, as msgpack                                                                                  |
| BYE       | nothing; the connection closes                                                                          |

An offer has 48 bytes a payload (u32 slot, u32 bytes of its envelope, u64 generation, u64 nbytes, u64 checksum, u64
flags: 1 checksum present, u64 commit time in ns), and then the envelopes, one after another.

What follows from an answer: the server has handled the frame that asked for it and all frames before it, their ends
included. An attempt that was answered OK is ended by the client; one that was refused is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

VERSION = 2
REQUEST_MAGIC = int.from_bytes(b"UXTQ", "little")
REPLY_MAGIC = int.from_bytes(b"UXTR", "little")
END_MARK = int.from_bytes(b"UXT-END.", "little")
TRAILER_MAGIC = int.from_bytes(b"uxttrail", "little")

FRAME_BYTES = 4096  # what is posted for a frame; the longest has 96 + 64 * 32 + 128 * 8 + 8 bytes
FRAME_HEAD_BYTES = 96
NAME_BYTES = 32
HEADER_BYTES = 64
TRAILER_BYTES = 16
ERROR_TEXT_BYTES = 1024
SHORTEST_BYTES = HEADER_BYTES + ERROR_TEXT_BYTES  # what is posted for an answer has room for an error's text
NONCE_BYTES = 32
MAC_BYTES = 32
RING_ID_BYTES = 16
MAX_NAMES = 64
MAX_ENDS = 128  # named and taken attempts have a window each, so one frame has room for all ends there can be
PACK_BYTES = 64 << 10  # a message that several answers share is copied at both ends; beyond this one each is faster
MAX_ATTEMPT = (1 << 63) - 1  # one bit of a word is left for how it ended
MAX_CHANNEL = 0xFFFF
MAX_READER = (1 << 63) - 1  # a client's id; one bit below a word, so that a ring can keep it beside a mark
MAX_SCHEMA_BYTES = 1 << 20  # a schema of 4096 fields with paths of ordinary length stays below this
MAX_BODY_BYTES = 1 << 46  # a body length beyond this is a lie of any peer: no machine's segment is larger
MAX_ENVELOPE_BYTES = 1024
OFFERED_BYTES = 48
MAX_WAIT_MS = 60_000

FLAG_CHECKSUM = 1
FLAG_TOKEN_REQUIRED = 2
FLAG_PACKED = 1
FLAG_NEWEST = 1


class Kind(IntEnum):
    """What a client's frame asks."""

    HELLO = 1
    AUTH = 2
    FETCH = 3
    TAKE = 4
    CONFIRM = 5
    DESCRIBE = 6
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
    EMPTY = 7


class Frame(NamedTuple):
    """A client's frame, every word within its range, as the table says. A CONFIRM's names end in two zeros."""

    kind: int
    sequence: int = 0
    ring_id: bytes = bytes(RING_ID_BYTES)
    flags: int = 0
    attempt: int = 0
    word: int = 0
    max_payloads: int = 0
    wait_ms: int = 0
    secret: bytes = bytes(NONCE_BYTES)
    names: Sequence[tuple[int, int, int, int, int]] = ()
    ends: Sequence[int] = ()


class ReplyHeader(NamedTuple):
    """The header of an answer, as the table says: about no payload, with zeros for its name and no checksum."""

    status: Status
    nbytes: int = 0
    ring_id: bytes = bytes(RING_ID_BYTES)
    slot: int = 0
    generation: int = 0
    checksum: int | None = None
    fingerprint: int = 0
    token_required: bool = False


class Window(NamedTuple):
    """What a server lets one client have in flight: named and not ended. One attempt alone may exceed the bytes."""

    attempts: int
    nbytes: int


class OfferedPayload(NamedTuple):
    """One payload of an offer. `commit_time_ns`: of the Unix epoch. `envelope`: what its writer noted of it."""

    slot: int
    generation: int
    nbytes: int
    checksum: int | None
    commit_time_ns: int
    envelope: bytes


def message_bytes(nbytes: int) -> int:
    """Length of an OK answer whose body has `nbytes` bytes."""
    return HEADER_BYTES + ((nbytes + 7) & ~7) + TRAILER_BYTES


def receive_bytes(nbytes: int) -> int:
    """What a client posts for an answer whose body has `nbytes` bytes: room for an error text too."""
    return max(message_bytes(nbytes), SHORTEST_BYTES)
