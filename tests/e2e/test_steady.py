"""Some thousand episodes through both ends, and nothing grows; for longer: `scripts/soak --episodes 100000`."""

from __future__ import annotations

from tests.soak.steady_soak import BATCH, LOOKS, SteadySoak


def test_thousands_of_episodes_leave_memory_descriptors_threads_and_shared_memory_as_they_were() -> None:
    soak = SteadySoak(LOOKS * BATCH)
    soak.run()
    assert soak.episodes == LOOKS * BATCH
    assert soak.lost == {}
    assert len(soak.looks) >= LOOKS // 2
