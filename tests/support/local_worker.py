"""A rollout worker in the test's own process, and a link that never comes up."""

from __future__ import annotations

from dataclasses import replace

from ucxx_transport import SharedRingBuffer
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.testing import Faults, MemoryNetwork


class LocalWorker:
    """A rollout worker of this host, and what it looks like from another one that nobody can reach."""

    def __init__(self, ring: SharedRingBuffer) -> None:
        self.ring = ring
        self._sequence = 0

    def play(self, count: int, *, policy_version: int | None = None) -> list[EpisodeRecord]:
        return [self._episode(policy_version) for _ in range(count)]

    def play_far_away(self, count: int, *, policy_version: int | None = None) -> list[EpisodeRecord]:
        records = self.play(count, policy_version=policy_version)
        return [
            replace(record, ref=replace(record.ref, host_id="elsewhere", host="192.0.2.1", ports=(1,)))
            for record in records
            if record.ref is not None
        ]

    def _episode(self, policy_version: int | None) -> EpisodeRecord:
        sequence, self._sequence = self._sequence, self._sequence + 1
        ref = self.ring.write_raw(sequence.to_bytes(8, "little"))
        return EpisodeRecord(worker_id="w", sequence=sequence, ref=ref, policy_version=policy_version)


silence = MemoryNetwork(faults=Faults(hang_connect=True)).link
"""A link on which no connection ever comes up."""
