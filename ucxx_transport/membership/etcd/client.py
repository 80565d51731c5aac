"""The client of a cluster: TLS, the user's token, and calls that each have one deadline over several endpoints."""

from __future__ import annotations

import importlib
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Final

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError
from ucxx_transport.membership.etcd.messages import FAILED_PRECONDITION, EtcdReply, Json, answer_of, is_not_logged_in
from ucxx_transport.settings.fields import Secret

if TYPE_CHECKING:
    import httpx

_HEADERS: Final = {"Content-Type": "application/json"}
_HAS_LEADER: Final = {"Grpc-Metadata-hasleader": "true"}
"""A member that has lost the others ends a watch that has this (clientv3.WithRequireLeader)."""
_IMPORTED_LATE: Final = ("anyio._backends._asyncio", "concurrent.futures.thread")
_IDLE_CONNECTIONS: Final = 8
_IDLE_S: Final = 30.0
_NO_TOKEN: Final = Secret(b"")


def httpx_module() -> ModuleType:
    """The httpx package; a ConfigError, which names the extra that brings it, where it is not installed."""
    try:
        import httpx
    except ImportError as error:
        raise ConfigError("etcd:// needs httpx: pip install 'ucxx_transport[etcd]'", field="url") from error
    return httpx


def load_libraries() -> None:
    """Import everything that requests need, also what would otherwise be imported where it is first used.

    That is in a watch's thread: a child that is forked in the middle of such an import waits for it for ever. Errors as
    `httpx_module`.
    """
    httpx_module()
    for name in _IMPORTED_LATE:
        with suppress(ImportError):  # these are the libraries' own modules, which may be renamed
            importlib.import_module(name)


class Endpoints:
    """The endpoints of a cluster, the one that answered last in front. Shared by threads: one word is written."""

    def __init__(self, endpoints: tuple[str, ...]) -> None:
        self._endpoints = endpoints
        self._good = 0

    def in_turn(self) -> Iterator[tuple[str, int]]:
        """Each endpoint once, with how many come after it."""
        good, count = self._good, len(self._endpoints)
        for step in range(count):
            yield self._endpoints[(good + step) % count], count - 1 - step

    def answered(self, endpoint: str) -> None:
        """Ask this one first from now on."""
        self._good = self._endpoints.index(endpoint)

    def failed(self, endpoint: str) -> None:
        """Ask another one first from now on."""
        if self._endpoints[self._good] == endpoint:
            self._good = (self._good + 1) % len(self._endpoints)


