"""The first 16 bytes: only the peer's own are taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucxx_transport.errors import ProtocolError
from ucxx_transport.link.ucxx_endpoint import HELLO_BYTES, decode_hello, encode_hello


@given(st.integers(0, 2**64 - 1))
def test_round_trip(tag: int) -> None:
    hello = encode_hello(tag)
    assert len(hello) == HELLO_BYTES == 16
    assert decode_hello(bytearray(hello), peer="p") == tag


@given(st.integers(0, 2**64 - 1), st.integers(0, 7), st.integers(1, 255))
def test_any_changed_byte_of_the_head_is_refused(tag: int, at: int, flip: int) -> None:
    hello = bytearray(encode_hello(tag))
    hello[at] ^= flip
    with pytest.raises(ProtocolError) as caught:
        decode_hello(hello, peer="10.0.0.1:5")
    assert caught.value.facts["peer"] == "10.0.0.1:5"


@given(st.binary(min_size=16, max_size=16))
def test_noise_is_refused(noise: bytes) -> None:
    if not noise.startswith(b"UXTL"):
        with pytest.raises(ProtocolError):
            decode_hello(noise, peer="p")
