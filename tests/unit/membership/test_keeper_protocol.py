from __future__ import annotations

import json

import pytest

from ucxx_transport.config import StoreConfig
from ucxx_transport.membership.keeper_protocol import END_LINE, KeeperOrder, KeeperReport, lease_line

SECRET = "correct horse"
CONFIG = StoreConfig(namespace="job-7", timeout_s=1.5, user="root", password=SECRET, ca_file="/ca.pem")


def order(config: StoreConfig) -> KeeperOrder:
    return KeeperOrder(url="etcd://10.0.0.1:2379", config=config, worker_pid=4711, interval_s=0.5)


@pytest.mark.parametrize("config", [CONFIG, StoreConfig()], ids=["all set", "defaults"])
def test_an_order_arrives_as_it_was_given(config: StoreConfig) -> None:
    line = order(config).to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    heard = KeeperOrder.from_line(line)
    assert heard == order(config)
    assert heard.config.password_text == config.password_text


def test_an_order_is_not_mixed_with_the_keeper_s_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    line = order(StoreConfig()).to_line()
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__USER", "somebody else")
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__PASSWORD", "other")
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__NAMESPACE", "another-job")
    heard = KeeperOrder.from_line(line).config
    assert (heard.user, heard.password_text, heard.namespace) == (None, None, "default")


def test_the_password_is_never_printed() -> None:
    given = order(CONFIG)
    assert SECRET in given.to_line().decode()  # it has to travel
    for words in (repr(given), str(given), repr(given.config), repr(KeeperOrder.from_line(given.to_line()))):
        assert SECRET not in words


@pytest.mark.parametrize("word", ["kept", "lost", "unavailable"])
def test_a_report_arrives_as_it_was_given(word: str) -> None:
    report = KeeperReport(lease_id=(1 << 63) - 1, word=word, reason="two\nlines, é")
    line = report.to_line()
    assert line.count(b"\n") == 1
    assert KeeperReport.from_line(line.removesuffix(b"\n")) == report


def test_what_a_worker_says_is_one_line_of_json_each() -> None:
    assert json.loads(lease_line(7)) == {"lease_id": 7}
    assert json.loads(lease_line(None)) == {"lease_id": None}
    assert json.loads(END_LINE) == {"end": True}
    assert all(line.endswith(b"\n") for line in (lease_line(7), lease_line(None), END_LINE))
