"""The hello of a UCX connection.

The hello is the first 16 bytes that each end sends, on the connection's own stream, to name the tags it receives by:

| offset | bytes | field                                                            |
|--------|-------|------------------------------------------------------------------|
| 0      | 4     | magic `b"UXTL"`                                                  |
| 4      | 2     | version, little-endian, 2                                        |
| 6      | 2     | zero                                                             |
| 8      | 8     | tag base, little-endian, below 2^48, that the sender receives by |

Channel `n` of an end is the tag `base << 16 | n`. UCX matches tagged messages in the whole worker, not per connection,
so each end draws a random base per connection: no connection can take, or forge, another one's message without guessing
48 bits.
"""

from __future__ import annotations

import struct
from typing import Final

from ucxx_transport.errors import ProtocolError

MAGIC: Final = b"UXTL"
VERSION: Final = 2
_HELLO: Final = struct.Struct("<4sHHQ")
HELLO_BYTES: Final = _HELLO.size

CHANNEL_BITS: Final = 16
BASE_BITS: Final = 48


def encode_hello(base: int) -> bytes:
    """The hello of an end that receives by tags of this base (48 bits)."""
    return _HELLO.pack(MAGIC, VERSION, 0, base)


def decode_hello(hello: bytes | bytearray, *, peer: str) -> int:
    """The peer's tag base.

    Raises:
        ProtocolError: not a hello of this version.
    """
    magic, version, zero, base = _HELLO.unpack(hello)
    if magic != MAGIC or zero != 0 or base >> BASE_BITS:
        raise ProtocolError("the peer speaks UCX but is not of this package", peer=peer, found=bytes(hello).hex())
    if version != VERSION:
        words = "the peer speaks another version of the link; upgrade both sides"
        raise ProtocolError(words, peer=peer, version=version, expected=VERSION)
    return int(base)
