"""Payloads as tensors of torch; runs where torch is installed (`pip install '.[torch]'`)."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import numpy as np
import pytest

from ucxx_transport import ClientConfig, ConfigError, RingConfig, Schema, SharedRingBuffer, SlotState, SyncUCXXClient
from ucxx_transport.trainer import RolloutFeed
from ucxx_transport.trainer.unpacking import unpacker_for

torch: Any = pytest.importorskip("torch", exc_type=ImportError)

NAMES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "float16", "float32", "float64", "complex64"]
NAMES += ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("local", ["view", "copy"])
def test_tensors_are_the_payloads_own_memory_with_the_dtypes_that_were_written(local: Any) -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, 0.5]])
    written = {"by_name": {name: values.to(getattr(torch, name)) for name in NAMES}, "scalar": torch.tensor(3.0)}
    with SharedRingBuffer.create(RingConfig(slots=1, schema=Schema.from_example(written))) as ring:
        ref = ring.write(written)
        with (
            SyncUCXXClient(ClientConfig(local=local)) as client,
            client.read(ref) as payload,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            unpack = unpacker_for(torch.device("cpu"))[0]
            tree = unpack(payload)
            arrays = payload.arrays
            for name, tensor in tree["by_name"].items():
                assert tensor.dtype == getattr(torch, name)
                assert tensor.data_ptr() == arrays["by_name"][name].ctypes.data
                assert torch.equal(tensor.to(torch.complex128), written["by_name"][name].to(torch.complex128))
            assert tree["scalar"].shape == ()
            assert tree["scalar"].item() == 3.0
            del arrays, tensor
        if local == "view":
            assert ring.slot_state(0) == SlotState.READING
        del tree
        gc.collect()
        assert ring.slot_state(0) == SlotState.FREE


def test_a_dtype_that_torch_has_not_is_refused_by_name() -> None:
    with SharedRingBuffer.create(RingConfig(slots=1, schema=Schema.from_example({"x": np.longdouble(1)}))) as ring:
        ref = ring.write({"x": np.longdouble(1)})
        with SyncUCXXClient() as client, client.read(ref) as payload, pytest.raises(ConfigError, match="numpy"):
            unpacker_for("cpu")[0](payload)


def test_a_feed_gives_tensors() -> None:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as ring, RolloutFeed(device="cpu") as feed:
        feed.start([ring.write_raw(b"12")])
        (rollout,) = feed.collect()
        tree = feed.resolve(rollout)
        assert tree is not None
        assert tree["data"].tolist() == [0x31, 0x32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error_at_set_up() -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda", 1)):
        with pytest.raises(ConfigError, match=r"finds no GPU.*device='cpu'") as caught:
            RolloutFeed(device=device)
        assert caught.value.facts["field"] == "device"
