from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.support.rows import row
from ucxx_transport.errors import ConfigError
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.layout import SERVER_WORDS


def test_references_carry_the_address_published_last(ring: SharedRingBuffer) -> None:
    before = ring.write_raw(b"x")
    assert (before.host, before.ports) == ring.address() == (None, ())
    ring.publish_address("10.0.0.7", [5001, 5002])
    with SharedRingBuffer.attach(ring.name) as other:
        after = other.write_raw(b"x")
        assert (after.host, after.ports) == other.address() == ("10.0.0.7", (5001, 5002))
        other.publish_address("fe80::1", range(65535, 65536))
    assert ring.write_raw(b"x", meta={"n": 1}).ports == (65535,)
    assert [ref.host for ref in ring.ready_refs()] == ["fe80::1"] * 3


def test_the_longest_address_fits(ring: SharedRingBuffer) -> None:
    ports = tuple(range(65535 - 63, 65536))
    ring.publish_address("h" * 255, ports)
    assert ring.address() == ("h" * 255, ports)


def test_an_address_that_is_none_changes_nothing(ring: SharedRingBuffer) -> None:
    rows: list[tuple[str | None, Sequence[int], str]] = [
        ("", [1], "host"),
        ("h" * 256, [1], "host"),
        ("é" * 128, [1], "host"),
        ("h\n", [1], "host"),
        ("h\udc80", [1], "host"),
        (None, [1], "host"),
        ("h", [], "ports"),
        ("h", range(1, 66), "ports"),
        ("h", [0], "ports"),
        ("h", [65536], "ports"),
        ("h", [-1], "ports"),
    ]
    for host, ports, field in rows:
        with row(host=host, ports=ports):
            ring.publish_address("good", [1])
            with pytest.raises(ConfigError) as caught:
                ring.publish_address(host, ports)
            assert caught.value.facts["field"] == field
            assert ring.address() == ("good", (1,))


def test_the_server_has_words_of_its_own_that_all_handles_see(ring: SharedRingBuffer) -> None:
    with SharedRingBuffer.attach(ring.name) as other:
        ring.server_words[0] = 7
        other.server_words[SERVER_WORDS - 1] = 2**64 - 1
        assert other.server_words[0] == 7
        assert ring.server_words[SERVER_WORDS - 1] == 2**64 - 1
        assert len(ring.server_words) == SERVER_WORDS
    assert ring.slot_states() == ring.slot_states()
