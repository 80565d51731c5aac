"""A core whose reads end as a script says, in virtual time: what a fetch needs of `ClientCore`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from ucxx_transport import Payload, SlotRef, TransportError
from ucxx_transport.link.reactor import Reactor

__all__ = ["FakeCore", "FakeJob"]


def _no_link(_: object) -> NoReturn:
    raise AssertionError("nothing here needs a link")


class FakeJob:
    """See `Job`."""

    def __init__(self, refs: Sequence[SlotRef]) -> None:
        self.refs = refs
        self.outcomes: list[Payload | TransportError | None] = [None] * len(refs)
        self.done = False


class FakeCore:
    """Answers each slot with what its script says, try by try, and with the payload when that is at its end.

    Attributes:
        asked: slots, job by job.
        limits_s: the jobs' time limits.
        began_s: when they began.
        delivered: all payloads.
        abandoned: jobs that were given up.
        raises: what `begin` raises next.
    """

    pid, inherited = os.getpid(), False
    local = SimpleNamespace(host_id="this host")

    def __init__(self, script: dict[int, list[TransportError]] | None = None, *, takes_s: float = 0.0) -> None:
        self.now_s = 1000.0
        self.reactor = Reactor(_no_link, clock=lambda: self.now_s)
        self._script = script or {}
        self._takes_s = takes_s
        self.asked: list[list[int]] = []
        self.limits_s: list[float] = []
        self.began_s: list[float] = []
        self.delivered: list[Payload] = []
        self.abandoned: list[FakeJob] = []
        self.raises: Exception | None = None

    def begin(
        self,
        refs: Sequence[SlotRef],
        deadline_s: float,
        *,
        on_done: Callable[[Any], None],
        on_payload: Callable[[int, Payload], Payload] | None = None,
    ) -> FakeJob:
        if self.raises is not None:
            raise self.raises
        self.asked.append([ref.slot for ref in refs])
        self.limits_s.append(deadline_s)
        self.began_s.append(self.now_s)
        job = FakeJob(refs)
        if self._takes_s:
            self.reactor.call_at(
                self.now_s + min(self._takes_s, deadline_s), lambda: self._end(job, on_done, on_payload)
            )
        else:
            self._end(job, on_done, on_payload)
        return job

    def abandon(self, job: FakeJob) -> None:
        self.abandoned.append(job)
        for outcome in job.outcomes:
            if isinstance(outcome, Payload):
                outcome.release()

    def run(self, until_s: float = math.inf) -> None:
        """Let time pass as far as there is something to be done, or to `until_s` from the start."""
        end_s = 1000.0 + until_s
        while (next_s := self.reactor.next_timer_s) <= end_s and next_s != math.inf:
            self.now_s = max(self.now_s, next_s)
            self.reactor.poll()
        if until_s != math.inf:
            self.now_s = end_s

    def _end(
        self,
        job: FakeJob,
        on_done: Callable[[Any], None],
        on_payload: Callable[[int, Payload], Payload] | None,
    ) -> None:
        if job in self.abandoned:
            return
        for index, ref in enumerate(job.refs):
            outcome = self._answer(ref)
            if isinstance(outcome, Payload):
                self.delivered.append(outcome)
                try:
                    outcome = outcome if on_payload is None else on_payload(index, outcome)
                except TransportError as error:
                    outcome = error
            job.outcomes[index] = outcome
        job.done = True
        on_done(job)

    def _answer(self, ref: SlotRef) -> Payload | TransportError:
        errors = self._script.get(ref.slot)
        return errors.pop(0) if errors else Payload(ref, np.zeros(1, np.uint8), None, "ucx")
