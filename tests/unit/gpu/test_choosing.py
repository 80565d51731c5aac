from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from tests.support.fake_gpu import FakeGpu, FakeRuntime
from tests.support.rows import row
from ucxx_transport import ConfigError
from ucxx_transport.gpu import on_host, receiver_for, runtime_of
from ucxx_transport.gpu.runtime import check_index
from ucxx_transport.trainer.unpacking import checked_device


class ByInterface:
    __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012 - as such libraries have it


class ByDLPack:
    def __dlpack__(self, **_: object) -> object:
        raise NotImplementedError

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


@pytest.mark.parametrize("leaf", [ByInterface(), ByDLPack()])
def test_where_there_is_neither_library_an_array_on_a_gpu_says_what_to_install(
    leaf: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "cupy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"'obs'.*needs torch or cupy.*ucxx_transport\[torch\]") as caught:
        runtime_of(leaf, "obs")
    assert caught.value.facts["field"] == "obs"


def test_few_values_come_to_the_host_wherever_they_are() -> None:
    gpu = FakeGpu()
    values = np.arange(3)
    assert on_host(values, "x", FakeRuntime(gpu)) is values
    np.testing.assert_array_equal(on_host([1, 2], "x", FakeRuntime(gpu)), [1, 2])
    assert gpu.log == []
    np.testing.assert_array_equal(on_host(gpu.array(values), "x", FakeRuntime(gpu)), values)
    assert gpu.log == ["to_host 24"]


def test_what_is_no_number_of_a_gpu_is_refused() -> None:
    rows: list[str] = ["cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "cupy:1.5", "cupy:²"]
    for device in rows:
        with row(device=device), pytest.raises(ConfigError, match=r"'cuda:N', 'cupy' or 'cupy:N', not 'cu") as caught:
            checked_device(device)
        assert caught.value.facts["field"] == "device"
    for device in ("numpy", "cpu", "cuda", "cuda:0", "cupy:12"):
        assert checked_device(device) == device


def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are() -> None:
    assert check_index("cuda", None, 2, lambda: 1) == 1
    assert check_index("cuda:1", 1, 2, lambda: 0) == 1
    with pytest.raises(ConfigError, match=r"device='cuda:2': this process has 2 GPUs.*CUDA_VISIBLE_DEVICES"):
        check_index("cuda:2", 2, 2, lambda: 0)
    with pytest.raises(ConfigError, match=r"this process has 1 GPU .*must be below 1"):
        check_index("cuda:1", 1, 1, lambda: 0)


def test_cupy_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"device='cupy:0' needs cupy.*ucxx_transport\[cu12\]"):
        receiver_for("cupy:0")
