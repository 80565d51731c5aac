"""Connections beside channels of the test's own: what a cancellation, an eviction or an age may not lose."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from tests.unit.client.references import reference
from ucxx_transport.client.channel import Channel
from ucxx_transport.client.connections import Connections
from ucxx_transport.client.exchange import ReadExchange
from ucxx_transport.client.statistics import ClientCounters
from ucxx_transport.config import ClientConfig

pytestmark = pytest.mark.anyio

KEY = ("10.0.0.1", 5001)
REF = reference()


class SlowChannel:
    """A channel that takes its time to close."""

    def __init__(self, *, unsettled: ReadExchange | None = None) -> None:
        self.key = KEY
        self.alive = True
        self.unsettled = unsettled
        self.closed = False

    async def close(self) -> bool:
        await asyncio.sleep(1.0)
        self.closed = True
        return True


def connections(max_age_s: float = 30.0) -> Connections:
    def no_link() -> None:
        raise AssertionError("nothing is to be opened here")

    config = ClientConfig(pool_endpoint_max_age_s=max_age_s)
    return Connections(config, no_link, reader=1, counters=ClientCounters())  # type: ignore[arg-type]  # never opened


def idle(pool: Connections, **state: ReadExchange | None) -> SlowChannel:
    channel = SlowChannel(**state)
    pool.checkin(cast("Channel", channel))
    return channel


async def test_checkout_waits_for_no_close_and_loses_no_expired_channel() -> None:
    pool = connections(max_age_s=40.0)
    old = [idle(pool), idle(pool)]
    await asyncio.sleep(41.0)
    young = idle(pool)
    async with asyncio.timeout(0.5):  # virtual, and less than a close takes
        assert cast("SlowChannel", await pool.checkout(KEY, 100.0)) is young
    await asyncio.sleep(2.0)
    assert [channel.closed for channel in old] == [True, True]


async def test_what_a_dead_channel_owes_is_known_to_the_very_next_read() -> None:
    pool = connections()
    idle(pool)
    dead = idle(pool, unsettled=ReadExchange(REF, 1))
    dead.alive = False
    assert pool.at_hand(KEY, REF) is None
    assert pool.at_hand(KEY, REF) is None, "the debt comes before a payload"
    await asyncio.sleep(2.0)
    assert dead.closed


async def test_what_an_evicted_channel_owes_is_known_to_the_very_next_read() -> None:
    pool = connections()
    idle(pool, unsettled=ReadExchange(REF, 1))
    pool.evict(KEY)
    other = ("10.0.0.1", 5002)
    assert pool.at_hand(other, REF) is None
    await asyncio.sleep(2.0)
