"""Processes of the harness, each with a window of requests that it has not answered yet."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["Actor", "Message", "Stage", "StageError"]

Message = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
_READ_BYTES = 1 << 20
_LOOK_S = 0.01
_STDERR_TAIL_BYTES = 4000


class StageError(AssertionError):
    """What should have happened did not; carries the tail of every process's standard error."""


class Actor:
    """One program of `tests.e2e.programs`.

    Args:
        name: for messages and the log file. module: what to run. settings: its first line.
        folder: where its standard error goes.
    """

    def __init__(self, name: str, module: str, settings: Message, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.facts: Message = {}
        self.ready = False
        self.killed = False
        self.outstanding: dict[int, Message] = {}
        self._next_id = 1
        self._partial = b""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._write(settings)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def answers(self) -> int:
        """The descriptor its answers come from."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def request(self, what: str, **facts: object) -> None:
        """Ask for something; `outstanding` holds it until it is answered."""
        number, self._next_id = self._next_id, self._next_id + 1
        message: Message = {"id": number, "what": what, **facts}
        self.outstanding[number] = message
        self._write(message)

    def take_answers(self) -> list[tuple[Message, Message]]:
        """Pairs of request and answer that have come; a line cut short by a kill is dropped with its process."""
        while True:
            try:
                part = os.read(self.answers, _READ_BYTES)
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
                pairs.append((self.outstanding.pop(message["id"]), message))
            else:
                self.ready, self.facts = True, message
        return pairs

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.killed = True
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()

    def close(self) -> None:
        """Let go of its pipes."""
        self.stop()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stderr_tail(self) -> str:
        text = self.log.read_bytes()[-_STDERR_TAIL_BYTES:].decode(errors="replace")
        return (
            f"--- {self.name} (pid {self.pid}, exit {self.process.poll()}): {len(self.outstanding)} unanswered\n{text}"
        )

    def _write(self, message: Message) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: found out by whoever waits for its answers


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

    def spawn(self, kind: str, module: str, settings: Message) -> Actor:
        """Start a program; it counts as present once it is `ready`."""
        self._spawned += 1
        actor = Actor(f"{self._spawned:04}-{kind}", module, settings, self.folder)
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
        actor.kill()
        self._dispatch(actor)
        actor.close()
        self.actors.remove(actor)

    def stop_all(self, deadline_s: float) -> None:
        """Ask all to end, and wait for it.

        Raises:
            StageError: one did not end in time, or not with status 0.
        """
        end = time.monotonic() + deadline_s
        for actor in self.actors:
            actor.stop()
        for actor in self.actors:
            try:
                code = actor.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise self.failure(f"{actor.name} did not end when asked to") from None
            if code != 0:
                raise self.failure(f"{actor.name} ended with status {code}")
        self.abandon()

    def abandon(self) -> None:
        """Leave nothing running, whatever happened."""
        for actor in self.actors:
            actor.kill()
            actor.close()
        self.actors.clear()

    def failure(self, what: str) -> StageError:
        """An error with everything the processes said last."""
        tails: Iterable[str] = (actor.stderr_tail() for actor in self.actors)
        return StageError("\n".join([what, *tails]))

    def _take_answers(self, wait_s: float) -> None:
        by_descriptor = {actor.answers: actor for actor in self.actors}
        readable, _, _ = select.select(list(by_descriptor), [], [], wait_s)
        for descriptor in readable:
            self._dispatch(by_descriptor[descriptor])

    def _dispatch(self, actor: Actor) -> None:
        for request, answer in actor.take_answers():
            self._on_answer(actor, request, answer)
