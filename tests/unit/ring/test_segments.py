"""Segments: made, found, refused, removed, swept."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import row
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, NotReadyError, ProtocolError
from ucxx_transport.ring import SharedRingBuffer, SlotState, layout
from ucxx_transport.ring.segment import NAME_PREFIX, host_id, list_segments, segment_folder, segment_path, sweep_orphans
from ucxx_transport.schema import Schema, TensorSpec


def file_of(ring: SharedRingBuffer) -> Path:
    return segment_path(ring.name)


@pytest.fixture
def file() -> Iterator[Path]:
    """A path of ours in the folder, where a test may put anything."""
    path = segment_path("test")
    yield path
    path.unlink(missing_ok=True)


def orphan(name: str) -> None:
    """A whole ring whose creator was killed."""
    program = f"""
        import os, signal
        from ucxx_transport.config import RingConfig
        from ucxx_transport.ring import SharedRingBuffer
        ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=100, name={name!r}))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode
    assert code == -9
    assert segment_path(name).exists()


def test_attaching_needs_nothing_but_the_name(make_ring: MakeRing) -> None:
    schema = Schema([TensorSpec("a/b", (3, 2), "float16", varlen=True), TensorSpec("c", (), "bool")])
    ring = make_ring(schema=schema, slots=7, readers=3, on_full="raise", checksum=True)
    for name in (ring.name, NAME_PREFIX + ring.name):
        with SharedRingBuffer.attach(name, populate=False) as other:
            assert (other.ring_id, other.slots, other.slot_bytes) == (ring.ring_id, 7, schema.nbytes)
            assert (other.schema, other.fingerprint, other.readers) == (schema, schema.fingerprint, 3)
            assert other.creator_alive()
    assert make_ring().schema is None


def test_a_reader_that_attaches_and_leaves_does_not_remove_the_ring(ring: SharedRingBuffer) -> None:
    with SharedRingBuffer.attach(ring.name) as other:
        assert not other.unlink()
    assert file_of(ring).exists()
    assert ring.unlink()
    assert not ring.unlink()
    assert not file_of(ring).exists()


def test_who_has_a_ring_keeps_it_when_its_name_is_gone(ring: SharedRingBuffer) -> None:
    with SharedRingBuffer.attach(ring.name) as other:
        ref = ring.write_raw(b"payload")
        ring.close()
        assert other.read(ref)["data"].tobytes() == b"payload"
        assert other.write_raw(b"more").slot == 1
        with pytest.raises(ConfigError) as caught:
            SharedRingBuffer.attach(ring.name)
        assert caught.value.facts["reason"] == "missing"


def test_a_ring_that_was_dropped_is_removed(make_ring: MakeRing) -> None:
    ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=10))
    path = file_of(ring)
    del ring
    gc.collect()
    assert not path.exists()
    del make_ring


def test_a_name_in_use_is_refused_while_its_creator_lives(make_ring: MakeRing) -> None:
    """The predecessor's second creator unlinked the first one's ring."""
    ring = make_ring(name=f"named-{os.getpid()}")
    ref = ring.write_raw(b"payload")
    with pytest.raises(ConfigError) as caught:
        make_ring(name=ring.name)
    assert caught.value.facts["reason"] == "in_use"
    with SharedRingBuffer.attach(ring.name) as other:
        assert other.ring_id == ring.ring_id
        assert other.read(ref)["data"].tobytes() == b"payload"
    ring.close()
    again = make_ring(name=ring.name)
    assert again.ring_id != ring.ring_id


def test_threads_that_race_for_one_name_make_one_ring(make_ring: MakeRing) -> None:
    made: list[SharedRingBuffer] = []
    refused: list[ConfigError] = []
    start = threading.Barrier(4)

    def race() -> None:
        start.wait()
        try:
            made.append(make_ring(name=f"raced-{os.getpid()}"))
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 3)
    with SharedRingBuffer.attach(made[0].name) as other:
        assert other.ring_id == made[0].ring_id


def test_the_next_creation_sweeps_what_a_killed_creator_left(make_ring: MakeRing) -> None:
    name = f"orphan-{os.getpid()}"
    orphan(name)
    infos = {info.name: info for info in list_segments()}
    assert not infos[name].creator_alive
    assert infos[name].identity is not None
    ring = make_ring()
    assert not segment_path(name).exists()
    assert file_of(ring).exists()


