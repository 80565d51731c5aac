"""Both halves of the handshake: the window that a server grants, and the token that each proves to the other.

```
 client                                          server
 HELLO  reader, client nonce             ->
                                         <-      server nonce, window, whether a token is required
 AUTH   mac("client", both nonces)       ->                       only if it is
                                         <-      mac("server", both nonces)
```
The token itself never travels. A mac is bound to its role and to both nonces: it can be neither reflected nor replayed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final

from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.frames import MAX_NAMES, NONCE_BYTES, Window

_WELCOME: Final = struct.Struct(f"<{NONCE_BYTES}sIIQ")
WELCOME_BYTES: Final = _WELCOME.size


def token_mac(token: bytes, role: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """HMAC-SHA256 over the role ("client" or "server") and both nonces."""
    text = b"ucxx_transport/2 " + role.encode() + b"\0" + client_nonce + server_nonce
    return hmac.new(token, text, hashlib.sha256).digest()


def pack_welcome(nonce: bytes, window: Window) -> bytes:
    """The body of the answer to HELLO."""
    return _WELCOME.pack(nonce, window.attempts, 0, window.nbytes)


def unpack_welcome(body: bytes) -> tuple[bytes, Window]:
    """The server's nonce, and what it grants; a ProtocolError where this is no welcome."""
    if len(body) != WELCOME_BYTES:
        raise ProtocolError("a welcome has a wrong length", nbytes=len(body), expected=WELCOME_BYTES)
    nonce, attempts, _, nbytes = _WELCOME.unpack(body)
    if not 0 < attempts <= MAX_NAMES or nbytes == 0:
        raise ProtocolError("a welcome grants no possible window", attempts=attempts, nbytes=nbytes)
    return nonce, Window(attempts, nbytes)
