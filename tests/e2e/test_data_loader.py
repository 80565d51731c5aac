"""Workers of torch's `DataLoader`, by each start method, over two epochs and with few descriptors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rows import row

pytest.importorskip("torch", exc_type=ImportError)

PROGRAM = Path(__file__).parent / "programs" / "data_loader.py"


def test_persistent_workers_read_each_episode_once_an_epoch_whatever_starts_them() -> None:
    for method in ("fork", "spawn"):
        with row(method=method):
            command = ["bash", "-c", 'ulimit -n 128; exec "$@"', "bash", sys.executable, str(PROGRAM), method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"epochs": [[0, 1, 2, 3, 4, 5]] * 2, "states": ["FREE"]}
            assert "Traceback" not in done.stderr, done.stderr
