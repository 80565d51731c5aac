"""Payloads that say what they are: any byte of another payload, or of the same one at another place, is found out.

| bytes | content                                                                      |
|-------|------------------------------------------------------------------------------|
| 0-31  | magic, stream, sequence, nbytes (u64 each), as much of it as fits            |
| 32-   | u64 words: a ramp of their positions xor a key of stream, sequence, nbytes   |
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash

__all__ = ["NAMED_BYTES", "Bytes", "fill", "make", "mismatch", "name_of"]

Bytes = npt.NDArray[np.uint8]

_HEAD = struct.Struct("<QQQQ")
NAMED_BYTES = _HEAD.size
"""A payload of this length or more names itself."""

_MAGIC = int.from_bytes(b"payload!", "little")
# 2**64 divided by the golden ratio, odd: neighbouring multiples differ in about half of their bits.
_ODD = 0x9E3779B97F4A7C15
_PIECE_WORDS = 1 << 16
_RAMP = np.arange(_PIECE_WORDS, dtype=np.uint64) * np.uint64(_ODD)


def fill(target: Bytes, stream: int, sequence: int) -> None:
    """Write the payload `(stream, sequence)` of this length into `target`, piece by piece, front to back.

    Args:
        target: writable, uint8. stream, sequence: u64 each.
    """
    nbytes = len(target)
    head = np.frombuffer(_HEAD.pack(_MAGIC, stream, sequence, nbytes), dtype=np.uint8)[:nbytes]
    target[: len(head)] = head
    for start, piece in _pieces(nbytes, _key(stream, sequence, nbytes)):
        target[start : start + len(piece)] = piece


def make(stream: int, sequence: int, nbytes: int) -> Bytes:
    """The payload `(stream, sequence)` of `nbytes` bytes."""
    payload = np.empty(nbytes, dtype=np.uint8)
    fill(payload, stream, sequence)
    return payload


def mismatch(payload: Bytes, stream: int, sequence: int) -> str:
    """What is wrong with a payload that should be `(stream, sequence)`; empty when every byte is right."""
    nbytes = len(payload)
    head = _HEAD.pack(_MAGIC, stream, sequence, nbytes)[:nbytes]
    if payload[: len(head)].tobytes() != head:
        return f"it is {name_of(payload)}, not {(stream, sequence)} of {nbytes} bytes"
    for start, piece in _pieces(nbytes, _key(stream, sequence, nbytes)):
        found = payload[start : start + len(piece)]
        if not np.array_equal(found, piece):
            first = start + int(np.argmax(found != piece))
            wrong = int(np.count_nonzero(found != piece))
            return f"torn: from byte {first} of {nbytes} on, {wrong} wrong bytes in one piece of {len(piece)}"
    return ""


def name_of(payload: Bytes) -> tuple[int, int] | str:
    """`(stream, sequence)` as a payload itself says, or a word on why it does not."""
    if len(payload) < _HEAD.size:
        return "too short to name itself"
    magic, stream, sequence, _ = _HEAD.unpack(payload[: _HEAD.size].tobytes())
    return (stream, sequence) if magic == _MAGIC else "no payload of this kind"


def _key(stream: int, sequence: int, nbytes: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<QQQ", stream, sequence, nbytes))


def _pieces(nbytes: int, key: int) -> Iterator[tuple[int, Bytes]]:
    """The bytes from 32 on, piece by piece: a check then stays in the cache."""
    for start in range(_HEAD.size, nbytes, 8 * _PIECE_WORDS):
        base = (start * _ODD) & ((1 << 64) - 1)
        words = (_RAMP + np.uint64(base)) ^ np.uint64(key)
        yield start, words.view(np.uint8)[: nbytes - start]
