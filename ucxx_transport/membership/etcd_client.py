"""The client of a cluster: TLS, the user's token, and calls that each have one deadline over several endpoints."""

from __future__ import annotations

import json
import math
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import count
from typing import Final, TypeVar

from ucxx_transport.backoff import pause_s
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError
from ucxx_transport.membership.etcd_messages import AUTH_IS_OFF, Json, answer_of, has_no_login
from ucxx_transport.units import Secret

T = TypeVar("T")

_LEAST_S: Final = 0.001
_PIECE_BYTES: Final = 1 << 16
_FIRST_PAUSE_S: Final = 0.05
NO_TOKEN: Final = Secret(b"")


class Connection:
    """A connection to an endpoint, for one request: calls are too rare for keeping any.

    No exception of the libraries is chained to an error of it: their frames hold the token and the password.
    """

    def __init__(self, endpoint: str, tls: ssl.SSLContext | None) -> None:
        self.endpoint = endpoint
        self._http = HTTPConnection(endpoint) if tls is None else HTTPSConnection(endpoint, context=tls)
        self._socket: socket.socket | None = None
        self._response: HTTPResponse | None = None
        self._sent = self._aborted = False
        self._raw = self._text = b""

    def ask(
        self, path: str, body: Json, token: Secret, *, until: float, connect_s: float = math.inf, streams: bool = False
    ) -> Json:
        """The answer, by a time on the monotonic clock; errors of `messages`, and what keeps it from being given.

        One that `streams` messages is {}, once the first has come: `read` brings them.
        """

        def answer() -> Json:
            response = self._post(path, body, token, until, connect_s)
            if not streams or response.status != 200:
                return self._answer(response, until)
            while b"\n" not in self._text:  # which leaves nothing in the library's buffer, where `read` would miss it
                self._decode(response.fp.read1(_PIECE_BYTES))
                self._bound(until)
            return {}

        return self._tried(answer)

    def read(self, until: float) -> list[Json]:
        """The whole messages of a stream that have come by then; a StoreUnavailableError at its end."""
        if b"\n" not in self._text:
            self._tried(partial(self._receive, until))
        *lines, self._text = self._text.split(b"\n")
        return [answer_of(200, line, self.endpoint) for line in lines if line]

    def abort(self) -> None:
        """End the request that is under way in another thread."""
        self._aborted = True
        if self._socket is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # which wakes who reads; TLS's own does not

    def close(self) -> None:
        """End it. Idempotent."""
        if self._response is not None:
            self._response.close()
        self._http.close()

    def _tried(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (OSError, HTTPException) as error:
            failure = self._unreachable(error)
        raise failure

    def _post(self, path: str, body: Json, token: Secret, until: float, connect_s: float) -> HTTPResponse:
        self._http.timeout = max(_LEAST_S, min(connect_s, until - time.monotonic()))
        self._http.connect()
        self._socket = self._http.sock
        if self._aborted:
            raise ConnectionAbortedError("closed in the meantime")
        self._bound(until)
        self._sent = True
        content = json.dumps(body, default=_revealed).encode()
        self._http.request("POST", f"/v3/{path}", content, _headers(path, token))
        self._response = self._http.getresponse()
        return self._response

    def _answer(self, response: HTTPResponse, until: float) -> Json:
        """The answer in the body, which must be whole by then: the socket bounds each of its pieces alone."""
        pieces: list[bytes] = []
        while piece := response.read1(_PIECE_BYTES):
            pieces.append(piece)
            self._bound(until)
        return answer_of(response.status, b"".join(pieces), self.endpoint)

    def _bound(self, until: float) -> None:
        if (left_s := until - time.monotonic()) <= 0:
            raise TimeoutError("the answer was not whole at the deadline")
        if self._socket is not None:
            self._socket.settimeout(left_s)

    def _receive(self, until: float) -> None:
        assert self._socket is not None
        self._socket.settimeout(max(0.0, until - time.monotonic()))
        with suppress(TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            self._decode(self._socket.recv(_PIECE_BYTES))

    def _decode(self, piece: bytes) -> None:
        """Take the text of a stream out of its chunks: the library would wait for the size of the next one."""
        if not piece:
            raise ConnectionResetError("the stream has ended")
        if self._response is None or not self._response.chunked:
            self._text += piece
            return
        self._raw += piece
        while b"\r\n" in self._raw:
            size, _, rest = self._raw.partition(b"\r\n")
            try:
                nbytes = int(size.partition(b";")[0], 16)
            except ValueError:
                raise HTTPException("not a chunk") from None
            if len(rest) < nbytes + 2:
                break
            self._text += rest[:nbytes]
            self._raw = rest[nbytes + 2 :]

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
    """One process's calls to a cluster, none by a proxy. Thread-safe. Arguments and errors as of `EtcdStore`."""

    def __init__(self, endpoints: tuple[str, ...], config: StoreConfig, *, tls: bool) -> None:
        self._endpoints = endpoints
        self.tls = _tls_context(config) if tls or config.ca_file is not None else None
        if self.tls is None and config.cert_file is not None:
            text = "store.cert_file is given, but nothing turns TLS on: write etcds:// or give store.ca_file too"
            raise ConfigError(text, field="cert_file")
        self._user, self._password = config.user or "", config.password or NO_TOKEN
        self._token: Secret | None = None if self._user else NO_TOKEN

    def call(self, path: str, body: Json, *, until: float, repeatable: bool = True) -> Json:
        """The answer of the first endpoint that gives one, until the deadline on the monotonic clock.

        One that is not `repeatable` is not sent again where it is not known whether it was carried out. Raises the
        errors of `messages`, and those of a connection.
        """
        return self.as_user(lambda token: self._ask(path, body, token, until, repeatable=repeatable), until)

    def first(self, ask: Callable[[str, float], T], until: float, *, repeatable: bool = True) -> T:
        """What `ask` returns for the first endpoint that does not fail, given its share of the time in seconds.

        The one that answered last is asked first.
        """
        found: TransportError | None = None
        for step, endpoint in enumerate(endpoints := self._endpoints):
            try:
                return ask(endpoint, max(0.0, until - time.monotonic()) / (len(endpoints) - step))
            except (StoreUnavailableError, ConfigError) as error:
                self.failed(endpoint)
                if found is None or isinstance(error, StoreUnavailableError):
                    found = error  # rather than one that is never tried again: the endpoint may come back
                if not (repeatable or error.facts.get("sent") is False) or time.monotonic() >= until:
                    break
        assert found is not None  # there is an endpoint, and it has not answered
        raise found

    def failed(self, endpoint: str) -> None:
        """Ask another one first from now on."""
        first, *others = self._endpoints
        if first == endpoint:
            self._endpoints = (*others, first)

    def as_user(self, work: Callable[[Secret], T], until: float) -> T:
        """What `work` does with the user's token; done again with a new one while etcd does not know that any more.

        A token ends when its time has run out, when etcd is started again or forgets it, and, in a JWT, with every
        change of users and rights; nothing was carried out then. It is empty without a user, and where etcd asks for
        none. A StorePermissionError: etcd does not know this user with this password.
        """
        facts: Mapping[str, object] = {}
        for attempt in count():
            token = self._token
            if token is None:
                token = self._token = self._logged_in(until)
            try:
                return work(token)
            except StorePermissionError as error:
                if not self._user or not has_no_login(error):
                    raise
                facts = error.facts
            if self._token is token:
                self._token = None
            wait_s = pause_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=1.0) if attempt else 0.0
            if time.monotonic() + wait_s >= until:
                break
            time.sleep(wait_s)
        text = "etcd takes none of the tokens that it gives this user: its members need one key and one clock for JWT"
        raise StoreUnavailableError(text, **facts)

    def _logged_in(self, until: float) -> Secret:
        credentials = {"name": self._user, "password": self._password}
        try:
            answer = self._ask("auth/authenticate", credentials, NO_TOKEN, until, repeatable=True)
        except StoreUnavailableError as error:
            if AUTH_IS_OFF in str(error.facts.get("reason")):
                return NO_TOKEN
            raise
        token = str(answer.get("token", ""))
        if not token.isascii() or not token.isprintable():  # no header can have it
            raise StoreUnavailableError("the answer is not etcd's: no token")
        return Secret(token.encode())

    def _ask(self, path: str, body: Json, token: Secret, until: float, *, repeatable: bool) -> Json:
        def ask(endpoint: str, share: float) -> Json:
            """One endpoint's answer, within its share, or, once connected, all of the time for what is sent once."""
            end = min(until, time.monotonic() + share) if repeatable else until
            with closing(Connection(endpoint, self.tls)) as connection:
                return connection.ask(path, body, token, until=end, connect_s=share)

        return self.first(ask, until, repeatable=repeatable)


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
    field, files = "ca_file", config.ca_file
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            field, files = "cert_file", f"{config.cert_file}, {config.key_file}"
            context.load_cert_chain(config.cert_file, config.key_file)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = f"store.{field} = {files!r} cannot be used for TLS: {reason}"
        raise ConfigError(text, field=field) from error
    return context
