"""EpisodeStream: the episodes of a stream of references, in its order, some of them fetched ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, Unpack

from ucxx_transport.errors import ConfigError
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.schema.wire_form import describe
from ucxx_transport.trainer.batch import FetchSettings, PrefetchStatistics, log_loss
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, is_ours, record_of
from ucxx_transport.trainer.prefetcher import PendingBatch, Prefetcher
from ucxx_transport.trainer.unpacking import unpacker_for

if TYPE_CHECKING:
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.schema.tree import ArrayTree


@dataclass(frozen=True, slots=True)
class StreamedEpisode:
    """One episode of a stream.

    Attributes:
        record: as its worker described it.
        arrays: nested as they were written, valid while they live.
    """

    record: EpisodeRecord
    arrays: ArrayTree


class EpisodeStream(Iterator[StreamedEpisode]):
    """Iterates over the episodes of references as they come, once. Close it, or use `with`.

    A thread takes the references, so that an episode is handed out as soon as it is there, however long the next
    reference takes to come. An episode that is lost is left out, and reported to `on_loss`.

    Args:
        references: records (as objects or dicts) and `SlotRef`s; may block, and may never end.
        config: settings of the client.
        device: where episodes are given, as for `RolloutFeed`.
        ahead: episodes fetched, or on their way, beyond the one in use; each holds a slot or a buffer.
        on_loss: called with every episode that could not be had, in the thread that iterates, with index 0; by default
            it is logged.
        **settings: as for `Prefetcher`, of one episode: `deadline_s`, `max_fetch_rounds`, `discard_lost`, `watcher`,
            `link_factory`.

    Raises:
        ConfigError: an argument is out of its bounds, or this machine has no such device.
    """

    def __init__(
        self,
        references: Iterable[object],
        config: ClientConfig | None = None,
        *,
        device: object = None,
        ahead: int = 8,
        on_loss: Callable[[Loss], None] = log_loss,
        **settings: Unpack[FetchSettings],
    ) -> None:
        if ahead < 1:
            raise ConfigError(f"ahead must be at least 1, not {ahead}", field="ahead")
        self._unpack = unpacker_for(device)
        self._ahead = ahead
        self._changed = threading.Condition()
        self._begun: deque[tuple[AskedFor, PendingBatch]] = deque()
        # the class, not an object of it: kept, that would keep the frames that it was raised through
        self._end: Exception | type[StopIteration] | None = None
        self._closed = False
        self._prefetcher = Prefetcher(config, on_loss=on_loss, uploader=self._unpack.uploader, **settings)
        # a daemon: it may wait for a reference that never comes
        threading.Thread(target=self._take, args=(references,), name="ucxx-stream", daemon=True).start()

    def __next__(self) -> StreamedEpisode:
        """The next episode.

        Raises:
            ConfigError: a reference is not ours, or the stream is closed.
            Exception: whatever the iterable of references raised, after the episodes before it.
        """
        self._prefetcher.check_usable()
        while True:
            record, pending = self._next_begun()
            batch = pending.result()
            if isinstance(record, EpisodeRecord) and batch.payloads:
                with batch.payloads[0] as payload:
                    return StreamedEpisode(record, self._unpack(payload))

    def statistics(self) -> PrefetchStatistics:
        """Counts since the stream was made; every episode is a batch of one."""
        return self._prefetcher.statistics()

    def close(self) -> None:
        """Give up what is on its way and end the threads. Idempotent.

        The thread that takes references cannot be called back from one that it waits for: it ends when that comes, and
        does not hand it out. What was taken and not handed out is counted as lost by "closed".
        """
        with self._changed:
            self._closed = True
            self._begun.clear()
            self._changed.notify_all()
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _next_begun(self) -> tuple[AskedFor, PendingBatch]:
        with self._changed:
            while not self._begun and self._end is None and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ConfigError("the stream is closed; make another")
            if not self._begun:
                assert self._end is not None
                raise self._end
            begun = self._begun.popleft()
            self._changed.notify_all()
            return begun

    def _take(self, references: Iterable[Any]) -> None:
        end: Exception | type[StopIteration] = StopIteration
        try:
            for reference in references:
                if not is_ours(reference):
                    message = f"{describe(reference)} is no episode record and no SlotRef"
                    raise ConfigError(message, field="references")  # noqa: TRY301 - raised to who iterates
                if not self._begin(record_of(reference)):
                    return
        except Exception as error:  # noqa: BLE001 - the edge of a thread: raised to who iterates
            end = error
        finally:
            with self._changed:
                self._end = end
                self._changed.notify_all()

    def _begin(self, record: AskedFor) -> bool:
        with self._changed:
            while len(self._begun) >= self._ahead and not self._closed:
                self._changed.wait()
            if self._closed:
                self._prefetcher.count_left(1)
                return False
            self._begun.append((record, self._prefetcher.begin([record])))
            self._changed.notify_all()
        return True
