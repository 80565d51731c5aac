"""Many episodes through both mixins' ends, and what they take of the machine meanwhile: it has to stay flat.

A worker writes, a trainer fetches ahead: in place and over UCX by turns, every value compared with what was written.
After a warm-up the resident memory, the descriptors and the threads of worker, server and trainer, and the bytes in
/dev/shm, are looked at again and again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import psutil

from tests.soak.steady_worker import play
from tests.support.programs import Program, program
from ucxx_transport import ClientConfig
from ucxx_transport.ring.segment import list_segments
from ucxx_transport.trainer import RolloutFeed

BATCH: Final = 50
LOOKS: Final = 40
"""How often the processes are looked at; the first quarter is the warm-up."""

POOL_DESCRIPTORS: Final = 3 * 3
"""Of the pool of connections, which may still grow from 1 to 2 for each of 2 ports; each takes 3 at either end."""

GROWTH_LIMIT_BYTES: Final = 8 << 20
"""Of resident memory, between the second and the last quarter of the looks: a leak of 100 bytes an episode shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one process has at one moment.

    Attributes:
        rss_bytes: resident memory that is its own, the ring's pages left out.
        descriptors, threads: how many.
    """

    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The whole at one moment: usage by process, and the bytes in /dev/shm."""

    episodes: int
    usage: dict[str, Usage]
    shm_bytes: int


class SteadySoak:
    """Runs `episodes` episodes.

    Args:
        episodes: at least `LOOKS` batches of `BATCH`. on_look: told of every look.
    """

    def __init__(self, episodes: int, *, on_look: Callable[[Look], None] = lambda _: None) -> None:
        self._rounds = max(LOOKS, -(-episodes // BATCH))
        self._on_look = on_look
        self.looks: list[Look] = []
        self.episodes = 0
        self.lost: dict[str, int] = {}

    def run(self) -> None:
        """Run to the end.

        Raises:
            AssertionError: an episode was lost or wrong, or something grew.
        """
        with ExitStack() as stack:
            worker = stack.enter_context(program("steady_worker", "worker-0", package="tests.soak"))
            feeds = [stack.enter_context(RolloutFeed(ClientConfig(local=local))) for local in ("view", "off")]
            server = self._run_rounds(worker, feeds)
            assert server is not None
            self.lost = {reason: count for feed in feeds for reason, count in feed.statistics().losses.items()}
            worker.end_input()
            assert worker.wait() == 0
        assert self.lost == {}, f"episodes were lost: {self.lost}"
        problems = list(self._growth())
        assert not problems, "; ".join(problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the first look after the warm-up, and the last."""
        warm = self.looks[len(self.looks) // 4 :] or self.looks
        return {
            "episodes": self.episodes,
            "lost": self.lost,
            "first": asdict(warm[0]) if warm else None,
            "last": asdict(warm[-1]) if warm else None,
        }

    def _run_rounds(self, worker: Program, feeds: list[RolloutFeed]) -> int | None:
        server = None
        look_every = max(1, self._rounds // LOOKS)
        for number in range(self._rounds):
            heard = worker.ask(play=BATCH)
            server = heard["server"] or server
            feed = feeds[number % 2]
            rollouts = [] if feed.is_cold_start else feed.collect()  # what was started two rounds ago
            feed.start(heard["records"])
            self._compare(feed, rollouts)
            if number % look_every == look_every - 1 and server is not None:
                self._look(worker.pid, server)
        for feed in feeds:
            self._compare(feed, feed.collect())
        return server

    def _compare(self, feed: RolloutFeed, rollouts: list[Any]) -> None:
        for record in rollouts:
            tree: Any = feed.resolve(record)
            expected = play(record["sequence"])
            assert np.array_equal(tree["obs"]["image"], expected["obs"]["image"]), record
            assert np.array_equal(tree["obs"]["speed"], expected["obs"]["speed"]), record
            assert np.array_equal(tree["reward"], expected["reward"]), record
            self.episodes += 1

    def _look(self, worker: int, server: int) -> None:
        processes = {"trainer": psutil.Process(), "worker": psutil.Process(worker), "server": psutil.Process(server)}
        look = Look(
            episodes=self.episodes,
            usage={name: _usage(process) for name, process in processes.items()},
            shm_bytes=sum(info.path.stat().st_blocks * 512 for info in list_segments()),
        )
        self.looks.append(look)
        self._on_look(look)

    def _growth(self) -> Iterator[str]:
        quarter = len(self.looks) // 4
        before, after = self.looks[quarter : 2 * quarter], self.looks[-quarter:]
        for name in self.looks[0].usage:
            grown = _median(look.usage[name].rss_bytes for look in after) - _median(
                look.usage[name].rss_bytes for look in before
            )
            if grown > GROWTH_LIMIT_BYTES:
                yield f"{name}: resident memory grew by {grown / 1e6:.1f} MB"
            for what, allowed in (("descriptors", POOL_DESCRIPTORS), ("threads", 0)):
                was = max(getattr(look.usage[name], what) for look in before)
                now = min(getattr(look.usage[name], what) for look in after)
                if now > was + allowed:
                    yield f"{name}: {now} {what} instead of {was}"
        if after[-1].shm_bytes > before[0].shm_bytes:
            yield f"/dev/shm: {after[-1].shm_bytes} bytes instead of {before[0].shm_bytes}"


def _usage(process: psutil.Process) -> Usage:
    memory = process.memory_info()
    return Usage(rss_bytes=memory.rss - memory.shared, descriptors=process.num_fds(), threads=process.num_threads())


def _median(values: Iterator[int]) -> float:
    return statistics.median(list(values))
