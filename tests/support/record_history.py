"""What a worker's record has said in a store, from first to last."""

from __future__ import annotations

from ucxx_transport.membership import SourceRecord, Store
from ucxx_transport.membership.keys import source_key

__all__ = ["History"]

WAIT_LIMIT_S = 60.0


class History:
    """All that the record of `w` has said, as a watch sees it."""

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
            told = [event.value for event in batch.events if event.key == source_key("w")]
            self.records += [SourceRecord.from_bytes(value) if value else None for value in told]
        assert batch is not None, "the watch has not heard of its own key"
        return ["gone" if found is None else (found.epoch, found.status.value) for found in self.records]

    def statuses(self) -> list[str]:
        return [said if isinstance(said, str) else said[1] for said in self.look()]

    def close(self) -> None:
        self._watch.close()
