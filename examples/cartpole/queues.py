"""Ordinary multiprocessing queues that carry bytes; every call on them is bounded.

Each seat has queues of its own. A worker killed by SIGKILL may die inside a queue's lock: that breaks its own queues
and nobody else's. What it sends is far below PIPE_BUF (4096 bytes), so a message is there as a whole or not at all.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from multiprocessing.context import SpawnContext
from multiprocessing.queues import Queue

__all__ = ["ByteQueue", "SeatQueues", "TrainerQueues"]


class ByteQueue:
    """One direction between two processes; `bytes` objects only."""

    def __init__(self, context: SpawnContext, *, limit: int) -> None:
        """Make a queue for at most `limit` messages."""
        self._queue: Queue[bytes] = context.Queue(limit)

    def offer(self, message: bytes, *, wait_s: float) -> bool:
        """Append a message; False when there was no room for it within `wait_s`."""
        try:
            self._queue.put(message, timeout=wait_s)
        except queue.Full:
            return False
        return True

    def offer_latest(self, message: bytes) -> bool:
        """Append a message, at the cost of an older unread one; False when there is no room even so."""
        for _ in range(2):
            try:
                self._queue.put_nowait(message)
            except queue.Full:
                self.take()
            else:
                return True
        return False

    def take(self, *, wait_s: float = 0.0) -> bytes | None:
        """The next message, or None when none came within `wait_s`."""
        try:
            return self._queue.get(wait_s > 0.0, wait_s)
        except queue.Empty:
            return None

    def take_all(self) -> list[bytes]:
        """Every message that is there now."""
        messages = []
        while (message := self.take()) is not None:
            messages.append(message)
        return messages

    def abandon(self) -> None:
        """Close this end; what was not sent yet is dropped, so that the exit of this process waits for nobody."""
        self._queue.cancel_join_thread()
        self._queue.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatQueues:
    """The queues of one seat: one rollout worker sits there, and after its death nobody does."""

    records: ByteQueue
    weights: ByteQueue
    status: ByteQueue

    @classmethod
    def open(cls, context: SpawnContext, *, slots: int) -> SeatQueues:
        """Make the queues for a ring of `slots` slots."""
        return cls(
            records=ByteQueue(context, limit=2 * slots + 16),
            weights=ByteQueue(context, limit=1),
            status=ByteQueue(context, limit=16),
        )

    def abandon(self) -> None:
        """Close this process's ends of all of them."""
        for each in (self.records, self.weights, self.status):
            each.abandon()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerQueues:
    """The queues between orchestrator and trainer."""

    orders: ByteQueue
    status: ByteQueue

    @classmethod
    def open(cls, context: SpawnContext) -> TrainerQueues:
        """Make the queues."""
        return cls(orders=ByteQueue(context, limit=64), status=ByteQueue(context, limit=64))

    def abandon(self) -> None:
        """Close this process's ends of both."""
        self.orders.abandon()
        self.status.abandon()
