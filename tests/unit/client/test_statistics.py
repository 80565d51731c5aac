from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from ucxx_transport.client.statistics import KEPT_DURATIONS, ClientCounters


def test_ways_tell_reads_bytes_and_how_long_they_took() -> None:
    counters = ClientCounters()
    for index in range(3000):
        counters.delivered("view", 10, (index % 100 + 1) * 1e-6)
    counters.delivered("ucx", 7, 0.5)
    statistics = counters.snapshot()
    assert set(statistics.ways) == {"view", "ucx"}
    view = statistics.ways["view"]
    assert (view.reads, view.nbytes) == (3000, 30_000)
    assert view.p50_s == pytest.approx(50.5e-6)
    assert view.p95_s == pytest.approx(95e-6, abs=1e-6)
    assert view.p99_s == pytest.approx(99e-6, abs=1e-6)
    assert statistics.ways["ucx"].p99_s == 0.5
    assert (statistics.reads, statistics.views, statistics.ucx, statistics.bytes_read) == (3001, 3000, 1, 30_007)


def test_percentiles_forget_what_is_long_ago_and_counts_do_not() -> None:
    counters = ClientCounters()
    for _ in range(10):
        counters.delivered("copy", 1, 9.0)
    for _ in range(KEPT_DURATIONS):
        counters.delivered("copy", 1, 1.0)
    way = counters.snapshot().ways["copy"]
    assert way.reads == KEPT_DURATIONS + 10
    assert way.p99_s == 1.0


def test_a_snapshot_is_plain_values() -> None:
    counters = ClientCounters()
    assert counters.snapshot().ways == {}
    counters.delivered("view", 10, 1e-6)
    assert json.loads(json.dumps(asdict(counters.snapshot())))["ways"]["view"]["reads"] == 1
