"""EpisodeStream: the episodes of a stream of references, in its order, some of them fetched ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from ucxx_transport.config import checked_count
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.machine import start_thread
from ucxx_transport.schema.episode_record import EpisodeRecord, several
from ucxx_transport.schema.wire_form import describe
from ucxx_transport.trainer.batch import FetchLimits, FetchSettings, LimitSettings
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, is_ours, record_of
from ucxx_transport.trainer.pending import PendingBatch
from ucxx_transport.trainer.prefetcher import Prefetcher
from ucxx_transport.trainer.unpacking import checked_device

if TYPE_CHECKING:
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.schema.fields import ArrayTree


@dataclass(frozen=True, slots=True)
class StreamedEpisode:
    """One episode of a stream.

    Attributes:
        record: as its worker described it.
        arrays: nested as they were written, valid while they live.
    """

    record: EpisodeRecord
    arrays: ArrayTree


class StreamSettings(FetchSettings, total=False):
    """Settings of an `EpisodeStream`, for what makes one; see there."""

    ahead: int
    on_loss: Callable[[Loss], None] | None


def check_settings(settings: StreamSettings) -> None:
    """Refuse, by a ConfigError, settings that an `EpisodeStream` would refuse, without making one."""
    checked_count(settings.get("ahead", 1), "ahead", at_least=1)
    checked_device(settings.get("device"))
    known = {*LimitSettings.__annotations__, "on_loss"}
    limits: Any = {name: value for name, value in settings.items() if name in known}
    FetchLimits(**limits)
    if (max_staleness := limits.get("max_staleness")) is not None:
        text = f"max_staleness = {max_staleness}, but a stream has no policy_version to judge by"
        raise ConfigError(f"{text}: take batches of a RolloutFeed or a Prefetcher", field="max_staleness")


class EpisodeStream(Prefetcher, Iterator[StreamedEpisode]):
    """Iterates over the episodes of references as they come, once. Close it, or use `with`.

    A thread takes the references, so that an episode is handed out as soon as it is there, however long the next
    reference takes to come. An episode that is lost is left out, logged, and reported to `on_loss`. When it is closed
    that thread cannot be called back from a reference that it waits for: it ends when that comes, and counts it, as all
    that was not handed out, as lost by "closed".

    Args:
        references: records (as objects or dicts) and `SlotRef`s; may block, and may never end.
        config: settings of the client.
        ahead: episodes fetched, or on their way, beyond the one in use; each holds a slot or a buffer.
        on_loss: as for `Prefetcher`, in the thread that iterates, with index 0.
        **settings: as for `Prefetcher`, of one episode: `device`, `deadline_s`, `max_fetch_rounds`, `discard_lost`,
            `watcher`, `link_factory`; `unreachable_batches`, of `ahead` episodes each. Not `max_staleness`.

    Raises:
        ConfigError: an argument is out of its bounds, or this machine has no such device.
    """

    def __init__(
        self,
        references: Iterable[object],
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        ahead: int = 8,
        on_loss: Callable[[Loss], None] | None = None,
        **settings: Unpack[FetchSettings],
    ) -> None:
        several(references, "references")
        self._ahead = self.in_a_batch = checked_count(ahead, "ahead", at_least=1)
        check_settings({**settings, "ahead": ahead, "on_loss": on_loss})
        # then what makes the error that ends it, without the frames that it was raised through before
        self._begun: deque[PendingBatch | Callable[[], BaseException]] = deque()
        super().__init__(config, on_loss=on_loss, **settings)
        try:  # a daemon: it may wait for a reference that never comes
            start_thread(self._take, references, name="ucxx-stream")
        except TransportError:
            self.close()
            raise

    def __next__(self) -> StreamedEpisode:
        """The next episode.

        Raises:
            ConfigError: a reference is not ours, or the stream is closed.
            TransportError: an episode is lost for a reason that cannot heal, or a source does not answer; see
                `unreachable_batches`. The next call goes on.
            Exception: whatever the iterable of references raised, after the episodes before it.
        """
        self.check_usable()
        while True:
            pending = None
            try:
                with self.lock:
                    self.changed.wait_for(lambda: self._begun or self.closed)
                    self.check_usable()
                    first = self._begun[0]
                    if not isinstance(first, PendingBatch):
                        break
                    pending = first
                    del self._begun[0]
                    self.changed.notify_all()
                batch = pending.settle()
                self.report(pending)
                for payload in batch.payloads.values():
                    record = pending.records[0]
                    assert isinstance(record, EpisodeRecord)
                    episode = StreamedEpisode(record, self.unpack(payload))
                    del self.untaken[pending]  # no call: an interrupt comes before it, or to who has the episode
                    return episode
                pending.cancel()
            except BaseException as error:
                if not isinstance(error, Exception):
                    if pending in self.untaken:  # interrupted: it is the next one again
                        self._begun.appendleft(pending)
                elif pending is not None:
                    pending.cancel()
                    self.check_usable()  # it was closed meanwhile
                raise
        raise first()

    def _take(self, references: Iterable[Any]) -> None:
        end: Callable[[], BaseException] = StopIteration
        try:
            for reference in references:
                if not is_ours(reference):
                    message = f"{describe(reference)} is no episode record and no SlotRef; give what the worker sent"
                    raise ConfigError(message, field="references")  # noqa: TRY301 - raised to who iterates
                if not self._append(record_of(reference)):  # read before the next is asked for, which may reuse it
                    return
        except BaseException as error:  # noqa: BLE001 - the edge of a thread: raised to who iterates, sys.exit() too
            end = partial(error.with_traceback, error.__traceback__)
        finally:
            with self.lock:
                self._begun.append(end)
                self.changed.notify_all()

    def _append(self, record: AskedFor) -> bool:
        """Begin to fetch an episode when there is room for it; False when the stream is closed."""
        with self.lock:
            self.changed.wait_for(lambda: len(self._begun) < self._ahead or self.closed)
            if self.closed:
                self.count_closed(1)
                return False
            self._begun.append(self.begin([record]))
            self.changed.notify_all()
        return True
