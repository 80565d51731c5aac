"""An etcd that refuses what it could do otherwise: no space, requests that are too large, too many of them."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.fake_source import FakeSource
from tests.support.waiting import wait_until
from ucxx_transport import HeartbeatPublisher, PublisherConfig, SourceWatcher
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, StoreUnavailableError
from ucxx_transport.membership import PublisherState, open_store
from ucxx_transport.membership.store import Store

MINUTE = 60
CONFIG = StoreConfig(timeout_s=20)
OFTEN = PublisherConfig(interval_s=1.5, backoff_s=0.05, max_backoff_s=0.2, keeper="thread", stop_timeout_s=20.0)
KEYS, LOOKS = 50_000, 10_000
AGREED = "etcd_server_proposals_committed_total"
AT_ONCE = 250
LET_WAIT = 5_000
"""Of writes that are agreed on and not made yet: past that etcd refuses (v3_server.go)."""
NO_SPACE = r"no space left.*alarm disarm"

pytestmark = pytest.mark.usefixtures("etcd_binary")
Events = list[MutableMapping[str, Any]]


@contextmanager
def server_with(folder: Path, *options: str) -> Iterator[tuple[EtcdServer, Store]]:
    with EtcdServer(folder, options=options) as server, open_store(server.url, CONFIG) as store:
        yield server, store


def fill(store: Store) -> None:
    """Write until there is no space."""
    for _ in range(100):
        try:
            store.put("filler", bytes(60_000))
        except StoreUnavailableError:
            return
    raise AssertionError("there is no end to its space")


def empty(server: EtcdServer) -> None:
    """As an operator does: forget old revisions, give the space back, and take the alarm away."""
    server.compact()
    server.ask("maintenance/defragment", {})
    for alarm in server.ask("maintenance/alarm", {"action": "GET"})["alarms"]:
        server.ask("maintenance/alarm", {**alarm, "action": "DEACTIVATE"})


def test_without_space_leases_live_reads_work_and_what_is_new_waits(tmp_path: Path, log_events: Events) -> None:
    with server_with(tmp_path, "--quota-backend-bytes", "400000") as (server, store):
        lease = store.grant(60)
        store.put("leased", b"", lease_id=lease.lease_id)
        early = HeartbeatPublisher(server.url, "early", FakeSource(), OFTEN, store_config=CONFIG)
        late = HeartbeatPublisher(server.url, "late", FakeSource(), OFTEN, store_config=CONFIG)
        with SourceWatcher(store) as watcher, early:
            early.wait_published(MINUTE)
            watcher.wait_for(1, MINUTE)
            fill(store)
            for call in (
                lambda: store.put("a", b""),
                lambda: store.put("a", b"", expected=0),
                lambda: store.grant(60),
            ):
                with pytest.raises(StoreUnavailableError, match=NO_SPACE):
                    call()
            assert store.keep_alive(lease.lease_id) >= 60
            assert len(store.snapshot("leased").entries) == 1
            store.revoke(lease.lease_id)
            with late:
                wait_until(lambda: late.statistics().attempts > 2, MINUTE, what="it tries to be published")
                assert late.state is PublisherState.PUBLISHING
                assert "no space left" in str(late.error)
                end_s = time.monotonic() + 1.5 * OFTEN.ttl_s  # etcd counts in real time
                wait_until(lambda: time.monotonic() > end_s, MINUTE, what="a lease that is not renewed has run out")
                assert [source.worker_id for source in watcher.sources()] == ["early"]
                empty(server)
                assert late.wait_published(MINUTE) == 1
                watcher.wait_for(2, MINUTE)
                fill(store)
            assert store.get("sources/late") is None  # the lease was ended, though no write was taken
            assert (early.epoch, early.statistics().losses) == (1, 0)
            assert watcher.error is None
            assert watcher.statistics().failures == 0
        said = [event["event"] for event in log_events if event["event"] != "sidecar_died"]
        assert sorted(said) == ["record_not_withdrawn", "record_not_withdrawn", "source_not_published"]


def test_a_record_that_etcd_finds_too_large_fails_after_one_attempt(tmp_path: Path) -> None:
    with server_with(tmp_path, "--max-request-bytes", "2000") as (server, store):
        store.put("a", bytes(1000))
        for nbytes in (3000, 1 << 20):  # refused by etcd, and by what is before it
            with pytest.raises(ConfigError, match=r"--max-request-bytes"):
                store.put("a", bytes(nbytes))
        meta = {"note": "x" * 5000}
        with HeartbeatPublisher(server.url, "w", FakeSource(), OFTEN, store_config=CONFIG, meta=meta) as publisher:
            with pytest.raises(ConfigError, match=r"--max-request-bytes.*meta"):
                publisher.wait_published(MINUTE)
            assert publisher.statistics().attempts == 1
        assert store.snapshot("sources/").entries == ()


@pytest.mark.exhaustive
def test_more_writes_than_etcd_lets_wait_are_refused_in_its_own_words_and_a_lease_is_renewed(tmp_path: Path) -> None:
    with server_with(tmp_path, "--max-txn-ops", str(KEYS), "--max-request-bytes", "9000000") as (server, store):
        lease = store.grant(60)
        with crowded(server):
            with pytest.raises(StoreUnavailableError, match="fewer writers; it is asked again") as caught:
                store.put("a", b"")
            assert caught.value.facts["reason"] == "etcdserver: too many requests"
            assert store.keep_alive(lease.lease_id) >= 60


@contextmanager
def crowded(server: EtcdServer) -> Iterator[None]:
    """One write that takes etcd seconds, since it looks through all keys often; behind it as many as it lets wait."""
    first, end = text(b"key"), text(b"kez")
    puts = [{"request_put": {"key": text(b"key%d" % number)}} for number in range(KEYS)]
    server.ask("kv/txn", {"success": puts})
    looks = [{"request_range": {"key": first, "range_end": end, "count_only": True}}] * LOOKS

    def ask() -> None:
        with suppress(OSError):  # etcd itself waits no longer than 7 s for it, and goes on with it
            server.ask("kv/txn", {"success": [*puts[:1], *looks]})

    agreed = server.counted(AGREED)
    slow = threading.Thread(target=ask)
    slow.start()
    wait_until(lambda: server.counted(AGREED) > agreed, MINUTE, what="it is at it")
    body = json.dumps({"key": first})
    put = f"POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    for _ in range(LET_WAIT // AT_ONCE):
        agreed = server.counted(AGREED)
        with ExitStack() as stack:  # what was agreed on waits, though who asked for it has gone
            for _ in range(AT_ONCE):
                one = stack.enter_context(socket.create_connection((server.address, server.ports[0])))
                one.sendall(put)
            wait_until(partial(all_agreed, server, agreed + AT_ONCE), MINUTE, what="all of them are agreed on")
    assert server.counted(AGREED) - server.counted("etcd_server_proposals_applied_total") > LET_WAIT
    yield
    server.kill()  # it would go on with it for seconds
    slow.join()


def all_agreed(server: EtcdServer, count: int) -> bool:
    return server.counted(AGREED) >= count


def text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
