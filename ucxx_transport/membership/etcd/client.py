"""The client of a cluster: TLS, the user's token, and calls that each have one deadline over several endpoints."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Final, TypeVar

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError
from ucxx_transport.membership.etcd.messages import (
    FAILED_PRECONDITION,
    EtcdReply,
    Json,
    answer_of,
    is_not_logged_in,
    parsed,
)
from ucxx_transport.settings.fields import Secret

T = TypeVar("T")

_LEAST_S: Final = 0.001
_PIECE_BYTES: Final = 1 << 16
NO_TOKEN: Final = Secret(b"")


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

    def first(self, ask: Callable[[str, float], T], until: float, *, repeatable: bool = True) -> T:
        """What `ask` returns for the first endpoint that does not fail, given its share of the time in seconds.

        One that is not `repeatable` is not asked of another endpoint where it is not known whether it was carried out.
        """
        found: TransportError | None = None
        for endpoint, others in self.in_turn():
            try:
                answer = ask(endpoint, share_s(until - time.monotonic(), others))
            except (StoreUnavailableError, ConfigError) as error:
                self.failed(endpoint)
                if found is None or isinstance(error, StoreUnavailableError):
                    found = error  # rather than one that is never tried again: the endpoint may come back
                if not (repeatable or error.facts.get("sent") is False) or time.monotonic() >= until:
                    break
            else:
                self.answered(endpoint)
                return answer
        assert found is not None  # there is an endpoint, and it has not answered
        raise found


def share_s(left_s: float, others: int) -> float:
    """How long one endpoint may take of the time that is left, when so many others shall have their turn."""
    return max(0.0, left_s) / (others + 1)


class Connection:
    """A connection to an endpoint, for one request: calls are too rare for keeping any.

    No exception of the libraries is chained to an error of it: their frames hold the token and the password.

    Args:
        endpoint: `host:port`.
        tls: None without.
    """

    def __init__(self, endpoint: str, tls: ssl.SSLContext | None) -> None:
        self.endpoint = endpoint
        self._http = HTTPConnection(endpoint) if tls is None else HTTPSConnection(endpoint, context=tls)
        self._socket: socket.socket | None = None
        self._response: HTTPResponse | None = None
        self._sent = self._aborted = False

    def ask(self, path: str, body: Json, token: Secret, *, until: float, connect_s: float) -> EtcdReply:
        """The answer, by a time on the monotonic clock; errors of `messages`, and what keeps it from being given."""
        response = self._post(path, body, token, until=until, connect_s=connect_s)
        return answer_of(response.status, self._whole(response, until), self.endpoint)

    def stream(self, path: str, body: Json, token: Secret, *, until: float, connect_s: float) -> Iterator[Json]:
        """The objects that the answer streams, one a line: the first by `until`, then until it ends or is cut."""
        response = self._post(path, body, token, until=until, connect_s=connect_s)
        if response.status != 200:
            answer_of(response.status, self._whole(response, until), self.endpoint)
        return self._lines(response)

    def unbounded(self) -> None:
        """Let the stream be silent from now on for as long as it likes."""
        if self._socket is not None:
            self._socket.settimeout(None)

    def abort(self) -> None:
        """Let the request that is under way in another thread fail."""
        self._aborted = True
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # which wakes who reads; TLS's own does not

    def close(self) -> None:
        """End it. Idempotent."""
        if self._response is not None:
            self._response.close()
        self._http.close()

    def _post(self, path: str, body: Json, token: Secret, *, until: float, connect_s: float) -> HTTPResponse:
        try:
            self._http.timeout = max(_LEAST_S, min(connect_s, until - time.monotonic()))
            self._http.connect()
            self._socket = self._http.sock
            if self._aborted:
                raise ConnectionAbortedError("closed in the meantime")
            self._socket.settimeout(max(_LEAST_S, until - time.monotonic()))
            self._sent = True
            content = json.dumps(body, default=_revealed).encode()
            self._http.request("POST", f"/v3/{path}", content, _headers(path, token))
            self._response = self._http.getresponse()
        except (OSError, HTTPException) as error:
            failure = self._unreachable(error)
        else:
            return self._response
        raise failure

    def _whole(self, response: HTTPResponse, until: float) -> bytes:
        """The body, which must be whole by then: the socket bounds each of its pieces alone."""
        assert self._socket is not None
        pieces: list[bytes] = []
        try:
            while piece := response.read1(_PIECE_BYTES):
                pieces.append(piece)
                if time.monotonic() > until:
                    raise TimeoutError("the answer was not whole at the deadline")
                self._socket.settimeout(max(_LEAST_S, until - time.monotonic()))
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from None
        return b"".join(pieces)

    def _lines(self, response: HTTPResponse) -> Iterator[Json]:
        try:
            while (line := response.readline()).endswith(b"\n"):
                if line != b"\n":
                    yield parsed(line, self.endpoint)
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> TransportError:
        """The error for a request that could not be brought to an answer."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return ConfigError(
                "etcd's certificate is not trusted: store.ca_file must hold the authority that signed it, and the "
                "certificate must name the host",
                endpoint=self.endpoint,
                reason=error.verify_message,
            )
        facts = {"endpoint": self.endpoint, "reason": type(error).__name__, "detail": str(error), "sent": self._sent}
        if isinstance(error, TimeoutError):
            return StoreUnavailableError("etcd does not answer in time", **facts)
        return StoreUnavailableError("etcd cannot be reached", **facts)


