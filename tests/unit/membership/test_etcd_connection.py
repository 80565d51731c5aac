"""A connection to etcd: what a stream brings, however it is cut into pieces on its way."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from contextlib import closing

import pytest

from tests.support.rows import row
from ucxx_transport.membership.etcd_connection import NO_TOKEN, Connection

HEADERS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MESSAGES = 2


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(text), text)


def serve(
    listening: socket.socket, pieces: list[bytes], go_on: threading.Event, tls: ssl.SSLContext | None = None
) -> None:
    """Answer one request in these pieces, and keep the connection."""
    plain, _ = listening.accept()
    with plain if tls is None else tls.wrap_socket(plain, server_side=True) as peer:
        peer.recv(1 << 16)
        for piece in pieces:
            peer.sendall(piece)
        go_on.wait(30.0)


def test_what_comes_of_a_stream_together_with_its_headers_is_there_without_more() -> None:
    first, second = chunk(b'{"result":{"created":true}}\n'), chunk(b'{"result":{"header":{"revision":"7"}}}\n')
    rows = [
        [HEADERS + first + second],
        [HEADERS, first + second],
        [HEADERS + first, second],
        [HEADERS + first[:9], first[9:] + second],
        [HEADERS, *(bytes([byte]) for byte in first + second)],
    ]
    for pieces in rows:
        with row(pieces=pieces), closing(socket.create_server(("127.0.0.1", 0))) as listening:
            go_on = threading.Event()

            thread = threading.Thread(target=serve, args=(listening, pieces, go_on))
            thread.start()
            try:
                with closing(Connection(f"127.0.0.1:{listening.getsockname()[1]}", None)) as connection:
                    until = time.monotonic() + 30.0
                    assert connection.ask("watch", {}, NO_TOKEN, until=until, streams=True) == {}
                    found: list[object] = []
                    while len(found) < MESSAGES:
                        found += connection.read(until)
                    assert connection.read(time.monotonic()) == []
            finally:
                go_on.set()
                thread.join(30.0)


def test_what_tls_has_decrypted_already_is_read_by_a_deadline_that_has_passed() -> None:
    """A message of several records, of which the last ones come to the socket together with the first."""
    trustme = pytest.importorskip("trustme", reason="trustme, of the extra dev, makes the certificates")
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    sent: list[dict[str, object]] = [{"result": {"created": True}}, {"result": {"text": "x" * 100_000}}, {"result": {}}]
    pieces = [HEADERS, *(chunk(json.dumps(message).encode() + b"\n") for message in sent)]
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        go_on = threading.Event()
        thread = threading.Thread(target=serve, args=(listening, pieces, go_on, server))
        thread.start()
        try:
            with closing(Connection(f"127.0.0.1:{listening.getsockname()[1]}", client)) as connection:
                until = time.monotonic() + 30.0
                connection.ask("watch", {}, NO_TOKEN, until=until, streams=True)
                found: list[object] = []
                while len(found) < len(sent):
                    assert time.monotonic() < until
                    found += connection.read(time.monotonic())
                assert found == [message["result"] for message in sent]
        finally:
            go_on.set()
            thread.join(30.0)
