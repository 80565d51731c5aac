"""The trainer's view of its workers, where they are in a store: who has come and who has gone, as seat orders."""

from __future__ import annotations

from collections import deque
from typing import Any

from cartpole.messages import SeatOrder
from ucxx_transport import SourceWatcher, StoreConfig
from ucxx_transport.membership import SourceRecord, SourceStatus, open_store

__all__ = ["Discovery", "seat_meta"]


def seat_meta(seat: int, worker: int) -> dict[str, int]:
    """What a worker's record says for `Discovery`."""
    return {"seat": seat, "worker": worker}


class Discovery:
    """Watches the run's part of the store.

    Args:
        store: its URL. config: its settings, with the run's namespace.

    Attributes:
        watcher: for the clients, so that reads of a dead worker end at once.
        joined, left: workers seen to come and to go.
    """

    def __init__(self, store: str, config: StoreConfig) -> None:
        self._orders: deque[SeatOrder] = deque()
        self._seated: set[tuple[str, int]] = set()
        self._store = open_store(store, config)
        self.joined = 0
        self.left = 0
        self.watcher = SourceWatcher(self._store, on_add=self._seen, on_update=self._seen, on_remove=self._gone)
        self.watcher.start()

    def take(self) -> list[SeatOrder]:
        """What has changed since."""
        return [self._orders.popleft() for _ in range(len(self._orders))]

    def close(self) -> None:
        """Watch no more."""
        self.watcher.stop()
        self._store.close()

    def _seen(self, source: SourceRecord) -> None:
        life = (source.worker_id, source.epoch)
        if source.status is SourceStatus.READY and life not in self._seated:
            self._seated.add(life)
            self.joined += 1
            self._orders.append(_order(source, occupied=True))

    def _gone(self, source: SourceRecord) -> None:
        life = (source.worker_id, source.epoch)
        if life in self._seated:
            self._seated.discard(life)
            self.left += 1
            self._orders.append(_order(source, occupied=False))


def _order(source: SourceRecord, *, occupied: bool) -> SeatOrder:
    meta: Any = source.meta
    return SeatOrder(seat=meta["seat"], worker=meta["worker"], occupied=occupied)
