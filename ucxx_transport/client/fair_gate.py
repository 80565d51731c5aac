"""A limit on reads in flight, fair across sources: one with many waiting reads does not hold up the others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


class FairGate:
    """Lets at most `limit` holders in; waiting sources take turns, each serving its own callers in order.

    Args:
        limit: holders at once, ≥ 1.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    def try_acquire(self) -> bool:
        """Take a place if one is free now."""
        if self._free > 0:
            self._free -= 1
            return True
        return False

    async def acquire(self, source: Hashable) -> None:
        """Take a place, waiting for `source`'s turn. A cancelled wait takes none."""
        if self.try_acquire():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.release()  # the place had been handed over in the same moment
            else:
                turn.cancel()
            raise

    def release(self) -> None:
        """Give a place back, to the next source in turn."""
        while self._waiting:
            source, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[source] = turns  # to the end of the line
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
