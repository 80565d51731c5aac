"""A ring with its server, real ports, and readers of both kinds, for the end-to-end tests."""

from __future__ import annotations

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

__all__ = ["ServedRing", "client_of", "open_ring", "read_retrying", "served_ring"]

LOOPBACK = "127.0.0.1"


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
    """A ring served on loopback, at one port, unless `server` says otherwise."""
    with ExitStack() as stack:
        opened = stack.enter_context(open_ring(**(ring or {})))
        settings = {"host": LOOPBACK, "ports": 1, "start_timeout_s": 60.0, "stop_timeout_s": 20.0, **server}
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
