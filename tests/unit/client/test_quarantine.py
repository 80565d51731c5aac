"""Ports that have just failed are avoided, for a while."""

from __future__ import annotations

from ucxx_transport.client.quarantine import Quarantine

PORT = ("10.0.0.1", 5001)
OTHER = ("10.0.0.1", 5002)


def test_a_port_is_avoided_for_the_whole_duration_and_not_longer() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add(PORT, 100.0)
    assert quarantine.holds(PORT, 100.0)
    assert quarantine.holds(PORT, 129.999)
    assert not quarantine.holds(PORT, 130.0)


def test_a_further_failure_starts_the_duration_anew() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add(PORT, 100.0)
    quarantine.add(PORT, 120.0)
    assert quarantine.holds(PORT, 149.0)


def test_only_the_port_that_failed_is_avoided() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add(PORT, 100.0)
    assert not quarantine.holds(OTHER, 100.0)
    assert not quarantine.holds(("10.0.0.2", 5001), 100.0)
    assert quarantine.held([PORT, OTHER], 100.0) == 1


def test_a_port_that_served_a_read_is_forgiven() -> None:
    quarantine = Quarantine(30.0)
    quarantine.add(PORT, 100.0)
    quarantine.forgive(PORT)
    quarantine.forgive(OTHER)
    assert not quarantine.holds(PORT, 100.0)


def test_a_duration_of_zero_avoids_nothing() -> None:
    quarantine = Quarantine(0.0)
    quarantine.add(PORT, 100.0)
    assert not quarantine.holds(PORT, 100.0)


def test_what_has_expired_is_forgotten() -> None:
    quarantine = Quarantine(30.0)
    for number in range(100):
        quarantine.add(("10.0.0.1", number), float(number))
    quarantine.prune(100.0)
    assert len(quarantine) == 29
    assert quarantine.holds(("10.0.0.1", 99), 100.0)
