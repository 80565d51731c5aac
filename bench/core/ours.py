"""This package as a subject: a ring with its server on one side, the public clients on the other."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Literal

from bench.core.control import BenchError
from bench.core.payloads import PayloadPattern
from ucxx_transport import (
    ClientConfig,
    Payload,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    SlotRef,
    SyncUCXXClient,
    UCXXClient,
    UCXXServer,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from bench.core.ends import Held, Offer

__all__ = ["AsyncClientReader", "BlockingReader", "RingSource", "TakingReader"]

HOST: Final = "127.0.0.1"
FILL_TIMEOUT_S: Final = 30.0
DEADLINE_S: Final = 60.0


class RingSource:
    """A worker with a ring that is served.

    Args:
        server: settings of the server, beside the host.
    """

    def __init__(self, server: Mapping[str, Any]) -> None:
        self._config = ServerConfig(host=HOST, **server)
        self._open = ExitStack()
        self._written = 0
        self._spinning = False

    def open(self, *, size_bytes: int, slots: int, on_full: Literal["block", "overwrite"] = "block") -> None:
        """Make a ring of that shape and start its server, in place of the present ones."""
        self.close()
        self._pattern = PayloadPattern(size_bytes)
        # `block`: a payload that was not consumed would stop the benchmark here instead of being overwritten unseen.
        ring_config = RingConfig(slots=slots, slot_bytes=size_bytes, on_full=on_full, block_timeout_s=FILL_TIMEOUT_S)
        self._ring = SharedRingBuffer.create(ring_config)
        self._open.callback(self._ring.unlink)
        self._open.callback(self._ring.close)
        self._server = UCXXServer(self._ring, self._config)
        self._server.start()
        self._open.callback(self._server.stop)

    def fill(self, *, count: int) -> list[Offer]:
        """Write so many payloads."""
        offers = []
        for _ in range(count):
            ref = self._ring.write_raw(self._pattern.payload(self._written).data)
            offers.append((self._written, ref.to_bytes()))
            self._written += 1
        return offers

    def close(self) -> None:
        """End server and ring."""
        self._open.close()

    def connections(self) -> int:
        """How many the server counts."""
        return self._server.statistics().total("connections")

    def spin(self, *, on: bool) -> None:
        """From now on this process's main thread spins in Python between orders, as a busy worker's does."""
        self._spinning = on

    def before_order(self, connection: Connection) -> None:
        """Hold the interpreter until an order has come."""
        if not self._spinning:
            return
        waiter = threading.Thread(target=connection.poll, args=(None,), name="order-waiter")
        waiter.start()
        turns = 0
        while waiter.is_alive():
            turns += 1
        waiter.join()


class _BlockingClient:
    """`SyncUCXXClient`, with its defaults but for what a lane's options say."""

    def open(self, *, size_bytes: int, slots: int, **options: Any) -> None:
        del size_bytes, slots
        self._client = SyncUCXXClient(ClientConfig(deadline_s=DEADLINE_S, **options))

    def resolve(self, reference: bytes) -> SlotRef:
        return SlotRef.from_bytes(reference)

    def close(self) -> None:
        self._client.close()


class BlockingReader(_BlockingClient):
    """Reads by name."""

    def open(self, *, size_bytes: int, slots: int, **options: Any) -> None:
        super().open(size_bytes=size_bytes, slots=slots, **options)
        self.read = self._client.read

    def read_batch(self, references: Sequence[SlotRef]) -> Sequence[Held]:
        came = self._client.read_many(references)
        payloads = [outcome for outcome in came if isinstance(outcome, Payload)]
        if len(payloads) < len(came):
            errors = Counter(repr(outcome) for outcome in came if not isinstance(outcome, Payload))
            raise BenchError(f"{errors.total()} of {len(came)} reads failed: {dict(errors)}")
        return payloads


class TakingReader(_BlockingClient):
    """Takes from the ring: the oldest first, so in the order of the references."""

    def read(self, reference: SlotRef) -> Held:
        [payload] = self._client.take(reference, max_payloads=1, wait_s=DEADLINE_S)
        return payload

    def read_batch(self, references: Sequence[SlotRef]) -> Sequence[Held]:
        came: list[Payload] = []
        while len(came) < len(references):
            came += self._client.take(references[0], max_payloads=len(references) - len(came), wait_s=DEADLINE_S)
        return came


class AsyncClientReader:
    """`UCXXClient`, likewise."""

    async def open(self, *, size_bytes: int, slots: int, **options: Any) -> None:
        del size_bytes, slots
        self._client = await UCXXClient(ClientConfig(deadline_s=DEADLINE_S, **options)).__aenter__()
        self.read = self._client.read

    def resolve(self, reference: bytes) -> SlotRef:
        return SlotRef.from_bytes(reference)

    async def close(self) -> None:
        await self._client.__aexit__(None, None, None)
