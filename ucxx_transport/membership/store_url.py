"""The address of a store, as text and as what it says.

| text                             | the store                                                        |
|----------------------------------|------------------------------------------------------------------|
| `local://`                       | this user's own file on this machine                             |
| `local:///abs/path`              | that file; percent-encoded where it has a "?", "#" or "%"        |
| `etcd://host:2379,host2,[::1]:1` | etcd at those endpoints, each with port 2379 unless it names one |
| `etcds://…`                      | the same, over TLS                                               |
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import unquote

from ucxx_transport.errors import ConfigError

__all__ = ["EtcdAddress", "EtcdEndpoint", "LocalAddress", "parse_store_url"]

ETCD_PORT: Final = 2379
_HOST: Final = re.compile(r"(?=.{1,253}\.?$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_ENDPOINT: Final = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[^:]*))?")
_REMEDY: Final = "write local://, local:///abs/path or etcd://host:2379"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAddress:
    """A file on this machine.

    Attributes:
        path: the file; None: this user's own.
    """

    path: PurePosixPath | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdEndpoint:
    """One address of an etcd cluster."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAddress:
    """An etcd cluster.

    Attributes:
        endpoints: at least one, in the order in which they are tried.
        tls: whether the URL asks for it.
    """

    endpoints: tuple[EtcdEndpoint, ...]
    tls: bool

    def __str__(self) -> str:
        scheme = "etcds" if self.tls else "etcd"
        return f"{scheme}://{','.join(str(endpoint) for endpoint in self.endpoints)}"


def parse_store_url(url: object) -> LocalAddress | EtcdAddress:
    """What the text says.

    Raises:
        ConfigError: it is no address of a store; names what is wrong and what would be right, and repeats no secret.
    """
    scheme, found, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not found:
        raise _wrong(url, "has no scheme")
    if scheme == "local":
        return _local(url, rest)
    if scheme in {"etcd", "etcds"}:
        return _etcd(url, rest, tls=scheme == "etcds")
    raise _wrong(url, f"has the unknown scheme {scheme!r}")


def _local(url: object, rest: str) -> LocalAddress:
    if not rest:
        return LocalAddress(path=None)
    if not rest.startswith("/"):
        raise _wrong(url, "names a path that is not absolute: three slashes, as in local:///tmp/store.sqlite")
    if "?" in rest or "#" in rest:
        raise _wrong(url, "has a '?' or '#': percent-encode it as %3F or %23 where it is part of the path")
    path = unquote(rest)
    if "\0" in path:
        raise _wrong(url, "names a path with a zero byte")
    if path.endswith("/"):
        raise _wrong(url, "names a folder: add the file's name, as in local:///tmp/store.sqlite")
    return LocalAddress(path=PurePosixPath(path))


def _etcd(url: object, rest: str, *, tls: bool) -> EtcdAddress:
    if "@" in rest:
        raise _wrong(url, "has a user or a password in it: they go into the settings store.user and store.password")
    rest = rest.removesuffix("/")
    if any(mark in rest for mark in "/?#"):
        raise _wrong(url, "has more than endpoints: keys lie below the setting store.namespace")
    endpoints = dict.fromkeys(_endpoint(url, text) for text in rest.split(","))
    return EtcdAddress(endpoints=tuple(endpoints), tls=tls)


def _endpoint(url: object, text: str) -> EtcdEndpoint:
    found = _ENDPOINT.fullmatch(text)
    if found is None:
        raise _wrong(url, f"has the endpoint {text!r}, which is not host:port; IPv6 goes in brackets, as in [::1]:2379")
    port = found["port"] if found["port"] is not None else str(ETCD_PORT)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise _wrong(url, f"has the endpoint {text!r}, whose port is not 1 to 65535")
    host = found["host"]
    if found["six"] is not None:
        try:
            address = ipaddress.IPv6Address(found["six"])
        except ValueError:
            address = None
        if address is None or address.scope_id is not None:
            raise _wrong(url, f"has the endpoint {text!r}, which is no IPv6 address without a zone")
        host = str(address)
    elif not _HOST.fullmatch(host):
        raise _wrong(url, f"has the endpoint {text!r}, which names no host")
    return EtcdEndpoint(host=host, port=int(port))


def _wrong(url: object, problem: str) -> ConfigError:
    return ConfigError(f"The store's address {_shown(url)} {problem}; {_REMEDY}", field="url")


def _shown(url: object) -> str:
    """The address without what stands before an "@": it may be a password."""
    if not isinstance(url, str):
        return f"is of {type(url).__name__} and"
    scheme, found, rest = url.rpartition("://") if "@" in url else ("", "", "")
    return repr(f"{scheme}{found}(hidden)@{rest.rpartition('@')[2]}" if "@" in url else url)
