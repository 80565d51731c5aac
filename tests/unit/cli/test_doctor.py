"""What the doctor concludes from what it finds."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import call
from tests.support.rows import row
from ucxx_transport.cli.doctor import memory_limit_finding, open_files_finding, segments_finding, transport_findings
from ucxx_transport.link.base import PER_CONNECTION, connection_budget
from ucxx_transport.machine import Finding, MemoryLimit
from ucxx_transport.ring.segment import SegmentInfo, segment_folder, segment_path

Capture = pytest.CaptureFixture[str]

WHEEL: dict[str, Any] = {"version": "1.21.0", "resources": [["tcp", "eth0"], ["posix", "memory"]]}
SYSTEM: dict[str, Any] = {**WHEEL, "resources": [*WHEEL["resources"], ["rc_mlx5", "mlx5_0:1"]]}


def rdma(facts: dict[str, Any], devices: list[str], **environment: str) -> Finding:
    findings = transport_findings(facts, rdma_devices=devices, environment=environment)
    (found,) = (finding for finding in findings if finding.name == "rdma")
    return found


def test_rdma_hardware_that_ucx_cannot_use_is_a_warning_with_the_way_out() -> None:
    found = rdma(WHEEL, ["mlx5_0"])
    assert found.verdict == "warning"
    assert "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true" in found.remedy
    assert "is there such a UCX?" in rdma(WHEEL, ["mlx5_0"], RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY="true").remedy


def test_rdma_that_works_needs_nothing() -> None:
    assert (rdma(SYSTEM, ["mlx5_0"]).verdict, rdma(SYSTEM, ["mlx5_0"]).remedy) == ("ok", "")


def test_a_host_without_rdma_is_only_told_so() -> None:
    assert rdma(WHEEL, []).verdict == "note"


def segment(name: str, *, alive: bool) -> SegmentInfo:
    return SegmentInfo(
        name=name, path=segment_path(name), nbytes=1 << 20, identity=None, problem="", creator_alive=alive
    )


def test_what_dead_processes_left_is_counted_with_the_way_to_remove_it() -> None:
    found = segments_finding([segment("a", alive=True), segment("b", alive=False), segment("c", alive=False)])
    assert (found.verdict, found.value) == ("warning", "1 in use, 2 left by dead processes")
    assert "ucxx-transport clean frees 2 MiB" in found.remedy
    assert segments_finding([segment("a", alive=True)]).verdict == "ok"


def test_a_memory_limit_is_shown_with_what_it_leaves_and_a_small_rest_is_a_warning() -> None:
    def found(room_bytes: int) -> Finding:
        return memory_limit_finding(MemoryLimit(Path("/sys/fs/cgroup/pod"), 8 << 30, room_bytes))

    assert memory_limit_finding(None).value == "none"
    assert (found(7 << 30).verdict, found(7 << 30).remedy) == ("ok", "")
    assert (found(1 << 29).verdict, found(1 << 29).value) == ("warning", "512 MiB left of 8 GiB (/sys/fs/cgroup/pod)")
    assert "docker: --memory" in found(1 << 29).remedy


def test_open_files_are_said_in_connections_where_the_limit_that_is_raised_to_leaves_few() -> None:
    found = open_files_finding(256, 1024)
    assert (found.verdict, found.value) == ("note", "256, raised to 1024 where needed")
    room = connection_budget(limit=1024, in_use=0, asked=None)
    assert f"room for {room} connections, {PER_CONNECTION} descriptors each" in found.remedy
    for soft, hard in ((256, 65536), (1024, resource.RLIM_INFINITY), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)):
        with row(soft=soft, hard=hard):
            found = open_files_finding(soft, hard)
            assert (found.verdict, found.remedy) == ("ok", "")


def test_the_whole_way_is_tried_and_its_bytes_compared(capsys: Capture) -> None:
    answer = call(capsys, "doctor", "--json")
    found = {(finding["topic"], finding["name"]): finding for finding in answer.document["findings"]}
    assert (answer.code, answer.document["ok"]) == (0, True), answer.out
    assert "intact" in found["loopback", "in place"]["value"]
    assert "intact" in found["loopback", "over UCX"]["value"]
    assert "tcp/lo" in found["ucx", "transports"]["value"]
    assert found["ucx", "version"]["verdict"] == "ok"


def test_settings_of_ucx_are_shown_since_they_win(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    answer = call(capsys, "doctor", "--no-loopback")
    assert answer.code == 0
    assert "UCX_NET_DEVICES" in answer.out


def test_ports_of_both_directions_are_named_with_those_that_are_set(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__DATA_PORTS", "15100-15131")
    for setting, value, listens, reads in (
        ("SERVER__BASE_PORT", "15001", "2 from 15001 on", "any free"),
        ("CLIENT__UCX__TCP_PORT_RANGE", "15200-15231", "2 any free", "15200-15231"),
        ("SERVER__PORTS", "15001,15002", "15001, 15002", "any free"),
    ):
        with row(setting=setting), monkeypatch.context() as patch:
            patch.setenv(f"UCXX_TRANSPORT_{setting}", value)
            answer = call(capsys, "doctor", "--no-loopback", "--json")
            (ports,) = (finding for finding in answer.document["findings"] if finding["name"] == "ports")
            assert ports["value"] == f"worker: listens on {listens}, data on 15100-15131; trainer: data on {reads}"
            assert "worker to trainer" in ports["remedy"]


def test_environment_without_a_network_and_the_library_in_use_are_named(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "self,sm")
    answer = call(capsys, "doctor", "--no-loopback", "--json")
    found = {finding["name"]: finding for finding in answer.document["findings"]}
    assert (answer.code, found["transports"]["verdict"]) == (1, "failure")
    assert "UCX_TLS=self,sm" in found["transports"]["remedy"]
    assert "/libucp.so" in found["version"]["value"]


def test_a_ucx_that_does_not_start_is_a_failure_not_a_crash(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "no_such_transport")
    answer = call(capsys, "doctor", "--no-loopback", "--json")
    (start,) = (finding for finding in answer.document["findings"] if finding["name"] == "start")
    assert (answer.code, start["verdict"]) == (1, "failure")


def test_memory_too_small_for_a_ring_is_said_before_it_hurts(capsys: Capture) -> None:
    (memory,) = (
        finding
        for finding in call(capsys, "doctor", "--no-loopback", "--json").document["findings"]
        if finding["name"] == str(segment_folder())
    )
    assert "free of" in memory["value"]
