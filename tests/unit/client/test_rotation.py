"""Which ports a call tries: in turn, healthy ones first, never none."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucxx_transport.client.quarantine import PortKey, Quarantine
from ucxx_transport.client.rotation import PORTS_PER_CALL, REMEMBERED_SOURCES, Rotation

HOST = "10.0.0.1"
PORTS = (5001, 5002, 5003, 5004)


def quarantine_of(*ports: int) -> Quarantine:
    quarantine = Quarantine(30.0)
    for port in ports:
        quarantine.add((HOST, port), 0.0)
    return quarantine


def calls(count: int, quarantine: Quarantine, rotation: Rotation | None = None) -> list[tuple[PortKey, ...]]:
    """The ports of `count` calls in a row, at time 1."""
    rotation = rotation or Rotation()
    return [rotation.ports_for_call(HOST, PORTS, quarantine, 1.0) for _ in range(count)]


def test_calls_start_at_each_port_in_turn_and_have_the_next_in_reserve() -> None:
    assert calls(5, quarantine_of()) == [
        ((HOST, 5001), (HOST, 5002)),
        ((HOST, 5002), (HOST, 5003)),
        ((HOST, 5003), (HOST, 5004)),
        ((HOST, 5004), (HOST, 5001)),
        ((HOST, 5001), (HOST, 5002)),
    ]


@pytest.mark.parametrize("sick", [(5001,), (5002,), (5001, 5003), (5002, 5003), (5002, 5003, 5004)])
def test_the_healthy_ports_share_the_calls_evenly_whichever_are_avoided(sick: tuple[int, ...]) -> None:
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


def test_a_source_with_one_port_has_no_reserve() -> None:
    rotation = Rotation()
    assert rotation.ports_for_call(HOST, [5001], quarantine_of(), 0.0) == ((HOST, 5001),)
    assert rotation.ports_for_call(HOST, [5001], quarantine_of(5001), 0.0) == ((HOST, 5001),)


def test_sources_rotate_independently() -> None:
    rotation, quarantine = Rotation(), quarantine_of()
    for _ in range(3):
        rotation.ports_for_call("busy", PORTS, quarantine, 0.0)
    assert rotation.ports_for_call("quiet", PORTS, quarantine, 0.0)[0] == ("quiet", 5001)
    assert rotation.ports_for_call("busy", PORTS, quarantine, 0.0)[0] == ("busy", 5004)


def test_sources_remembered_are_bounded_and_the_longest_unused_is_forgotten() -> None:
    rotation, quarantine = Rotation(), quarantine_of()
    rotation.ports_for_call("first", PORTS, quarantine, 0.0)
    rotation.ports_for_call("kept", PORTS, quarantine, 0.0)
    for number in range(REMEMBERED_SOURCES - 1):
        rotation.ports_for_call(f"host-{number}", PORTS, quarantine, 0.0)
    assert rotation.ports_for_call("kept", PORTS, quarantine, 0.0)[0] == ("kept", 5002)
    assert rotation.ports_for_call("first", PORTS, quarantine, 0.0)[0] == ("first", 5001)


@settings(max_examples=100, deadline=None)
@given(
    ports=st.lists(st.integers(1, 65535), min_size=1, max_size=8, unique=True),
    sick=st.sets(st.integers(0, 7)),
    count=st.integers(1, 30),
)
def test_every_call_has_one_or_two_different_ports_and_healthy_ones_first(
    ports: list[int], sick: set[int], count: int
) -> None:
    avoided = {ports[index] for index in sick if index < len(ports)}
    quarantine, rotation = quarantine_of(*avoided), Rotation()
    for _ in range(count):
        keys = rotation.ports_for_call(HOST, ports, quarantine, 1.0)
        tried = [port for _, port in keys]
        assert 1 <= len(tried) <= PORTS_PER_CALL
        assert len(set(tried)) == len(tried)
        assert avoided == set(ports) or not avoided & set(tried)
