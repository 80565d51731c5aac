"""The first 16 bytes: only the peer's own are taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucxx_transport.errors import ProtocolError
from ucxx_transport.link.endpoint import HELLO_BYTES, decode_hello


def hello_of(base: int) -> bytes:
    """As the table of `link.endpoint` has it."""
    return b"UXTL" + (2).to_bytes(2, "little") + bytes(2) + base.to_bytes(8, "little")


@given(st.integers(0, 2**48 - 1))
def test_round_trip(base: int) -> None:
    hello = hello_of(base)
    assert len(hello) == HELLO_BYTES == 16
    assert decode_hello(bytearray(hello), peer="p") == base


@given(st.integers(0, 2**48 - 1), st.integers(0, 7), st.integers(1, 255))
def test_any_changed_byte_of_the_head_is_refused(base: int, at: int, flip: int) -> None:
    hello = bytearray(hello_of(base))
    hello[at] ^= flip
    with pytest.raises(ProtocolError) as caught:
        decode_hello(hello, peer="10.0.0.1:5")
    assert caught.value.facts["peer"] == "10.0.0.1:5"


@given(st.binary(min_size=16, max_size=16))
def test_noise_is_refused(noise: bytes) -> None:
    if not noise.startswith(b"UXTL"):
        with pytest.raises(ProtocolError):
            decode_hello(noise, peer="p")


@pytest.mark.parametrize("version", [0, 1, 3])
def test_another_version_is_refused_by_name(version: int) -> None:
    hello = bytearray(hello_of(1))
    hello[4:6] = version.to_bytes(2, "little")
    with pytest.raises(ProtocolError, match="another version of the link") as caught:
        decode_hello(hello, peer="p")
    assert (caught.value.facts["version"], caught.value.facts["expected"]) == (version, 2)


@given(st.integers(2**48, 2**64 - 1))
def test_tag_base_that_would_not_leave_room_for_channels_is_refused(base: int) -> None:
    with pytest.raises(ProtocolError):
        decode_hello(hello_of(0)[:8] + base.to_bytes(8, "little"), peer="p")
