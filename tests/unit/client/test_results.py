from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.unit.client.references import reference
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.results import gather_results
from ucxx_transport.errors import StaleSlotError
from ucxx_transport.schema import SlotRef

pytestmark = pytest.mark.anyio

REFS = [reference(slot=slot) for slot in range(3)]


class Reads:
    """Slot 0 is delivered, slot 1 is stale, slot 2 never comes or fails in an unforeseen way."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.delivered: list[Payload] = []
        self._failure = failure

    async def read(self, ref: SlotRef) -> Payload:
        if ref.slot == 1:
            raise StaleSlotError("gone")
        if ref.slot == 2:
            if self._failure is not None:
                raise self._failure
            await asyncio.Event().wait()
        payload = Payload(ref, np.zeros(1, np.uint8), None, "ucx")
        self.delivered.append(payload)
        return payload


async def test_each_read_has_its_own_outcome() -> None:
    reads = Reads()
    payload, error = await gather_results(reads.read, REFS[:2])
    assert payload is reads.delivered[0]
    assert isinstance(error, StaleSlotError)
    assert not reads.delivered[0].released


async def test_cancelled_reads_keep_nothing() -> None:
    reads = Reads()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await gather_results(reads.read, REFS)
    assert [payload.released for payload in reads.delivered] == [True]


async def test_an_unforeseen_error_is_raised_and_keeps_nothing() -> None:
    reads = Reads(MemoryError("no buffer"))
    with pytest.raises(ExceptionGroup) as caught:
        await gather_results(reads.read, REFS)
    assert caught.group_contains(MemoryError)
    assert [payload.released for payload in reads.delivered] == [True]
