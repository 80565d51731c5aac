"""Users of an etcd that goes on: tokens that end again and again, and authentication that is turned on and off."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.exhaustive import exhaustive
from tests.support.fake_source import FakeSource
from tests.support.programs import program
from tests.support.sidecars import sidecars_of
from tests.support.store_in_front import StoreInFront
from tests.support.waiting import wait_until
from ucxx_transport import HeartbeatPublisher, PublisherConfig, RankGroup, SourceWatcher
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import StorePermissionError, TransportError
from ucxx_transport.membership import Lease, open_store
from ucxx_transport.membership.entries import source_key
from ucxx_transport.membership.store import Store

MINUTE = 60
PASSWORD, OTHER_PASSWORD = "correct horse", "battery staple"
CONFIG = StoreConfig(user="worker", password=PASSWORD, timeout_s=20)
OFTEN = PublisherConfig(interval_s=1.0, stop_timeout_s=20.0)

pytestmark = pytest.mark.usefixtures("etcd_binary")
Events = list[MutableMapping[str, Any]]


def options_of(kind: str, folder: Path) -> list[str]:
    """Of an etcd whose tokens are of this kind and end within a second or two."""
    if kind == "simple":
        return ["--auth-token-ttl", "1", "--bcrypt-cost", "4"]
    key = folder / "jwt.key"
    key.write_text(secrets.token_hex(32))
    return ["--auth-token", f"jwt,pub-key={key},priv-key={key},sign-method=HS256,ttl=1s", "--bcrypt-cost", "4"]


@contextmanager
def server_of(kind: str, folder: Path, *, guarded: bool = True) -> Iterator[EtcdServer]:
    """One with a user `worker`, whom it asks for a password where it is guarded."""
    with EtcdServer(folder, options=options_of(kind, folder)) as server:
        server.add_user("root", PASSWORD)
        server.add_user("worker", PASSWORD, prefix="/ucxx_transport/")
        if guarded:
            server.ask("auth/enable", {})
        yield server


def as_root(server: EtcdServer, path: str, body: dict[str, str]) -> None:
    server.ask(path, body, token=server.log_in("root", PASSWORD))


class LongLeases(StoreInFront):
    """Grants a lease a minute, however often it is renewed: no busy machine is late by that."""

    def grant(self, ttl_s: float, *, timeout_s: float | None = None) -> Lease:
        return super().grant(max(ttl_s, MINUTE), timeout_s=timeout_s)


def opened(url: str, config: StoreConfig | None = CONFIG) -> Store:
    return LongLeases(open_store(url, config))


def has_given(server: EtcdServer, tokens: int) -> bool:
    return server.logins >= tokens


def calls_of(store: Store) -> list[Callable[[], object]]:
    """Each kind of call, also with a lease of its own."""

    def lease_cycle() -> None:
        lease = store.grant(60)
        store.put("leased", b"", lease_id=lease.lease_id)
        store.keep_alive(lease.lease_id)
        store.revoke(lease.lease_id)

    return [
        partial(store.put, "a", b""),
        partial(store.get, "a"),
        partial(store.delete, "a"),
        store.snapshot,
        lease_cycle,
    ]


@contextmanager
def one_job(url: str, config: StoreConfig | None = CONFIG) -> Iterator[tuple[HeartbeatPublisher, SourceWatcher, Store]]:
    """A worker with its sidecar, a watcher and a rank of a group; the store is the watcher's and the rank's."""
    with ExitStack() as stack:
        store, publishers = (stack.enter_context(opened(url, config)) for _ in range(2))
        publisher = stack.enter_context(HeartbeatPublisher(publishers, "w", FakeSource(), OFTEN))
        publisher.wait_published(MINUTE)
        watcher = stack.enter_context(SourceWatcher(store))
        watcher.wait_for(1, MINUTE)
        rank = RankGroup(store, "trainers", 0, config=OFTEN)
        stack.callback(rank.leave)
        rank.join_group(timeout_s=MINUTE)
        wait_until(lambda: publisher.statistics().keeper_keeps, MINUTE, what="the sidecar renews the lease")
        yield publisher, watcher, store


@pytest.mark.parametrize("kind", ["simple", "jwt"])
def test_tokens_that_end_again_and_again_are_renewed_in_silence(
    kind: str, tmp_path: Path, log_events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    with server_of(kind, tmp_path) as server, ExitStack() as stack:
        publisher, watcher, _ = stack.enter_context(one_job(server.url))
        calls = [calls_of(stack.enter_context(open_store(server.url, CONFIG)))[number] for number in range(5)]
        log_events.clear()
        capfd.readouterr()
        for _ in range(3):
            seen = server.logins  # each store has a token, which ends while the others are waited for
            for call in calls:
                call()
            wait_until(partial(has_given, server, seen + 2), MINUTE, what="tokens have ended")
            assert watcher.error is None
        # What ends all tokens at once, whatever their time: in a JWT any change of users, else one of the password.
        for number in range(5):
            as_root(server, "auth/user/add", {"name": f"new-{number}", "password": PASSWORD})
            as_root(server, "auth/user/changepw", {"name": "worker", "password": PASSWORD})
            for call in calls:
                call()
            assert watcher.error is None
        statistics = publisher.statistics()
        assert (statistics.losses, statistics.outages, statistics.keeper_restarts) == (0, 0, 0)
        assert watcher.statistics().failures == 0
        assert log_events == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [exhaustive("simple"), "jwt"])
def test_the_sidecar_of_a_killed_worker_ends_its_lease_though_its_token_has_ended(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__USER", "worker")
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__PASSWORD", PASSWORD)
    seldom = json.dumps({"interval_s": 100.0})  # so that the lease does not end by itself
    with server_of(kind, tmp_path) as server, open_store(server.url, CONFIG) as store:
        with program("source_worker", server.url, "w", "0", seldom) as worker:
            worker.hear()
            assert worker.ask(published=MINUTE) == {"epoch": 1}
            wait_until(
                lambda: worker.ask(look=True)["statistics"]["keeper_keeps"], MINUTE, what="the sidecar has a token"
            )
            as_root(server, "auth/user/add", {"name": "new", "password": PASSWORD})
            as_root(server, "auth/user/changepw", {"name": "worker", "password": PASSWORD})
            assert store.get(source_key("w")) is not None
        wait_until(lambda: store.get(source_key("w")) is None, MINUTE, what="the lease was revoked")


@pytest.mark.parametrize("kind", [exhaustive("simple"), "jwt"])
def test_authentication_turned_on_and_off_is_nothing_to_those_who_have_a_user(
    kind: str, tmp_path: Path, log_events: Events
) -> None:
    with server_of(kind, tmp_path, guarded=False) as server, one_job(server.url) as (publisher, watcher, store):
        log_events.clear()
        for path in ("auth/enable", "auth/disable", "auth/enable"):
            if path == "auth/enable":
                server.ask(path, {})
            else:
                as_root(server, path, {})
            for call in calls_of(store):
                call()
            with (
                opened(server.url) as its_own,
                HeartbeatPublisher(its_own, "late", FakeSource(), OFTEN, store_config=CONFIG) as late,
            ):
                late.wait_published(MINUTE)
                watcher.wait_for(2, MINUTE)
            wait_until(lambda: len(watcher.sources()) == 1, MINUTE, what="it is seen to go")
        assert (publisher.statistics().losses, publisher.statistics().outages) == (0, 0)
        assert watcher.statistics().failures == 0
        assert [event["event"] for event in log_events] == []


def test_authentication_turned_on_under_clients_without_a_user_names_it_and_ends_no_lease(
    tmp_path: Path, log_events: Events
) -> None:
    anonymous = StoreConfig(timeout_s=20)
    with server_of("simple", tmp_path, guarded=False) as server, one_job(server.url, anonymous) as job:
        publisher, watcher, store = job
        log_events.clear()
        server.ask("auth/enable", {})
        for call in calls_of(store):
            with pytest.raises(StorePermissionError, match=r"asks for a user.* store\.user and store\.password"):
                call()
        wait_until(lambda: watcher.error, MINUTE, what="the watcher has noticed")
        assert isinstance(watcher.error, StorePermissionError)
        assert "store.user and store.password" in str(watcher.error)
        wait_until(lambda: "group_store_away" in [event["event"] for event in log_events], MINUTE, what="the rank too")
        assert [source.worker_id for source in watcher.sources()] == ["w"]  # what was known stays
        as_root(server, "auth/disable", {})
        wait_until(lambda: watcher.error is None, MINUTE, what="the watcher goes on")
        for call in calls_of(store):
            call()
        assert publisher.statistics().losses == 0
        said = [event["event"] for event in log_events]
        assert len(said) == len(set(said)), said
        assert set(said) - {"store_unreachable"} == {"group_store_away", "store_not_followed"}
        assert not any(event.get("exception") for event in log_events)


def test_no_secret_is_shown_by_anything_that_a_job_shows_in_trouble(
    tmp_path: Path, log_events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    hasty = StoreConfig(user="worker", password=PASSWORD, timeout_s=0.5)

    def show(error: BaseException | None) -> None:
        if error is not None:
            trace = traceback.TracebackException.from_exception(error, capture_locals=True)
            shown.extend([*trace.format(), repr(error), repr(vars(error))])

    def show_calls(store: Store) -> None:
        for call in calls_of(store):
            try:
                call()
            except TransportError as error:
                show(error)

    with server_of("jwt", tmp_path) as server, one_job(server.url) as (publisher, watcher, _):
        (sidecars := sidecars_of(os.getpid())).sort()
        assert len(sidecars) == 2  # the publisher's, and the rank's
        for pid, what in product(sidecars, ("cmdline", "environ")):
            shown.append(Path(f"/proc/{pid}/{what}").read_text())
        with open_store(server.url, hasty) as store, HeartbeatPublisher(store, "v", FakeSource(), OFTEN) as other:
            show_calls(store)
            server.pause()
            show_calls(store)
            server.resume()
            server.kill()
            show_calls(store)
            wait_until(lambda: watcher.error, MINUTE, what="the watcher has noticed")
            show(watcher.error)
            server.start()
            as_root(server, "auth/user/changepw", {"name": "worker", "password": OTHER_PASSWORD})
            show_calls(store)
            wait_until(lambda: isinstance(watcher.error, StorePermissionError), MINUTE, what="it is refused")
            show(watcher.error)
            show(other.error)
            show(publisher.error)
            for one in (store, store.watch(after=0), publisher, other, watcher, hasty, CONFIG):
                shown.extend([repr(one), str(one), repr(getattr(one, "__dict__", None))])
            shown.append(repr(publisher.statistics()))
            as_root(server, "auth/user/changepw", {"name": "worker", "password": PASSWORD})  # so that all ends well
    shown.extend(f"{event['event']} {vars_of(event)}" for event in log_events)
    shown.extend(capfd.readouterr())
    assert len(log_events) > 3
    assert any("StoreUnavailableError" in text for text in shown)
    # the last: any JWT, which is two JSON documents and a signature; a source's record in a request is one
    secret = re.compile("|".join([PASSWORD, OTHER_PASSWORD, text_of(PASSWORD), r"eyJ[\w-]{8,}\.eyJ"]))
    assert [found.group() for text in shown if (found := secret.search(text))] == []


def vars_of(event: MutableMapping[str, Any]) -> str:
    """All that a formatter could show of it."""
    return " ".join(f"{name}={value!s} {value!r}" for name, value in event.items())


def text_of(secret: str) -> str:
    return base64.b64encode(secret.encode()).decode().rstrip("=")
