"""Batches of episodes: fetched in rounds under one deadline; begun in the background; counted."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from ucxx_transport.client.retry import attempt_budget_s
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason, Wanted, discardable_of, loss_of, sort_out

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ucxx_transport.client import Payload, UCXXClient
    from ucxx_transport.client.loop_thread import LoopThread
    from ucxx_transport.schema import SlotRef


DEFAULT_FETCH_ROUNDS: Final = 3

ROUND_PAUSE_S: Final = 0.1
"""Between two rounds: a server process that died takes a second or two to be back."""


class BatchReader(Protocol):
    """What a fetch needs of a client; `UCXXClient` is one."""

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
    ) -> list[Payload | TransportError]:
        """See `UCXXClient.read_many`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What became of a batch: every episode asked for is in one of the two.

    Attributes:
        payloads: by the episode's place in what was asked for, in that order.
        losses: the others, in that order, each with its reason.
        rounds: how many it took.
        retried: episodes asked for again, once for each round after the first.
        took_s: seconds.
    """

    payloads: dict[int, Payload]
    losses: tuple[Loss, ...]
    rounds: int
    retried: int
    took_s: float

    def release(self) -> None:
        """Release all payloads."""
        for payload in self.payloads.values():
            payload.release()


async def fetch_batch(
    client: BatchReader,
    records: Sequence[AskedFor],
    *,
    deadline_s: float,
    max_fetch_rounds: int = DEFAULT_FETCH_ROUNDS,
    policy_version: int | None = None,
    max_staleness: int | None = None,
) -> Batch:
    """Fetch a batch; an episode that cannot be had costs the others nothing.

    Args:
        client: reads; `UCXXClient`.
        records: the episodes, as their workers described them; an error stands for a record that could not be read.
        deadline_s: seconds for the whole batch.
        max_fetch_rounds: how often an episode is asked for while its error is retryable, at least 1.
        policy_version: of the trainer's weights now; needed for `max_staleness`.
        max_staleness: versions that an episode's weights may be behind; None: any.

    Returns:
        What was fetched and what was lost. The caller releases the payloads (`Batch.release`), and discards what may
        still lie in its slot (`loss_policy.discardable_of`).

    Raises:
        ConfigError: an argument is out of its bounds.
    """
    check_limits(deadline_s, max_fetch_rounds)
    clock = asyncio.get_running_loop().time
    began_s = clock()
    until_s = began_s + deadline_s
    wanted, losses = sort_out(records, policy_version=policy_version, max_staleness=max_staleness)
    payloads: dict[int, Payload] = {}
    rounds = retried = 0
    try:
        while wanted:
            rounds += 1
            rounds_left = max_fetch_rounds - rounds + 1
            limit_s = attempt_budget_s(max(0.0, until_s - clock()), rounds_left)
            outcomes = await client.read_many([entry.ref for entry in wanted], deadline_s=limit_s)
            may_follow = rounds_left > 1 and until_s - clock() > ROUND_PAUSE_S
            again: list[Wanted] = []
            for entry, outcome in zip(wanted, outcomes, strict=True):
                if not isinstance(outcome, Exception):
                    payloads[entry.index] = outcome
                elif (loss := loss_of(entry, outcome, again=may_follow)) is not None:
                    losses.append(loss)
                else:
                    again.append(entry)
            wanted = again
            if wanted:
                retried += len(wanted)
                await asyncio.sleep(ROUND_PAUSE_S)
    except BaseException:
        for payload in payloads.values():  # the traceback would hold them, and they their slots
            payload.release()
        raise
    return Batch(
        payloads=dict(sorted(payloads.items())),
        losses=tuple(sorted(losses, key=lambda loss: loss.index)),
        rounds=rounds,
        retried=retried,
        took_s=clock() - began_s,
    )


def check_limits(deadline_s: float, max_fetch_rounds: int) -> None:
    """Refuse limits under which nothing could be fetched, by a ConfigError."""
    if max_fetch_rounds < 1:
        raise ConfigError(f"max_fetch_rounds must be at least 1, not {max_fetch_rounds}", field="max_fetch_rounds")
    if not deadline_s > 0:
        raise ConfigError(f"deadline_s must be positive, not {deadline_s}", field="deadline_s")


Records: TypeAlias = Sequence[AskedFor] | Callable[[], Sequence[AskedFor]]
"""The episodes of a batch; or what gives them, called in the background thread."""


class FetchRequest:
    """A batch to fetch, and the version of the trainer's weights when it was asked for."""

    def __init__(self, given: Records, policy_version: int | None) -> None:
        self._given = given if callable(given) else tuple(given)
        self.policy_version = policy_version

    @cached_property
    def records(self) -> tuple[AskedFor, ...]:
        """Its episodes."""
        return tuple(self._given()) if callable(self._given) else self._given


