"""Processes of the harness, each with a window of requests that it has not answered yet."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.soak.nursery import Nursery

__all__ = ["Actor", "Message", "Stage", "StageError"]

Message = dict[str, Any]

_READ_BYTES = 1 << 20
_LOOK_S = 0.01
_STDERR_TAIL_BYTES = 4000
KILL_LIMIT_S = 60.0


class StageError(AssertionError):
    """What should have happened did not; carries the tail of every process's standard error."""


class Actor:
    """One program of `tests.e2e.programs`.

    Args:
        name: for messages and the log file. module: what to run. settings: its first line.
        folder: where its standard error goes. nursery: starts it.
    """

    def __init__(self, name: str, module: str, settings: Message, folder: Path, nursery: Nursery) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.facts: Message = {}
        self.ready = False
        self.unanswered: dict[int, Message] = {}
        self._next_id = 1
        self._partial = b""
        with self.log.open("ab") as log:
            self.process = nursery.start(module, log)
        os.set_blocking(self.process.stdout, False)
        self._write(settings)

    def request(self, what: str, **facts: object) -> None:
        """Ask for something; `unanswered` holds it until it is answered."""
        number, self._next_id = self._next_id, self._next_id + 1
        message: Message = {"id": number, "what": what, **facts}
        self.unanswered[number] = message
        self._write(message)

    def take_answers(self) -> list[tuple[Message, Message]]:
        """Pairs of request and answer that have come; a line cut short by a kill is dropped with its process."""
        while True:
            try:
                part = os.read(self.process.stdout, _READ_BYTES)
            except BlockingIOError:
                break
            if not part:
                break
            self._partial += part
        *lines, self._partial = self._partial.split(b"\n")
        pairs = []
        for line in lines:
            message = json.loads(line)
            if "id" in message:
                pairs.append((self.unanswered.pop(message["id"]), message))
            else:
                self.ready, self.facts = True, message
        return pairs

    def stderr_tail(self) -> str:
        text = self.log.read_bytes()[-_STDERR_TAIL_BYTES:].decode(errors="replace")
        state = f"pid {self.process.pid}, exit {self.process.poll()}, {len(self.unanswered)} requests unanswered"
        return f"--- {self.name}: {state}\n{text}"

    def _write(self, message: Message) -> None:
        with suppress(BrokenPipeError):  # it died: found out where its answers are waited for
            os.write(self.process.stdin, json.dumps(message).encode() + b"\n")


class Stage:
    """Runs actors: hands out work, takes answers, notices who died unasked.

    Args:
        folder: for the actors' logs.
        hand_out: called before each wait; sends what there is to send.
        on_answer: gets each answer with its request.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hand_out: Callable[[], None],
        on_answer: Callable[[Actor, Message, Message], None],
    ) -> None:
        self.folder = folder
        self.actors: list[Actor] = []
        self._hand_out = hand_out
        self._on_answer = on_answer
        self._spawned = 0
        self._nursery = Nursery()

    def spawn(self, kind: str, module: str, settings: Message) -> Actor:
        """Start a program; it counts as present once it is `ready`."""
        self._spawned += 1
        actor = Actor(f"{self._spawned:04}-{kind}", module, settings, self.folder, self._nursery)
        self.actors.append(actor)
        return actor

    def run_until(self, reached: Callable[[], object], deadline_s: float, what: str) -> None:
        """Keep all actors busy until `reached()`.

        Raises:
            StageError: not in time, or an actor died.
        """
        end = time.monotonic() + deadline_s
        while not reached():
            if time.monotonic() > end:
                raise self.failure(f"not within {deadline_s} s: {what}")
            self._hand_out()
            self._take_answers(_LOOK_S)
            for actor in self.actors:
                if actor.process.poll() is not None:
                    raise self.failure(f"{actor.name} died by itself while waiting: {what}")

    def kill(self, actor: Actor) -> None:
        """SIGKILL an actor; what it had said before still counts."""
        actor.process.kill(KILL_LIMIT_S)
        self._dispatch(actor)
        actor.process.close()
        self.actors.remove(actor)

    def stop_all(self, deadline_s: float) -> None:
        """Ask all to end, and wait for it.

        Raises:
            StageError: one did not end in time, or not with status 0.
        """
        end = time.monotonic() + deadline_s
        for actor in self.actors:
            actor.process.end_input()
        for actor in self.actors:
            code = actor.process.wait(max(0.1, end - time.monotonic()))
            if code is None:
                raise self.failure(f"{actor.name} did not end when asked to")
            if code != 0:
                raise self.failure(f"{actor.name} ended with status {code}")
        self.abandon()

    def abandon(self) -> None:
        """Leave nothing running, whatever happened."""
        for actor in self.actors:
            actor.process.kill(KILL_LIMIT_S)
            actor.process.close()
        self.actors.clear()

    def close(self) -> None:
        """`abandon()`, and the end of the nursery."""
        self.abandon()
        self._nursery.close()

    def failure(self, what: str) -> StageError:
        """An error with everything the processes said last."""
        tails: Iterable[str] = (actor.stderr_tail() for actor in self.actors)
        return StageError("\n".join([what, *tails]))

    def _take_answers(self, wait_s: float) -> None:
        by_descriptor = {actor.process.stdout: actor for actor in self.actors}
        readable, _, _ = select.select(list(by_descriptor), [], [], wait_s)
        for descriptor in readable:
            self._dispatch(by_descriptor[descriptor])

    def _dispatch(self, actor: Actor) -> None:
        for request, answer in actor.take_answers():
            self._on_answer(actor, request, answer)