def share_s(left_s: float, others: int) -> float:
    """How long one endpoint may take of the time that is left, when so many others shall have their turn."""
    return max(0.0, left_s) / (others + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a cluster is reached, the same for all processes. Proxies of the environment are not asked."""

    endpoints: Endpoints
    scheme: str
    tls: ssl.SSLContext | bool
    user: str
    password: Secret

    def request(
        self, endpoint: str, path: str, body: Json, *, token: Secret, timeouts: Mapping[str, float | None]
    ) -> httpx.Request:
        """A request for `/v3/<path>`, whose body may have secrets, with timeouts to connect, read, write and pool."""
        made: httpx.Request = httpx_module().Request(
            "POST",
            f"{self.scheme}://{endpoint}/v3/{path}",
            headers={
                **_HEADERS,
                **({"Authorization": token.reveal().decode()} if token != _NO_TOKEN else {}),
                **(_HAS_LEADER if path == "watch" else {}),
            },
            content=json.dumps(body, default=_revealed).encode(),
            extensions={"timeout": dict(timeouts)},
        )
        return made


def access(endpoints: tuple[str, ...], config: StoreConfig, *, tls: bool) -> Access:
    """The access that the URL and the settings describe.

    Raises:
        ConfigError: a file of TLS cannot be used, or TLS is half turned on.
    """
    context: ssl.SSLContext | bool = False
    if tls or config.ca_file is not None:
        context = _tls_context(config)
    elif config.cert_file is not None:
        raise ConfigError(
            "store.cert_file is given, but nothing turns TLS on: write etcds:// or give store.ca_file too",
            field="cert_file",
        )
    return Access(
        endpoints=Endpoints(endpoints),
        scheme="https" if context else "http",
        tls=context,
        user=config.user or "",
        password=config.password or Secret(b""),
    )


class EtcdClient:
    """One process's connections to a cluster. Thread-safe."""

    def __init__(self, access: Access) -> None:
        """Nothing is connected yet."""
        self.access = access
        self.endpoints = access.endpoints
        self._token: Secret | None = None if access.user else _NO_TOKEN
        self._login_lock = threading.Lock()
        self._closed = False
        library = httpx_module()
        limits = library.Limits(max_keepalive_connections=_IDLE_CONNECTIONS, keepalive_expiry=_IDLE_S)
        self._transport: httpx.HTTPTransport = library.HTTPTransport(verify=access.tls, trust_env=False, limits=limits)
        self._errors: tuple[type[Exception], ...] = (library.TransportError, library.StreamError)
        self._unsent: tuple[type[Exception], ...] = (library.ConnectError, library.ConnectTimeout, library.PoolTimeout)

    def call(self, path: str, body: Json, *, until: float, repeatable: bool = True) -> EtcdReply:
        """The answer of the first endpoint that gives one, until the deadline on the monotonic clock.

        One that is not `repeatable` is not sent again where it is not known whether it was carried out. Raises the
        errors of `messages`, and `unreachable`.
        """
        token = self.token(until)
        try:
            return self._ask_in_turn(path, body, token, until, repeatable=repeatable)
        except StorePermissionError as error:
            if not self.access.user or not is_not_logged_in(error):
                raise
        self.forget(token)  # it has run out, or etcd was started again; a refused request was not carried out
        return self._ask_in_turn(path, body, self.token(until), until, repeatable=repeatable)

    def token(self, until: float) -> Secret:
        """The user's token; empty without a user, or where etcd asks for none.

        Raises:
            StorePermissionError: etcd does not know this user with this password.
            StoreUnavailableError: it does not answer.
        """
        token = self._token
        if token is not None:
            return token
        if not self._login_lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreUnavailableError("another thread's login took until the deadline")
        try:
            token = self._token = self._token or self._logged_in(until)
            return token
        finally:
            self._login_lock.release()

    def forget(self, token: Secret) -> None:
        """Log in again before the next call, unless another thread has done so since this token was given."""
        with self._login_lock:
            if self._token == token and self.access.user:
                self._token = None

    def close(self) -> None:
        """Close all connections; a call that is under way ends with an error."""
        self._closed = True
        self._transport.close()

    def _logged_in(self, until: float) -> Secret:
        credentials = {"name": self.access.user, "password": self.access.password}
        try:
            reply = self._ask_in_turn("auth/authenticate", credentials, _NO_TOKEN, until, repeatable=True)
        except StoreUnavailableError as error:
            if error.facts.get("code") == FAILED_PRECONDITION:
                return _NO_TOKEN  # authentication is not turned on
            raise
        token = str(reply.body.get("token", ""))
        if not token.isascii() or not token.isprintable():  # httpx would show it in its error: no header can have it
            raise StoreUnavailableError("the answer is not etcd's: no token")
        return Secret(token.encode())

    def _ask_in_turn(self, path: str, body: Json, token: Secret, until: float, *, repeatable: bool) -> EtcdReply:
        found: TransportError | None = None
        for endpoint, others in self.endpoints.in_turn():
            share = share_s(until - time.monotonic(), others)
            try:
                reply = self._ask(endpoint, path, body, token, until=until, share=share, whole=not repeatable)
            except (StoreUnavailableError, ConfigError) as error:
                self.endpoints.failed(endpoint)
                if found is None or isinstance(error, StoreUnavailableError):
                    found = error  # rather than one that is never tried again: the endpoint may come back
                if not (repeatable or error.facts.get("sent") is False) or time.monotonic() >= until:
                    break
            else:
                self.endpoints.answered(endpoint)
                return reply
        assert found is not None  # there is an endpoint, and it has not answered
        raise found

    def _ask(
        self, endpoint: str, path: str, body: Json, token: Secret, *, until: float, share: float, whole: bool
    ) -> EtcdReply:
        """One endpoint's answer, within its share of the time, or, once connected, the `whole` of it."""
        if self._closed:
            raise ConfigError("the store is closed: open another")
        end = until if whole else min(until, time.monotonic() + share)
        left_s = max(0.001, end - time.monotonic())
        timeouts = {"connect": max(0.001, min(share, left_s)), "read": left_s, "write": left_s, "pool": left_s}
        request = self.access.request(endpoint, path, body, token=token, timeouts=timeouts)
        try:
            response = self._transport.handle_request(request)
            try:
                text = _read(response, end, endpoint)
            finally:
                response.close()
        except self._errors as error:
            failure = unreachable(error, endpoint)
            failure.facts["sent"] = not isinstance(error, self._unsent)
            raise failure from error
        except RuntimeError as error:  # of a pool that is closed while it is used
            if not self._closed:
                raise
            raise StoreUnavailableError("the store was closed in the meantime", endpoint=endpoint) from error
        return answer_of(response.status_code, text, endpoint)


def unreachable(error: Exception, endpoint: str) -> TransportError:
    """The error for a request that httpx could not bring to an answer."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigError(
                "etcd's certificate is not trusted: store.ca_file must hold the authority that signed it, and the "
                "certificate must name the host",
                endpoint=endpoint,
                reason=cause.verify_message,
            )
        cause = cause.__cause__ or cause.__context__
    return StoreUnavailableError(
        "etcd cannot be reached", endpoint=endpoint, reason=type(error).__name__, detail=str(error)
    )


def _read(response: httpx.Response, until: float, endpoint: str) -> bytes:
    """The body, which must be whole by the deadline: httpx bounds each of its pieces alone."""
    pieces: list[bytes] = []
    for piece in response.iter_raw():
        pieces.append(piece)
        if time.monotonic() > until:
            raise StoreUnavailableError("the answer was not whole at the deadline", endpoint=endpoint)
    return b"".join(pieces)


def _revealed(value: object) -> str:
    assert isinstance(value, Secret)
    return value.reveal().decode()


def _tls_context(config: StoreConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise _unusable("ca_file", config.ca_file, error) from error
    if config.cert_file is not None:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except (OSError, ssl.SSLError) as error:
            raise _unusable("cert_file", f"{config.cert_file}, {config.key_file}", error) from error
    return context


def _unusable(field_name: str, files: str | None, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(f"store.{field_name} = {files!r} cannot be used for TLS: {reason}", field=field_name)
