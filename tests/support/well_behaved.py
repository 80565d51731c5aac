"""A trainer that minds its own business: while others misbehave, every payload must go on to reach it whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e.programs import content
from tests.support.served_ring import ServedRing, client_of, read_retrying
from tests.support.waiting import wait_until

__all__ = ["Trainer", "trainer_at_work"]

STREAM = 77
NBYTES = 50_000


class Trainer:
    """Writes to the ring and reads over UCX, one payload after the other, in a thread of its own."""

    def __init__(self, served: ServedRing, **client: Any) -> None:
        self._served = served
        self._client = client
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="well-behaved")
        self.read = 0

    def start(self) -> None:
        """Begin; returns when it has read its first."""
        self._thread.start()
        self.must_get(1)

    def must_get(self, count: int) -> None:
        """Return when `count` more payloads have come, each of them right."""
        wanted = self.read + count
        wait_until(lambda: self._failure or self.read >= wanted, 60, what="the well-behaved client reads on")
        if self._failure is not None:
            raise AssertionError("the well-behaved client came to harm") from self._failure

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with client_of(connect_timeout_s=1.0, **self._client) as client:
                while not self._stop.is_set():
                    ref = self._served.ring.write_raw(content.make(STREAM, self.read, NBYTES))
                    with read_retrying(client, ref) as payload:
                        wrong = content.mismatch(payload.arrays["data"], STREAM, self.read)
                    assert not wrong, wrong
                    self.read += 1
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: the test raises it
            self._failure = error


@contextmanager
def trainer_at_work(served: ServedRing, **client: Any) -> Iterator[Trainer]:
    """A trainer at work around a block, and five payloads beyond it."""
    trainer = Trainer(served, **client)
    try:
        trainer.start()
        yield trainer
        trainer.must_get(5)
    finally:
        trainer.stop()
