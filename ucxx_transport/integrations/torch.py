"""torch: an `IterableDataset` over a stream of references. Needs torch (`pip install 'ucxx_transport[torch]'`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import attrgetter
from typing import Final, Generic, TypeVar, Unpack

from torch import Tensor, strided
from torch.utils.data import IterableDataset, get_worker_info

from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.schema.episode_record import several
from ucxx_transport.schema.wire_form import refuse
from ucxx_transport.settings import check_names, made_of
from ucxx_transport.trainer.episode_stream import EpisodeStream, StreamedEpisode, StreamSettings, check_settings
from ucxx_transport.trainer.unpacking import map_leaves

T = TypeVar("T")

HANDED_OVER_IN: Final = "/dev/shm"  # noqa: S108 - POSIX shared memory, not a temporary file
"""Where torch's workers put tensors for the process that has the loader: by shm_open, in files of their own."""


class EpisodeDataset(IterableDataset, Generic[T]):  # type: ignore[misc]  # torch is not always there to be looked at
    """Episodes as tensors, fetched ahead, in the order of their references.

    ```python
    dataset = EpisodeDataset(iter(records.get, None))        # a queue of records, until None
    for episode in DataLoader(dataset, batch_size=None):     # dicts of tensors
        ...
    ```

    In a `DataLoader` with `num_workers=0` tensors lie in the payloads' own memory; workers copy them once more. With
    workers give it a `timeout`: an episode that /dev/shm has no room for is a ConfigError here, but where workers run
    out of it between them torch drops the item, and waits for it.

    Args:
        references: as for `EpisodeStream`. With workers every one of them iterates over its own copy.
        config: settings of the client.
        item_of: makes the dataset's item of an episode; the default gives its tensors, nested as written.
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
        item_of: Callable[[StreamedEpisode], T] = attrgetter("arrays"),
        shared: bool = False,
        **settings: Unpack[StreamSettings],
    ) -> None:
        check_names(f"setting of {type(self).__name__}", settings, StreamSettings.__annotations__)
        self._references = several(references, "references")
        self._config = made_of(ClientConfig, config, "config")
        if not callable(item_of):
            refuse("item_of", item_of, "a function of an episode")
        if not isinstance(shared, bool):
            refuse("shared", shared, "True or False")
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
                item = self._item_of(episode)
                if worker is not None:
                    _check_room(item)
                yield item


def _check_room(item: object) -> None:
    """Refuse tensors that cannot be handed over: torch would print that, drop them, and go on waiting for them."""
    leaves: list[object] = []
    map_leaves(leaves.append, item)
    tensors = [each for each in leaves if isinstance(each, Tensor) and each.device.type == "cpu"]
    dense = [each for each in tensors if each.layout is strided and not each.is_shared()]  # others have no storage
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in dense}
    needed = sum(storages.values())  # views of one storage are handed over as one
    if not needed:
        return  # torch needs no shared memory for it, be there some or not
    found = os.statvfs(HANDED_OVER_IN)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and needed > free:  # none: a file system without a limit
        raise ConfigError(
            f"torch hands an item of {needed} bytes over in {HANDED_OVER_IN}, which has {free} bytes free: enlarge it "
            "(docker: --shm-size), lower ring.slots or the loader's prefetch_factor, or set num_workers=0",
            needed_bytes=needed,
            free_bytes=free,
        )
