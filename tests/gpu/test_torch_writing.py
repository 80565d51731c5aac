"""torch tensors on a real GPU into slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from ucxx_transport import ConfigError, Schema, SharedRingBuffer, SlotState, TensorSpec
from ucxx_transport.gpu import runtime_of
from ucxx_transport.gpu.torch import TorchRuntime
from ucxx_transport.schema.episode_record import RewardSummary
from ucxx_transport.schema.tensors import as_array
from ucxx_transport.worker import TrajectoryWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.may_leave("descriptors", "threads", reason="CUDA keeps its driver's, and its threads, for the process"),
]

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
NAMES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "bfloat16"]
NAMES += ["uint16", "uint32", *FLOAT8]
A_WHILE_CYCLES = 200_000_000


@contextmanager
def writing(**settings: Any) -> Iterator[tuple[TrajectoryWriter, Any]]:
    with TrajectoryWriter("w", **{"serve": False, "ring": {"slots": 4}, **settings}) as end:

        def through(trajectory: dict[str, Any]) -> Any:
            record = end.write(trajectory)
            assert record.ref is not None
            return ring_of(end).read(record.ref)

        yield end, through


def ring_of(end: TrajectoryWriter) -> SharedRingBuffer:
    assert end.ring is not None
    return end.ring


def bits(array: Any) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_arrives_bit_for_bit_whatever_its_layout(torch: Any, name: str) -> None:
    full = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.5, 8.0]]).to(getattr(torch, name)).cuda()
    given = {"plain": full, "transposed": full.T, "strided": full[:, ::2], "scalar": full[0, 1], "empty": full[:0]}
    with writing() as (_, through):
        found = through(given)
        for key, tensor in given.items():
            expected = as_array(tensor.cpu(), "x")
            assert (found[key].dtype, found[key].shape) == (expected.dtype, expected.shape), key
            assert bits(found[key]) == bits(expected), key


def test_tensors_with_a_gradient_and_conjugate_views_are_their_values(torch: Any) -> None:
    with writing() as (_, through):
        found = through(
            {
                "grad": torch.ones(2, device="cuda", requires_grad=True) * 2,
                "conj": torch.tensor([1 + 2j], device="cuda").conj(),
                "neg": torch.tensor([1 + 2j], device="cuda").conj().imag,
            }
        )
        assert (found["grad"].tolist(), found["conj"].tolist(), found["neg"].tolist()) == ([2, 2], [1 - 2j], [-2])


def test_leaves_on_the_host_and_on_the_gpu_may_be_mixed_and_change_places(torch: Any) -> None:
    on_host = {"a": np.arange(1000), "b": {"c": [np.ones(3, np.float32), np.zeros(2)]}}
    on_gpu = {"a": torch.arange(1000).cuda(), "b": {"c": [torch.ones(3).cuda(), torch.zeros(2).double().cuda()]}}
    mixed = {"a": on_gpu["a"], "b": {"c": [on_host["b"]["c"][0], on_gpu["b"]["c"][1]]}}  # type: ignore[index]  # a tree of mixed kinds
    with writing() as (_, through):
        for given in (on_host, mixed, on_gpu, on_host):
            found = through(given)
            np.testing.assert_array_equal(found["a"], on_host["a"])
            np.testing.assert_array_equal(found["b"]["c"][0], [1, 1, 1])
            np.testing.assert_array_equal(found["b"]["c"][1], [0, 0])


def test_the_ring_is_really_page_locked_and_is_no_more_once_the_writer_is_closed(torch: Any) -> None:
    with writing() as (end, through):
        through({"x": torch.ones(1 << 20, device="cuda")})
        mapping = ring_of(end).mapping
        assert torch.from_numpy(mapping).is_pinned()
        assert torch.from_numpy(mapping[-64:]).is_pinned()
    assert not torch.from_numpy(mapping).is_pinned()
    # and the pages may be locked again
    TorchRuntime(torch).page_lock(mapping, 0, what="", remedy="")()


def test_memory_that_is_locked_twice_breaks_no_kernel_that_comes_later(torch: Any) -> None:
    runtime = TorchRuntime(torch)
    memory = np.zeros(1 << 20, np.uint8)
    unlock = runtime.page_lock(memory, 0, what="", remedy="")
    assert runtime.call(0, "HostRegister", memory.ctypes.data, memory.nbytes, 1) == 712
    assert torch.ones(8, device="cuda").sum().item() == 8
    unlock()
    assert runtime.call(0, "HostUnregister", memory.ctypes.data) == 713
    assert torch.ones(8, device="cuda").sum().item() == 8
    assert "error 713" in runtime.error_words(713)


@pytest.mark.parametrize("own_stream", [False, True])
def test_what_the_producer_has_still_to_do_is_waited_for(torch: Any, *, own_stream: bool) -> None:
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with writing(ring={"slots": 4, "checksum": True}) as (_, through), torch.cuda.stream(stream):
        values = torch.zeros(1 << 20, device="cuda")
        through({"x": values})  # the ring is made and locked
        for number in (3, 4):
            torch.cuda._sleep(A_WHILE_CYCLES)  # noqa: SLF001 - as torch's own tests have a GPU busy
            values.fill_(number)
            assert (through({"x": values})["x"] == number).all()


def test_narrowing_refuses_what_is_refused_of_host_arrays(torch: Any) -> None:
    schema = Schema(
        [TensorSpec("f", (3,), "float32"), TensorSpec("i", (2,), "int16"), TensorSpec("h", (2,), "bfloat16")]
    )
    good = {
        "f": torch.tensor([1 / 3, float("inf"), float("nan")], dtype=torch.float64).cuda(),
        "i": torch.tensor([-32768, 32767]).cuda(),
        "h": torch.tensor([1 / 3, 3e38]).cuda(),
    }
    with writing(schema=schema, narrow=["f", "i", "h"]) as (end, through):
        found = through(good)
        np.testing.assert_array_equal(found["f"], np.array([1 / 3, np.inf, np.nan], np.float32))
        assert found["i"].tolist() == [-32768, 32767]
        assert found["h"].astype(np.float32).tolist() == good["h"].to(torch.bfloat16).float().tolist()
        for name, values, words in [
            ("f", torch.full((3,), 1e300, dtype=torch.float64), "does not fit float32"),
            ("f", torch.ones(3, dtype=torch.int64), "give floats"),
            ("i", torch.tensor([0, 32768]), "does not fit int16"),
            ("i", torch.ones(2), "give the field float"),
            ("h", torch.tensor([1.0, 3.4e38]), "does not fit bfloat16"),
        ]:
            with pytest.raises(ConfigError, match=words):
                end.write({**good, name: values.cuda()})
        assert ring_of(end).slot_states() == [SlotState.FREE] * 4


@pytest.mark.parametrize(("stored", "too_large"), [("float8_e4m3fn", 465.0), ("float8_e5m2", 61441.0)])
def test_a_value_too_large_for_float8_is_refused(torch: Any, stored: str, too_large: float) -> None:
    with writing(schema=Schema([TensorSpec("x", (2,), stored)]), narrow=["x"]) as (end, through):
        assert through({"x": torch.tensor([1.5, -2.0]).cuda()})["x"].astype(np.float32).tolist() == [1.5, -2.0]
        with pytest.raises(ConfigError, match=f"does not fit {stored}"):
            end.write({"x": torch.tensor([1.0, too_large]).cuda()})


@pytest.mark.parametrize("name", ["int64", "uint16", "uint32", "uint64", "uint8"])
def test_integers_of_every_kind_are_narrowed_or_refused(torch: Any, name: str) -> None:
    wide = torch.tensor([0, 7, 100]).to(getattr(torch, name)).cuda()
    with writing(schema=Schema([TensorSpec("x", (3,), "int8")]), narrow=["x"]) as (end, through):
        assert through({"x": wide})["x"].tolist() == [0, 7, 100]
        with pytest.raises(ConfigError, match="does not fit int8"):
            end.write({"x": torch.tensor([0, 7, 128]).to(getattr(torch, name)).cuda()})


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda torch: torch.ones(4).cuda(), r"shape \(4,\) is not \(3,\)"),
        (lambda torch: torch.ones(3).double().cuda(), "dtype float64 would not keep its values in float32"),
        (lambda torch: torch.eye(3).to_sparse().cuda(), "torch cannot take a Tensor from its GPU"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(torch: Any, made: Any, words: str) -> None:
    with writing(schema=Schema([TensorSpec("x", (3,), "float32")])) as (end, through):
        with pytest.raises(ConfigError, match=words):
            end.write({"x": made(torch)})
        assert ring_of(end).statistics().written == 0
        assert through({"x": torch.ones(3, dtype=torch.float16).cuda()})["x"].tolist() == [1, 1, 1]


def test_a_ring_itself_refuses_a_tensor_on_a_gpu(torch: Any) -> None:
    schema = Schema([TensorSpec("x", (3,), "float32")])
    with writing(schema=schema) as (end, _), pytest.raises(ConfigError, match="write it with TrajectoryWriter"):
        ring_of(end).write({"x": torch.ones(3).cuda()})


def test_rewards_on_the_gpu_are_summed_up(torch: Any) -> None:
    with writing(reward="reward") as (end, _):
        record = end.write({"reward": torch.arange(4, dtype=torch.bfloat16).cuda()})
        assert record.episode_length == 4
        assert record.rewards == RewardSummary(total=6.0, mean=1.5, least=0.0, most=3.0)


class ByInterface:
    """An array of a library that has CUDA's interface alone, and names the stream that works on it."""

    def __init__(self, tensor: Any, stream: int | None) -> None:
        self._tensor = tensor
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, "version": 3, "stream": stream}


