"""What a trainer was told of and will not take: let go beside its batches, so that the slots are free again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.triage import Loss, unwanted_of

if TYPE_CHECKING:
    from ucxx_transport.client import UCXXClient

_log = get_logger(__name__)


class UnwantedPayloads:
    """Discards in the background. Of one event loop.

    Args:
        client: says so to the servers.
        discard_lost: whether episodes go that were given up although they may still lie in their slots.
        deadline_s: of each discard, its own.
    """

    def __init__(self, client: UCXXClient, *, discard_lost: bool, deadline_s: float) -> None:
        self._client = client
        self._discard_lost = discard_lost
        self._deadline_s = deadline_s
        self._tasks: set[asyncio.Task[int]] = set()

    def let_go(self, losses: Sequence[Loss]) -> None:
        """Begin to discard what of these may still lie in its slot."""
        refs = unwanted_of(losses, discard_lost=self._discard_lost)
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
