"""The first 16 bytes each end sends, on the connection's own stream, to say by which tag it receives.

| offset | bytes | field                                            |
|--------|-------|--------------------------------------------------|
| 0      | 4     | magic `b"UXTL"`                                  |
| 4      | 2     | version, little-endian, 1                        |
| 6      | 2     | zero                                             |
| 8      | 8     | tag, little-endian, that the sender receives by  |

UCX matches tagged messages in the whole worker, not per connection, so each end draws a random tag per connection for
what it receives: no connection can take, or forge, another one's message without guessing 64 bits.
"""

from __future__ import annotations

import struct

from ucxx_transport.errors import ProtocolError

__all__ = ["HELLO_BYTES", "decode_hello", "encode_hello"]

MAGIC = b"UXTL"
VERSION = 1
_HELLO = struct.Struct("<4sHHQ")
HELLO_BYTES = _HELLO.size


def encode_hello(tag: int) -> bytes:
    """The hello of an end that receives by `tag` (u64)."""
    return _HELLO.pack(MAGIC, VERSION, 0, tag)


def decode_hello(hello: bytes | bytearray, *, peer: str) -> int:
    """The peer's tag.

    Raises:
        ProtocolError: not a hello of this version.
    """
    magic, version, zero, tag = _HELLO.unpack(hello)
    if magic != MAGIC or zero != 0:
        raise ProtocolError("the peer speaks UCX but is not of this package", peer=peer, found=bytes(hello).hex())
    if version != VERSION:
        raise ProtocolError("the peer speaks another version of the link", peer=peer, found=version, expected=VERSION)
    return int(tag)
