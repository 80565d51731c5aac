"""A connection to an endpoint of etcd, for one request: calls are too rare for keeping any."""

from __future__ import annotations

import json
import math
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Final, TypeVar

from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import ConfigError, StoreUnavailableError, TransportError
from ucxx_transport.membership.etcd_messages import Json, answer_of
from ucxx_transport.units import Secret

T = TypeVar("T")

_LEAST_S: Final = 0.001
_PIECE_BYTES: Final = 1 << 16
NO_TOKEN: Final = Secret(b"")


class Connection:
    """It uses no proxy. It chains no library's exception to an error: their frames hold the token and the password."""

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
        """The answer, by `until` (monotonic); {} of one that `streams` messages, once the first is there for `read`."""

        def answer() -> Json:
            response = self._post(path, body, token, until, connect_s)
            if streams and response.status == 200:
                while b"\n" not in self._text:  # which leaves nothing in the library's buffer, where `read` misses it
                    self._decode(response.fp.read1(_PIECE_BYTES))
                    self._bound(until)
                return {}
            pieces: list[bytes] = []
            while piece := response.read1(_PIECE_BYTES):
                pieces.append(piece)
                if not response.isclosed():  # as the last piece leaves it, from Python 3.13 on
                    self._bound(until)  # of the whole answer: the socket bounds each of its pieces alone
            return answer_of(response.status, b"".join(pieces), self.endpoint)

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
        failure: TransportError
        try:
            return work()
        except ssl.SSLCertVerificationError as error:
            failure = ConfigError(
                "etcd's certificate is not trusted: store.ca_file must hold the authority that signed it, and the "
                "certificate must name the host",
                endpoint=self.endpoint,
                reason=error.verify_message,
            )
        except (OSError, HTTPException) as error:
            why = "etcd does not answer in time" if isinstance(error, TimeoutError) else "etcd cannot be reached"
            facts = {"reason": type(error).__name__, "detail": str(error), "sent": self._sent}
            failure = StoreUnavailableError(why, endpoint=self.endpoint, **facts)
        raise failure

    def _post(self, path: str, body: Json, token: Secret, until: float, connect_s: float) -> HTTPResponse:
        self._http.timeout = max(_LEAST_S, min(connect_s, until - time.monotonic()))
        self._http.connect()
        self._socket = self._http.sock
        if self._aborted:
            raise ConnectionAbortedError("closed in the meantime")
        self._bound(until)
        self._sent = True
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if token != NO_TOKEN:
            headers["Authorization"] = token.reveal().decode()
        if path == "watch":  # a member that has lost the others ends one that has this (clientv3.WithRequireLeader)
            headers["Grpc-Metadata-hasleader"] = "true"
        self._http.request("POST", f"/v3/{path}", json.dumps(body, default=_revealed).encode(), headers)
        self._response = self._http.getresponse()
        return self._response

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


def _revealed(value: object) -> str:
    assert isinstance(value, Secret)
    return value.reveal().decode()


def tls_context(config: StoreConfig, *, is_wanted: bool) -> ssl.SSLContext | None:
    """What `etcds://` (`is_wanted`) or `store.ca_file` turns on; a ConfigError: half of it, or a file of no use."""
    if not is_wanted and config.ca_file is None:
        if config.cert_file is not None:
            text = "store.cert_file is given, but nothing turns TLS on: write etcds:// or give store.ca_file too"
            raise ConfigError(text, field="cert_file")
        return None
    field, files = "ca_file", config.ca_file
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.cert_file is not None:
            field, files = "cert_file", f"{config.cert_file}, {config.key_file}"
            context.load_cert_chain(config.cert_file, config.key_file)
    except OSError as error:  # as ssl's own are
        text = f"store.{field} = {files!r} cannot be used for TLS: {error.strerror or error}"
        raise ConfigError(text, field=field) from error
    return context
