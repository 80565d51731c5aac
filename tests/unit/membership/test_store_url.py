"""The address of a store as text, and the error for a wrong one."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.support.command_line import call
from tests.support.fake_source import FakeSource
from tests.support.rows import row
from ucxx_transport import Schema, TensorSpec, TrajectoryWriter
from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.membership import HeartbeatPublisher, SourceWatcher, open_store

OFTEN = PublisherConfig(keeper="thread")
ALONE: dict[str, Any] = {
    "schema": Schema([TensorSpec("x", (2,), "float32")]),
    "ring": {"slots": 2},
    "serve": False,
    "publisher": OFTEN,
}

LOCAL = {
    "local:///tmp/s": "/tmp/s",
    "local:///a%20b/%C3%BC": "/a b/ü",
    "local:///a@b": "/a@b",
    "local:///100%25": "/100%",
}
ETCD = {
    "etcd://host": ("host:2379",),
    "etcd://host/": ("host:2379",),
    "etcd://a:1,b.example.org,c_d:003": ("a:1", "b.example.org:2379", "c_d:3"),
    "etcds://[::1],[fe80::2]:9": ("[::1]:2379", "[fe80::2]:9"),
    "etcds://[0:0::1]": ("[::1]:2379",),
    "etcd://10.0.0.1:2379,10.0.0.1": ("10.0.0.1:2379",),
}
WRONG: list[tuple[Any, str]] = [
    ("", "scheme"),
    ("host:2379", "scheme"),
    ("/tmp/store", "scheme"),
    ("http://host:2379", "'http'"),
    ("redis://host", "'redis'"),
    ("local:/tmp/x", "scheme"),
    ("local://tmp/x", "three slashes"),
    ("local:///", "folder"),
    ("local:///tmp/", "folder"),
    ("local:///tmp/x?y", "%3F"),
    ("local:///tmp/%00", "zero byte"),
    ("etcd://", "no host"),
    ("etcd://,", "no host"),
    ("etcd://a,,b", "no host"),
    ("etcd://a:0", "port"),
    ("etcd://a:65536", "port"),
    ("etcd://a:", "port"),
    ("etcd://a:²", "port"),
    ("etcd://a: 1", "port"),
    ("etcd://::1:2379", "brackets"),
    ("etcd://[::1", "brackets"),
    ("etcd://[host]:1", "IPv6"),
    ("etcd://[fe80::1%eth0]:1", "IPv6"),
    ("etcd://a b", "no host"),
    ("etcd://" + "a" * 64, "no host"),
    ("etcd://host/prefix", "namespace"),
    ("etcd://host?x=1", "namespace"),
    (b"etcd://host", "bytes"),
    (None, "no store is named"),
]


def path_of(url: str) -> str:
    """The file that a local store is opened in, whether one can lie there or not."""
    try:
        with open_store(url) as store:
            return unquote(store.url.removeprefix("local://"))
    except ConfigError as error:
        return str(error.facts["path"])


def test_a_local_address_names_a_file() -> None:
    for url, path in LOCAL.items():
        assert path_of(url) == path, url


def test_an_etcd_address_names_endpoints_and_opens_the_same_store_again() -> None:
    for url, endpoints in ETCD.items():
        with open_store(url) as store, open_store(store.url) as again:
            assert again.url == store.url == f"{url.partition(':')[0]}://{','.join(endpoints)}", url


def test_a_wrong_address_says_what_would_be_right() -> None:
    for url, word in WRONG:
        with pytest.raises(ConfigError, match=r"etcd://host:2379") as caught:
            open_store(url)
        assert word in str(caught.value), url


def test_a_secret_in_an_address_is_refused_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("etcd://me:s3cret@host", "redis://me:s3cret@host", "me:s3cret@host", "s3cret@"):
        monkeypatch.setenv("UCXX_TRANSPORT_STORE__URL", url)
        shown = call(capsys, "config")
        assert shown.code == 1
        assert "s3cret" not in shown.out + shown.err, url
        for build in (open_store, StoreConfig, partial(StoreConfig, url=url), SourceWatcher):
            with row(url=url, build=build), pytest.raises(ConfigError) as caught:
                build()
            trace = traceback.TracebackException.from_exception(caught.value)
            assert "s3cret" not in "".join(trace.format()), url
            assert "s3cret" not in repr(caught.value), url
        monkeypatch.delenv("UCXX_TRANSPORT_STORE__URL")
        with pytest.raises(ConfigError) as caught:
            open_store(url)
        assert "s3cret" not in str(caught.value), url
        assert "s3cret" not in repr(caught.value), url


def test_a_store_that_code_does_not_name_is_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    url, other = f"local://{tmp_path}/store.db", f"local://{tmp_path}/other.db"
    uses: dict[str, Callable[[], object]] = {
        "open_store": open_store,
        "watcher": SourceWatcher,
        "publisher": lambda: HeartbeatPublisher(None, "w", FakeSource()),
    }
    for what, use in uses.items():
        with row(what=what), pytest.raises(ConfigError, match=r"store\.url \(UCXX_TRANSPORT_STORE__URL\)"):
            use()
    with TrajectoryWriter("w", **ALONE) as writer:
        assert writer.publisher is None
    toml = tmp_path / "ucxx_transport.toml"
    for setting in ("toml", "environment"):
        toml.write_text(f'[store]\nurl = "{url if setting == "toml" else other}"\nnamespace = "run-7"\n')
        if setting == "environment":
            monkeypatch.setenv("UCXX_TRANSPORT_STORE__URL", url)
        with row(setting=setting), open_store() as store, SourceWatcher() as watcher, open_store(other) as elsewhere:
            assert (store.url, elsewhere.url) == (url, other)
            with TrajectoryWriter("w", **ALONE), HeartbeatPublisher(None, "v", FakeSource(), OFTEN):
                assert [source.worker_id for source in watcher.wait_for(2, 60.0)] == ["v", "w"]
                listed = call(capsys, "registry", "ls", "--json").document
                assert [source["worker_id"] for source in listed["sources"]] == ["v", "w"]
            with TrajectoryWriter("w", store=other, **ALONE) as writer:
                assert writer.publisher is not None
                writer.publisher.wait_published(60.0)
                assert [entry.key for entry in elsewhere.snapshot("sources/")] == ["sources/w"]
