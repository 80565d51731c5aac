"""Packer tests run under virtual time, beside a worker of this host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.local_worker import LocalWorker
from tests.support.virtual_time import VirtualTimeLoop
from ucxx_transport import RingConfig, SharedRingBuffer


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, object]]:
    """asyncio, with a clock that jumps."""
    return "asyncio", {"loop_factory": VirtualTimeLoop}


@pytest.fixture
def worker() -> Iterator[LocalWorker]:
    with SharedRingBuffer.create(RingConfig(slots=32, slot_bytes=64, on_full="raise")) as ring:
        yield LocalWorker(ring)
