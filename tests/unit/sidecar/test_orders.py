"""The orders that a sidecar is sent: what arrives is what was given, and secrets are printed nowhere."""

from __future__ import annotations

import json

import pytest

from tests.support.memory_store import MemoryStore
from tests.support.rows import row
from ucxx_transport.config import PublisherConfig, ServerConfig, StoreConfig
from ucxx_transport.membership.renewal import Keeper
from ucxx_transport.sidecar.launch import packed

SECRET = "correct horse"
STORE = StoreConfig(namespace="job-7", timeout_s=1.5, user="root", password=SECRET, ca_file="/ca.pem")


def test_settings_arrive_as_they_were_given_and_the_sidecar_s_environment_has_no_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [
        STORE,
        StoreConfig(),
        ServerConfig(ports=2, idle_timeout_s=7.0),
        *(
            ServerConfig(host="10.0.0.7", ports=[5001, 5002], token=token, max_connections=3, ucx={"TLS": "tcp"})
            for token in ("plain", "größe", b"\x00\xffbytes", bytes(range(256)), b"\xed\xa0\x80")
        ),
    ]
    sent = [packed({"settings": config}) for config in given]
    for name, value in (("STORE__NAMESPACE", "another-job"), ("SERVER__IDLE_TIMEOUT_S", "99"), ("SERVER__TOKEN", "x")):
        monkeypatch.setenv(f"UCXX_TRANSPORT_{name}", value)
    for config, message in zip(given, sent, strict=True):
        with row(config=config):
            heard = type(config)(**json.loads(message)["settings"])
            assert heard == config
            if isinstance(config, ServerConfig) and isinstance(heard, ServerConfig):
                assert heard.token_bytes == config.token_bytes


def test_secrets_are_never_printed() -> None:
    store = MemoryStore()
    store.config = STORE
    keeper = Keeper(store, PublisherConfig())
    for words in (repr(keeper), repr(STORE), repr(ServerConfig(token=SECRET))):
        assert SECRET not in words
