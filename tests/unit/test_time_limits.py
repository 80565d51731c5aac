"""Time limits of calls: numbers or text, refused at the front, before anything is waited for or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.fake_source import FakeSource
from tests.support.memory_store import MemoryStore
from tests.support.rows import row
from ucxx_transport import ConfigError, RingConfig, Schema, SharedRingBuffer, TensorSpec
from ucxx_transport.groups import RankGroup
from ucxx_transport.membership import HeartbeatPublisher, SourceWatcher
from ucxx_transport.membership.local_store import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

WRONG = ("soon", float("nan"), float("inf"), -1, True, b"5s", [1])


def test_a_time_limit_that_is_none_is_refused_by_every_call_that_waits(tmp_path: Path) -> None:
    store, file = MemoryStore(), LocalStore(tmp_path / "store")
    revision = file.snapshot().revision
    with (
        SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as ring,
        SharedRingBuffer.create(RingConfig(slots=2, schema=Schema([TensorSpec("data", 1, "uint8")]))) as shaped,
        SourceWatcher(MemoryStore()) as watcher,
        file.watch(after=revision) as watch,
    ):
        ref, data = ring.write_raw(b"x"), np.zeros(1, np.uint8)
        publisher, group = HeartbeatPublisher(store, "w", FakeSource()), RankGroup(store, "g", 0)
        calls: dict[str, Callable[[Any], object]] = {
            "wait_for": lambda limit: watcher.wait_for(1, limit),
            "reset_grace_s": lambda limit: SourceWatcher(store, reset_grace_s=limit),
            "wait_published": publisher.wait_published,
            "ack_timeout_s": lambda limit: RankGroup(store, "g", 0, ack_timeout_s=limit),
            "join_group": group.join_group,
            "drain": ring.drain,
            "write": lambda limit: shaped.write({"data": data}, deadline_s=limit),
            "write_raw": lambda limit: ring.write_raw(data, deadline_s=limit),
            "reserve": lambda limit: ring.reserve(deadline_s=limit),
            "acquire": lambda limit: ring.acquire(ref, deadline_s=limit),
            "take": lambda limit: ring.take(1, deadline_s=limit),
            "wait_for_ready": ring.wait_for_ready,
            "get": lambda limit: file.get("k", timeout_s=limit),
            "put": lambda limit: file.put("k", b"", timeout_s=limit),
            "next": watch.next,
        }
        for name, call in calls.items():
            for wrong in WRONG:
                with row(name=name, wrong=wrong), pytest.raises(ConfigError) as caught:
                    call(wrong)
                assert str(caught.value.facts["field"]).endswith("_s")
        assert len(ring.take(2, deadline_s="5s")) == 1, "no refused call had an effect"
        assert ring.drain("1ms") == 1
        assert watcher.wait_for(0, "1ms") == ()
    file.close()