class PendingBatch:
    """A batch that was begun. Take its `result`, or `cancel` it."""

    __slots__ = ("_future", "_hand_out", "_leave", "_thread")

    def __init__(
        self,
        thread: LoopThread,
        future: Future[Batch],
        hand_out: Callable[[Batch], None],
        leave: Callable[[], None],
    ) -> None:
        self._thread = thread
        self._future = future
        self._hand_out = hand_out
        self._leave = leave

    def result(self) -> Batch:
        """Wait for it: counted, its losses reported; the caller releases it. A ConfigError: it was closed meanwhile."""
        batch = self._thread.result(self._future)
        self._hand_out(batch)
        return batch

    def cancel(self) -> None:
        """Give it up: what came of it is released, and all of it is counted as lost by "closed"."""
        self._leave()
        if not self._future.cancel() and self._future.exception() is None:
            self._future.result().release()


_log = get_logger(__name__)


class LossDiscarder:
    """Discards, in the background, what of a trainer's losses may still lie in its slot. Of one event loop."""

    def __init__(self, client: UCXXClient, *, discard_lost: bool, deadline_s: float) -> None:
        self._client = client
        self._discard_lost = discard_lost
        self._deadline_s = deadline_s
        self._tasks: set[asyncio.Task[int]] = set()

    def discard(self, losses: Sequence[Loss]) -> None:
        """Begin to discard what of these may still lie in its slot."""
        refs = discardable_of(losses, discard_lost=self._discard_lost)
        if refs:
            task = asyncio.create_task(self._client.discard(refs, deadline_s=self._deadline_s))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def cancel(self) -> None:
        """Give up what is on its way."""
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[int]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("discard_failed", reason=f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """What a prefetcher has handed out.

    Attributes:
        batches: collected or fetched.
        episodes: their payloads.
        nbytes: their bytes.
        fetch_s: seconds that fetching them took, added up; the trainer did not wait for what was fetched ahead.
        retried: episodes asked for again, in a later round of their batch.
        losses: episodes that are in no batch, by the reason's word.
        given_up: batches that did not come in time; their episodes are lost by "timeout".
    """

    batches: int
    episodes: int
    nbytes: int
    fetch_s: float
    retried: int
    losses: Mapping[str, int]
    given_up: int


class PrefetchCounters:
    """The running counts behind `PrefetchStatistics`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches = self._episodes = self._nbytes = self._retried = self._given_up = 0
        self._fetch_s = 0.0
        self._losses: Counter[str] = Counter()

    def handed_out(self, batch: Batch) -> None:
        """Count a batch that the trainer has taken; its losses are counted by `lost`."""
        with self._lock:
            self._batches += 1
            self._episodes += len(batch.payloads)
            self._nbytes += sum(payload.nbytes for payload in batch.payloads.values())
            self._retried += batch.retried
            self._fetch_s += batch.took_s

    def lost(self, losses: Sequence[Loss]) -> None:
        """Count episodes by why they are in no batch."""
        with self._lock:
            self._losses.update(loss.reason.value for loss in losses)

    def left(self, count: int) -> int:
        """Count episodes that were asked for and will not be taken; returns how many there have been."""
        with self._lock:
            if count:
                self._losses[LossReason.CLOSED.value] += count
            return self._losses[LossReason.CLOSED.value]

    def gave_up(self) -> None:
        """Count a batch that did not come in time."""
        with self._lock:
            self._given_up += 1

    def snapshot(self) -> PrefetchStatistics:
        """The counts now."""
        with self._lock:
            return PrefetchStatistics(
                batches=self._batches,
                episodes=self._episodes,
                nbytes=self._nbytes,
                fetch_s=self._fetch_s,
                retried=self._retried,
                losses=dict(self._losses),
                given_up=self._given_up,
            )
