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

from ucxx_transport.errors import AuthenticationError, ProtocolError
from ucxx_transport.wire.frames import MAX_NAMES, NONCE_BYTES, ReplyHeader, Window

_WELCOME: Final = struct.Struct(f"<{NONCE_BYTES}sIIQ")
WELCOME_BYTES: Final = _WELCOME.size


def token_mac(token: bytes, role: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """HMAC-SHA256 over the role ("client" or "server") and both nonces."""
    text = b"ucxx_transport/2 " + role.encode() + b"\0" + client_nonce + server_nonce
    return hmac.new(token, text, hashlib.sha256).digest()


class ClientHandshake:
    """What a client makes of the server's two answers; `nonce` is 32 fresh random bytes."""

    def __init__(self, *, nonce: bytes, token: bytes | None) -> None:
        self.nonce = nonce
        self._token = token
        self._server_nonce = b""

    def welcome(self, header: ReplyHeader, body: bytes) -> tuple[Window, bytes | None]:
        """Judge the answer to HELLO.

        Returns:
            The window, and the mac for an AUTH frame, None where no token is configured.

        Raises:
            AuthenticationError: only one of the two sides has a token. ProtocolError: no welcome of ours.
        """
        if len(body) != WELCOME_BYTES:
            raise ProtocolError("a welcome has a wrong length", nbytes=len(body), expected=WELCOME_BYTES)
        self._server_nonce, attempts, _, nbytes = _WELCOME.unpack(body)
        if not 0 < attempts <= MAX_NAMES or nbytes == 0:
            raise ProtocolError("a welcome grants no possible window", attempts=attempts, nbytes=nbytes)
        window = Window(attempts, nbytes)
        if self._token is None:
            if header.token_required:
                raise AuthenticationError("the server asks for a token; set ClientConfig(token=…) to its secret")
            return window, None
        if not header.token_required:
            raise AuthenticationError("this client has a token but the server asks for none; set ServerConfig(token=…)")
        return window, token_mac(self._token, "client", self.nonce, self._server_nonce)

    def authenticated(self, body: bytes) -> None:
        """Judge the answer to AUTH. An AuthenticationError: the server does not know the token."""
        expected = token_mac(self._token or b"", "server", self.nonce, self._server_nonce)
        if not hmac.compare_digest(body, expected):
            raise AuthenticationError("the server does not know the token; it may be an impostor")


class ServerHandshake:
    """What a server makes of HELLO and AUTH; `nonce` is 32 fresh random bytes."""

    def __init__(self, *, nonce: bytes, token: bytes | None) -> None:
        self._nonce = nonce
        self._token = token
        self._client_nonce = b""
        self.token_required = token is not None  # an AUTH must follow

    def welcome(self, client_nonce: bytes, window: Window) -> bytes:
        """The body of the answer to HELLO."""
        self._client_nonce = client_nonce
        return _WELCOME.pack(self._nonce, window.attempts, 0, window.nbytes)

    def prove(self, mac: bytes) -> bytes:
        """The body of the answer to AUTH, the server's own mac; empty: the client's is wrong."""
        token = self._token or b""
        if not hmac.compare_digest(mac, token_mac(token, "client", self._client_nonce, self._nonce)):
            return b""
        return token_mac(token, "server", self._client_nonce, self._nonce)
