"""ray: records of rollouts through Ray, payloads through rings. Needs ray (`pip install 'ucxx_transport[ray]'`)."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from ucxx_transport.config import checked_count, checked_seconds
from ucxx_transport.errors import ConfigError, DeadlineExceededError, PeerLostError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring.segment import host_id, remove_orphan, segment_path
from ucxx_transport.schema.episode_record import EpisodeRecord, several
from ucxx_transport.settings import known_options
from ucxx_transport.teardown import Closing, may_end, refuse_forked
from ucxx_transport.trainer.loss_policy import is_ours, record_of

_log = get_logger(__name__)

_DYING_S = 30.0  # Ray reports a death before the process is gone; on a busy host long before
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCounts:
    """What came of the rollouts that were asked for.

    Attributes:
        asked: rollouts asked for.
        received: those that were answered.
        lost: those of actors that died.
        lost_actors: how many did.
    """

    asked: int
    received: int
    lost: int
    lost_actors: int


class ActorRollouts(Closing, Iterator[Any]):
    """What rollout actors answer, as it comes: each is asked again as soon as it has answered.

    ```python
    with ActorRollouts(actors, lambda actor: actor.play.remote(), in_flight=2) as rollouts:
        for record in rollouts: ...
    ```

    Ray kills actors at the end of a job, and rings stay behind those that it kills: leave the `with`, or call `close`,
    which ends the writer of each actor of a class with `UCXXRolloutMixin`; else it is called at exit.

    An actor that dies costs the rollouts that it had not answered: they are counted, the ring that it left on this host
    is removed with a later answer of another one, and the others go on. What a rollout itself raises is raised here,
    and the actor asked again.

    Args:
        actors: handles.
        ask: asks an actor for one rollout.
        in_flight: rollouts that each actor is asked for at a time.
        timeout_s: how long an answer may take to come.
        replace: called with the handle of an actor that died; gives another one in its place, or None.

    Raises:
        ConfigError: there is no actor, or an argument is wrong.
    """

    @known_options
    def __init__(
        self,
        actors: Sequence[Any],
        ask: Callable[[Any], Any],
        *,
        in_flight: int = 2,
        timeout_s: float | str = 600.0,
        replace: Callable[[Any], Any | None] = lambda _: None,
    ) -> None:
        actors = [*several(actors, "actors")]
        if not actors:
            raise ConfigError("there is no actor to ask; give one or more", field="actors")
        for name, call in (("ask", ask), ("replace", replace)):
            if not callable(call):
                raise ConfigError(f"{name} must be a function of an actor's handle, not {call!r}", field=name)
        self._ask_actor = ask
        self._in_flight = checked_count(in_flight, "in_flight", at_least=1)
        self._timeout_s = checked_seconds(timeout_s, "timeout_s")
        self._replace = replace
        self._actors: list[Any | None] = []
        self._rings: set[Path] = set()
        self._dying_until_s = 0.0
        self._kept: Exception | None = None
        self._stopped = False
        self._pid = os.getpid()
        self._pending: dict[Any, int] = {}
        self._counts = dict.fromkeys(("asked", "received", "lost", "lost_actors"), 0)
        atexit.register(self.close_at_exit)
        for actor in actors:
            self._welcome(actor)

    def __next__(self) -> Any:
        """The next answer, whichever actor it is from.

        Raises:
            StopIteration: after `stop`, when all has been answered.
            PeerLostError: all actors are dead.
            DeadlineExceededError: no answer came for `timeout_s`.
            ray.exceptions.RayTaskError: what the rollout raised.
        """
        refuse_forked(self._pid, "ActorRollouts")
        if self._kept is not None:
            kept, self._kept = self._kept, None
            raise kept
        while self._pending:
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=self._timeout_s)
            if not ready:
                raise DeadlineExceededError(f"no rollout came for {self._timeout_s:g} s", asked=len(self._pending))
            number = self._pending.pop(ready[0])
            try:
                answer = ray.get(ready[0])
            except RayTaskError:  # the rollout's own, whatever it raised
                self._ask(number)
                raise
            except RayActorError as error:
                self._counts["lost"] += 1
                if isinstance(error, ActorDiedError):
                    self._bury(number, error)
                else:
                    self._ask(number)  # out of reach for a while, Ray says
                continue
            self._counts["received"] += 1
            self._note_ring(answer)
            if time.monotonic() < self._dying_until_s:
                self._sweep()
            try:
                self._ask(number)
            except Exception as error:  # noqa: BLE001 - the answer is there: what the next one meets is raised after it
                self._kept = error
            return answer
        if self._stopped:
            raise StopIteration
        self._sweep(self._dying_until_s)
        raise PeerLostError("all rollout actors are dead", lost_actors=self._counts["lost_actors"])

    def take(self, count: int) -> list[Any]:
        """The next `count` answers, or those before an error, which then comes with the next call; errors as `next`."""
        answers: list[Any] = []
        try:
            while len(answers) < count:
                answers.append(next(self))
        except Exception as error:
            if not answers:
                raise
            self._kept = error
        return answers

    def stop(self) -> None:
        """Ask for no more: what is under way still comes, then the iteration ends."""
        self._stopped = True

    @known_options
    def close(self, *, drain_s: float | str = 0.0, timeout_s: float | str = 30.0) -> int:
        """Call `cleanup_ucxx` of every actor that has it, and remove what dead ones left on this host. Idempotent.

        What is under way is dropped: take it first, after `stop`.

        Args:
            drain_s: how long each waits until its payloads have had their readers.
            timeout_s: how long the rollouts under way and the clean-up itself may take beside that.

        Returns:
            How many payloads the actors had left unread.
        """
        drain_s, timeout_s = checked_seconds(drain_s, "drain_s"), checked_seconds(timeout_s, "timeout_s")
        if not may_end(self._pid):
            return 0
        atexit.unregister(self.close_at_exit)
        self.stop()
        self._pending.clear()
        actors, self._actors = self._actors, []
        until_s = time.monotonic() + drain_s + timeout_s
        ends: list[Any] = []
        unread = 0
        for actor in filter(None, actors if ray.is_initialized() else ()):  # else a call would start a cluster
            try:
                ends += [actor.cleanup_ucxx.remote(drain_s=drain_s)] if hasattr(actor, "cleanup_ucxx") else []
            except Exception as error:  # noqa: BLE001 - a bare one, of a handle of a cluster that is gone
                _log.warning("actor_not_cleaned", reason=str(error).partition("\n")[0] or type(error).__name__)
        for end in ends:
            try:
                unread += ray.get(end, timeout=max(0.0, until_s - time.monotonic()))
            except (RayError, TimeoutError) as error:
                _log.warning("actor_not_cleaned", reason=str(error).partition("\n")[0] or type(error).__name__)
        self._sweep(self._dying_until_s)
        return unread

    def statistics(self) -> RolloutCounts:
        """Counts since this was made."""
        return RolloutCounts(**self._counts)

    def close_at_exit(self) -> None:
        """What runs at exit, before Ray's own end, unless `atexit.unregister` is given it: of actors that live on."""
        if may_end(self._pid):
            self.close(timeout_s=10)
            if self._rings:  # of actors that still play
                ray.shutdown()
                self._sweep(time.monotonic() + _DYING_S)

    def _welcome(self, actor: Any) -> None:
        self._actors.append(actor)
        for _ in range(self._in_flight):
            self._ask(len(self._actors) - 1)

    def _ask(self, number: int) -> None:
        actor = self._actors[number]
        if actor is not None and not self._stopped:  # else it answered before it died
            self._pending[self._ask_actor(actor)] = number
            self._counts["asked"] += 1

    def _note_ring(self, answer: object) -> None:
        record = record_of(answer) if is_ours(answer) else None
        if isinstance(record, EpisodeRecord) and record.ref is not None and record.ref.host_id == host_id():
            self._rings.add(segment_path(record.ref.ring_name))

    def _sweep(self, until_s: float = 0.0) -> None:
        """Remove dead actors' rings, since Ray ends an actor's sidecars with it; looks for them until then."""
        while True:
            self._rings = {ring for ring in self._rings if not remove_orphan(ring)}
            if not self._rings or time.monotonic() >= until_s:
                return
            time.sleep(_LOOK_S)

    def _bury(self, number: int, error: RayActorError) -> None:
        dead, self._actors[number] = self._actors[number], None
        if dead is None:
            return  # by another of its rollouts
        self._counts["lost_actors"] += 1
        _log.warning("actor_died", reason=str(error).partition("\n")[0])
        self._dying_until_s = time.monotonic() + _DYING_S
        replacement = None if self._stopped else self._replace(dead)
        if replacement is not None:
            self._welcome(replacement)
