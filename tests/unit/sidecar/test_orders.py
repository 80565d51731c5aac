"""The orders that a sidecar is sent: what arrives is what was given, and secrets are printed nowhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.memory_store import MemoryStore
from ucxx_transport.config import PublisherConfig, ServerConfig, StoreConfig
from ucxx_transport.membership import renewal
from ucxx_transport.membership.renewal import Keeper, open_ordered
from ucxx_transport.server.port import of_order, to_order

SECRET = "correct horse"
STORE = StoreConfig(namespace="job-7", timeout_s=1.5, user="root", password=SECRET, ca_file="/ca.pem")


def as_sent(order: object) -> dict[str, Any]:
    line = json.dumps(order)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


def opened(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[str, StoreConfig]:
    """What the sidecar would open for a store with these settings."""
    order = as_sent(Keeper(MemoryStore(), config, PublisherConfig(interval_s=0.5)).order)
    found: list[tuple[str, StoreConfig]] = []
    with monkeypatch.context() as patched:
        patched.setattr(renewal, "open_store", lambda url, config: found.append((url, config)))
        open_ordered(order)
    return found[0]


@pytest.mark.parametrize("config", [STORE, StoreConfig()], ids=["all set", "defaults"])
def test_the_settings_of_a_store_arrive_as_they_were_given(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, heard = opened(config, monkeypatch)
    assert url == MemoryStore().url
    assert heard == config
    assert heard.password_text == config.password_text


def test_the_sidecar_s_environment_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    config, server = StoreConfig(), ServerConfig(ports=2, idle_timeout_s=7.0)
    order = as_sent(to_order(server))
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__USER", "another")
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__PASSWORD", "other")
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__NAMESPACE", "another-job")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__IDLE_TIMEOUT_S", "99")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__BASE_PORT", "5000")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__TOKEN", "other")
    _, heard = opened(config, monkeypatch)
    assert (heard.user, heard.password_text, heard.namespace) == (None, None, "default")
    assert of_order(order) == server


@pytest.mark.parametrize("token", [None, "plain", b"\x00\xffbytes"], ids=["none", "text", "bytes"])
@pytest.mark.parametrize("ports", [4, [5001, 5002]], ids=["count", "numbers"])
def test_the_settings_of_a_server_arrive_as_they_were_given(token: str | bytes | None, ports: int | list[int]) -> None:
    config = ServerConfig(
        host="10.0.0.7", ports=ports, token=token, idle_timeout_s=7.0, max_connections=3, ucx={"TLS": "tcp"}
    )
    heard = of_order(as_sent(to_order(config)))
    assert heard == config
    assert heard.token_bytes == config.token_bytes


def test_secrets_are_never_printed() -> None:
    lease = Keeper(MemoryStore(), STORE, PublisherConfig())
    server = ServerConfig(token=SECRET)
    assert SECRET in json.dumps(lease.order)  # they have to travel
    for words in (repr(lease), repr(STORE), repr(server), repr(of_order(to_order(server)))):
        assert SECRET not in words
