from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np
import pytest

from tests.support.fake_gpu import FakeGpu, FakeRuntime
from tests.support.rows import row
from ucxx_transport import ConfigError
from ucxx_transport.gpu.runtime import PageLockError

WHAT = {"what": "a thing", "remedy": "have a smaller thing"}


def memory(nbytes: int = 1 << 20) -> Any:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def lock(gpu: FakeGpu, array: Any) -> Callable[[], object]:
    return FakeRuntime(gpu).page_lock(array, 0, **WHAT)


def test_memory_is_unregistered_once_however_often_it_is_unlocked() -> None:
    gpu = FakeGpu()
    array = memory()
    unlock = lock(gpu, array)
    assert gpu.is_page_locked(array)
    unlock()
    unlock()
    del array
    gc.collect()
    assert gpu.log == ["register 1048576", "unregister 1048576 mapped"]


def test_memory_that_goes_is_unregistered_first_whether_its_lock_is_kept_or_not() -> None:
    gpu = FakeGpu()
    array, other = memory(), memory()
    unlock = lock(gpu, array)
    lock(gpu, other)
    view = array[10:20]
    del array, other
    assert len(gpu.registered) == 1
    del view
    assert gpu.registered == {}
    assert [entry for entry in gpu.log if entry.endswith("unmapped")] == []
    unlock()
    assert gpu.counts() == {"register": 2, "unregister": 2}


def test_a_refusal_says_why_and_what_to_do() -> None:
    gpu = FakeGpu()
    gpu.refuse = 304
    with pytest.raises(
        PageLockError, match=r"a thing of 1048576 bytes.*words \(error 304\).*ulimit -l.*smaller"
    ) as caught:
        lock(gpu, memory())
    assert isinstance(caught.value, ConfigError)
    assert caught.value.facts == {"field": "device", "status": 304, "needed_bytes": 1 << 20}


def test_what_somebody_else_registered_is_theirs_to_unregister() -> None:
    gpu = FakeGpu()
    gpu.refuse = 712
    array = memory()
    lock(gpu, array)()
    del array
    assert gpu.log == []


def test_memory_that_cannot_be_unlocked_is_warned_of_unless_there_is_nothing_left_to_unlock(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    rows: list[tuple[int, int]] = [(0, 0), (4, 0), (713, 0), (1, 1)]
    for status, warnings in rows:
        with row(status=status, warnings=warnings):
            gpu = FakeGpu()
            gpu.unregister_status = status
            lock(gpu, memory())()
            assert [event["status"] for event in log_events] == [status] * warnings


FORKED = """
import os, sys
import numpy as np
from tests.support.fake_gpu import FakeGpu, FakeRuntime

gpu = FakeGpu()
memory = np.zeros(4096, np.uint8)
unlock = FakeRuntime(gpu).page_lock(memory, 0, what="", remedy="")
if os.fork() == 0:
    unlock()
    print("child", len(gpu.registered), flush=True)
    os._exit(0)
os.wait()
unlock()
print("parent", len(gpu.registered))
"""


def test_a_forked_child_leaves_its_parent_s_memory_locked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.split() == ["child", "1", "parent", "0"]
