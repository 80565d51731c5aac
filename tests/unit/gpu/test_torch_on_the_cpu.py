"""What torch does for a GPU and can be asked of its CPU tensors too; runs where torch is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from ucxx_transport import ConfigError
from ucxx_transport.gpu import on_host, runtime_of
from ucxx_transport.gpu.runtime import DeviceArray
from ucxx_transport.gpu.torch import dtype_of, flat_bytes, host_tensor, view_of_bytes
from ucxx_transport.schema.fields import DTYPES
from ucxx_transport.schema.tensors import as_array

torch: Any = pytest.importorskip("torch", exc_type=ImportError)

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
NAMES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32"]
NAMES += ["float64", "complex64", "complex128", "bfloat16", *FLOAT8]
VALUES = [[1.0, 2.0, 0.0], [4.0, 0.5, 8.0]]


def leaves() -> Any:
    return runtime_of(torch.ones(1), "x")


def device_array(tensor: Any) -> DeviceArray:
    """As `adopt` would describe it, were it on a GPU."""
    return DeviceArray(
        runtime=leaves(), array=tensor, shape=tuple(tensor.shape), dtype=dtype_of(tensor.dtype), device=0
    )


def test_a_copy_is_the_elements_in_their_order_whatever_the_layout() -> None:
    made_rows: list[Any] = [lambda t: t, lambda t: t.T, lambda t: t[:, ::2], lambda t: t[0, 1], lambda t: t[:0]]
    for made in made_rows:
        for name in NAMES:
            with row(made=made, name=name):
                tensor = made(torch.tensor(VALUES).to(getattr(torch, name)))
                flat = flat_bytes(torch, tensor)
                assert (flat.dtype, flat.ndim, flat.numel()) == (torch.uint8, 1, tensor.numel() * tensor.dtype.itemsize)
                expected = as_array(tensor, "x")
                target = np.zeros(expected.shape, expected.dtype)
                leaves().copy_to_host(device_array(tensor), target)
                assert target.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_a_copy_is_the_elements_of_a_view_of_one_element_of_a_conjugate_and_of_its_parts() -> None:
    made_rows: list[Any] = [
        lambda t: t[:1],
        lambda t: t[::2][:1],
        lambda t: t[1:2],
        lambda t: t.reshape(2, 2)[::2],
        lambda t: t.conj(),
        lambda t: t.conj()[:1],
        lambda t: t.conj().imag,
        lambda t: t.conj().imag[:1],
        lambda t: t.real[::2][:1],
    ]
    for made in made_rows:
        for name in ("complex64", "complex128"):
            with row(made=made, name=name):
                tensor = made(torch.tensor([1 + 2j, 3 - 4j, 5 + 6j, -7 + 8j], dtype=getattr(torch, name)))
                expected = np.ascontiguousarray(tensor.resolve_conj().resolve_neg().numpy())
                assert flat_bytes(torch, tensor).numpy().tobytes() == expected.tobytes()


def test_a_contiguous_tensor_is_not_copied_on_the_device() -> None:
    for name in NAMES:
        tensor = torch.tensor(VALUES).to(getattr(torch, name))
        assert flat_bytes(torch, tensor).data_ptr() == tensor.data_ptr()


def test_fields_are_views_of_one_row_of_bytes() -> None:
    shape_rows: list[tuple[int, ...]] = [(2, 3), (), (0, 5), (1,)]
    for shape in shape_rows:
        for name in NAMES:
            with row(shape=shape, name=name):
                memory = torch.zeros(256, dtype=torch.uint8)
                tensor = view_of_bytes(torch, memory, 64, shape, DTYPES[name])
                assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, name), shape)
                if tensor.numel():
                    assert tensor.data_ptr() == memory.data_ptr() + 64
                memory[64:] = 1
                expected = np.ones(192, np.uint8).view(DTYPES[name])[: tensor.numel()].reshape(shape)
                assert as_array(tensor, "x").tobytes() == expected.tobytes()


def test_a_dtype_that_torch_has_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"float(96|128)"):
        view_of_bytes(torch, torch.zeros(64, dtype=torch.uint8), 0, (1,), np.dtype(np.longdouble))


def test_a_read_only_array_becomes_a_tensor_of_its_memory_without_a_warning() -> None:
    array = np.arange(4, dtype=np.uint8)
    array.flags.writeable = False
    assert host_tensor(torch, array).data_ptr() == array.ctypes.data


def test_a_few_values_come_as_an_array_of_their_own_dtype() -> None:
    tensor = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    array = leaves().to_host(device_array(tensor))
    assert array.dtype.name == "bfloat16"
    assert array.astype(np.float32).tolist() == [1.5, -2.0]
    assert on_host(tensor, "x").dtype.name == "bfloat16"


def test_a_tensor_s_own_library_takes_it_a_subclass_too() -> None:
    class Own(torch.Tensor):  # type: ignore[misc]  # the check does not look at torch
        __module__ = "somewhere.else"

    assert type(runtime_of(torch.ones(1).as_subclass(Own), "x")).__name__ == "TorchRuntime"
