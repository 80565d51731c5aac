"""A ring with its server, real ports, and readers of both kinds, for the end-to-end tests."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.waiting import wait_until
from ucxx_transport import (
    ClientConfig,
    Payload,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SlotRef,
    SyncUCXXClient,
    TransportError,
    UCXXServer,
)

__all__ = ["ServedRing", "client_of", "consecutive_free_ports", "open_ring", "read_retrying", "served_ring"]

LOOPBACK = "127.0.0.1"
# Below the kernel's ephemeral ports (32768-60999): nothing that binds port 0 comes in between.
_FIRST_PORT, _LAST_PORT = 20000, 30000


@dataclass(frozen=True, slots=True)
class ServedRing:
    """A ring and the server before it."""

    ring: SharedRingBuffer
    server: UCXXServer


@contextmanager
def open_ring(**settings: Any) -> Iterator[SharedRingBuffer]:
    """A small raw ring, unless `settings` say otherwise."""
    values = {"slots": 8, **settings}
    if "schema" not in values:
        values.setdefault("slot_bytes", 1 << 20)
    with SharedRingBuffer.create(RingConfig(**values)) as ring:
        yield ring


@contextmanager
def served_ring(*, ring: dict[str, Any] | None = None, **server: Any) -> Iterator[ServedRing]:
    """A ring served on loopback; two ports of a process, unless `server` says otherwise."""
    with ExitStack() as stack:
        opened = stack.enter_context(open_ring(**(ring or {})))
        settings = {"host": LOOPBACK, "ports": 2, "start_timeout_s": 60.0, "stop_timeout_s": 20.0, **server}
        serving = stack.enter_context(UCXXServer(opened, ServerConfig(**settings)))
        yield ServedRing(opened, serving)


def client_of(**settings: Any) -> SyncUCXXClient:
    """A blocking client that reads everything over UCX and has time, unless `settings` say otherwise."""
    values = {"local": "off", "deadline_s": 60.0, "connect_timeout_s": 20.0, **settings}
    return SyncUCXXClient(ClientConfig(**values))


def read_retrying(client: SyncUCXXClient, ref: SlotRef, *, deadline_s: float = 5.0) -> Payload:
    """Read as a batch layer does: again and again, for a minute, while the failure is one that passes.

    Args:
        client: who reads. ref: what. deadline_s: of one read.

    Raises:
        TransportError: one that is not retryable.
    """

    def attempt() -> Payload | None:
        try:
            return client.read(ref, deadline_s=deadline_s)
        except TransportError as error:
            if not error.retryable:
                raise
            return None

    payload = wait_until(attempt, 60, what=f"a read of {ref.name} succeeds")
    assert payload is not None
    return payload


def consecutive_free_ports(count: int) -> int:
    """The first of `count` TCP ports in a row that nobody has bound."""
    for _ in range(1000):
        first = random.randrange(_FIRST_PORT, _LAST_PORT - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise AssertionError(f"no {count} free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - what UCX binds
        except OSError:
            return False
        return True
