"""Calls of a cluster: each under one deadline, over several endpoints, with a token that is renewed when refused."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError, TransportError
from ucxx_transport.membership.etcd.access import Access, httpx_module, timeouts
from ucxx_transport.membership.etcd.endpoints import Endpoints, share_s
from ucxx_transport.membership.etcd.failures import (
    FAILED_PRECONDITION,
    NOT_LOGGED_IN,
    code_of,
    refusal,
    unreachable,
)
from ucxx_transport.membership.etcd.messages import Json, Reply, parsed

if TYPE_CHECKING:
    import httpx

__all__ = ["Caller", "Login", "answer_of", "is_not_logged_in"]

_IDLE_CONNECTIONS: Final = 8
_IDLE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """A user of etcd."""

    name: str
    password: str = field(repr=False)


class Caller:
    """One process's connections to a cluster. Thread-safe."""

    def __init__(self, access: Access, endpoints: Endpoints, login: Login | None) -> None:
        self.access = access
        self.endpoints = endpoints
        self._login = login
        self._token: str | None = None if login else ""
        self._login_lock = threading.Lock()
        self._closed = False
        library = httpx_module()
        limits = library.Limits(max_keepalive_connections=_IDLE_CONNECTIONS, keepalive_expiry=_IDLE_S)
        self._transport: httpx.HTTPTransport = library.HTTPTransport(verify=access.tls, trust_env=False, limits=limits)
        self._errors: tuple[type[Exception], ...] = (library.TransportError, library.StreamError)
        self._unsent: tuple[type[Exception], ...] = (library.ConnectError, library.ConnectTimeout, library.PoolTimeout)

    def call(self, path: str, body: Json, *, until: float, repeatable: bool = True) -> Reply:
        """The answer of the first endpoint that gives one.

        Args:
            path: below `/v3/`.
            body: the request.
            until: the deadline, on the monotonic clock.
            repeatable: whether it may be sent again where it is not known whether it was carried out.

        Raises:
            TransportError: see `failures`.
        """
        token = self.token(until)
        try:
            return self._ask_in_turn(path, body, token, until, repeatable=repeatable)
        except StorePermissionError as error:
            if not self._login or not is_not_logged_in(error):
                raise
        self.forget(token)  # it has run out, or etcd was started again; a refused request was not carried out
        return self._ask_in_turn(path, body, self.token(until), until, repeatable=repeatable)

    def token(self, until: float) -> str:
        """The user's token; "" without a user, or where etcd asks for none.

        Raises:
            StorePermissionError: etcd does not know this user with this password.
            StoreUnavailableError: it does not answer.
        """
        if self._token is not None or self._login is None:
            return self._token or ""
        if not self._login_lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreUnavailableError("another thread's login took until the deadline")
        try:
            if self._token is None:
                self._token = self._logged_in(self._login, until)
            return self._token
        finally:
            self._login_lock.release()

    def forget(self, token: str) -> None:
        """Log in again before the next call, unless somebody has done so since this token was given."""
        with self._login_lock:
            if self._token == token and self._login is not None:
                self._token = None

    def close(self) -> None:
        """Close all connections; a call that is under way ends with an error."""
        self._closed = True
        self._transport.close()

    def _logged_in(self, login: Login, until: float) -> str:
        credentials = {"name": login.name, "password": login.password}
        try:
            reply = self._ask_in_turn("auth/authenticate", credentials, "", until, repeatable=True)
        except StoreUnavailableError as error:
            if error.facts.get("code") == FAILED_PRECONDITION:
                return ""  # authentication is not turned on
            raise
        return str(reply.body.get("token", ""))

    def _ask_in_turn(self, path: str, body: Json, token: str, until: float, *, repeatable: bool) -> Reply:
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
        self, endpoint: str, path: str, body: Json, token: str, *, until: float, share: float, whole: bool
    ) -> Reply:
        """One endpoint's answer, within its share of the time, or, once connected, the `whole` of it."""
        if self._closed:
            raise ConfigError("the store is closed: open another")
        end = until if whole else min(until, time.monotonic() + share)
        request = self.access.request(endpoint, path, body, token=token, timeouts=timeouts(end, share))
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
        except RuntimeError as error:  # what a pool says that is closed while it is used
            if not self._closed:
                raise
            raise StoreUnavailableError("the store was closed meanwhile", endpoint=endpoint) from error
        return answer_of(response.status_code, text, endpoint)


def answer_of(status: int, text: bytes, endpoint: str) -> Reply:
    """The answer in a response.

    Raises:
        TransportError: it is none: see `failures.refusal`.
    """
    if status != 200:
        try:
            body = parsed(text, endpoint)
        except StoreUnavailableError:
            body = {}
        raise refusal(status, body, endpoint)
    body = parsed(text, endpoint)
    if code_of(body):
        raise refusal(status, body, endpoint)
    return Reply(body.get("result", body))


def is_not_logged_in(error: TransportError) -> bool:
    """Whether etcd asks for a token, or for another one."""
    return error.facts.get("code") in NOT_LOGGED_IN


def _read(response: httpx.Response, until: float, endpoint: str) -> bytes:
    """The body, which must be whole by the deadline: httpx bounds each of its pieces alone."""
    pieces: list[bytes] = []
    for piece in response.iter_raw():
        pieces.append(piece)
        if time.monotonic() > until:
            raise StoreUnavailableError("the answer was not whole at the deadline", endpoint=endpoint)
    return b"".join(pieces)
