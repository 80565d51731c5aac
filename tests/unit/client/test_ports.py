"""Which ports a call tries: in turn, healthy ones first, never none; one that has just failed is avoided."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rows import row
from ucxx_transport.client.ports import PORTS_PER_CALL, REMEMBERED_SOURCES, PortKey, Quarantine, Rotation

HOST = "10.0.0.1"
PORTS = (5001, 5002, 5003, 5004)


def quarantine_of(*ports: int) -> Quarantine:
    quarantine = Quarantine(30.0)
    for port in ports:
        quarantine.add((HOST, port), 0.0)
    return quarantine


def calls(count: int, quarantine: Quarantine, rotation: Rotation | None = None) -> list[tuple[PortKey, ...]]:
    """The ports of `count` overlapping calls, at time 1."""
    rotation = rotation or Rotation()
    with ExitStack() as under_way:
        return [under_way.enter_context(rotation.turn(HOST, PORTS)).ports(quarantine, 1.0) for _ in range(count)]


def call(rotation: Rotation, quarantine: Quarantine, host: str = HOST, ports: tuple[int, ...] = PORTS) -> int:
    """The port that one call, alone at its source, tries first at time 1."""
    with rotation.turn(host, ports) as turn:
        return turn.ports(quarantine, 1.0)[0][1]


def test_overlapping_calls_start_at_each_port_in_turn_and_have_the_next_in_reserve() -> None:
    assert calls(5, quarantine_of()) == [
        ((HOST, 5001), (HOST, 5002)),
        ((HOST, 5002), (HOST, 5003)),
        ((HOST, 5003), (HOST, 5004)),
        ((HOST, 5004), (HOST, 5001)),
        ((HOST, 5001), (HOST, 5002)),
    ]


def test_the_healthy_ports_share_the_calls_evenly_whichever_are_avoided() -> None:
    rows: list[tuple[int, ...]] = [(5001,), (5002,), (5001, 5003), (5002, 5003), (5002, 5003, 5004)]
    for sick in rows:
        with row(sick=sick):
            first = Counter(keys[0][1] for keys in calls(120, quarantine_of(*sick)))
            healthy = set(PORTS) - set(sick)
            assert set(first) == healthy
            assert max(first.values()) == min(first.values())


def test_an_avoided_port_is_not_even_the_reserve_while_another_is_healthy() -> None:
    for keys in calls(8, quarantine_of(5002, 5003)):
        assert {port for _, port in keys} == {5001, 5004}
    assert calls(3, quarantine_of(5001, 5002, 5003)) == [((HOST, 5004),)] * 3


def test_when_all_are_avoided_all_are_tried_in_turn() -> None:
    tried = calls(4, quarantine_of(*PORTS))
    assert {port for keys in tried for _, port in keys} == set(PORTS)
    assert all(len(keys) == PORTS_PER_CALL for keys in tried)


def test_a_call_that_is_alone_stays_at_the_port_that_served_the_last() -> None:
    rotation, quarantine = Rotation(), quarantine_of()
    assert [call(rotation, quarantine) for _ in range(3)] == [5001, 5001, 5001]
    with rotation.turn(HOST, PORTS):
        assert [call(rotation, quarantine) for _ in range(3)] == [5002, 5003, 5004]
    assert [call(rotation, quarantine) for _ in range(3)] == [5004, 5004, 5004]


def test_a_failed_attempt_makes_the_next_port_due() -> None:
    rotation, quarantine = Rotation(), quarantine_of()
    with rotation.turn(HOST, PORTS) as turn:
        turn.advance()
    assert call(rotation, quarantine) == 5002


def test_clients_differ_in_the_port_they_begin_with() -> None:
    assert [call(Rotation(first), quarantine_of()) for first in range(5)] == [5001, 5002, 5003, 5004, 5001]
    assert call(Rotation(2**63 - 1), quarantine_of()) == 5004


def test_a_source_with_one_port_has_no_reserve() -> None:
    with Rotation().turn(HOST, (5001,)) as turn:
        assert turn.ports(quarantine_of(), 0.0) == ((HOST, 5001),)
        assert turn.ports(quarantine_of(5001), 0.0) == ((HOST, 5001),)


def test_sources_rotate_independently() -> None:
    rotation, quarantine = Rotation(), quarantine_of()
    with rotation.turn("busy", PORTS), rotation.turn("busy", PORTS), rotation.turn("busy", PORTS):
        assert call(rotation, quarantine, "quiet") == 5001
        assert call(rotation, quarantine, "busy") == 5004


def test_sources_remembered_are_bounded_and_the_longest_unused_is_forgotten() -> None:
    rotation, quarantine = Rotation(), quarantine_of()
    for host in ("first", "kept"):
        with rotation.turn(host, PORTS) as turn:
            turn.advance()
    for number in range(REMEMBERED_SOURCES - 1):
        call(rotation, quarantine, f"host-{number}")
    assert call(rotation, quarantine, "kept") == 5002
    assert call(rotation, quarantine, "first") == 5001


@settings(max_examples=100, deadline=None)
@given(
    ports=st.lists(st.integers(1, 65535), min_size=1, max_size=8, unique=True),
    sick=st.sets(st.integers(0, 7)),
    failures=st.lists(st.booleans(), max_size=30),
    first=st.integers(0, 2**63),
)
def test_every_call_has_one_or_two_different_ports_and_healthy_ones_first(
    ports: list[int], sick: set[int], failures: list[bool], first: int
) -> None:
    avoided = {ports[index] for index in sick if index < len(ports)}
    quarantine, rotation = quarantine_of(*avoided), Rotation(first)
    for fails in failures:
        with rotation.turn(HOST, tuple(ports)) as turn:
            tried = [port for _, port in turn.ports(quarantine, 1.0)]
            if fails:
                turn.advance()
        candidates = len(set(ports) - avoided) or len(ports)
        assert len(tried) == min(candidates, PORTS_PER_CALL)
        assert len(set(tried)) == len(tried)
        assert avoided == set(ports) or not avoided & set(tried)


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
