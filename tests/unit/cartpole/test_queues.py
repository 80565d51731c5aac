from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from cartpole.queues import ByteQueue

_WAIT_S = 10.0


@pytest.fixture
def pair() -> Iterator[ByteQueue]:
    queue = ByteQueue(multiprocessing.get_context("spawn"), limit=1)
    yield queue
    queue.abandon()


@pytest.mark.may_leave("descriptors", reason="the resource tracker of multiprocessing keeps its pipe")
def test_the_latest_message_wins(pair: ByteQueue) -> None:
    assert pair.offer(b"old", wait_s=_WAIT_S)
    assert pair.take(wait_s=_WAIT_S) == b"old"
    assert pair.offer(b"older", wait_s=_WAIT_S)
    assert not pair.offer(b"refused", wait_s=0.01)
    while not pair.offer_latest(b"new"):
        pass  # the first message is still on its way into the pipe
    assert pair.take(wait_s=_WAIT_S) == b"new"
    assert pair.take() is None
    assert pair.take_all() == []