class EtcdClient:
    """One process's calls to a cluster, none by a proxy. Thread-safe.

    Args:
        endpoints: `host:port` of at least one, in the order in which they are tried.
        config: the user, and the files of TLS.
        tls: whether it is spoken without a `ca_file` too.

    Raises:
        ConfigError: a file of TLS cannot be used, or TLS is half turned on.
    """

    def __init__(self, endpoints: tuple[str, ...], config: StoreConfig, *, tls: bool) -> None:
        self.endpoints = Endpoints(endpoints)
        self.tls = _tls_context(config) if tls or config.ca_file is not None else None
        if self.tls is None and config.cert_file is not None:
            text = "store.cert_file is given, but nothing turns TLS on: write etcds:// or give store.ca_file too"
            raise ConfigError(text, field="cert_file")
        self._user, self._password = config.user or "", config.password or NO_TOKEN
        self._token: Secret | None = None if self._user else NO_TOKEN
        self._login_lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._closed = False

    def call(self, path: str, body: Json, *, until: float, repeatable: bool = True) -> EtcdReply:
        """The answer of the first endpoint that gives one, until the deadline on the monotonic clock.

        One that is not `repeatable` is not sent again where it is not known whether it was carried out. Raises the
        errors of `messages`, and those of a connection.
        """
        return self.as_user(lambda token: self._ask(path, body, token, until, repeatable=repeatable), until)

    def as_user(self, work: Callable[[Secret], T], until: float) -> T:
        """What `work` does with the user's token; done again with a new one where etcd does not know that any more.

        Raises:
            StorePermissionError: etcd does not know this user with this password.
            StoreUnavailableError: it does not answer.
        """
        token = self.token(until)
        try:
            return work(token)
        except StorePermissionError as error:
            if not self._user or not is_not_logged_in(error):
                raise
        with self._login_lock:  # unless another thread has a new one already
            if self._token == token:
                self._token = None
        return work(self.token(until))  # it had run out, or etcd was started again; nothing was carried out

    def token(self, until: float) -> Secret:
        """The user's token; empty without a user, or where etcd asks for none; errors as `as_user`."""
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

    def close(self) -> None:
        """Refuse from now on; a call that is under way ends with an error."""
        self._closed = True
        for connection in tuple(self._connections):
            connection.abort()

    def _logged_in(self, until: float) -> Secret:
        credentials = {"name": self._user, "password": self._password}
        try:
            reply = self._ask("auth/authenticate", credentials, NO_TOKEN, until, repeatable=True)
        except StoreUnavailableError as error:
            if error.facts.get("code") == FAILED_PRECONDITION:
                return NO_TOKEN  # authentication is not turned on
            raise
        token = str(reply.body.get("token", ""))
        if not token.isascii() or not token.isprintable():  # no header can have it
            raise StoreUnavailableError("the answer is not etcd's: no token")
        return Secret(token.encode())

    def _ask(self, path: str, body: Json, token: Secret, until: float, *, repeatable: bool) -> EtcdReply:
        def ask(endpoint: str, share: float) -> EtcdReply:
            """One endpoint's answer, within its share, or, once connected, all of the time for what is sent once."""
            if self._closed:
                raise ConfigError("the store is closed: open another")
            end = min(until, time.monotonic() + share) if repeatable else until
            connection = Connection(endpoint, self.tls)
            self._connections.add(connection)
            try:
                return connection.ask(path, body, token, until=end, connect_s=share)
            finally:
                self._connections.discard(connection)
                connection.close()

        return self.endpoints.first(ask, until, repeatable=repeatable)


def _headers(path: str, token: Secret) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if token != NO_TOKEN:
        headers["Authorization"] = token.reveal().decode()
    if path == "watch":  # a member that has lost the others ends a watch that has this (clientv3.WithRequireLeader)
        headers["Grpc-Metadata-hasleader"] = "true"
    return headers


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
