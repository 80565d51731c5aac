"""Episodes as a torch dataset; runs where torch is installed (`pip install '.[torch]'`)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.support.one_for_many import one_for_many
from tests.support.rows import row
from ucxx_transport import ClientConfig, ConfigError, RingConfig, Schema, SharedRingBuffer, SlotState
from ucxx_transport.schema.episode_record import EpisodeRecord

torch: Any = pytest.importorskip("torch", exc_type=ImportError)

from ucxx_transport.integrations.torch import EpisodeDataset, _check_room  # noqa: E402 - they need torch

EPISODE = {"obs": np.zeros((3, 2), np.float32), "reward": np.zeros(3, np.float32)}
LOCAL = ClientConfig(local="view")


def written(ring: SharedRingBuffer, count: int) -> list[Any]:
    return [
        ring.write({"obs": np.full((3, 2), number, np.float32), "reward": np.full(3, -number, np.float32)})
        for number in range(count)
    ]


@pytest.fixture
def ring() -> Any:
    config = RingConfig(slots=16, schema=Schema.from_example(EPISODE), on_full="raise")
    with SharedRingBuffer.create(config) as ring:
        yield ring


def test_a_data_loader_gives_episodes_as_tensors(ring: SharedRingBuffer) -> None:
    dataset: Any = EpisodeDataset(written(ring, 5), LOCAL)
    found = []
    for episode in torch.utils.data.DataLoader(dataset, batch_size=None):
        assert episode["obs"].dtype == torch.float32
        assert episode["obs"].shape == (3, 2)
        found.append((float(episode["obs"][0, 0]), float(episode["reward"][0])))
    assert found == [(number, -number) for number in range(5)]
    del episode
    assert ring.slot_states() == [SlotState.FREE] * 16


def test_batches_are_torch_s_own(ring: SharedRingBuffer) -> None:
    dataset: Any = EpisodeDataset(written(ring, 6), LOCAL)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=3))
    assert [tuple(batch["obs"].shape) for batch in batches] == [(3, 3, 2)] * 2
    assert batches[1]["reward"][:, 0].tolist() == [-3, -4, -5]


def test_an_item_is_what_the_caller_makes_of_an_episode(ring: SharedRingBuffer) -> None:
    dataset: Any = EpisodeDataset(
        written(ring, 2), LOCAL, item_of=lambda episode: (episode.record.worker_id, episode.arrays["obs"].mean().item())
    )
    assert list(dataset) == [(ring.name, 0.0), (ring.name, 1.0)]


def test_settings_are_checked_where_the_dataset_is_made() -> None:
    with pytest.raises(ConfigError, match="setting of EpisodeDataset 'ahed'; did you mean 'ahead'"):
        EpisodeDataset([], LOCAL, ahed=2)  # type: ignore[call-arg]  # what is tested
    with pytest.raises(ConfigError, match="setting of ClientConfig 'locl'; did you mean 'local'"):
        EpisodeDataset([], {"locl": "view"})
    rows: tuple[tuple[str, Any, str], ...] = (
        ("ahead", 0, "ahead must be a whole number, at least 1, not 0"),
        ("ahead", "8", "ahead must be a whole number, at least 1, not '8'"),
        ("deadline_s", "soon", "deadline_s = 'soon'"),
        ("deadline_s", 0, "deadline_s must be more than 0, not 0"),
        ("max_fetch_rounds", 0, "max_fetch_rounds must be a whole number, at least 1, not 0"),
        ("max_staleness", -1, "max_staleness must be a whole number, at least 0"),
        ("max_staleness", 1, "max_staleness = 1, but a stream has no policy_version"),
        ("unreachable_batches", 0, "unreachable_batches must be a whole number, at least 1"),
        ("on_loss", "x", "on_loss must be a function of a Loss"),
        ("device", "tpu", "device must be None, 'numpy', 'cpu'"),
        ("item_of", "arrays", "item_of must be a function of an episode, not 'arrays'"),
        ("shared", "no", "shared must be True or False, not 'no'"),
        ("discard_lost", "no", "discard_lost must be True or False, not 'no'"),
    )
    for name, wrong, message in rows:
        with row(name=name, wrong=wrong), pytest.raises(ConfigError, match=re.escape(message)):
            EpisodeDataset([], LOCAL, **{name: wrong})


def test_one_reference_in_the_place_of_several_is_refused_where_the_dataset_is_made(ring: SharedRingBuffer) -> None:
    (ref,) = written(ring, 1)
    for one in one_for_many(EpisodeRecord(worker_id="w", sequence=0, ref=ref)):
        with row(one=one), pytest.raises(ConfigError, match=r"references must be a list, .*: \[reference\]"):
            EpisodeDataset(one)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_data_loader_share_the_references_between_them(ring: SharedRingBuffer) -> None:
    dataset: Any = EpisodeDataset(written(ring, 7), LOCAL)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert sorted(float(episode["obs"][0, 0]) for episode in loader) == list(range(7))


class Room(NamedTuple):
    """What a file system says of itself."""

    f_blocks: int
    f_bavail: int
    f_frsize: int = 4096


def test_only_what_a_worker_hands_over_in_shared_memory_has_to_fit_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of_one = torch.zeros(4, 1024)
    too_large = {"nested": [torch.zeros(4096), (torch.zeros(1024),)]}
    fitting: tuple[tuple[str, object], ...] = (
        ("views of one storage", {"rows": list(rows_of_one), "first": rows_of_one[0], "all": rows_of_one}),
        ("in shared memory already", torch.zeros(8192).share_memory_()),
        ("no storage", torch.eye(4096).to_sparse()),
        ("no memory", torch.empty(1 << 40, device="meta")),
        ("no tensors", {"obs": np.zeros(1 << 20), "name": "episode"}),
    )
    monkeypatch.setattr("os.statvfs", lambda _: Room(f_blocks=100, f_bavail=4))
    for name, item in fitting:
        with row(name=name):
            _check_room(item)
    with pytest.raises(ConfigError, match="an item of 20480 bytes over in /dev/shm, which has 16384 bytes free"):
        _check_room(too_large)
    monkeypatch.setattr("os.statvfs", lambda _: Room(f_blocks=0, f_bavail=0))
    _check_room(too_large)  # by a file system without a limit


def test_where_there_is_no_shared_memory_only_what_needs_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucxx_transport.integrations.torch.HANDED_OVER_IN", "/nowhere")
    _check_room({"obs": np.zeros(4)})
    with pytest.raises(FileNotFoundError):
        _check_room(torch.zeros(4))