def test_a_killed_creator_s_name_can_be_taken_at_once(make_ring: MakeRing) -> None:
    name = f"retaken-{os.getpid()}"
    orphan(name)
    assert make_ring(name=name).slot_states() == [SlotState.FREE] * 4


def test_a_ring_that_is_being_made_when_its_process_exits_is_removed() -> None:
    program = """
        import threading
        from ucxx_transport.config import RingConfig
        from ucxx_transport.ring import SharedRingBuffer, transitions
        is_in = threading.Event()
        transitions.populate = lambda _: (is_in.set(), threading.Event().wait())
        config = RingConfig(slots=2, slot_bytes=100, name="made")
        threading.Thread(target=SharedRingBuffer.create, args=(config,), daemon=True).start()
        assert is_in.wait(60)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    assert not segment_path("made").exists()


def test_a_sweep_leaves_the_living_alone(make_ring: MakeRing, file: Path) -> None:
    ring = make_ring()
    file.touch()
    with file.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # half-made, by somebody who is at it
        assert not {ring.name, file.name.removeprefix(NAME_PREFIX)} & set(sweep_orphans())
        assert file.exists()
    assert file.name.removeprefix(NAME_PREFIX) in sweep_orphans()
    assert file_of(ring).exists()


def test_segments_are_listed_with_what_they_are(ring: SharedRingBuffer, file: Path) -> None:
    file.write_bytes(b"\1" * 8192)
    infos = {info.name: info for info in list_segments()}
    mine, other = infos[ring.name], infos[file.name.removeprefix(NAME_PREFIX)]
    assert mine.identity is not None
    assert (mine.identity.ring_id, mine.creator_alive, mine.problem) == (ring.ring_id, True, "")
    assert mine.identity.creator_pid == os.getpid()
    assert (other.identity, other.nbytes) == (None, 8192)
    assert "not a ring" in other.problem


def test_a_file_that_is_no_ring_is_refused_with_what_was_found(file: Path) -> None:
    for content, error in (
        (b"", NotReadyError),
        (bytes(8192), NotReadyError),
        (b"garbage!" * 1024, ProtocolError),
        (b"short", ProtocolError),
    ):
        file.write_bytes(content)
        with pytest.raises(error):
            SharedRingBuffer.attach(file.name)


def test_a_ring_that_is_not_what_it_says_is_refused(make_ring: MakeRing) -> None:
    rows: list[tuple[int, int, type[Exception]]] = [
        (layout.VERSION_WORD, 1, ProtocolError),
        (layout.MAGIC_WORD, 2, ProtocolError),
        (layout.TOTAL_BYTES_WORD, 4096, ProtocolError),
        (layout.SLOTS_WORD, 2**40, ProtocolError),
        (layout.FINGERPRINT_WORD, 1, ProtocolError),
        (layout.COMPLETE_WORD, 0, NotReadyError),
        (layout.PID_NAMESPACE_WORD, 1, ConfigError),
        (layout.BOOT_ID_WORD, 1, ConfigError),
    ]
    for word, value, error in rows:
        with row(word=word, value=value, error=error):
            ring = make_ring(schema=Schema([TensorSpec("a", (2,), "int8")]))
            with file_of(ring).open("r+b") as raw:
                raw.seek(8 * word)
                before = raw.read(8)
                raw.seek(8 * word)
                raw.write(value.to_bytes(8, "little"))
                raw.flush()
                with pytest.raises(error):
                    SharedRingBuffer.attach(ring.name)
                raw.seek(8 * word)
                raw.write(before)
            SharedRingBuffer.attach(ring.name).close()


def test_a_name_that_is_no_file_s_is_refused() -> None:
    rows: list[str] = ["", "/etc/passwd", "a/b", "..", "a\0b", "x" * 300]
    for name in rows:
        with row(name=name), pytest.raises(ConfigError):
            SharedRingBuffer.attach(name)


def test_a_link_is_not_followed(ring: SharedRingBuffer, file: Path) -> None:
    file.symlink_to(file_of(ring))
    with pytest.raises(ConfigError):
        SharedRingBuffer.attach(file.name)
    assert file.name.removeprefix(NAME_PREFIX) not in sweep_orphans()


def test_a_ring_that_does_not_fit_fails_at_once_with_the_numbers(make_ring: MakeRing) -> None:
    before = {info.name for info in list_segments()}
    with pytest.raises(ConfigError, match=r"does not fit.*lower ring.slots") as caught:
        make_ring(slots=65536, slot_bytes=1 << 40)
    facts = caught.value.facts
    assert int(str(facts["needed_bytes"])) > 1 << 56
    assert int(str(facts["free_bytes"])) < 1 << 50
    assert {info.name for info in list_segments()} <= before


def test_all_memory_of_a_ring_is_allocated_when_it_is_made(make_ring: MakeRing) -> None:
    for prefault in (True, False):
        ring = make_ring(slots=8, slot_bytes=1 << 20, prefault=prefault)
        facts = file_of(ring).stat()
        assert facts.st_blocks * 512 >= facts.st_size > 8 << 20
        assert facts.st_mode & 0o077 == 0


def test_a_ring_in_a_folder_of_its_own_is_found_and_swept_there_alone(tmp_path: Path, make_ring: MakeRing) -> None:
    ring = make_ring(folder=str(tmp_path))
    assert ring.folder == tmp_path
    assert [info.name for info in list_segments(tmp_path)] == [ring.name]
    assert ring.name not in {info.name for info in list_segments()}
    with SharedRingBuffer.attach(ring.name, folder=tmp_path) as other:
        assert other.ring_id == ring.ring_id
    with pytest.raises(ConfigError, match="no such ring"):
        SharedRingBuffer.attach(ring.name)
    dead = segment_path("dead", tmp_path)
    dead.touch()
    assert sweep_orphans() == []
    assert sweep_orphans(tmp_path) == ["dead"]


def test_the_folder_of_segments_is_a_setting_of_the_process(
    tmp_path: Path, make_ring: MakeRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = host_id()
    monkeypatch.setenv("UCXX_TRANSPORT_RING__FOLDER", str(tmp_path))
    ring = make_ring()
    assert ring.folder == segment_folder() == tmp_path
    assert host_id() == ring.write_raw(b"x").host_id != before
    with SharedRingBuffer.attach(ring.name) as other:
        assert other.ring_id == ring.ring_id


def test_a_folder_that_is_missing_or_relative_is_refused_with_its_name(tmp_path: Path, make_ring: MakeRing) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match="missing"):
        make_ring(folder=str(missing))
    with pytest.raises(ConfigError, match="missing"):
        host_id(missing)
    with pytest.raises(ConfigError, match=r"ring\.folder = 'here'"):
        make_ring(folder="here")


def test_a_ring_whose_name_was_removed_is_attached_by_its_descriptor_and_its_lock_stays_the_creators(
    ring: SharedRingBuffer,
) -> None:
    file_of(ring).unlink()
    descriptor = ring.duplicate()
    assert descriptor is not None
    with SharedRingBuffer.attach(ring.name, descriptor=descriptor) as other:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # of an open file of its own, so the creator keeps its lock
        assert other.duplicate() is None
        assert other.read(ring.write_raw(b"payload"))["data"].tobytes() == b"payload"
        with open(f"/proc/self/fd/{descriptor}", "rb") as again, pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


@pytest.mark.parametrize("descriptor", [-1, 2**30])
def test_a_descriptor_of_no_open_file_is_refused(ring: SharedRingBuffer, descriptor: int) -> None:
    with pytest.raises(ConfigError, match="cannot be mapped: Bad file descriptor") as caught:
        SharedRingBuffer.attach(ring.name, descriptor=descriptor)
    assert caught.value.facts["reason"] == "refused"


def test_a_writer_hears_once_that_another_program_removed_its_rings_name(
    make_ring: MakeRing, log_events: list[MutableMapping[str, Any]]
) -> None:
    ring = make_ring(slots=2)
    for removed in (False, True):
        if removed:
            file_of(ring).unlink()
        for _ in range(2 * 1024):
            ring.write_raw(b"payload")
        told = [event for event in log_events if event["event"] == "ring_name_removed"]
        assert len(told) == removed
    ring.close()
    assert len(log_events) == 1
