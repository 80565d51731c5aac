"""A store by its URL, which an error repeats without any secret."""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.machine import NO_SQLITE, check_file_name
from ucxx_transport.membership.store import Store
from ucxx_transport.settings import made_of

ETCD_PORT: Final = 2379
_HOST: Final = re.compile(r"(?=.{1,253}\.?$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_ENDPOINT: Final = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[0-9]{1,5}))?")


def open_store(url: str | None = None, config: StoreConfig | Mapping[str, object] | None = None) -> Store:
    """The store that membership is kept in. Close it, or use `with`.

    Args:
        url: for the processes of one machine `local://`, this user's own file, or `local:///abs/path`, percent-encoded
            where it has a "?", "#" or "%"; for several machines `etcd://host:2379,host2,[::1]:1`, each with port 2379
            unless it names one, or `etcds://…`, over TLS; None: `store.url`.
        config: its settings, a dict or a `StoreConfig`; None: those of the environment and the file.

    Raises:
        ConfigError: the URL or a setting is wrong, there is no URL, or a local store's interpreter has no sqlite3.
        StorePermissionError: the file of a local store is not this user's to use.
    """
    settings = made_of(StoreConfig, config, "config")
    named: object = settings.url if url is None else url
    if named is None:
        text = "no store is named: give its URL, or set store.url (UCXX_TRANSPORT_STORE__URL), such as etcd://host:2379"
        raise ConfigError(text, field="url")
    scheme, place = parse_store_url(named)
    if scheme != "local":
        from ucxx_transport.membership.etcd_store import EtcdStore

        return EtcdStore(place, settings, tls=scheme == "etcds")
    try:
        from ucxx_transport.membership.local_store import LocalStore
    except ImportError as error:
        if "sqlite3" not in str(error):
            raise
        raise ConfigError(NO_SQLITE, python=sys.executable, reason=str(error)) from error
    return LocalStore(place, settings)


def parse_store_url(url: object) -> tuple[str, Any]:
    """The scheme, and a path (None: this user's own) or each endpoint once; a ConfigError: it is no URL of a store."""
    scheme, found, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not isinstance(url, str) or not found or "@" in scheme:
        raise _wrong(url, "has no scheme")
    if scheme == "local":
        return scheme, _path(url, rest) if rest else None
    if scheme not in {"etcd", "etcds"}:
        raise _wrong(url, f"has the unknown scheme {scheme!r}")
    if "@" in rest:
        raise _wrong(url, "has a user or a password in it: they go into the settings store.user and store.password")
    rest = rest.removesuffix("/")
    if any(mark in rest for mark in "/?#"):
        raise _wrong(url, "has more than endpoints: keys lie below the setting store.namespace")
    return scheme, tuple(dict.fromkeys(_endpoint(url, text) for text in rest.split(",")))


def _path(url: str, rest: str) -> Path:
    path = unquote(rest)
    for is_wrong, problem in (
        (not path.startswith("/"), "names a path that is not absolute: three slashes, as in local:///tmp/job.store"),
        ("?" in rest or "#" in rest, "has a '?' or '#': percent-encode it as %3F or %23 where it is part of the path"),
        ("\0" in path, "names a path with a zero byte"),
        (path.endswith("/"), "names a folder: add the file's name, as in local:///tmp/job.store"),
    ):
        if is_wrong:
            raise _wrong(url, problem)
    check_file_name(path)
    return Path(path)


def _endpoint(url: str, text: str) -> str:
    found = _ENDPOINT.fullmatch(text)
    if found is None or not 0 < (port := int(found["port"] or ETCD_PORT)) < 65536:
        problem = "host:port, with a port from 1 to 65535; IPv6 goes in brackets, as in [::1]:2379"
        raise _wrong(url, f"has the endpoint {text!r}, which is not {problem}")
    if found["six"] is not None:
        with suppress(ValueError):
            address = ipaddress.IPv6Address(found["six"])
            if address.scope_id is None:
                return f"[{address}]:{port}"
        raise _wrong(url, f"has the endpoint {text!r}, which is no IPv6 address without a zone")
    if not _HOST.fullmatch(found["host"]):
        raise _wrong(url, f"has the endpoint {text!r}, which names no host")
    return f"{found['host']}:{port}"


def _wrong(url: object, problem: str) -> ConfigError:
    shown = f"is of {type(url).__name__} and"
    if isinstance(url, str):
        _, mark, rest = url.rpartition("@")  # what comes before it may be a password
        shown = repr(f"(hidden)@{rest}" if mark else rest)
    remedy = "write local://, local:///abs/path or etcd://host:2379"
    return ConfigError(f"The store's address {shown} {problem}; {remedy}", field="url")
