"""A job that forks while it trains: a child uses nothing of its parent's, ends nothing of it, and exits."""

from __future__ import annotations

from pathlib import Path

from tests.support.programs import program


def test_forked_children_are_refused_all_they_inherited_and_their_exit_hurts_nothing(tmp_path: Path) -> None:
    with program("forks", f"local://{tmp_path}/store.db") as job:
        facts = job.hear()
        assert job.wait() == 0
    assert facts == {
        "codes": {how: [0, 0, 0] for how in ("os._exit", "sys.exit", "multiprocessing")},
        "trained_on": True,
        "held": "held",
        "pending": 1,
        "read": "unread",
        "published": "live",
        "sources": ["w0"],
        "active": [0],
        "healthy": True,
        "written": 1,
        "alive": ["w0"],
    }