class ByDLPack:
    """An array of a library that has DLPack alone."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)


def test_arrays_of_other_libraries_come_by_either_interface(torch: Any) -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).cuda()
    stream = torch.cuda.Stream()
    given = {
        "dlpack": ByDLPack(tensor),
        "bfloat16": ByDLPack(tensor.bfloat16()),
        "no_stream": ByInterface(tensor, None),
        "default": ByInterface(tensor, 1),
        "per_thread": ByInterface(tensor, 2),
        "other": ByInterface(tensor, stream.cuda_stream),
        "transposed": ByInterface(tensor.T, None),
    }
    with writing() as (_, through):
        found = through(given)
        for name, array in found.items():
            expected = tensor.T if name == "transposed" else tensor
            np.testing.assert_array_equal(array.astype(np.float32), expected.cpu().numpy(), err_msg=name)


def test_what_an_interface_s_stream_has_still_to_do_is_waited_for(torch: Any) -> None:
    stream = torch.cuda.Stream()
    values = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with writing() as (_, through):
        through({"x": values})
        with torch.cuda.stream(stream):
            torch.cuda._sleep(A_WHILE_CYCLES)  # noqa: SLF001 - as torch's own tests have a GPU busy
            values.fill_(5)
        assert (through({"x": ByInterface(values, stream.cuda_stream)})["x"] == 5).all()


def test_every_gpu_of_the_process_is_taken_from(torch: Any) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU")
    given = {f"gpu_{number}": torch.full((1000,), number, device=f"cuda:{number}") for number in range(count)}
    with writing() as (_, through):
        found = through(given)
        assert [int(found[f"gpu_{number}"].sum()) for number in range(count)] == [1000 * n for n in range(count)]


def test_a_tensor_is_described_without_a_copy(torch: Any) -> None:
    tensor = torch.zeros((5, 3), device="cuda", dtype=torch.bfloat16)
    array = runtime_of(tensor, "x").adopt(tensor, "x")
    assert (array.shape, array.dtype.name, array.device) == ((5, 3), "bfloat16", 0)
    assert array.array.data_ptr() == tensor.data_ptr()
