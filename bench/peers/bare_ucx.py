"""The floor of what UCX gives from Python: a request and its answers, on a synchronous loop, with nothing above it.

No ring, no verification, no acknowledgement, buffers registered once: two messages for one payload. A batch is one
request to each source, all sent before an answer is awaited. Both sides spin for 50 µs after the last progress, then
sleep on the worker's descriptor. The TCP settings are those of this package.

A request is 64-bit words: how many payloads; for each its slot, and the tag that its answer is to have. None: goodbye.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.peers.memory import ReceiveBuffers, Received, Slots

if TYPE_CHECKING:
    from bench.core.ends import Offer

__all__ = ["SHM_LANES", "BareReader", "BareSource"]

HOST: Final = "127.0.0.1"
SPIN_S: Final = 50e-6
SLEEP_S: Final = 1.0
SETTINGS: Final = {"TLS": "tcp", "TCP_TX_SEG_SIZE": "256K", "TCP_RX_SEG_SIZE": "512K", "WARN_UNUSED_ENV_VARS": "n"}
SHM_LANES: Final = {**SETTINGS, "TLS": "tcp,sm,self", "POSIX_ERROR_HANDLING": "y", "SYSV_ERROR_HANDLING": "y"}
REQUEST_TAG: Final = 1 << 32
MOST_PAYLOADS: Final = 1024
"""Of one request."""


class _Worker:
    """A UCX worker, whose progress is made by the thread that waits."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array
        from ucxx.types import Tag

        self._array, self.tag = Array, Tag
        self.request_tag = Tag(REQUEST_TAG)
        features = (libucxx.Feature.TAG, libucxx.Feature.WAKEUP)
        context = libucxx.UCXContext(config_dict=dict(settings), feature_flags=features)
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
    """Serves one client after the other, in a thread.

    Args:
        settings: of UCX; the reader's `options` may have others, too.
    """

    def __init__(self, settings: Mapping[str, str] = SETTINGS) -> None:
        self._settings = settings
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

    def fill(self, *, count: int) -> list[Offer]:
        return self._slots.fill(self._port, count)

    def close(self) -> None:
        self._stopping = True
        self._thread.join()

    def _serve(self) -> None:
        from ucxx._lib.libucxx import UCXListener

        self._worker = worker = _Worker(self._settings)
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
        worker, tag = self._worker, self._worker.tag
        request = np.zeros(1 + 2 * MOST_PAYLOADS, np.uint64)
        message, words = worker.message(request), request.data
        while True:
            asked = endpoint.tag_recv(message, worker.request_tag)
            last_s = time.perf_counter()
            while not asked.completed:
                if self._stopping:
                    return
                last_s = worker.turn(last_s)
            if not words[0]:
                return
            pairs = range(1, 2 * words[0], 2)
            for answer in [endpoint.tag_send(self._messages[words[at]], tag(words[at + 1])) for at in pairs]:
                worker.wait(answer)


class _Connection:
    """To one source."""

    def __init__(self, worker: _Worker, port: int) -> None:
        from ucxx._lib.libucxx import UCXEndpoint

        self._worker = worker
        self._endpoint = UCXEndpoint.create(worker.ucx, HOST, port, endpoint_error_handling=True)
        self._request = np.zeros(1 + 2 * MOST_PAYLOADS, np.uint64)
        self._words = self._request.data
        self._messages: dict[int, Any] = {}
        self.tag_recv = self._endpoint.tag_recv

    def ask(self, *slots_and_tags: int) -> Any:
        """Send a request: the one before it has been sent."""
        used = len(slots_and_tags) + 1
        message = self._messages.get(used)
        if message is None:
            message = self._messages[used] = self._worker.message(self._request[:used])
        words = self._words
        words[0] = used // 2
        for place, word in enumerate(slots_and_tags, 1):
            words[place] = word
        return self._endpoint.tag_send(message, self._worker.request_tag)

    def close(self) -> None:
        self._worker.wait(self.ask())
        self._endpoint.close_blocking()


class BareReader:
    """A connection to each source, opened when the first reference to it is resolved."""

    def open(self, *, size_bytes: int, slots: int, settings: Mapping[str, str] = SETTINGS) -> None:
        self._worker = _Worker(settings)
        self._buffers = ReceiveBuffers(size_bytes, slots)
        self._messages = [self._worker.message(received.buffer) for received in self._buffers.received]
        self._tags = [self._worker.tag(place) for place in range(len(self._messages))]
        self._connections: dict[int, _Connection] = {}

    def resolve(self, reference: Sequence[int]) -> tuple[_Connection, int]:
        port, slot = reference
        if port not in self._connections:
            self._connections[port] = _Connection(self._worker, port)
        return self._connections[port], slot

    def read(self, reference: tuple[_Connection, int]) -> Received:
        (connection, slot), worker, place = reference, self._worker, self._buffers.next()
        answer = connection.tag_recv(self._messages[place], self._tags[place])
        asked = connection.ask(slot, place)
        worker.wait(answer)
        worker.wait(asked)
        return self._buffers.received[place]

    def read_batch(self, references: Sequence[tuple[_Connection, int]]) -> Sequence[Received]:
        places, requests = [], []
        asked: dict[_Connection, list[int]] = {}
        for connection, slot in references:
            place = self._buffers.next()
            places.append(place)
            requests.append(connection.tag_recv(self._messages[place], self._tags[place]))
            asked.setdefault(connection, []).extend((slot, place))
        requests += [connection.ask(*pairs) for connection, pairs in asked.items()]
        for request in requests:
            self._worker.wait(request)
        return [self._buffers.received[place] for place in places]

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._worker.close()
