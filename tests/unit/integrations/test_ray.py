"""What becomes of rollout actors' rings when a job ends, on a stand-in for Ray."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from ucxx_transport import ConfigError, PeerLostError, UCXXRolloutMixin
from ucxx_transport.ring.segment import segment_path

OURS = "ucxx_transport.integrations.ray"


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class RayActorError(RayError):
    pass


class ActorDiedError(RayActorError):
    pass


def get(call: Callable[[], Any], timeout: float | None = None) -> Any:
    del timeout
    return call()


def wait(calls: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
    return calls[:1], calls[1:]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration over a Ray whose references are calls that `get` makes."""
    ray, exceptions = ModuleType("ray"), ModuleType("ray.exceptions")
    vars(ray).update(get=get, wait=wait, is_initialized=lambda: True, exceptions=exceptions)
    for error in (RayError, RayTaskError, RayActorError, ActorDiedError):
        setattr(exceptions, error.__name__, error)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    monkeypatch.delitem(sys.modules, OURS, raising=False)  # one over the real Ray comes back afterwards
    yield importlib.import_module(OURS)
    sys.modules.pop(OURS)


class Rollouts(UCXXRolloutMixin):
    """A rollout worker, with or without the mixin's calls in its handle."""

    def __init__(self, name: str) -> None:
        self.setup_ucxx(name, serve=False, ring={"slots": 32})

    def play(self) -> dict[str, object]:
        return self.write_to_buffer({"obs": np.zeros(4, "f4")})


class Handle:
    """An actor's handle: each method has `remote`. A dead one answers everything by its death."""

    def __init__(self, actor: Rollouts) -> None:
        self.is_dead = False
        for name in ("play", "cleanup_ucxx"):
            setattr(self, name, SimpleNamespace(remote=self._remote(getattr(actor, name))))

    def _remote(self, method: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
        def remote(**arguments: Any) -> Callable[[], Any]:
            def call() -> Any:
                if self.is_dead:
                    raise ActorDiedError
                return method(**arguments)

            return call

        return remote


def rings_of(records: Iterator[Any]) -> set[Path]:
    return {segment_path(record["ref"]["ring_name"]) for record in records}


def test_a_job_that_ends_leaves_no_ring_behind(ours: Any) -> None:
    handles = [Handle(Rollouts(f"worker-{number}")) for number in range(2)]
    with ours.ActorRollouts(handles, lambda actor: actor.play.remote(), in_flight=2) as rollouts:
        rings = rings_of(iter(rollouts.take(4)))
        rollouts.stop()
        rings |= rings_of(rollouts)
        assert len(rings) == 2
        assert all(ring.exists() for ring in rings)
        found = rollouts.statistics()
        assert found.asked == found.received == 8
        assert rollouts.close() == 8
    assert not any(ring.exists() for ring in rings)
    with pytest.raises(StopIteration):
        next(rollouts)


def test_actors_that_died_or_have_no_writer_of_ours_keep_no_job_from_its_end(
    ours: Any, log_events: list[MutableMapping[str, Any]]
) -> None:
    actors = [Rollouts(f"worker-{number}") for number in range(2)]
    handles: list[Any] = [*map(Handle, actors), SimpleNamespace(play=vars(Handle(actors[0]))["play"])]
    rollouts = ours.ActorRollouts(handles, lambda actor: actor.play.remote(), in_flight=1)
    rollouts.take(3)
    handles[1].is_dead = True
    assert rollouts.close() > 0
    assert [event["event"] for event in log_events] == ["actor_not_cleaned"]
    assert actors[0].ucxx_writer is None
    actors[1].cleanup_ucxx()


def test_a_forked_child_neither_asks_nor_ends_what_is_its_parent_s(ours: Any) -> None:
    with ours.ActorRollouts([Handle(Rollouts("worker"))], lambda actor: actor.play.remote()) as rollouts:
        child = os.fork()
        if child == 0:
            try:
                next(rollouts)
            except ConfigError as error:
                rollouts.close()
                os._exit("forked" in error.message)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert next(rollouts)["sequence"] == 0


def test_what_a_driver_s_exit_calls_can_be_left_out_by_name_and_is_left_out_after_a_close(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    with ours.ActorRollouts([Handle(Rollouts("worker"))], lambda actor: actor.play.remote()) as rollouts:
        assert rollouts.close_at_exit in at_exit
    assert rollouts.close_at_exit not in at_exit


def test_what_cannot_be_asked_is_refused_where_it_is_made(ours: Any) -> None:
    handle = object()
    for given, words in (
        ({"actors": handle}, r"actors must be a list, not an object; give a list: \[actor\]"),
        ({"actors": []}, "there is no actor to ask"),
        ({"ask": "play"}, "ask must be a function of an actor's handle, not 'play'"),
        ({"replace": None}, "replace must be a function of an actor's handle, not None"),
        ({"in_flight": 0}, "in_flight must be a whole number, at least 1, not 0"),
        ({"in_flight": "2"}, "in_flight must be a whole number, at least 1, not '2'"),
        ({"timeout_s": "soon"}, "timeout_s = 'soon'"),
        ({"inflight": 2}, "Unknown option of ActorRollouts 'inflight'; did you mean 'in_flight'"),
    ):
        with row(given=given), pytest.raises(ConfigError, match=words):
            ours.ActorRollouts(**{"actors": [handle], "ask": id, **given})


def test_actors_that_all_died_are_no_end_that_was_asked_for(ours: Any) -> None:
    handle = Handle(actor := Rollouts("worker"))
    rollouts = ours.ActorRollouts([handle], lambda actor: actor.play.remote())
    handle.is_dead = True
    with pytest.raises(PeerLostError):
        next(rollouts)
    actor.cleanup_ucxx()
