"""`serve` as a process: it announces itself, delivers, and leaves nothing however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import pytest

from tests.support.command_line import call, running
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, SlotRef, SyncUCXXClient
from ucxx_transport.ring.segment import list_segments


def announcement(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    document: dict[str, Any] = json.loads(line)
    assert document["event"] == "serving"
    return document


def rings() -> set[str]:
    return {info.name for info in list_segments()}


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_a_client_reads_what_it_was_filled_with(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__MODE", mode)
    words = ["serve", "--json", "--fill", "2", "--slots", "2", "--slot-bytes", "64KiB", "--ports", "2"]
    with running(*words, "--host", "127.0.0.1") as process:
        serving = announcement(process)
        assert len(serving["ports"]) == 2
        refs = [SlotRef.from_dict(ref) for ref in serving["refs"]]
        with SyncUCXXClient(ClientConfig(local="off", deadline_s=30.0)) as client:
            for ref in refs:
                with client.read(ref) as payload:
                    assert payload.nbytes == 64 << 10
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    stopping = json.loads(out)
    assert process.returncode == 0
    assert stopping["event"] == "stopping"
    assert sum(port["delivered"] for port in stopping["server"]["ports"]) == 2
    assert serving["ring"] not in rings()


def test_what_is_not_given_comes_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_RING__SLOT_BYTES", "8KiB")
    monkeypatch.setenv("UCXX_TRANSPORT_RING__SLOTS", "3")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__PORTS", "2")
    with running("serve", "--json", "--slots", "2") as process:
        serving = announcement(process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert (serving["slots"], serving["slot_bytes"], len(serving["ports"])) == (2, 8192, 2)


def test_a_wrong_number_of_ports_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (("0", "1 to 64 ports"), ("65", "1 to 64 ports"), ("5001,5001", "each port number once")):
        with row(words=words):
            answer = call(capsys, "serve", "--ports", words)
            assert answer.code == 2
            assert said in answer.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_its_code_and_no_ring_left(number: signal.Signals, code: int) -> None:
    with running("serve", "--json", "--slots", "2", "--slot-bytes", "4KiB", "--ports", "1") as process:
        serving = announcement(process)
        assert serving["ring"] in rings()
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == code
    assert serving["ring"] not in rings()


def test_a_signal_during_its_start_leaves_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cli-starting-{os.getpid()}"
    monkeypatch.setenv("UCXX_TRANSPORT_RING__NAME", name)
    with running("serve", "--slots", "2", "--slot-bytes", "4KiB", "--ports", "1") as process:
        wait_until(lambda: name in rings(), 60.0, what="ring made")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert name not in rings()
    assert process.returncode == 0


def test_a_name_in_use_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_RING__NAME", f"taken-{os.getpid()}")
    words = ["serve", "--json", "--slots", "2", "--slot-bytes", "4KiB", "--ports", "1"]
    with running(*words) as first:
        announcement(first)
        with running(*words) as second:
            out, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "in use" in json.loads(out)["error"]["message"]
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 0
