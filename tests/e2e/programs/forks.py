"""A job that forks while it trains: each child uses and ends all that it inherited, then exits; prints what came of it.

Argument: the store's URL.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest

from tests.e2e.programs.request_lines import answer, log_to_stderr
from tests.support.rows import row
from ucxx_transport import (
    ClientConfig,
    ConfigError,
    EpisodeStream,
    HeartbeatPublisher,
    RankGroup,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SourceWatcher,
    SyncUCXXClient,
    TrajectoryWriter,
    UCXXClient,
    UCXXDataPackerMixin,
    UCXXServer,
    open_store,
)
from ucxx_transport.membership import ReplicaMonitor
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


AS_IT_WAS = {
    *(
        "pending.records",
        "client.config",
        "async_client.config",
        "group.rank",
    ),
    *("packer.setup_ucxx_data_packer", "packer.ucxx_feed", "packer.on_episode_lost", "packer.rollout_output_of"),
    *("prefetcher.in_a_batch", "feed.in_a_batch", "stream.in_a_batch"),
}
"""What says nothing but what an object was given, or is the application's own."""

OF_ANOTHER = {
    *(
        "server.sidecar",
        "server.offer",
        "server.hold",
        "server.bind",
        "server.discard_old",
        "server.release",
    ),  # the publisher's
    *(
        f"{name}.{call}"
        for name in ("prefetcher", "feed", "stream")
        for call in ("discard", "count", "count_closed", "report")
    ),  # the thread's, and its batches'
    *(f"pending.{name}" for name in ("is_counted", "problem", "has_begun", "start", "abandon", "fail", "ended")),
}
"""What only an object calls that is refused itself."""


def use_and_end(
    objects: Mapping[str, Any], arguments: Mapping[str, Sequence[Any]], ends: Mapping[str, Callable[[], object]]
) -> None:
    """What a child does: every use is refused as one of a forked child, every end is nothing to it."""
    for of, one in objects.items():
        for attribute in ("__next__", *dir(type(one))):
            name = f"{of}.{attribute}"
            if attribute.startswith("_") and not (attribute == "__next__" and hasattr(one, attribute)):
                continue
            if name in ends or name in AS_IT_WAS or name in OF_ANOTHER:
                continue
            with row(use=name), pytest.raises(ConfigError, match="forked child"):
                use(one, attribute, *arguments.get(name, ()))
    for end in ends.values():
        end()


def use(one: object, attribute: str, *given: object) -> None:
    """Ask for a property, or call a method."""
    found = getattr(one, attribute)
    if callable(found):
        found = found(*given)
    if inspect.iscoroutine(found):
        anyio.run(partial(awaited, found))


async def awaited(found: Awaitable[object]) -> object:
    return await found


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
    async_client = UCXXClient(ClientConfig(local="off"))
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
    monitor = ReplicaMonitor(feed=watcher)
    ref = ring.write_raw(b"unread")
    stream = EpisodeStream([ring.write_raw(b"streamed")], ClientConfig(local="off"))
    objects: dict[str, Any] = {
        "client": client,
        "async_client": async_client,
        "prefetcher": prefetcher,
        "pending": pending,
        "packer": packer,
        "feed": feed,
        "stream": stream,
        "watcher": watcher,
        "monitor": monitor,
        "writer": writer,
        "publisher": publisher,
        "server": server,
        "group": group,
    }
    reads = {
        "client.read": (ref,),
        "client.read_many": ([ref],),
        "client.discard": ([ref],),
        "client.take": (ref,),
    }
    arguments: dict[str, tuple[Any, ...]] = {
        **reads,
        **{f"async_{name}": given for name, given in reads.items()},
        "prefetcher.fetch": ([],),
        "prefetcher.add": (pending,),
        "feed.add": (pending,),
        "stream.add": (pending,),
        "prefetcher.begin": ([],),
        "packer.start_prefetch": ([],),
        "packer.defer_prefetch": ([],),
        "packer.get_policy_input": (None, ref),
        "feed.fetch": ([],),
        "feed.begin": ([],),
        "feed.start": ([],),
        "feed.defer": ([],),
        "feed.resolve": (ref,),
        "stream.fetch": ([],),
        "stream.begin": ([],),
        "watcher.wait_for": (1, 60),
        "watcher.report_to": (print,),
        "writer.write": (episode,),
        "publisher.wait_published": (60,),
        "server.is_healthy": (60,),
        "group.join_group": (60,),
        "group.wait_for_view": (1, 60),
        "group.activate_ranks": ([0],),
        "group.deactivate_ranks": ([0],),
        "group.set_policy_version": (1,),
        "group.get_peer_state": (0,),
        "group.on_view": (print,),
        "group.on_gone": (print,),
    }
    ends: dict[str, Callable[[], object]] = {
        "packer.shutdown_ucxx_data_packer": packer.shutdown_ucxx_data_packer,
        "feed.close": feed.close,
        "stream.close": stream.close,
        "group.on_view's": end_of_views,
        "watcher.subscribe's": end_of_news,
        "monitor.close": monitor.close,
        "writer.close": writer.close,
        "pending.cancel": pending.cancel,
        "prefetcher.close": prefetcher.close,
        "client.close": client.close,
        "async_client.aclose": lambda: anyio.run(async_client.aclose),
        "watcher.stop": watcher.stop,
        "group.leave": group.leave,
        "publisher.stop": publisher.stop,
    }
    child = partial(use_and_end, objects, arguments, {**ends, "server.stop": server.stop, "ring.close": ring.close})
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
        "alive": list(monitor.alive),
    }
    held.release()
    for end in ends.values():
        end()
    store.close()
    server.stop()
    ring.close()
    answer(facts)


if __name__ == "__main__":
    main(sys.argv[1])
