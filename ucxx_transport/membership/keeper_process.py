"""KeeperProcess: the worker's side of the process that keeps its lease."""

from __future__ import annotations

import os
import random
import select
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ucxx_transport.backoff import pause_s
from ucxx_transport.companion import start_companion
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keeper_protocol import END_LINE, KeeperOrder, KeeperReport, lease_line

_log = get_logger(__name__)

# Inside a call of a store that does not answer, or still in its imports, it is killed: it holds nothing.
_END_S: Final = 0.5
_FIRST_PAUSE_S: Final = 1.0
_MOST_PAUSE_S: Final = 60.0
_LONG_LIFE_S: Final = 10.0
"""One that lived this long is replaced at once; of those that die sooner each pauses longer."""
_REPORT_LIMIT_BYTES: Final = 65536


class KeeperProcess:
    """Keeps the leases it is told of, in a process that no blocked interpreter starves. Used by one thread.

    It lives as long as this process and no longer, and ends the lease when this process dies without a word. When it
    dies itself `keeps` starts another: at once, or, while they die as soon as they are started, ever less often.

    Args:
        url: of the store. config: its settings.
        interval_s: how often a lease is renewed.
        clock: monotonic seconds.

    Attributes:
        kept: the lease that it has renewed last, and goes on with.
        restarts: how often another had to be started.
    """

    def __init__(
        self, url: str, config: StoreConfig, *, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._order = KeeperOrder(url=url, config=config, worker_pid=os.getpid(), interval_s=interval_s)
        self._lease_id: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._started_s = 0.0
        self._short_lives = 0
        self._next_start_s = 0.0
        self.restarts = 0
        self.kept: int | None = None

    @property
    def pid(self) -> int | None:
        """The process, None when there is none."""
        return self._process.pid if self._process is not None else None

    @property
    def descriptor(self) -> int | None:
        """Readable when there is something to hear."""
        return self._process.stdout.fileno() if self._process is not None and self._process.stdout else None

    def keep(self, lease_id: int | None) -> None:
        """Keep this lease from now on, or none."""
        self._lease_id, self.kept = lease_id, None
        if self._process is None:
            self._start_when_due()
        else:
            self._write(lease_line(lease_id))

    def keeps(self, lease_id: int) -> bool:
        """Hear what it has said since, and start another if it has died; see `LeaseKeeper`.

        Raises:
            LeaseLostError: the store told it that the lease has ended.
        """
        for report in self._poll():
            if report.lease_id == lease_id and report.word == "lost":
                raise LeaseLostError(report.reason, lease_id=lease_id)
            self.kept = lease_id if report.lease_id == lease_id and report.word == "kept" else None
        return self.kept == lease_id

    def _poll(self) -> list[KeeperReport]:
        self._start_when_due()
        process = self._process
        if process is None or process.stdout is None:
            return []
        reports: list[KeeperReport] = []
        watched = select.poll()
        watched.register(process.stdout, select.POLLIN | select.POLLHUP)
        while watched.poll(0):
            part = os.read(process.stdout.fileno(), _REPORT_LIMIT_BYTES)
            if not part:
                self._bury()
                self._note_death(f"it ended with status {process.returncode}")
                self._start_when_due()
                return []  # what it said is past: its successor looks for itself
            *lines, self._heard = (self._heard + part).split(b"\n")
            reports += [KeeperReport.from_line(line) for line in lines]
        return reports

    def _note_death(self, reason: str) -> None:
        self.kept = None
        self.restarts += 1
        now = self._clock()
        self._short_lives = 0 if now - self._started_s >= _LONG_LIFE_S else self._short_lives + 1
        if self._short_lives > 1:
            jitter = random.random()  # noqa: S311 - spreads those who try
            pause = pause_s(self._short_lives - 1, first_s=_FIRST_PAUSE_S, longest_s=_MOST_PAUSE_S, jitter=jitter)
            self._next_start_s = now + pause
        _log.warning("lease keeper died; starting another", reason=reason, in_s=max(0.0, self._next_start_s - now))

    def _start_when_due(self) -> None:
        """Start another where one is wanted; meanwhile its owner renews."""
        if self._process is not None or self._lease_id is None or self._clock() < self._next_start_s:
            return
        self.start()

    def close(self) -> None:
        """End the process; the lease stays as it is. Bounded; idempotent."""
        if self._process is not None:
            self._write(END_LINE)
            self._bury()

    def start(self) -> None:
        """Start it before it is needed: an interpreter takes a second to be there."""
        self._heard, self._started_s = b"", self._clock()
        try:
            self._process = start_companion("ucxx_transport.membership.keeper_child", stdout=subprocess.PIPE)
        except OSError as error:
            self._note_death(f"no process can be made: {error}")
            return
        self._write(self._order.to_line())
        self._write(lease_line(self._lease_id))

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # it died: `keeps` notices
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _bury(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
