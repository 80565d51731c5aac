"""Tensors of torch as payloads; runs where torch is installed (`pip install '.[torch]'`)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.support.payloads import pack_into
from tests.support.rows import row
from ucxx_transport.errors import ConfigError
from ucxx_transport.schema import Schema, TensorSpec
from ucxx_transport.schema.tensors import as_array

torch: Any = pytest.importorskip("torch", exc_type=ImportError)

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
NAMES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "bfloat16"]


def test_a_tensor_is_its_own_memory_with_its_own_dtype() -> None:
    for name in NAMES + FLOAT8:
        with row(name=name):
            tensor = torch.tensor([[1.0, 2.0], [4.0, 0.5]]).to(getattr(torch, name))
            array = as_array(tensor, "x")
            assert array.dtype.name == name
            assert array.__array_interface__["data"][0] == tensor.data_ptr()
            np.testing.assert_array_equal(array.astype(np.complex128), tensor.to(torch.complex128).numpy())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn"])
def test_a_tensor_that_is_not_contiguous_keeps_its_order(name: str) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, name)).T[::2]
    np.testing.assert_array_equal(as_array(tensor, "x").astype(np.float32), [[0, 3], [2, 5]])


def test_a_tensor_with_a_gradient_or_a_conjugate_view_is_its_values() -> None:
    np.testing.assert_array_equal(as_array(torch.ones(2, requires_grad=True) * 2, "x"), [2, 2])
    np.testing.assert_array_equal(as_array(torch.tensor([1 + 2j]).conj(), "x"), [1 - 2j])
    np.testing.assert_array_equal(as_array(torch.nn.Parameter(torch.ones(1)), "x"), [1])


def test_tensors_go_into_a_payload_and_come_out_as_they_were() -> None:
    schema = Schema([TensorSpec("logits", (2, 3), "bfloat16"), TensorSpec("reward", (), "float32")])
    memory = bytearray(schema.nbytes)
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pack_into(schema, memory, {"logits": logits, "reward": torch.tensor(0.5)})
    found = schema.views(memory)
    assert found["logits"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["logits"].view(np.int16), logits.view(torch.int16).numpy())
    assert float(found["reward"]) == 0.5


@pytest.mark.parametrize(
    "tensor",
    [lambda: torch.eye(3).to_sparse(), lambda: torch.ones(2, device="meta")],
)
def test_a_tensor_that_is_no_array_in_host_memory_is_refused_by_name(tensor: Any) -> None:
    with pytest.raises(ConfigError, match="'x'"):
        as_array(tensor(), "x")
