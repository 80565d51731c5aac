from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.fake_gpu import FakeGpu
from tests.support.rows import row
from ucxx_transport import ConfigError, RingConfig, Schema, SharedRingBuffer, TensorSpec
from ucxx_transport.schema.tensors import DeviceArrayError, as_array, is_on_device


class DLPack:
    """An array as DLPack has it, on the kind of device of that number."""

    def __init__(self, kind: int) -> None:
        self._kind = kind

    def __dlpack_device__(self) -> tuple[int, int]:
        if self._kind < 0:
            raise ValueError("an array over several devices")
        return self._kind, 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:  # jax has it, and copies from the GPU for it
        return np.ones(2, dtype)


def test_an_array_says_by_dlpack_whether_it_is_on_a_gpu() -> None:
    rows: list[tuple[int, bool]] = [(1, False), (2, True), (3, False), (13, True), (-1, False)]
    for kind, expected in rows:
        with row(kind=kind, expected=expected):
            assert is_on_device(DLPack(kind)) is expected


def test_what_is_in_host_memory_is_not_on_a_gpu() -> None:
    rows: list[object] = [np.ones(2), np.float32(1), 1.5, [1, 2], "text", None, b"ab", memoryview(b"ab")]
    for value in rows:
        with row(value=value):
            assert not is_on_device(value)


@pytest.mark.parametrize("value", [DLPack(2), FakeGpu().array(np.ones(2))])
def test_an_array_on_a_gpu_is_refused_by_a_ring_with_who_takes_it(value: object) -> None:
    words = r"field 'x': a \w+ on a GPU is not in host memory; write it with TrajectoryWriter or UCXXRolloutMixin"
    with pytest.raises(DeviceArrayError, match=words) as caught:
        as_array(value, "x")
    assert isinstance(caught.value, ConfigError)
    schema = Schema([TensorSpec("x", (2,), "float64")])
    with SharedRingBuffer.create(RingConfig(slots=1, schema=schema)) as ring:
        with pytest.raises(DeviceArrayError, match=words):
            ring.write({"x": value})
        assert ring.statistics().written == 0
    with pytest.raises(DeviceArrayError, match=words):
        Schema.from_example({"x": value})


def test_an_array_that_is_not_on_a_gpu_is_taken_as_before() -> None:
    np.testing.assert_array_equal(as_array(DLPack(1), "x"), [1, 1])
