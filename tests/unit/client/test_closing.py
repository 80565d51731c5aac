"""The end of a blocking client: in a forked child, in other threads' reads, and what statistics may touch."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest

from ucxx_transport import ClientConfig, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer
from ucxx_transport.client.loop_thread import LoopThread
from ucxx_transport.errors import ConfigError, DeadlineExceededError

CONFIG = ClientConfig(local="off")


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    settings = RingConfig(slots=8, slot_bytes=4096)
    with SharedRingBuffer.create(settings) as ring, UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=2)):
        yield ring


def test_forked_child_ends_whatever_its_parent_has_read(ring: SharedRingBuffer) -> None:
    with SyncUCXXClient(CONFIG) as client:
        client.read(ring.write_raw(b"parent's")).release()
        child = os.fork()
        if child == 0:
            client.close()
            with pytest.raises(ConfigError, match="forked"):
                client.read(ring.write_raw(b"child's"))
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        client.read(ring.write_raw(b"still the parent's")).release()


def test_statistics_may_be_asked_for_while_other_threads_read(ring: SharedRingBuffer) -> None:
    with SyncUCXXClient(ClientConfig(local="off", max_pooled_endpoints=0)) as client:
        done = threading.Event()

        def read() -> None:
            try:
                for _ in range(60):
                    client.read(ring.write_raw(b"x" * 100)).release()
            finally:
                done.set()

        thread = threading.Thread(target=read)
        thread.start()
        while not done.is_set():
            assert client.statistics().reads >= 0
        thread.join()
        assert client.statistics().reads == 60
    assert client.statistics().reads == 60


def test_read_after_close_starts_nothing(ring: SharedRingBuffer) -> None:
    client = SyncUCXXClient(CONFIG)
    ref = ring.write_raw(b"late")
    client.close()
    with pytest.raises(ConfigError, match="closed"):
        client.read(ref)
    with pytest.raises(ConfigError, match="closed"):
        client._started()  # noqa: SLF001 - a read of another thread that was let in just before
    assert not [thread for thread in threading.enumerate() if thread.name == "ucxx-client"]


def test_call_in_a_loop_that_stops_raises() -> None:
    loop, entered = LoopThread("stops"), threading.Event()
    told: list[BaseException] = []

    async def waits() -> None:
        entered.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            loop.call(waits)
        except BaseException as error:  # noqa: BLE001 - whatever it is
            told.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    entered.wait()
    loop.stop()
    thread.join()
    assert [type(error) for error in told] == [ConfigError]
    with pytest.raises(ConfigError):
        loop.call(waits)


def test_time_out_of_a_call_is_its_own() -> None:
    loop = LoopThread("times-out")

    async def fails() -> None:
        raise DeadlineExceededError("its own")

    with pytest.raises(DeadlineExceededError, match="its own"):
        loop.call(fails)
    loop.stop()
