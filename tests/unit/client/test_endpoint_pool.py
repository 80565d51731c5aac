"""Idle connections: exclusive, young, few, newest first."""

from __future__ import annotations

from ucxx_transport.client.ports import EndpointPool

PORT = ("10.0.0.1", 5001)
OTHER = ("10.0.0.1", 5002)


def pool(max_age_s: float = 100.0, max_idle: int = 4) -> EndpointPool[str]:
    return EndpointPool(max_age_s=max_age_s, max_idle=max_idle)


def test_an_empty_pool_says_open_a_new_one() -> None:
    checkout = pool().checkout(PORT, 0.0)
    assert checkout.endpoint is None
    assert checkout.expired == ()


def test_a_checked_out_endpoint_has_one_user() -> None:
    idle = pool()
    idle.checkin(PORT, "a", 0.0)
    assert idle.checkout(PORT, 1.0).endpoint == "a"
    assert idle.checkout(PORT, 1.0).endpoint is None


def test_an_endpoint_serves_only_its_own_port() -> None:
    idle = pool()
    idle.checkin(PORT, "a", 0.0)
    assert idle.checkout(OTHER, 1.0).endpoint is None
    assert len(idle) == 1


def test_the_most_recently_used_goes_out_first() -> None:
    idle = pool()
    for index, name in enumerate("abc"):
        idle.checkin(PORT, name, float(index))
    assert [idle.checkout(PORT, 5.0).endpoint for _ in range(3)] == ["c", "b", "a"]


def test_endpoints_idle_too_long_are_closed_at_checkout_and_younger_ones_used() -> None:
    idle = pool(max_age_s=100.0)
    idle.checkin(PORT, "old", 0.0)
    idle.checkin(PORT, "older than it looks", 10.0)
    idle.checkin(PORT, "young", 60.0)
    checkout = idle.checkout(PORT, 111.0)
    assert checkout.expired == ("old", "older than it looks")
    assert checkout.endpoint == "young"
    assert len(idle) == 0


def test_the_age_limit_itself_is_still_young_enough() -> None:
    idle = pool(max_age_s=100.0)
    idle.checkin(PORT, "a", 0.0)
    assert idle.checkout(PORT, 100.0).endpoint == "a"
    idle.checkin(PORT, "a", 0.0)
    assert idle.checkout(PORT, 100.001).expired == ("a",)


def test_use_renews_the_age() -> None:
    idle = pool(max_age_s=100.0)
    idle.checkin(PORT, "a", 0.0)
    idle.checkout(PORT, 90.0)
    idle.checkin(PORT, "a", 90.0)
    assert idle.checkout(PORT, 180.0).endpoint == "a"


def test_above_the_limit_the_longest_idle_makes_room() -> None:
    idle = pool(max_idle=2)
    assert idle.checkin(PORT, "a", 0.0) == ()
    assert idle.checkin(PORT, "b", 1.0) == ()
    assert idle.checkin(PORT, "c", 2.0) == ("a",)
    assert idle.checkin(OTHER, "d", 2.0) == (), "the limit is per port"
    assert len(idle) == 3


def test_a_limit_of_zero_keeps_nothing() -> None:
    idle = pool(max_idle=0)
    assert idle.checkin(PORT, "a", 0.0) == ("a",)
    assert idle.checkout(PORT, 0.0).endpoint is None


def test_an_unhealthy_port_loses_all_its_idle_endpoints_and_no_other_port_any() -> None:
    idle = pool()
    idle.checkin(PORT, "a", 0.0)
    idle.checkin(PORT, "b", 0.0)
    idle.checkin(OTHER, "c", 0.0)
    assert idle.evict(PORT) == ("a", "b")
    assert idle.evict(PORT) == ()
    assert idle.checkout(OTHER, 0.0).endpoint == "c"


def test_expired_endpoints_of_ports_nobody_asks_for_can_be_collected() -> None:
    idle = pool(max_age_s=100.0)
    idle.checkin(PORT, "gone", 0.0)
    idle.checkin(OTHER, "gone too", 10.0)
    idle.checkin(OTHER, "stays", 90.0)
    assert set(idle.expired(111.0)) == {"gone", "gone too"}
    assert len(idle) == 1


def test_drain_gives_everything_and_leaves_nothing() -> None:
    idle = pool()
    for key in (PORT, OTHER):
        for name in "ab":
            idle.checkin(key, f"{key[1]}{name}", 0.0)
    assert sorted(idle.drain()) == ["5001a", "5001b", "5002a", "5002b"]
    assert len(idle) == 0
    assert idle.drain() == ()
