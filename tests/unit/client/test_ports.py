"""Which port a read is given: in turn, healthy ones first, never none; one that has just failed is avoided."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from ucxx_transport.client.ports import (
    REMEMBERED_SOURCES,
    SPREAD_BYTES,
    SPREAD_READS,
    Quarantine,
    Source,
    Sources,
    shares,
)

HOST = "10.0.0.1"
PORTS = (5001, 5002, 5003, 5004)


def quarantine_of(*ports: int) -> Quarantine:
    quarantine = Quarantine(30.0)
    for port in ports:
        quarantine.add((HOST, port), 0.0)
    return quarantine


def source_of(*ports: int, first: int = 0) -> Source[object]:
    sources: Sources[object] = Sources(first)
    return sources.of(HOST, ports or PORTS)


def due(source: Source[object], *, alone: bool = True, sick: tuple[int, ...] = ()) -> int:
    keys = source.healthy(quarantine_of(*sick), 1.0)
    return keys[source.first(keys, alone=alone)][1]


def test_reads_that_overlap_take_the_ports_in_turn() -> None:
    source = source_of()
    assert [due(source, alone=number == 0) for number in range(6)] == [5001, 5002, 5003, 5004, 5001, 5002]


def test_a_read_that_is_alone_stays_at_the_port_that_served_the_last() -> None:
    source = source_of()
    assert [due(source) for _ in range(3)] == [5001, 5001, 5001]
    assert [due(source, alone=False) for _ in range(3)] == [5002, 5003, 5004]
    assert [due(source) for _ in range(3)] == [5004, 5004, 5004]


def test_ports_in_quarantine_are_stepped_over_and_their_share_goes_to_all_others() -> None:
    source = source_of()
    taken = [due(source, alone=False, sick=(5002,)) for _ in range(300)]
    assert {port: taken.count(port) for port in PORTS} == {5001: 100, 5002: 0, 5003: 100, 5004: 100}


def test_a_source_whose_ports_are_all_in_quarantine_has_no_healthy_one() -> None:
    source = source_of()
    assert source.healthy(quarantine_of(*PORTS), 1.0) == ()
    assert source.healthy(quarantine_of(*PORTS), 31.0) == source.keys


def test_a_failed_attempt_makes_the_next_port_due() -> None:
    source = source_of()
    source.advance()
    assert due(source) == 5002


def test_clients_differ_in_the_port_they_begin_with() -> None:
    assert [due(source_of(first=first)) for first in range(5)] == [5001, 5002, 5003, 5004, 5001]
    assert due(source_of(first=2**63 - 1)) == 5004


def test_sources_rotate_independently() -> None:
    sources: Sources[object] = Sources()
    busy, quiet = sources.of("busy", PORTS), sources.of("quiet", PORTS)
    for _ in range(3):
        busy.first(busy.keys, alone=False)
    assert (busy.first(busy.keys, alone=True), quiet.first(quiet.keys, alone=True)) == (3, 0)
    assert sources.of("busy", PORTS) is busy


def test_sources_remembered_are_bounded_and_the_longest_unused_is_forgotten() -> None:
    sources: Sources[object] = Sources()
    for host in ("first", "kept"):
        sources.of(host, PORTS).advance()
    for number in range(REMEMBERED_SOURCES - 1):
        sources.of(f"host-{number}", PORTS)
    kept, first = sources.of("kept", PORTS), sources.of("first", PORTS)
    assert (kept.first(kept.keys, alone=True), first.first(first.keys, alone=True)) == (1, 0)


def test_a_group_goes_to_one_port_unless_it_is_of_many_or_of_much() -> None:
    rows: list[tuple[int, int, int, list[int]]] = [
        (1, 1 << 30, 4, [1]),
        (SPREAD_READS - 1, SPREAD_BYTES - 1, 4, [SPREAD_READS - 1]),
        (SPREAD_READS, 0, 4, [2, 2, 2, 2]),
        (SPREAD_READS, 0, 1, [SPREAD_READS]),
        (2, SPREAD_BYTES, 4, [1, 1]),
        (10, 0, 4, [3, 3, 2, 2]),
    ]
    for count, nbytes, ports, expected in rows:
        with row(count=count, nbytes=nbytes, ports=ports):
            assert shares(count, nbytes, ports) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(0, 1 << 40), st.integers(1, 64))
def test_shares_are_of_all_reads_and_even(count: int, nbytes: int, ports: int) -> None:
    given_out = shares(count, nbytes, ports)
    assert sum(given_out) == count
    assert len(given_out) <= ports
    assert max(given_out) - min(given_out) <= 1


def test_a_port_is_avoided_for_the_whole_duration_and_not_longer() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add((HOST, 5001), 100.0)
    assert quarantine.holds((HOST, 5001), 100.0)
    assert quarantine.holds((HOST, 5001), 129.999)
    assert not quarantine.holds((HOST, 5001), 130.0)


def test_a_further_failure_restarts_the_duration() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add((HOST, 5001), 100.0)
    quarantine.add((HOST, 5001), 120.0)
    assert quarantine.holds((HOST, 5001), 149.0)


def test_only_the_port_that_failed_is_avoided() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add((HOST, 5001), 100.0)
    assert not quarantine.holds((HOST, 5002), 100.0)
    assert not quarantine.holds(("10.0.0.2", 5001), 100.0)


def test_a_port_that_served_a_read_is_forgiven() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add((HOST, 5001), 100.0)
    quarantine.forgive((HOST, 5001))
    quarantine.forgive((HOST, 5002))
    assert not quarantine.holds((HOST, 5001), 100.0)


def test_a_duration_of_zero_avoids_nothing() -> None:
    quarantine = Quarantine(0.0)
    quarantine.add((HOST, 5001), 100.0)
    assert not quarantine.holds((HOST, 5001), 100.0)


def test_what_has_expired_is_forgotten() -> None:
    quarantine = Quarantine(30.0)
    for number in range(100):
        quarantine.add(("10.0.0.1", number), float(number))
    quarantine.prune(100.0)
    assert len(quarantine) == 29
    assert quarantine.holds(("10.0.0.1", 99), 100.0)
