"""How the ends of operations are found: in order, all of them, and with a bounded search."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ucxx_transport.link.libraries import IN_PROGRESS
from ucxx_transport.link.ucx_flight import (
    ENDS_AT_ONCE,
    FULL_EVERY,
    HOT_ENDPOINTS,
    MISSES,
    Flight,
    Posted,
    operation_of,
)


class Side(Posted):
    """An endpoint whose requests end when the test says so."""

    def __init__(self, flight: Flight) -> None:
        super().__init__()
        self.flight = flight
        self.ended: list[str] = []
        self.asked = 0
        flight.endpoints[self] = flight.order[self] = None

    def post(self, name: str, channel: int = 0) -> Any:
        """Post a receive, or a send as channel -1; what UCX would know of it."""
        request = Request(self)
        array: Any = None
        operation = operation_of(array, 1, lambda _: self.ended.append(name), request, channel)
        if channel < 0:
            self.sends.append(operation)
        else:
            before = self.newest.get(channel)
            if before is None:
                self.receives.append(operation)
            else:
                before.follower = operation
            self.newest[channel] = operation
        self.flight.order.pop(self, None)
        self.flight.order[self] = None
        return request


class Request(SimpleNamespace):
    """UCX's request, which counts how often it is asked."""

    def __init__(self, side: Side) -> None:
        super().__init__(side=side, value=IN_PROGRESS)

    @property
    def status(self) -> int:
        self.side.asked += 1
        return int(self.value)

    def end(self) -> None:
        """It is over, well."""
        self.value = 0


def test_ends_of_a_channel_are_called_in_the_order_of_its_posts() -> None:
    flight = Flight()
    side = Side(flight)
    requests = [side.post(str(number), channel=3) for number in range(5)]
    for number in (1, 2, 4):
        requests[number].end()
    assert not flight.search(everywhere=True)
    requests[0].end()
    assert flight.search(everywhere=False)
    assert side.ended == ["0", "1", "2"]
    requests[3].end()
    flight.search(everywhere=False)
    assert side.ended == ["0", "1", "2", "3", "4"]
    assert (side.receives, side.newest, list(flight.order)) == ([], {}, [])


def test_channels_and_directions_do_not_wait_for_each_other() -> None:
    flight = Flight()
    side = Side(flight)
    requests = {name: side.post(name, channel=channel) for channel, name in enumerate("abc")}
    requests["send"] = side.post("send", -1)
    for name in ("c", "send"):
        requests[name].end()
        flight.search(everywhere=False)
    assert side.ended == ["c", "send"]
    assert flight.search(everywhere=True) is False


def test_posts_of_a_callback_join_behind_what_is_posted_already() -> None:
    flight = Flight()
    side = Side(flight)
    first, second = side.post("first"), side.post("second")
    again: list[Any] = []
    side.receives[0].on_done = lambda _: again.append(side.post("again"))
    first.end()
    flight.search(everywhere=False)
    again[0].end()
    assert not flight.search(everywhere=True)
    second.end()
    flight.search(everywhere=True)
    assert side.ended == ["second", "again"]


def test_search_gives_up_after_a_few_in_progress_and_says_that_it_has_overlooked_some() -> None:
    flight = Flight()
    side = Side(flight)
    requests = [side.post(str(number), channel=number) for number in range(200)]
    requests[150].end()
    assert not flight.search(everywhere=False)
    assert side.asked <= MISSES + 1
    assert flight.overlooked
    assert flight.search(everywhere=True)
    assert (side.ended, flight.overlooked) == (["150"], False)


def test_search_of_many_idle_endpoints_is_bounded_and_finds_the_latest_used_first() -> None:
    flight = Flight()
    sides = [Side(flight) for _ in range(10 * HOT_ENDPOINTS)]
    requests = [side.post("x") for side in sides]
    requests[-1].end()
    assert flight.search(everywhere=False)
    assert sum(side.asked for side in sides) < 10
    assert flight.overlooked
    requests[0].end()
    assert not flight.search(everywhere=False)
    assert sum(side.asked for side in sides) < 10 + HOT_ENDPOINTS
    sides[0].post("y", channel=1)  # it is used now
    assert flight.search(everywhere=False)
    assert sides[0].ended == ["x"]


def test_what_lies_far_behind_is_found_even_while_others_are_busy() -> None:
    flight = Flight()
    quiet = Side(flight)
    quiet.post("quiet").end()
    busy = [Side(flight) for _ in range(2 * HOT_ENDPOINTS)]
    for _ in range(FULL_EVERY):
        for side in busy:
            side.post("busy").end()
        flight.search(everywhere=False)
    assert quiet.ended == ["quiet"]


def test_search_ends_even_where_every_callback_posts_what_ends_at_once() -> None:
    flight = Flight()
    side = Side(flight)

    def again(_operation: object) -> None:
        side.ended.append("x")
        side.post("x").end()
        side.newest[0].on_done = again

    side.post("x").end()
    side.newest[0].on_done = again
    side.post("last in the first search")
    for turns in range(1, 4):
        flight.search(everywhere=turns % 2 == 0)
        assert len(side.ended) <= turns * ENDS_AT_ONCE
    flight.search(side, everywhere=True)


def test_callback_that_raises_costs_no_other_its_turn() -> None:
    flight = Flight()
    side = Side(flight)

    def fail(_operation: object) -> None:
        raise RuntimeError

    requests = [side.post(str(number), channel=number) for number in range(3)]
    side.receives[0].on_done = fail
    for request in requests:
        request.end()
    with pytest.raises(RuntimeError):
        flight.search(everywhere=False)
    assert flight.overlooked
    flight.search(everywhere=True)
    assert side.ended == ["1", "2"]
