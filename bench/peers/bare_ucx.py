"""The floor of what UCX gives from Python: a request and an answer, on a synchronous loop, with nothing above it.

No ring, no verification, no acknowledgement: two messages on one endpoint, buffers registered once. Both sides spin for
50 µs after the last progress, then sleep on the worker's descriptor. The TCP settings are those of this package.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.peers.memory import ReceiveBuffers, Received, Slots

if TYPE_CHECKING:
    from bench.core.ends import Offer

__all__ = ["BareReader", "BareSource"]

HOST: Final = "127.0.0.1"
SPIN_S: Final = 50e-6
SLEEP_S: Final = 1.0
SETTINGS: Final = {"TLS": "tcp", "TCP_TX_SEG_SIZE": "256K", "TCP_RX_SEG_SIZE": "512K", "WARN_UNUSED_ENV_VARS": "n"}
REQUEST_TAG: Final = 1
ANSWER_TAG: Final = 2
HEADER_BYTES: Final = 64


class _Worker:
    """A UCX worker, whose progress is made by the thread that waits."""

    def __init__(self) -> None:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array
        from ucxx.types import Tag

        self._array = Array
        self.request_tag, self.answer_tag = Tag(REQUEST_TAG), Tag(ANSWER_TAG)
        features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        context = libucxx.UCXContext(config_dict=SETTINGS, feature_flags=features)
        self.ucx = libucxx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        self.ucx.init_blocking_progress_mode()
        self._epoll = select.epoll()
        self._epoll.register(self.ucx.epoll_file_descriptor, select.EPOLLIN)

    def message(self, memory: Any) -> Any:
        return self._array(memory)

    def turn(self, last_s: float) -> float:
        """Progress, or sleep where there was none for a while; when progress was made last."""
        if self.ucx.progress_once():
            return time.perf_counter()
        if time.perf_counter() - last_s <= SPIN_S:
            os.sched_yield()  # on a busy machine the other end may be waiting for this very core
            return last_s
        if self.ucx.arm():
            self._epoll.poll(SLEEP_S)
        return time.perf_counter()

    def wait(self, request: Any) -> None:
        last_s = time.perf_counter()
        while not request.completed:
            last_s = self.turn(last_s)
        request.check_error()

    def close(self) -> None:
        self._epoll.close()


class BareSource:
    """Serves one client after the other, in a thread."""

    def __init__(self) -> None:
        self._slots = Slots()
        self._messages: list[Any] = []
        self._stopping = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="bare-ucx-server")
        self._thread.start()
        self._ready.wait()

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._slots.open(size_bytes=size_bytes, slots=slots)
        self._messages = [self._worker.message(memory) for memory in self._slots.memory]

    def fill(self) -> list[Offer]:
        return self._slots.fill(self._port)

    def close(self) -> None:
        self._stopping = True
        self._thread.join()

    def _serve(self) -> None:
        from ucxx._lib.libucxx import UCXListener

        self._worker = worker = _Worker()
        accepted: list[Any] = []
        listener = UCXListener.create(worker.ucx, 0, accepted.append, deliver_endpoint=True)
        self._port = listener.port
        self._ready.set()
        last_s = time.perf_counter()
        while not self._stopping:
            last_s = worker.turn(last_s)
            if accepted:
                self._serve_client(accepted.pop(0))

    def _serve_client(self, endpoint: Any) -> None:
        worker = self._worker
        request = np.zeros(HEADER_BYTES, np.uint8)
        message, word = worker.message(request), request[:8].view(np.uint64)
        while True:
            asked = endpoint.tag_recv(message, worker.request_tag)
            last_s = time.perf_counter()
            while not asked.completed:
                if self._stopping:
                    return
                last_s = worker.turn(last_s)
            slot = int(word[0])
            if slot == len(self._messages):
                return  # the client's last word
            worker.wait(endpoint.tag_send(self._messages[slot], worker.answer_tag))


class BareReader:
    """One connection, opened by the first read."""

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._worker = _Worker()
        self._buffers = ReceiveBuffers(size_bytes, slots)
        self._messages = [self._worker.message(received.buffer) for received in self._buffers.received]
        self._request = np.zeros(HEADER_BYTES, np.uint8)
        self._word = self._request[:8].view(np.uint64)
        self._request_message = self._worker.message(self._request)
        self._endpoint: Any = None
        self._goodbye = slots

    def resolve(self, reference: Sequence[int]) -> int:
        port, slot = reference
        if self._endpoint is None:
            from ucxx._lib.libucxx import UCXEndpoint

            self._endpoint = UCXEndpoint.create(self._worker.ucx, HOST, port, endpoint_error_handling=True)
        return slot

    def read(self, reference: int) -> Received:
        worker, place = self._worker, self._buffers.next()
        answer = self._endpoint.tag_recv(self._messages[place], worker.answer_tag)
        self._word[0] = reference
        asked = self._endpoint.tag_send(self._request_message, worker.request_tag)
        worker.wait(answer)
        worker.wait(asked)
        return self._buffers.received[place]

    def close(self) -> None:
        self._word[0] = self._goodbye
        self._worker.wait(self._endpoint.tag_send(self._request_message, self._worker.request_tag))
        self._endpoint.close_blocking()
        self._endpoint = None
        self._worker.close()
