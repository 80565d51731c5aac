"""What is needed to reach a cluster, over httpx: TLS, the user's token, and one request and its answer."""

from __future__ import annotations

import importlib
import json
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Final

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    import httpx

    from ucxx_transport.membership.etcd.messages import Json

__all__ = ["Access", "access", "httpx_module", "load_libraries", "timeouts"]

_HEADERS: Final = {"Content-Type": "application/json"}
_IMPORTED_LATE: Final = ("anyio._backends._asyncio", "concurrent.futures.thread")
_HAS_LEADER: Final = {"Grpc-Metadata-hasleader": "true"}
"""A member that has lost the others ends a watch that has this (clientv3.WithRequireLeader)."""


def httpx_module() -> ModuleType:
    """The httpx package.

    Raises:
        ConfigError: it is not installed; names the extra that brings it.
    """
    try:
        import httpx
    except ImportError as error:
        raise ConfigError("etcd:// needs httpx: pip install 'ucxx_transport[etcd]'", field="url") from error
    return httpx


def load_libraries() -> None:
    """Import everything that requests need, also what would otherwise be imported where it is first used.

    That is in a watch's thread: forked in the middle of such an import, a child waits for it for ever.

    Raises:
        ConfigError: httpx is not installed.
    """
    httpx_module()
    for name in _IMPORTED_LATE:
        with suppress(ImportError):  # these are the libraries' own affair, and may come to be named otherwise
            importlib.import_module(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How requests are made. Proxies of the environment are not asked: a cluster is reached directly.

    Attributes:
        scheme: `http` or `https`.
        tls: what is trusted and shown.
    """

    scheme: str
    tls: ssl.SSLContext | bool

    def request(
        self, endpoint: str, path: str, body: Json, *, token: str, timeouts: Mapping[str, float | None]
    ) -> httpx.Request:
        """A request for `/v3/<path>`.

        Args:
            endpoint: where to.
            path: below `/v3/`.
            body: a JSON object.
            token: of the user; "" for none.
            timeouts: seconds for `connect`, `read`, `write` and `pool`.
        """
        headers = {
            **_HEADERS,
            **({"Authorization": token} if token else {}),
            **(_HAS_LEADER if path == "watch" else {}),
        }
        made: httpx.Request = httpx_module().Request(
            "POST",
            f"{self.scheme}://{endpoint}/v3/{path}",
            headers=headers,
            content=json.dumps(body).encode(),
            extensions={"timeout": dict(timeouts)},
        )
        return made


def access(config: StoreConfig, *, tls: bool) -> Access:
    """The access that the settings describe; `tls`: whether the URL asks for it.

    Raises:
        ConfigError: a file of TLS cannot be used, or TLS is half turned on.
    """
    if not tls and config.ca_file is None:
        if config.cert_file is not None:
            raise ConfigError(
                "store.cert_file is given, but nothing turns TLS on: write etcds:// or give store.ca_file too",
                field="cert_file",
            )
        return Access(scheme="http", tls=False)
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise _unusable("ca_file", config.ca_file, error) from error
    if config.cert_file is not None:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except (OSError, ssl.SSLError) as error:
            raise _unusable("cert_file", f"{config.cert_file}, {config.key_file}", error) from error
    return Access(scheme="https", tls=context)


def timeouts(until: float, share: float) -> dict[str, float]:
    """What httpx may wait for each step of a request.

    Args:
        until: the call's deadline on the monotonic clock.
        share: of what is left, the seconds that connecting may take.
    """
    left_s = max(0.001, until - time.monotonic())
    return {"connect": max(0.001, min(share, left_s)), "read": left_s, "write": left_s, "pool": left_s}


def _unusable(field: str, files: str | None, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"store.{field} = {files!r} cannot be used for TLS: {reason}", field=field)
