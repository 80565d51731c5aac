"""The shared statistics: one block a port, single words, outliving the process that counts."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ucxx_transport.ring.layout import AWAITED
from ucxx_transport.server.counters import (
    BEAT,
    PORT,
    PortCounters,
    PortStatistics,
    ServerStatistics,
)
from ucxx_transport.units import MAX_PORTS

NAMES = [spec.name for spec in fields(PortStatistics)]


@pytest.fixture
def words() -> memoryview:
    return memoryview(bytearray(8 * (AWAITED + 64))).cast("Q")


def test_every_counter_is_a_word_of_its_own(words: memoryview) -> None:
    counters = PortCounters(words, 3)
    for amount, name in enumerate(NAMES, start=1):
        counters.add(name, amount)
    snapshot = counters.snapshot()
    assert [getattr(snapshot, name) for name in NAMES] == list(range(1, len(NAMES) + 1))


def test_ports_do_not_share_words(words: memoryview) -> None:
    for index in range(MAX_PORTS):
        PortCounters(words, index).words[PORT] = 5000 + index
    assert [PortCounters(words, index).snapshot().port for index in range(MAX_PORTS)] == list(range(5000, 5064))
    assert not any(words[AWAITED:])
    assert sum(word != 0 for word in words) == MAX_PORTS


def test_counts_outlive_the_object_that_counted(words: memoryview) -> None:
    PortCounters(words, 0).add("delivered", 2)
    PortCounters(words, 0).add("delivered")
    assert PortCounters(words, 0).snapshot() == PortStatistics(delivered=3)


def test_a_block_holds_every_counter() -> None:
    assert len(NAMES) <= BEAT


def test_an_unknown_counter_is_an_error_not_a_loss(words: memoryview) -> None:
    with pytest.raises(KeyError):
        PortCounters(words, 0).add("no_such_counter")


def test_the_server_sums_its_ports() -> None:
    ports = (PortStatistics(delivered=2, stale=1), PortStatistics(delivered=3))
    statistics = ServerStatistics(host="h", pids=(1, 2), restarts=0, ports=ports)
    assert statistics.total("delivered") == 5
    assert statistics.total("stale") == 1
