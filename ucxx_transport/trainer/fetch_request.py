"""A batch that was asked for: its episodes, and how to take or give up what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from ucxx_transport.trainer.triage import AskedFor

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ucxx_transport.client.loop_thread import LoopThread
    from ucxx_transport.trainer.batch import Batch

Records: TypeAlias = Sequence[AskedFor] | Callable[[], Sequence[AskedFor]]
"""The episodes of a batch; or what gives them, called in the background thread."""


class FetchRequest:
    """A batch to fetch.

    Args:
        given: its episodes. policy_version: of the trainer's weights when it was asked for.
    """

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
        """Wait for it: counted, its losses told of. The caller releases it.

        Raises:
            ConfigError: the prefetcher has been closed meanwhile.
        """
        batch = self._thread.result(self._future)
        self._hand_out(batch)
        return batch

    def cancel(self) -> None:
        """Give it up: what came of it is released, and all of it is counted as lost by "closed"."""
        self._leave()
        if not self._future.cancel() and self._future.exception() is None:
            self._future.result().release()
