"""What only a store in etcd has: users, TLS, several endpoints, and connections that are cut."""

from __future__ import annotations

import base64
import socket
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.support.etcd_server import HOST, EtcdServer
from tests.support.exhaustive import exhaustive
from tests.support.fake_source import FakeSource
from tests.support.ports import free_ports
from tests.support.store_rigs import error_of
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until
from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import (
    ConfigError,
    StorePermissionError,
    StoreResetError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership import HeartbeatPublisher, open_store
from ucxx_transport.membership.entries import Batch
from ucxx_transport.membership.etcd_store import EtcdStore
from ucxx_transport.membership.store import Store, Watch

pytestmark = pytest.mark.usefixtures("etcd_binary")

DEADLINE_S = 20.0
PASSWORD = "correct horse"
Open = Callable[..., Store]


@pytest.fixture
def namespace() -> str:
    """The test's own."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def opened(namespace: str) -> Iterator[Open]:
    """Opens stores that are closed at the end."""
    with ExitStack() as stack:

        def of(url: str, **settings: Any) -> Store:
            config = StoreConfig(**{"namespace": namespace, "timeout_s": 5, **settings})
            return stack.enter_context(open_store(url, config))

        yield of


def text(raw: str) -> str:
    return base64.b64encode(raw.encode()).decode()


def patiently(call: Callable[[], Any]) -> Any:
    """What the call answers once the store is there again."""
    end = time.monotonic() + DEADLINE_S
    while True:
        try:
            return call()
        except StoreUnavailableError:
            assert time.monotonic() < end


def batches_until(watch: Watch, last: str) -> list[Batch]:
    """All batches up to the one that changes the key `last`, whatever cuts come between."""
    found: list[Batch] = []
    end = time.monotonic() + DEADLINE_S
    while not found or found[-1].events[-1].key != last:
        assert time.monotonic() < end, found
        try:
            batch = watch.next(1.0)
        except StoreUnavailableError:
            continue
        found += [batch] if batch else []
    return found


# users


@pytest.fixture(scope="module")
def guarding_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A server with the users `root`, `worker`, `trainer` and `stranger`, who have no rights but root."""
    with EtcdServer(tmp_path_factory.mktemp("guarded")) as server:
        for name in ("root", "worker", "trainer", "stranger"):
            server.ask("auth/user/add", {"name": name, "password": PASSWORD})
            server.ask("auth/role/add", {"name": name})
            server.ask("auth/user/grant", {"user": name, "role": name})
        server.ask("auth/enable", {})
        yield server


@pytest.fixture
def guarded(guarding_server: EtcdServer, namespace: str) -> EtcdServer:
    """The same server: `worker` has all of the test's namespace, `trainer` what the documents grant."""
    root = f"/ucxx_transport/{namespace}/"
    grants = [
        ("worker", "READWRITE", root, root[:-1] + "0"),
        ("trainer", "READ", f"{root}sources/", f"{root}sources0"),
        ("trainer", "READ", f"{root}/identity", ""),
    ]
    token = guarding_server.ask("auth/authenticate", {"name": "root", "password": PASSWORD})["token"]
    for name, right, first, end in grants:
        permission = {"permType": right, "key": text(first), "range_end": text(end)}
        guarding_server.ask("auth/role/grant", {"name": name, "perm": permission}, token=token)
    return guarding_server


def test_a_user_with_its_password_has_the_whole_store(guarded: EtcdServer, opened: Open) -> None:
    store = opened(guarded.url, user="worker", password=PASSWORD)
    snapshot = store.snapshot()
    lease = store.grant(60)
    with store.watch(after=snapshot.revision) as watch:
        store.put("a", b"1", lease_id=lease.lease_id, expected=0)
        assert store.keep_alive(lease.lease_id) >= 60
        assert [batch.events[0].key for batch in batches_until(watch, "a")] == ["a"]
        store.revoke(lease.lease_id)
        assert [event.kind for event in batches_until(watch, "a")[0].events] == ["delete"]


def test_a_user_that_etcd_does_not_know_is_refused(guarded: EtcdServer, opened: Open) -> None:
    for settings in ({}, {"user": "worker", "password": "wrong"}, {"user": "unknown", "password": PASSWORD}):
        store = opened(guarded.url, **settings)
        calls: list[Callable[[], object]] = [
            partial(store.get, "a"),
            partial(store.put, "a", b""),
            partial(store.put, "a", b"", expected=0),
            partial(store.delete, "a"),
            store.snapshot,
        ]
        for call in calls:
            with pytest.raises(StorePermissionError, match=r"store\.user") as caught:
                call()
            assert PASSWORD not in str(caught.value)
            assert "wrong" not in str(caught.value)
        with store.watch(after=0) as watch:
            assert isinstance(error_of(watch), StorePermissionError)


def test_a_user_may_do_what_its_role_says(guarded: EtcdServer, opened: Open) -> None:
    worker = opened(guarded.url, user="worker", password=PASSWORD)
    trainer = opened(guarded.url, user="trainer", password=PASSWORD)
    assert trainer.snapshot("sources/").entries == ()  # and cannot give the store an identity
    with trainer.watch("sources/", after=trainer.snapshot("sources/").revision) as early:
        assert early.next(0.1) is None
        worker.put("sources/a", b"0")
        batches_until(early, "sources/a")
    assert worker.snapshot().identity == trainer.snapshot("sources/").identity
    with trainer.watch("sources/", after=trainer.snapshot("sources/").revision) as watch:
        worker.put("sources/a", b"1")
        assert [batch.events[0].value for batch in batches_until(watch, "sources/a")] == [b"1"]
    with pytest.raises(StorePermissionError, match="READWRITE"):
        trainer.put("sources/a", b"2")
    with pytest.raises(StorePermissionError):
        trainer.snapshot()
    assert [entry.value for entry in trainer.snapshot("sources/")] == [b"1"]
    stranger = opened(guarded.url, user="stranger", password=PASSWORD)
    with pytest.raises(StorePermissionError):
        stranger.get("a")
    with stranger.watch(after=0) as watch:
        assert isinstance(error_of(watch), StorePermissionError)


@pytest.mark.may_leave("processes", reason="the server that all tests share, started again")
def test_a_token_that_etcd_has_forgotten_is_renewed(guarded: EtcdServer, opened: Open) -> None:
    store = opened(guarded.url, user="worker", password=PASSWORD)
    with store.watch(after=store.snapshot().revision) as watch:
        store.put("a", b"")
        batches_until(watch, "a")
        guarded.kill()  # its tokens live in its memory alone
        guarded.start()
        patiently(lambda: store.get("a"))
        store.put("b", b"")
        assert [batch.events[0].key for batch in batches_until(watch, "b")] == ["b"]


def test_a_worker_that_is_refused_has_failed_after_exactly_one_attempt(guarded: EtcdServer, opened: Open) -> None:
    refused = opened(guarded.url, user="stranger", password=PASSWORD)
    publisher = HeartbeatPublisher(refused, "w", FakeSource(), PublisherConfig(keeper="thread"))
    with publisher, pytest.raises(StorePermissionError):
        publisher.wait_published(60.0)
    assert publisher.statistics().attempts == 1
    assert publisher.statistics().publications == 0
    assert opened(guarded.url, user="worker", password=PASSWORD).snapshot("sources/").entries == ()


def test_a_user_is_no_hindrance_where_etcd_asks_for_none(etcd_server: EtcdServer, opened: Open) -> None:
    store = opened(etcd_server.url, user="worker", password=PASSWORD)
    store.put("a", b"")
    assert [entry.key for entry in store.snapshot()] == ["a"]


def test_a_library_that_closes_a_response_with_its_last_piece_cuts_nothing_off(
    etcd_server: EtcdServer, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As http.client does from Python 3.13 on."""
    plain = HTTPResponse.read1

    def closing(response: HTTPResponse, n: int = -1) -> bytes:
        piece = plain(response, n)
        if response.length == 0:
            response.close()
        return piece

    monkeypatch.setattr(HTTPResponse, "read1", closing)
    store = opened(etcd_server.url)
    store.put("a", bytes(200_000))
    assert [len(entry.value) for entry in store.snapshot()] == [200_000]


def test_no_secret_is_in_a_log_a_repr_or_a_traceback(
    guarded: EtcdServer, opened: Open, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    shown: list[str] = []

    def show(call: Callable[[], object]) -> None:
        with pytest.raises(TransportError) as caught:
            call()
        trace = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        shown.extend([*trace.format(), str(caught.value), repr(caught.value.facts)])

    def show_store(endpoint: str) -> str:
        """What a store's calls and a watch show while etcd is silent; returns its token."""
        config = StoreConfig(namespace=namespace, user="worker", password=PASSWORD, timeout_s=0.2)
        store = EtcdStore((endpoint,), config)
        token = store.as_user(lambda token: token.reveal().decode(), time.monotonic() + 5)
        guarded.pause()
        try:
            show(lambda: store.get("a", timeout_s=0.1))
            with store.watch(after=0) as watch:
                show(lambda: watch.next(DEADLINE_S))
        finally:
            guarded.resume()
        shown.extend([repr(store), repr(vars(store))])
        return token

    token = show_store(f"{HOST}:{guarded.ports[0]}")
    show(partial(opened(guarded.url, user="worker", password=f"{PASSWORD}!").get, "a"))
    show(partial(opened(guarded.url, user="stranger", password=PASSWORD).get, "a"))
    with stranger(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{") as url:
        store = opened(url, user="worker", password=PASSWORD, timeout_s=1)
        show(partial(store.get, "a"))
        with store.watch(after=0) as watch:
            show(lambda: watch.next(DEADLINE_S))
    shown += [store.url, repr(store), repr(vars(store)), caplog.text]
    for secret in (PASSWORD, token):
        assert [text for text in shown if secret in text] == []


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Any:
    """A certificate authority, its certificate in `ca.pem`; `Any`: trustme may be missing."""
    trustme = pytest.importorskip("trustme", reason="trustme, of the extra dev, makes the certificates")
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return made


@contextmanager
def tls_server(folder: Path, authority: Any, *, client_certificates: bool = False) -> Iterator[EtcdServer]:
    """A server whose certificate the authority has signed; asks clients for one too, or does not."""
    certificate = authority.issue_cert(HOST)
    certificate.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
    certificate.private_key_pem.write_to_path(str(folder / "server.key"))
    options = ["--cert-file", str(folder / "server.pem"), "--key-file", str(folder / "server.key")]
    if client_certificates:
        options += ["--client-cert-auth", "--trusted-ca-file", str(folder / "ca.pem")]
    with EtcdServer(folder, options=options, scheme="https") as server:
        yield server


def test_a_trusted_server_is_used_over_tls(opened: Open, tmp_path: Path, authority: Any) -> None:
    with tls_server(tmp_path, authority) as server:
        ca_file = str(tmp_path / "ca.pem")
        store = opened(server.url.replace("etcd:", "etcds:"), ca_file=ca_file)
        with store.watch(after=patiently(store.snapshot).revision) as watch:
            opened(server.url, ca_file=ca_file).put("a", b"1")
            assert [batch.events[0].value for batch in batches_until(watch, "a")] == [b"1"]


def test_a_server_that_is_not_trusted_is_a_configuration_error(opened: Open, tmp_path: Path, authority: Any) -> None:
    trustme = pytest.importorskip("trustme")
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    with tls_server(tmp_path, authority) as server:
        for settings in ({"ca_file": str(tmp_path / "other.pem")}, {}):
            store = opened(server.url.replace("etcd:", "etcds:"), **settings)
            with pytest.raises(ConfigError, match="ca_file"):
                store.get("a")
            with store.watch(after=0) as watch:
                assert isinstance(error_of(watch), ConfigError)
        with pytest.raises((ConfigError, StoreUnavailableError)):
            opened(server.url).get("a")


def test_a_server_that_asks_for_a_certificate_gets_it(opened: Open, tmp_path: Path, authority: Any) -> None:
    own = authority.issue_cert("worker.example")
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "own.pem"))
    own.private_key_pem.write_to_path(str(tmp_path / "own.key"))
    files = {"cert_file": str(tmp_path / "own.pem"), "key_file": str(tmp_path / "own.key")}
    with tls_server(tmp_path, authority, client_certificates=True) as server:
        url, ca_file = server.url.replace("etcd:", "etcds:"), str(tmp_path / "ca.pem")
        store = opened(url, ca_file=ca_file, **files)
        assert patiently(lambda: store.put("a", b"")) > 0
        with pytest.raises(StoreUnavailableError):
            opened(url, ca_file=ca_file).get("a", timeout_s=1)


# several endpoints


def test_an_endpoint_that_refuses_is_passed_over(etcd_server: EtcdServer, opened: Open) -> None:
    (dead,) = free_ports(1)
    store = opened(f"etcd://{HOST}:{dead},{HOST}:{etcd_server.ports[0]}")
    with store.watch(after=store.snapshot().revision) as watch:
        store.put("a", b"", expected=0)
        assert [batch.events[0].key for batch in batches_until(watch, "a")] == ["a"]


def test_an_endpoint_that_is_silent_costs_its_share_once(etcd_server: EtcdServer, opened: Open) -> None:
    with socket.create_server((HOST, 0)) as silent:  # takes connections, and answers nothing
        store = opened(f"etcd://{HOST}:{silent.getsockname()[1]},{HOST}:{etcd_server.ports[0]}")
        assert store.get("a", timeout_s=2) is None
        for _ in range(3):
            assert store.put("a", b"", timeout_s=2) > 0


def test_calls_and_watches_go_on_at_another_endpoint(etcd_server: EtcdServer, opened: Open) -> None:
    with TcpProxy(etcd_server.ports[0]) as one, TcpProxy(etcd_server.ports[0]) as other:
        store = opened(f"etcd://{HOST}:{one.port},{HOST}:{other.port}")
        lease = store.grant(60)
        with store.watch(after=store.snapshot().revision) as watch:
            store.put("a", b"")
            batches_until(watch, "a")
            one.refuse()
            store.put("b", b"", lease_id=lease.lease_id)
            assert store.keep_alive(lease.lease_id) >= 60
            moved = watch.next(DEADLINE_S)  # without an error
            assert moved is not None
            assert [event.key for event in moved.events] == ["b"]
            one.listen()
            other.refuse()
            assert store.put("c", b"", expected=0) > 0
            assert [batch.events[0].key for batch in batches_until(watch, "c")] == ["c"]
            one.refuse()
            with pytest.raises(StoreUnavailableError):
                store.get("a")
            with pytest.raises(StoreUnavailableError):
                wait_until(lambda: watch.next(1.0), DEADLINE_S)
            other.listen()
            patiently(lambda: store.put("d", b""))
            assert batches_until(watch, "d")[0].events[0].key == "d"


def test_a_change_that_may_have_been_made_is_not_made_again(etcd_server: EtcdServer, opened: Open) -> None:
    with TcpProxy(etcd_server.ports[0]) as mute, TcpProxy(etcd_server.ports[0]) as other:
        direct = opened(etcd_server.url)
        revision = direct.put("a", b"0")
        mute.mute = True
        url = f"etcd://{HOST}:{mute.port},{HOST}:{other.port}"
        with pytest.raises(StoreUnavailableError):
            opened(url).put("a", b"1", expected=revision)
        found = direct.get("a")
        assert found is not None
        assert (found.value, found.revision) == (b"1", revision + 1)
        found = opened(url).get("a")  # a question may be asked again
        assert found is not None
        assert found.value == b"1"


# cuts, silence and strangers


@pytest.mark.parametrize("cut_after", [700, exhaustive(1500), 20_000, exhaustive(60_000)])
def test_a_stream_that_is_cut_anywhere_goes_on_after_the_last_whole_batch(
    etcd_server: EtcdServer, opened: Open, cut_after: int
) -> None:
    direct = opened(etcd_server.url)
    after = direct.snapshot().revision
    lease = direct.grant(60)
    revisions = [direct.put(f"k/{number:02}", bytes(2000), lease_id=lease.lease_id) for number in range(20)]
    direct.revoke(lease.lease_id)
    last = direct.put("k/last", b"")
    with TcpProxy(etcd_server.ports[0]) as proxy:
        store = opened(f"etcd://{HOST}:{proxy.port}")
        proxy.cut_after = cut_after
        with store.watch("k/", after=after) as watch:
            cut = threading.Event()

            def let_through() -> None:
                wait_until(lambda: proxy.connections >= 6, DEADLINE_S)
                proxy.cut_after = None
                proxy.cut()
                cut.set()

            helper = threading.Thread(target=let_through)
            helper.start()
            found = batches_until(watch, "k/last")
            proxy.connections += 6
            helper.join()
    assert [batch.revision for batch in found] == [*revisions, revisions[-1] + 1, last]
    assert len(found[-2].events) == 20


def test_a_stream_that_is_cut_again_and_again_repeats_nothing(etcd_server: EtcdServer, opened: Open) -> None:
    direct = opened(etcd_server.url)
    found: list[Batch] = []
    revisions: list[int] = []
    with ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy(etcd_server.ports[0]))
        store = opened(f"etcd://{HOST}:{proxy.port}")
        watch = stack.enter_context(store.watch("k/", after=direct.snapshot().revision))
        for number in range(4):
            revisions.append(direct.put(f"k/{number}", b""))
            found += batches_until(watch, f"k/{number}")
            proxy.cut()
    assert [batch.revision for batch in found] == revisions


def test_a_silent_server_is_noticed_and_the_watch_goes_on_when_it_speaks_again(
    etcd_server: EtcdServer, opened: Open
) -> None:
    store = opened(etcd_server.url, timeout_s=1)
    with store.watch(after=store.snapshot().revision) as watch:
        store.put("a", b"")
        batches_until(watch, "a")
        etcd_server.pause()
        try:
            with pytest.raises(StoreUnavailableError):
                wait_until(lambda: watch.next(1.0), DEADLINE_S)
        finally:
            etcd_server.resume()
        patiently(lambda: store.put("b", b""))
        assert batches_until(watch, "b")[-1].events[0].key == "b"


def test_a_watch_of_a_silent_server_is_closed_at_once(etcd_server: EtcdServer, opened: Open) -> None:
    store = opened(etcd_server.url, timeout_s=10 * DEADLINE_S)
    watch = store.watch(after=store.snapshot().revision)
    etcd_server.pause()
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(watch.next, 10 * DEADLINE_S)
            threading.Timer(0.05, watch.close).start()
            with pytest.raises(StoreUnavailableError, match="closed"):
                waiting.result(timeout=DEADLINE_S)
    finally:
        etcd_server.resume()


@pytest.mark.parametrize("moment", [0, 1, 3, 10, 30])
def test_a_watch_closed_by_another_thread_at_any_moment_ends_without_a_failure(
    etcd_server: EtcdServer, opened: Open, moment: int, log_events: list[MutableMapping[str, Any]]
) -> None:
    store = opened(etcd_server.url)
    after = store.snapshot().revision
    for number in range(10):
        store.put("k", bytes(number))
        watch = store.watch(after=after)
        closing = threading.Timer(moment / 1000, watch.close)
        closing.start()
        with pytest.raises(StoreUnavailableError, match="closed"):
            deque(iter(partial(watch.next, DEADLINE_S), None))
        closing.join()
    assert log_events == []


def test_a_stream_that_ends_within_a_chunk_is_taken_up_again(opened: Open) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    message = b"3\r\n{}\n\r\n"
    for rest in (b"", b"2", b"20\r\n{", b"20\r\n{}\n", message, message + b"5", b"nonsense\r\n", b"0\r\n\r\n"):
        with stranger(head + rest) as url, opened(url, timeout_s=1).watch(after=0) as watch:
            for _ in range(2):
                with pytest.raises(StoreUnavailableError):
                    watch.next(DEADLINE_S)


def test_a_namespace_that_was_wiped_by_hand_is_noticed(etcd_server: EtcdServer, opened: Open, namespace: str) -> None:
    store = opened(etcd_server.url)
    with store.watch("quiet/", after=store.snapshot().revision) as watch:
        assert watch.next(0.1) is None
        root = f"/ucxx_transport/{namespace}/"
        etcd_server.ask("kv/deleterange", {"key": text(root), "range_end": text(root[:-1] + "0")})
        assert isinstance(error_of(watch), StoreResetError)
    with store.watch(after=0) as watch:
        store.put("a", b"")
        assert batches_until(watch, "a")[-1].events[0].key == "a"


def test_nobody_there_is_said_at_once(opened: Open) -> None:
    (dead,) = free_ports(1)
    store = opened(f"etcd://{HOST}:{dead}")
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
        store.get("a")
    assert caught.value.facts["endpoint"] == f"{HOST}:{dead}"
    with store.watch(after=0) as watch, pytest.raises(StoreUnavailableError):
        watch.next(DEADLINE_S)


@contextmanager
def stranger(answer: bytes, *, forever: bytes = b"") -> Iterator[str]:
    """A server that gives every connection this answer, and then `forever`, again and again."""
    ended = threading.Event()
    with socket.create_server((HOST, 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while not ended.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    _answer(connection, answer, forever, ended)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"etcd://{HOST}:{server.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def _answer(connection: socket.socket, answer: bytes, forever: bytes, ended: threading.Event) -> None:
    try:
        connection.recv(65536)
        connection.sendall(answer)
        while forever and not ended.wait(0.05):
            connection.sendall(forever)
    except OSError:
        return


def test_a_server_that_is_no_etcd_is_noticed(opened: Open) -> None:
    answers: list[tuple[bytes, type[TransportError]]] = [
        (b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", ConfigError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", StoreUnavailableError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", StoreUnavailableError),
        (b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\n\r\n", StoreUnavailableError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", StoreUnavailableError),
        (b"", StoreUnavailableError),
    ]
    for answer, error in answers:
        with stranger(answer) as url:
            store = opened(url, timeout_s=1)
            with store.watch(after=0) as watch:
                calls: list[Callable[[], object]] = [
                    partial(store.get, "a"),
                    partial(store.put, "a", b""),
                    partial(store.grant, 5),
                    partial(watch.next, DEADLINE_S),
                ]
                for call in calls:
                    with pytest.raises(TransportError) as caught:
                        call()
                    assert type(caught.value) is error, answer


def test_an_answer_that_drips_is_bounded_by_the_deadline(opened: Open) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    with stranger(head, forever=b" ") as url, pytest.raises(StoreUnavailableError):
        opened(url).get("a", timeout_s=0.5)
