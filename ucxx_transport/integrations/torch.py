"""torch: an `IterableDataset` over a stream of references. Needs torch (`pip install 'ucxx_transport[torch]'`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, TypeVar, Unpack

from torch.utils.data import IterableDataset, get_worker_info

from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.schema.episode_record import several
from ucxx_transport.settings import check_keywords, made_of
from ucxx_transport.trainer.episode_stream import EpisodeStream, StreamedEpisode, StreamSettings, check_settings

T = TypeVar("T")


def arrays_of(episode: StreamedEpisode) -> Any:
    """An episode's tensors, nested as they were written: the dataset's default item."""
    return episode.arrays


class EpisodeDataset(IterableDataset, Generic[T]):  # type: ignore[misc]  # torch is not always there to be looked at
    """Episodes as tensors, fetched ahead, in the order of their references.

    ```python
    dataset = EpisodeDataset(iter(records.get, None))        # a queue of records, until None
    for episode in DataLoader(dataset, batch_size=None):     # dicts of tensors
        ...
    ```

    In a `DataLoader` with `num_workers=0` tensors lie in the payloads' own memory; workers copy them once more. With
    workers give it a `timeout`: torch drops an item that /dev/shm has no room for, and waits for it.

    Args:
        references: as for `EpisodeStream`. With workers every one of them iterates over its own copy.
        config: settings of the client.
        item_of: makes the dataset's item of an episode; the default gives its tensors.
        shared: whether copies of `references` share their items (a queue): then every worker takes what it gets. Else
            worker i of n takes every n-th, from the i-th.
        **settings: as for `EpisodeStream`: `ahead`, `deadline_s`, `max_fetch_rounds`, `on_loss` …; `device` is "cpu".

    Raises:
        ConfigError: a setting is unknown or wrong, of the client or of the stream.
    """

    def __init__(
        self,
        references: Iterable[object],
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        item_of: Callable[[StreamedEpisode], T] = arrays_of,
        shared: bool = False,
        **settings: Unpack[StreamSettings],
    ) -> None:
        check_keywords(f"setting of {type(self).__name__}", settings, StreamSettings)
        self._references = several(references, "references")
        self._config = made_of(ClientConfig, config, "config")
        if not callable(item_of):
            raise ConfigError(f"item_of must be a function of an episode, not {item_of!r}", field="item_of")
        if not isinstance(shared, bool):
            raise ConfigError(f"shared must be True or False, not {shared!r}", field="shared")
        self._item_of = item_of
        self._shared = shared
        self._settings: StreamSettings = {"device": "cpu", **settings}
        check_settings(self._settings)

    def __iter__(self) -> Iterator[T]:
        """Iterate; a client of its own each time."""
        worker = get_worker_info()
        references = self._references
        if worker is not None and not self._shared:
            references = islice(references, worker.id, None, worker.num_workers)
        with EpisodeStream(references, self._config, **self._settings) as stream:
            for episode in stream:
                yield self._item_of(episode)
