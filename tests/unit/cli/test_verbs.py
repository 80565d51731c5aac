"""What the small verbs answer, to people and as JSON."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.support.command_line import call
from ucxx_transport import RingConfig, SharedRingBuffer, __version__
from ucxx_transport.ring.segment import list_segments, segment_path

Capture = pytest.CaptureFixture[str]
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=4096, name=f"cli-{os.getpid()}")) as ring:
        yield ring


def make_and_wait(name: str, made: Event) -> None:
    ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096, name=name))
    made.set()
    signal.pause()
    ring.close()


def leave_an_orphan(name: str) -> None:
    made = SPAWN.Event()
    maker = SPAWN.Process(target=make_and_wait, args=(name, made))
    maker.start()
    assert made.wait(60)
    maker.kill()
    maker.join()


def test_version_names_this_release(capsys: Capture) -> None:
    for word in ("version", "--version"):
        assert call(capsys, word).out.splitlines()[0].split() == ["ucxx_transport", __version__]
        assert call(capsys, word, "--json").document["ucxx_transport"] == __version__


def test_inspect_shows_a_ring_as_it_fills_and_empties(ring: SharedRingBuffer, capsys: Capture) -> None:
    ring.publish_address("10.0.0.1", [5001, 5002])
    first, second = ring.write_raw(b"one"), ring.write_raw(b"two")
    ring.read(first)
    with ring.acquire(second, reader=9):
        (found,) = call(capsys, "inspect", ring.name, "--json").document["segments"]
    assert found["creator_pid"] == os.getpid()
    assert found["creator_alive"] is True
    assert (found["host"], found["ports"]) == ("10.0.0.1", [5001, 5002])
    counts = found["statistics"]
    assert {name: counts[name] for name in ("free", "ready", "reading", "committed", "consumed")} == {
        "free": 3,
        "ready": 0,
        "reading": 1,
        "committed": 2,
        "consumed": 1,
    }
    (holder,) = found["holders"]
    assert (holder["pid"], holder["reader"], holder["slots"]) == (os.getpid(), 9, 1)
    assert holder["held_s"] > 0


def test_inspect_prints_a_row_a_ring(ring: SharedRingBuffer, capsys: Capture) -> None:
    (row,) = (line for line in call(capsys, "inspect").out.splitlines() if line.startswith(ring.name))
    assert "4 × 4 KiB" in row
    assert f"{os.getpid()} alive" in row


def test_inspect_of_a_ring_that_is_not_there_fails(capsys: Capture) -> None:
    answer = call(capsys, "inspect", "nowhere", "--json")
    assert answer.code == 1
    assert answer.document["missing"] == ["nowhere"]


def test_inspect_says_what_is_wrong_with_a_damaged_segment(capsys: Capture) -> None:
    path = segment_path("damaged")
    path.write_bytes(b"something else entirely".ljust(8192, b"."))
    try:
        (found,) = call(capsys, "inspect", path.name.removeprefix("ucxx_transport-"), "--json").document["segments"]
        assert found["problem"]
        assert call(capsys, "inspect").code == 0
    finally:
        path.unlink()


def test_looking_changes_nothing(ring: SharedRingBuffer, capsys: Capture) -> None:
    ref = ring.write_raw(b"payload")
    before = ring.statistics()
    call(capsys, "inspect")
    call(capsys, "top", "--once")
    assert ring.statistics() == before
    assert bytes(ring.read(ref)["data"]) == b"payload"


def test_top_looks_once_as_a_table_or_json(ring: SharedRingBuffer, capsys: Capture) -> None:
    assert ring.name in call(capsys, "top", "--once").out
    names = [segment["name"] for segment in call(capsys, "top", "--once", "--json").document["segments"]]
    assert ring.name in names


def test_clean_removes_what_a_dead_process_left(capsys: Capture) -> None:
    for attempt in range(5):  # another program on this machine may sweep it first, by making a ring
        orphan = f"cli-orphan-{os.getpid()}-{attempt}"
        leave_an_orphan(orphan)
        would = call(capsys, "clean", "--dry-run", "--json").document
        kept = orphan in names_of_segments()
        done = call(capsys, "clean", "--json").document
        assert orphan not in names_of_segments()
        if kept and orphan in done["removed"]:
            assert orphan in would["removed"]
            assert done["freed_bytes"] > 0
            return
    pytest.fail("never got to clean it")


def names_of_segments() -> set[str]:
    return {info.name for info in list_segments()}


def test_clean_leaves_a_living_ring_alone(ring: SharedRingBuffer, capsys: Capture) -> None:
    done = call(capsys, "clean", "--json").document
    assert ring.name in done["in_use"]
    assert ring.name not in done["removed"]
    assert ring.get_ready_count() == 0


def test_config_shows_every_setting_with_its_source(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ucxx_transport.toml").write_text("[server]\nports = 8\n")
    monkeypatch.setenv("UCXX_TRANSPORT_CLIENT__DEADLINE_S", "9s")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__TOKEN", "correct horse")
    answer = call(capsys, "config", "--json")
    settings = answer.document
    assert settings["server"]["ports"]["value"] == 8
    assert "ucxx_transport.toml" in settings["server"]["ports"]["source"]
    assert settings["client"]["deadline_s"] | {"description": ""} == {
        "value": 9.0,
        "source": "environment UCXX_TRANSPORT_CLIENT__DEADLINE_S",
        "description": "",
    }
    assert settings["ring"]["slots"]["source"] == "default"
    assert settings["ring"]["slot_bytes"]["value"] is None
    assert settings["file"] == str(tmp_path / "ucxx_transport.toml")
    assert "horse" not in answer.out
    assert "horse" not in call(capsys, "config").out
