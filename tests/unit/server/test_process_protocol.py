"""The line a worker gives its server process, and the one it gets back."""

from __future__ import annotations

import json

import pytest

from tests.support.rows import row
from ucxx_transport.config import ServerConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.server.port_settings import PortSettings
from ucxx_transport.server.process_protocol import ServerOrder, ServerReport


def test_an_order_survives_the_trip_with_every_setting() -> None:
    token_rows: list[str | bytes | None] = [None, "plain", b"\x00\xffbytes"]
    ports_rows: list[int | list[int]] = [4, [5001, 5002]]
    for ports in ports_rows:
        for token in token_rows:
            with row(ports=ports, token=token):
                config = ServerConfig(
                    host="10.0.0.7", ports=ports, token=token, idle_timeout_s=7.0, max_connections=3, ucx={"TLS": "tcp"}
                )
                settings = PortSettings.of(config)
                order = ServerOrder(
                    ring_name="ucxx_transport-x", ring_folder="/dev/shm", worker_pid=42, settings=settings
                )
                line = order.to_line()
                assert line.endswith(b"\n")
                assert line.count(b"\n") == 1
                back = ServerOrder.from_line(line)
                assert (back.ring_name, back.worker_pid) == ("ucxx_transport-x", 42)
                assert back.settings == settings
                assert back.settings.ports == ((0, 0, 0, 0) if ports == 4 else (5001, 5002))
                assert back.settings.token == config.token_bytes
                assert (back.settings.idle_timeout_s, back.settings.max_connections, back.settings.ucx) == (
                    7.0,
                    3,
                    {"TLS": "tcp"},
                )


def test_the_child_takes_its_settings_from_the_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PortSettings.of(ServerConfig(ports=2, idle_timeout_s=7.0))
    line = ServerOrder(ring_name="r", ring_folder="/dev/shm", worker_pid=1, settings=settings).to_line()
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__IDLE_TIMEOUT_S", "99")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__BASE_PORT", "5000")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__TOKEN", "other")
    assert ServerOrder.from_line(line).settings == settings


def test_a_report_survives_the_trip() -> None:
    report = ServerReport(ports=(5001, 5002))
    assert ServerReport.from_line(report.to_line()) == report
    report.raise_error()


def test_what_stopped_the_child_is_raised_in_the_worker() -> None:
    rows: list[tuple[str, type[TransportError]]] = [
        ("ConfigError", ConfigError),
        ("DeadlineExceededError", DeadlineExceededError),
        ("PeerLostError", TransportError),
        ("SystemExit", TransportError),
    ]
    for name, cls in rows:
        with row(name=name, cls=cls):
            report = ServerReport.from_line(ServerReport(error_class=name, error="the words").to_line())
            with pytest.raises(cls, match="the words") as caught:
                report.raise_error()
            assert type(caught.value) is cls


def test_both_lines_are_plain_json() -> None:
    order = ServerOrder(
        ring_name="r", ring_folder="/dev/shm", worker_pid=1, settings=PortSettings.of(ServerConfig(token="t"))
    )
    assert json.loads(order.to_line())["ring_name"] == "r"
    assert json.loads(ServerReport(ports=(1,)).to_line())["ports"] == [1]
