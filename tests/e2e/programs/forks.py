"""A job that forks while it trains: each child uses and ends all that it inherited, then exits; prints what came of it.

Argument: the store's URL.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.e2e.programs.request_lines import answer, log_to_stderr
from tests.support.rows import row
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    HeartbeatPublisher,
    RankGroup,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SourceWatcher,
    SyncUCXXClient,
    TrajectoryWriter,
    UCXXDataPackerMixin,
    UCXXServer,
    open_store,
)
from ucxx_transport.trainer import Prefetcher
from ucxx_transport.trainer.loss_policy import record_of

ROUNDS = 3


class Base:
    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        return sample, rollout_output, n_ignore_prefix_tokens, kwargs


class Packer(UCXXDataPackerMixin, Base):
    pass


def use_and_end(uses: Mapping[str, Callable[[], object]], ends: Sequence[Callable[[], object]]) -> None:
    """What a child does: every use is refused as one of a forked child, every end is nothing to it."""
    for name, use in uses.items():
        with row(use=name), pytest.raises(ConfigError, match="forked child"):
            use()
    for end in ends:
        end()


def fork(child: Callable[[], object], exit_by: Callable[[int], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:  # an assertion is printed by `sys.exit` no more
            if code:
                traceback.print_exc()
            exit_by(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def process_of(child: Callable[[], object]) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def main(url: str) -> None:
    log_to_stderr()
    warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
    ring = SharedRingBuffer.create(RingConfig(slots=32, slot_bytes=1000))
    server = UCXXServer(ring, ServerConfig(ports=1, host="127.0.0.1"))
    server.start()
    publisher = HeartbeatPublisher(url, "w0", server)
    publisher.start()
    watcher = SourceWatcher(url)
    watcher.start()
    publisher.wait_published(60)
    watcher.wait_for(1, 60)
    store = open_store(url)
    group = RankGroup(store, "trainers", 0)
    group.join_group(60)
    end_of_views = group.on_view(print)
    client = SyncUCXXClient(ClientConfig(local="off"), watcher=watcher)
    held = client.read(ring.write_raw(b"held"))
    prefetcher = Prefetcher(ClientConfig(local="off"))
    pending = prefetcher.begin([record_of(ring.write_raw(b"pending"))])
    packer = Packer()
    packer.setup_ucxx_data_packer(client=ClientConfig(local="off"))
    feed = packer.ucxx_feed
    assert feed is not None
    ended, batches = threading.Event(), [0]

    def train() -> None:
        while not ended.is_set():
            packer.start_prefetch([ring.write_raw(b"episode") for _ in range(4)])
            assert len(packer.collect_prefetch() or []) == 4
            batches[0] += 1

    writer = TrajectoryWriter("w1", varlen=9, serve=False)
    episode = {"obs": np.zeros((3, 2), "f4")}
    writer.write(episode)
    end_of_news = watcher.subscribe(on_remove=lambda _: None)
    ref = ring.write_raw(b"unread")
    uses: dict[str, Callable[[], object]] = {
        "client.read": lambda: client.read(ref),
        "client.statistics": client.statistics,
        "prefetcher.fetch": lambda: prefetcher.fetch([]),
        "pending.result": pending.result,
        "packer.start_prefetch": lambda: packer.start_prefetch([]),
        "packer.defer_prefetch": lambda: packer.defer_prefetch([]),
        "packer.wait_prefetch": packer.wait_prefetch,
        "packer.collect_prefetch": packer.collect_prefetch,
        "packer.is_cold_start": lambda: packer.is_cold_start,
        "packer.get_policy_input": lambda: packer.get_policy_input(None, ref),
        "feed.release": feed.release,
        "feed.statistics": feed.statistics,
        "watcher.wait_for": lambda: watcher.wait_for(1, 60),
        "watcher.sources": watcher.sources,
        "watcher.subscribe": lambda: watcher.subscribe(on_add=print),
        "writer.write": lambda: writer.write(episode),
        "writer.statistics": writer.statistics,
        "publisher.statistics": publisher.statistics,
        "watcher.report_to": lambda: watcher.report_to(print),
        "publisher.wait_published": lambda: publisher.wait_published(60),
        "server.start": server.start,
        "server.statistics": server.statistics,
        "server.is_healthy": lambda: server.is_healthy(60),
        "group.join_group": lambda: group.join_group(60),
        "group.wait_for_view": lambda: group.wait_for_view(1, 60),
        "group.deactivate_ranks": lambda: group.deactivate_ranks([0]),
        "group.on_gone": lambda: group.on_gone(print),
    }
    ends: list[Callable[[], object]] = [
        packer.shutdown_ucxx_data_packer,
        end_of_views,
        end_of_news,
        writer.close,
        prefetcher.close,
        client.close,
        watcher.stop,
        group.leave,
        publisher.stop,
    ]

    child = partial(use_and_end, uses, (*ends, server.stop, ring.close))
    trainer = threading.Thread(target=train)
    trainer.start()
    codes: dict[str, list[int | None]] = {"os._exit": [], "sys.exit": [], "multiprocessing": []}
    for _ in range(ROUNDS):
        codes["os._exit"].append(fork(child, os._exit))
        codes["multiprocessing"].append(process_of(child))
        codes["sys.exit"].append(fork(child, sys.exit))
    before = batches[0]
    while batches[0] < before + 2 and trainer.is_alive():
        pass
    ended.set()
    trainer.join()
    facts = {
        "codes": codes,
        "trained_on": batches[0] >= before + 2,
        "held": bytes(held.buffer).decode(),
        "pending": len(pending.result().payloads),
        "read": bytes(client.read(ref).buffer).decode(),
        "published": publisher.state.value,
        "sources": [source.worker_id for source in watcher.sources()],
        "active": list(group.state.active_ranks),
        "healthy": server.is_healthy(60),
        "written": writer.write(episode).sequence,
    }
    held.release()
    for end in ends:
        end()
    store.close()
    server.stop()
    ring.close()
    answer(facts)


if __name__ == "__main__":
    main(sys.argv[1])
