"""Rings for one test, closed after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer

MakeRing = Callable[..., SharedRingBuffer]


@pytest.fixture
def make_ring() -> Iterator[MakeRing]:
    """Makes raw rings of 4 slots of 64 bytes, unless told otherwise; the arguments are those of `RingConfig`."""
    with ExitStack() as stack:

        def make(**settings: Any) -> SharedRingBuffer:
            if "schema" not in settings:
                settings.setdefault("slot_bytes", 64)
            config = RingConfig(**{"slots": 4, **settings})
            return stack.enter_context(SharedRingBuffer.create(config))

        yield make


@pytest.fixture
def ring(make_ring: MakeRing) -> SharedRingBuffer:
    """A raw ring of 4 slots of 64 bytes that overwrites."""
    return make_ring()
