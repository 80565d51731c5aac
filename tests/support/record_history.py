"""A worker's record in a store, from its first state to its last."""

from __future__ import annotations

from ucxx_transport.membership import SourceRecord, Store
from ucxx_transport.membership.entries import source_key

__all__ = ["History"]

WAIT_LIMIT_S = 60.0


class History:
    """Every state of the record of `w`, as a watch sees it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watch = store.watch("sources/", after=store.snapshot().revision)
        self._looks = 0
        self.records: list[SourceRecord | None] = []

    def look(self) -> list[tuple[int, str] | str]:
        """Epoch and status of every record so far, and "gone" for each end."""
        self._looks += 1
        last = self._store.put("sources/~", str(self._looks).encode())
        while (batch := self._watch.next(WAIT_LIMIT_S)) and batch.revision < last:
            values = [event.value for event in batch.events if event.key == source_key("w")]
            self.records += [SourceRecord.from_bytes(value) if value else None for value in values]
        assert batch is not None, "the watch has not heard of its own key"
        return ["gone" if found is None else (found.epoch, found.status.value) for found in self.records]

    def statuses(self) -> list[str]:
        return [state if isinstance(state, str) else state[1] for state in self.look()]

    def close(self) -> None:
        self._watch.close()
