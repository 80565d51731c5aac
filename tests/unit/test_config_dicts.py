"""Whatever takes settings takes them as a dict too, and says what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ucxx_transport import (
    ConfigError,
    EpisodeStream,
    HeartbeatPublisher,
    RankGroup,
    RingConfig,
    RolloutFeed,
    SharedRingBuffer,
    SyncUCXXClient,
    TrajectoryWriter,
    UCXXClient,
    UCXXServer,
    open_store,
)
from ucxx_transport.membership.local_store import LocalStore
from ucxx_transport.server import RingSource


class Taker(NamedTuple):
    """What takes settings, those that it takes, a misspelt one with the right name, and the argument's name."""

    name: str
    make: Callable[[Path, Any], object]
    settings: dict[str, object]
    misspelt: str
    meant: str
    argument: str = "config"


@contextmanager
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as made:
        yield made


def _create(_: Path, settings: Any) -> int:
    with SharedRingBuffer.create(settings) as made:
        return made.slots


def _serve(_: Path, settings: Any) -> None:
    with ring() as made:
        UCXXServer(made, settings)


def _publish(folder: Path, settings: Any, argument: str = "config") -> None:
    with ring() as made:
        publisher: Any = HeartbeatPublisher
        publisher(f"local://{folder}/store", "worker-0", RingSource(made), **{argument: settings}).stop()


def _join(folder: Path, settings: Any) -> None:
    group: Any = RankGroup
    with open_store(f"local://{folder}/store") as store:
        group(store, "trainers", 0, config=settings)


def _stream(_: Path, settings: Any) -> None:
    with EpisodeStream([], settings):
        pass


TAKERS = [
    Taker("SyncUCXXClient", lambda _, given: SyncUCXXClient(given).close(), {"local": "off"}, "locl", "local"),
    Taker("UCXXClient", lambda _, given: UCXXClient(given), {"deadline_s": "2s"}, "deadlin_s", "deadline_s"),
    Taker("UCXXServer", _serve, {"ports": 1, "mode": "thread"}, "prots", "ports"),
    Taker("SharedRingBuffer.create", _create, {"slots": 2, "slot_bytes": "4KiB"}, "slot_byte", "slot_bytes"),
    Taker("RolloutFeed", lambda _, given: RolloutFeed(given).close(), {"local": "off"}, "locl", "local"),
    Taker("EpisodeStream", _stream, {"local": "off"}, "locl", "local"),
    Taker(
        "TrajectoryWriter",
        lambda _, given: TrajectoryWriter("w", serve=False, server=given).close(),
        {"ports": 1},
        "prots",
        "ports",
        "server",
    ),
    Taker("HeartbeatPublisher", _publish, {"keeper": "thread"}, "keper", "keeper"),
    Taker(
        "HeartbeatPublisher's store",
        lambda folder, given: _publish(folder, given, "store_config"),
        {"namespace": "one"},
        "namespce",
        "namespace",
        "store_config",
    ),
    Taker("RankGroup", _join, {"keeper": "thread"}, "keper", "keeper"),
    Taker(
        "open_store",
        lambda folder, given: open_store(f"local://{folder}/store", given).close(),
        {"namespace": "one"},
        "namespce",
        "namespace",
    ),
]


@pytest.mark.parametrize("taker", TAKERS, ids=[taker.name for taker in TAKERS])
def test_settings_may_be_a_dict(taker: Taker, tmp_path: Path) -> None:
    taker.make(tmp_path, taker.settings)
    with pytest.raises(ConfigError, match=f"did you mean '{taker.meant}'"):
        taker.make(tmp_path, {**taker.settings, taker.misspelt: 1})
    with pytest.raises(ConfigError, match=f"{taker.argument} takes a [A-Z][a-z]+Config, or a dict .*, not int"):
        taker.make(tmp_path, 4)


def test_the_settings_of_a_dict_are_in_force(tmp_path: Path) -> None:
    with SyncUCXXClient({"local": "off", "deadline_s": "2s"}) as client:
        assert (client.config.local, client.config.deadline_s) == ("off", 2.0)
    assert _create(tmp_path, {"slots": 3, "slot_bytes": 64}) == 3
    with open_store(f"local://{tmp_path}/store", {"namespace": "one"}) as store:
        assert isinstance(store, LocalStore)
        assert store.namespace.root == b"/ucxx_transport/one/"
