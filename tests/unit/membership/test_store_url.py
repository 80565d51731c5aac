"""The address of a store as text, and the error for a wrong one."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import pytest

from ucxx_transport.errors import ConfigError
from ucxx_transport.membership import open_store

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
    (None, "NoneType"),
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
        with pytest.raises(ConfigError, match=r"local:///abs/path or etcd://host:2379") as caught:
            open_store(url)
        assert word in str(caught.value), url


def test_a_secret_in_an_address_is_refused_and_not_repeated() -> None:
    for url in ("etcd://me:s3cret@host", "redis://me:s3cret@host", "me:s3cret@host", "s3cret@"):
        with pytest.raises(ConfigError) as caught:
            open_store(url)
        assert "s3cret" not in str(caught.value), url
        assert "s3cret" not in repr(caught.value), url
