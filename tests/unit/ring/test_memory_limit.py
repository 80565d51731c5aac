"""The memory limit of the cgroups: found in both versions and at every height, and a ring beyond it is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.ring.conftest import MakeRing
from ucxx_transport import machine
from ucxx_transport.errors import ConfigError
from ucxx_transport.machine import MemoryLimit, memory_limit
from ucxx_transport.ring.segment import list_segments

MIB = 1 << 20


def group(folder: Path, limit: str, used: int, cached: int = 0, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\n{prefix}inactive_file {cached // 2}\n{prefix}active_file {cached // 2}\n"
    )


def found(tmp_path: Path, membership: str) -> MemoryLimit | None:
    (tmp_path / "membership").write_text(membership)
    return memory_limit(tmp_path / "membership", tmp_path)


def test_the_group_that_leaves_the_least_counts_whatever_its_height(tmp_path: Path) -> None:
    group(tmp_path / "pod" / "worker", "max", 10 * MIB)
    group(tmp_path / "pod", str(300 * MIB), 200 * MIB)
    limit = found(tmp_path, "0::/pod/worker\n")
    assert limit is not None
    assert (limit.limit_bytes, limit.room_bytes, limit.folder) == (300 * MIB, 100 * MIB, tmp_path / "pod")
    group(tmp_path / "pod" / "worker", str(150 * MIB), 100 * MIB)
    limit = found(tmp_path, "0::/pod/worker\n")
    assert limit is not None
    assert limit.room_bytes == 50 * MIB


def test_contents_of_files_make_room_and_nothing_less_than_none_is_left(tmp_path: Path) -> None:
    group(tmp_path, str(100 * MIB), 90 * MIB, cached=60 * MIB)
    limit = found(tmp_path, "0::/\n")
    assert limit is not None
    assert limit.room_bytes == 70 * MIB
    group(tmp_path, str(100 * MIB), 120 * MIB)
    limit = found(tmp_path, "0::/\n")
    assert limit is not None
    assert limit.room_bytes == 0


def test_version_1_is_read_too_and_its_great_number_is_no_limit(tmp_path: Path) -> None:
    membership = "9:name=systemd:/\n4:cpu,memory:/docker/a:b\n0::/\n"
    group(tmp_path / "memory" / "docker" / "a:b", str(2**63 - 4096), 0, version=1)
    assert found(tmp_path, membership) is None
    group(tmp_path / "memory", str(64 * MIB), 60 * MIB, cached=4 * MIB, version=1)
    limit = found(tmp_path, membership)
    assert limit is not None
    assert (limit.limit_bytes, limit.room_bytes) == (64 * MIB, 8 * MIB)


def test_without_groups_or_rights_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "missing", tmp_path) is None
    assert found(tmp_path, "0::/gone/../elsewhere\n") is None


def test_a_ring_beyond_the_limit_is_refused_with_both_numbers_and_leaves_nothing(
    make_ring: MakeRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(tmp_path, str(8 * MIB), 5 * MIB)
    (tmp_path / "membership").write_text("0::/\n")
    monkeypatch.setattr(machine, "memory_limit", lambda: memory_limit(tmp_path / "membership", tmp_path))
    make_ring(slots=2, slot_bytes=MIB)
    before = len(list_segments())
    with pytest.raises(ConfigError, match=r"\d bytes \(4\.03 MiB\).*3145728 bytes.*8 MiB.*raise the limit") as caught:
        make_ring(slots=4, slot_bytes=MIB)
    assert caught.value.facts["room_bytes"] == 3 * MIB
    assert len(list_segments()) == before


def test_a_ring_on_a_disk_is_no_matter_of_the_limit(
    make_ring: MakeRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: MemoryLimit(tmp_path, MIB, 0))
    monkeypatch.setattr(machine, "file_system", lambda _: "ext4")
    make_ring(slots=2, slot_bytes=MIB)


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A cgroup of 64 MiB."""
    version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
    folder = Path("/sys/fs/cgroup", *(() if version == 2 else ("memory",)), f"ucxx-transport-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(64 * MIB))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield folder
    folder.rmdir()


PROGRAM = """
import os, sys
with open(sys.argv[1], "w") as group:
    group.write(str(os.getpid()))
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.ring import SharedRingBuffer
with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes="1MiB")):
    pass
try:
    SharedRingBuffer.create(RingConfig(slots=128, slot_bytes="1MiB"))
except ConfigError as error:
    print(error.facts["limit_bytes"], error.facts["needed_bytes"] > error.facts["room_bytes"])
"""


def test_in_a_real_group_a_ring_beyond_its_limit_is_an_error_and_not_a_kill(limited_group: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(limited_group / "cgroup.procs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(64 * MIB), "True"]
