"""A fake GPU: real bytes, moved when a real GPU would be allowed to move them at the latest.

Its arrays lie in ordinary memory that they hide. A copy that was begun moves nothing until somebody waits for it, or
the test says that the GPU has got so far (`finish`): what reads or reuses it too early gets the wrong bytes.
Copies to or from memory that is not page-locked are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ucxx_transport.gpu.runtime import Bytes, DeviceArray, Receiver, Runtime, Upload
from ucxx_transport.schema.fields import DType
from ucxx_transport.schema.tensors import Array

__all__ = ["POISON", "FakeArray", "FakeGpu", "FakeReceiver", "FakeRuntime", "FakeUpload"]

PORTABLE = 1
"""`cudaHostRegisterPortable`."""

POISON = 0xA5
"""What memory of the device holds before anything was copied there."""


class FakeGpu:
    """What has happened on it, in order, and what is still to happen.

    Attributes:
        log: what was asked of it, in order.
        registered: bytes by address, page-locked now.
        refuse: the status of every further `host_register`, 0 to let it succeed.
        lockable: bytes that can be page-locked in one piece; what is larger is refused.
        on_wait: called before the host waits for copies.
        on_register: called before memory is page-locked.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.refuse = 0
        self.lockable = 1 << 40
        self.unregister_status = 0
        self.on_wait: Callable[[], object] = lambda: None
        self.on_register: Callable[[int], object] = lambda _: None
        self.downloads: list[tuple[int, Array, Array]] = []
        self.uploads: list[FakeUpload] = []

    def array(self, values: Array, device: int = 0) -> FakeArray:
        return FakeArray(self, values, device)

    def is_page_locked(self, array: Array) -> bool:
        start: int = array.__array_interface__["data"][0]
        return any(
            first <= start and start + array.nbytes <= first + nbytes for first, nbytes in self.registered.items()
        )

    def finish(self) -> None:
        """The GPU has done all that it was asked for."""
        for upload in self.uploads:
            upload.upload()
        self.uploads.clear()
        self.upload()

    def upload(self, device: int | None = None) -> None:
        waiting, self.downloads = self.downloads, []
        for entry in waiting:
            number, source, target = entry
            if device in (None, number):
                assert self.is_page_locked(target), "its target was unlocked under the copy"
                target[...] = source
            else:
                self.downloads.append(entry)

    def counts(self) -> dict[str, int]:
        """How often each thing was asked for."""
        words = [entry.partition(" ")[0] for entry in self.log]
        return {word: words.count(word) for word in dict.fromkeys(words)}


class FakeArray:
    """An array on the pretended GPU; another library than numpy cannot look into it."""

    def __init__(self, gpu: FakeGpu, values: Array, device: int) -> None:
        self.gpu = gpu
        self.device = device
        self._values = values

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self._values.shape, "typestr": "|V1", "data": (0, False), "version": 3}

    def seen_by_the_gpu(self) -> Array:
        return self._values


class FakeRuntime(Runtime):
    """See `Runtime`.

    Attributes:
        fail_at: which copy of those begun fails, counted from 0; None: none.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(np)
        self.gpu = gpu
        self.fail_at: int | None = None

    def __call__(self, leaf: object, field: str) -> FakeRuntime:
        del leaf, field
        return self

    def call(self, device: int, function: str, *arguments: int) -> int:
        del device
        if function == "HostRegister":
            return self._register(*arguments)
        (address,) = arguments
        nbytes = self.gpu.registered.pop(address)
        mapped = "mapped" if _is_mapped(address, nbytes) else "unmapped"
        self.gpu.log.append(f"unregister {nbytes} {mapped}")
        return self.gpu.unregister_status

    def error_words(self, status: int) -> str:
        return f"the GPU's words (error {status})"

    def seen(self, leaf: Any, field: str) -> tuple[Array, DType, int]:
        del field
        if not isinstance(leaf, FakeArray):
            raise TypeError("not of this library")
        values = leaf.seen_by_the_gpu()
        return values, values.dtype, leaf.device

    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        begun = self.gpu.counts().get("download", 0)
        self.gpu.log.append(f"download {array.array.nbytes}")
        assert self.gpu.is_page_locked(target), "a copy to pageable memory"
        assert target.flags.c_contiguous
        assert (target.shape, target.dtype) == (array.shape, array.dtype)
        # what a failing call may have begun, it has begun
        self.gpu.downloads.append((array.device, array.array, target))
        if begun == self.fail_at:
            raise RuntimeError("the GPU fell over")

    def wait(self, device: int) -> None:
        self.gpu.log.append(f"wait {device}")
        self.gpu.on_wait()
        self.gpu.upload(device)

    def to_host(self, array: DeviceArray) -> Array:
        self.gpu.log.append(f"to_host {array.array.nbytes}")
        copied: Array = array.array.copy()
        return copied

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == PORTABLE
        self.gpu.on_register(nbytes)
        if self.gpu.refuse or nbytes > self.gpu.lockable:
            return self.gpu.refuse or 2
        self.gpu.log.append(f"register {nbytes}")
        self.gpu.registered[address] = nbytes
        return 0


class FakeReceiver(Receiver):
    """See `Receiver`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.runtime = FakeRuntime(gpu)
        self.device = 0
        self.name = "fake:0"
        self.out_of_memory = MemoryError

    def begin(self, source: Bytes) -> Upload:
        self.gpu.log.append(f"upload {source.nbytes}")
        assert self.gpu.is_page_locked(source), "a copy from pageable memory"
        upload = FakeUpload(self.gpu, source)
        self.gpu.uploads.append(upload)
        return Upload(lambda: upload.done, upload.wait, upload.ready, upload.view)


class FakeUpload:
    """See `Upload`."""

    def __init__(self, gpu: FakeGpu, source: Bytes) -> None:
        self._gpu = gpu
        # the address alone, as a GPU has it: what holds the source is the caller's business
        self._source = (source.__array_interface__["data"][0], source.nbytes)
        self._memory = np.full(source.nbytes, POISON, np.uint8)
        self.done = False

    def wait(self) -> None:
        self._gpu.log.append("wait upload")
        self._gpu.finish()

    def ready(self) -> None:
        self._gpu.log.append("ready")

    def view(self, offset: int, shape: tuple[int, ...], dtype: DType) -> FakeArray:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._gpu.array(self._memory[offset : offset + nbytes].view(dtype).reshape(shape))

    def upload(self) -> None:
        address, nbytes = self._source
        if nbytes and not self.done:
            source = np.asarray(_Raw(address, nbytes))
            assert self._gpu.is_page_locked(source), "its source was unlocked under the copy"
            self._memory[:] = source
        self.done = True


class _Raw:
    """Bytes at an address, whatever holds them now."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, True), "version": 3}


def _is_mapped(address: int, nbytes: int) -> bool:
    first = address
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split(" ", 1)[0].split("-"))
        if start <= first < end:
            first = end
    return first >= address + nbytes
