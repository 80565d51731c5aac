"""The token's proof: bound to the role and to both nonces, never the token itself."""

from __future__ import annotations

from itertools import combinations

from ucxx_transport.wire.codec import macs_equal, token_mac
from ucxx_transport.wire.frames import MAC_BYTES, NONCE_BYTES

TOKEN = b"correct horse"
CLIENT_NONCE = b"c" * NONCE_BYTES
SERVER_NONCE = b"s" * NONCE_BYTES


def test_the_same_facts_give_the_same_mac() -> None:
    mac = token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE)
    assert len(mac) == MAC_BYTES
    assert macs_equal(mac, token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE))


def test_any_other_fact_gives_another_mac() -> None:
    macs = [
        token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE),
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE),  # a mac cannot be reflected to its sender
        token_mac(TOKEN, "client", SERVER_NONCE, CLIENT_NONCE),
        token_mac(TOKEN, "client", b"d" * NONCE_BYTES, SERVER_NONCE),  # nor replayed on another connection
        token_mac(TOKEN, "client", CLIENT_NONCE, b"t" * NONCE_BYTES),
        token_mac(b"other token", "client", CLIENT_NONCE, SERVER_NONCE),
        token_mac(b"", "client", CLIENT_NONCE, SERVER_NONCE),
    ]
    assert not any(macs_equal(left, right) for left, right in combinations(macs, 2))
