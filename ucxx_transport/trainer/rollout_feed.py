"""RolloutFeed: rollouts as a framework hands them about, and the episodes that ours among them refer to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, Unpack

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.schema.episode_record import several
from ucxx_transport.schema.wire_form import describe, refuse
from ucxx_transport.settings import known_options
from ucxx_transport.teardown import refuse_forked
from ucxx_transport.trainer.batch import FetchSettings
from ucxx_transport.trainer.loss_policy import Loss, is_ours, key_of, record_of
from ucxx_transport.trainer.pending import PendingBatch
from ucxx_transport.trainer.prefetcher import Prefetcher

if TYPE_CHECKING:
    from ucxx_transport.client import Payload
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.schema.fields import ArrayTree

OnMissing: TypeAlias = "Literal['shrink', 'refill'] | Callable[[list[object], tuple[Loss, ...]], Iterable[object]]"
"""What to do about a batch of which episodes are lost: a word, or what makes rollouts of those left and the losses."""

YIELD_S: Final = 1e-3
"""A trainer's thread that starts a fetch goes on with its step; where it has had its batches in time, the fetch begins
so much later, rather than take the interpreter from it at once."""


def completion_of(rollout: object) -> object:
    """The output of a rollout: its `completion` where it has one, else itself."""
    return getattr(rollout, "completion", rollout)


class _Rollouts(PendingBatch):
    """Rollouts to fetch, or fetched; what takes long is done by the thread that fetches, which asks first."""

    _filled: Sequence[object] | None = None
    _asking = 0  # the thread in `on_missing`

    def __init__(self, feed: RolloutFeed, rollouts: Sequence[object], policy_version: int | None) -> None:
        self.rollouts = tuple(several(rollouts, "rollouts"))
        outputs = enumerate(map(feed.output_of, self.rollouts))
        super().__init__(feed, {place: output for place, output in outputs if is_ours(output)}, policy_version)

    @cached_property
    def keys(self) -> dict[int, Hashable]:
        """By what each output is found again."""
        return {place: key_of(output, self.records[place]) for place, output in self.outputs.items()}

    @cached_property
    def found(self) -> dict[Hashable, Payload | None]:
        """What came of them, None for what is lost: by key, and by the outputs' own `id`; this keeps them alive."""
        found: dict[Hashable, Payload | None] = dict.fromkeys([*self.keys.values(), *map(id, self.outputs.values())])
        for place, payload in self.batch.payloads.items():
            found[self.keys[place]] = found[id(self.outputs[place])] = payload
        return found

    def is_for(self, other: _Rollouts) -> bool:
        """Whether both are the same rollouts: the same objects, or references to the same payloads."""
        same_objects = [*map(id, self.rollouts)] == [*map(id, other.rollouts)]
        return same_objects or (len(self.rollouts) == len(other.rollouts) == len(self.keys) and self.keys == other.keys)

    def to_train_on(self, on_missing: OnMissing) -> list[object]:
        if self._asking == threading.get_ident():  # the function asks for the batch that it is to make
            return list(self._filled_by("shrink"))
        if self._filled is None:
            self._filled = self._filled_by(on_missing)
        return list(self._filled)

    def _filled_by(self, on_missing: OnMissing) -> Sequence[object]:
        lost = self.outputs.keys() - self.batch.payloads.keys()
        usable = [rollout for place, rollout in enumerate(self.rollouts) if place not in lost]
        if not lost or on_missing == "shrink":
            return usable
        if on_missing != "refill":
            self._asking = threading.get_ident()
            try:
                return [*several(on_missing(usable, self.batch.losses), "rollouts")]
            finally:
                self._asking = 0
        if not usable:
            reasons = ", ".join(sorted({loss.reason.value for loss in self.batch.losses}))
            message = f"none of the batch's {len(lost)} episodes came: there is nothing to refill it with ({reasons})"
            raise TransportError(message, lost=len(lost), of=len(self.rollouts))
        again = cycle(usable)
        return [next(again) if place in lost else each for place, each in enumerate(self.rollouts)]


class RolloutFeed(Prefetcher):
    """A trainer's rollouts, their episodes fetched ahead; what is not ours passes through. Close it, or use `with`.

    ```python
    feed.start(source.next_rollouts())
    while training:
        rollouts = feed.collect()              # waits for the batch on its way
        feed.start(source.next_rollouts())     # fetched while this one is trained on
        train([feed.resolve(rollout.completion) for rollout in rollouts])
    ```

    Args:
        config: settings of the client.
        on_loss: called with every episode that could not be had, in the thread that collects or resolves: once, and
            again where it is resolved after its batch, and lost again. What it raises is raised when it was called with
            all of them, and the batch is in use. One line a batch and reason is logged in any case.
        on_missing: what `collect` gives of a batch of which episodes are lost. "shrink": the others. "refill": as many
            as were asked for, those that came repeated in the places of the lost ones, in turn; a TransportError when
            none came. A function is called with the others and the losses, and gives the rollouts.
        output_of: the output of a rollout; the default is its `completion` where it has one, else itself.
        **settings: as for `Prefetcher`: `device`, `deadline_s`, `max_fetch_rounds`, `max_staleness`, `discard_lost`,
            `unreachable_batches`, `watcher`, `link_factory`.

    Raises:
        ConfigError: an argument is out of its bounds, or this machine has no such device.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        on_loss: Callable[[Loss], None] | None = None,
        on_missing: OnMissing = "shrink",
        output_of: Callable[[object], object] = completion_of,
        **settings: Unpack[FetchSettings],
    ) -> None:
        if on_missing not in ("shrink", "refill") and not callable(on_missing):
            refuse("on_missing", on_missing, "'shrink', 'refill' or a function")
        if not callable(output_of):
            refuse("output_of", output_of, "a function of a rollout")
        self.output_of, self._on_missing = output_of, on_missing
        self._state, self._turn = threading.RLock(), threading.RLock()
        self._pending: deque[_Rollouts] = deque()  # of which the first is begun
        self._in_use: _Rollouts | None = None
        self._is_awaited = True
        self._policy_version: int | None = None
        super().__init__(config, on_loss=on_loss, **settings)

    @property
    def is_cold_start(self) -> bool:
        """Whether there is no batch in use, and none on its way."""
        with self._locked():
            return self._in_use is None and not self._pending

    @property
    def is_ready(self) -> bool:
        """Whether a batch has come, so that `collect` need not wait for it."""
        with self._locked():
            return bool(self._pending) and self._pending[0].is_ready

    @property
    def buffer(self) -> list[object] | None:
        """The rollouts in use: of the batch collected last, those that are not ours and those that can be resolved.

        With `on_missing` it is what that makes of them.
        """
        with self._locked():
            in_use = self._in_use
        return None if in_use is None else in_use.to_train_on(self._on_missing)

    @property
    def missing(self) -> tuple[Loss, ...]:
        """What is lost of the batch in use, each with its reason and its place among the rollouts asked for."""
        with self._locked():
            return () if self._in_use is None else self._in_use.batch.losses

    @known_options
    def start(self, rollouts: Sequence[object], *, policy_version: int | None = None) -> None:
        """Begin to fetch the episodes of these rollouts, and return at once.

        Args:
            rollouts: ours and others, in any mixture; left as they are until the batch has come.
            policy_version: of the trainer's weights now; needed with `max_staleness`.

        Raises:
            ConfigError: a batch is on its way already; `policy_version` is missing; or the feed is closed.
        """
        asked = _Rollouts(self, rollouts, policy_version)
        with self._locked():
            if self._pending:
                self.check_usable()
                raise ConfigError(
                    "a batch is on its way or waits to be collected; collect() first, or defer(rollouts); of a packer "
                    "collect_prefetch, defer_prefetch",
                    rollouts=sum(len(each.rollouts) for each in self._pending),
                )
            self._append(asked, policy_version)

    @known_options
    def defer(self, rollouts: Sequence[object], *, policy_version: int | None = None) -> None:
        """Leave these rollouts to a later `collect`, and return at once: their worker may have its acknowledgement.

        They are fetched as soon as those before them are collected: at once when there are none. Rollouts that were
        started already, or are in use, are not fetched again.

        Raises:
            ConfigError: `policy_version` is missing, or the feed is closed.
        """
        asked = _Rollouts(self, rollouts, policy_version)
        with self._locked():
            known = [*self._pending] if self._in_use is None else [*self._pending, self._in_use]
            if not any(asked.is_for(other) for other in known):
                self._append(asked, policy_version)
            elif policy_version is not None:
                self.limits.sorter(policy_version)  # refuses what is no number
                self._policy_version = policy_version

    def wait(self, timeout_s: float | str | None = None) -> bool:
        """Wait for the batch on its way and take it into use; the one before it is released, with the next that comes.

        Args:
            timeout_s: how long at most; None: the batch's own deadline.

        Returns:
            False when it did not come in time: its episodes are lost, and what is not ours is in use.

        Raises:
            ConfigError: nothing is on its way, or the feed is closed.
            TransportError: as `collect`.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        taken = self._take_next(timeout_s)
        if taken is None:
            raise ConfigError("nothing is on its way: start(rollouts) first, of a packer start_prefetch")
        self.report(taken)
        return taken.batch.in_time

    def collect(self, timeout_s: float | str | None = None) -> list[object]:
        """The rollouts to train on now: waits for the batch on its way, if one is.

        What came of that is in use then; what was is released, and what was deferred first is fetched.

        Returns:
            Those that can be resolved and those that are not ours, in order; without a batch on its way those in use.
            `missing` has what is lost of them; see `on_missing`, too.

        Raises:
            ConfigError: nothing was started, and nothing is in use; or the feed is closed.
            TransportError: all of it is lost for a reason that cannot heal, or a source does not answer
                (`unreachable_batches`): worker, host and remedy are named. `buffer` has what came, and the next
                batch is on its way. Or nothing came that "refill" could repeat.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        in_use = self._take_next(timeout_s) or self._in_use
        if in_use is None:
            raise ConfigError("nothing is on its way or in use: start(rollouts) first, of a packer start_prefetch")
        self.report(in_use)
        return in_use.to_train_on(self._on_missing)

    def resolve(self, output: object) -> ArrayTree | None:
        """The episode that a rollout's output refers to: of the batch in use, or on its way, else fetched now.

        Returns:
            Its arrays, as nested as they were written, on the feed's device, valid while they live. None when it is
            lost: then `on_loss` was called. An episode on its way is waited for, and its batch taken into use.

        Raises:
            ConfigError: the output is not ours, `policy_version` was never given, or the feed is closed.
            TransportError: it is lost for a reason that cannot heal, or its source does not answer: after as many
                episodes in a row that are fetched now as `unreachable_batches`, each of which counts as a batch.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        if self.core.reactor.forked:
            self.check_usable()
        with self._state:  # in which the batch in use is not released
            payload = None if self._in_use is None else self._in_use.found.get(id(output))
            if payload is not None:
                return self.unpack(payload)
        if not is_ours(output):
            raise ConfigError(f"{describe(output)} is no episode record; it needs no resolving", field="output")
        record = record_of(output)
        key = key_of(output, record)
        while True:
            with self._state:
                in_use = self._in_use
                if in_use is not None and key in in_use.found:
                    payload = in_use.found[key]
                    return None if payload is None else self.unpack(payload)
            if not self._awaited(key, in_use):
                break
        batch = self.add(PendingBatch(self, {0: record}, self._policy_version, alone=True)).fetch()
        if not batch.payloads:
            return None
        with batch.payloads[0] as payload:
            return self.unpack(payload)

    def release(self) -> None:
        """Use the batch in use no longer: slots and buffers come back now rather than with the next batch.

        Arrays taken from it stay valid while they live. Its episodes cannot be resolved any more.
        """
        with self._locked():
            done, self._in_use = self._in_use, None
        if done is not None:
            done.batch.release()

    def close(self) -> None:
        """Give up what is on its way, release what is held, end the thread. Idempotent."""
        super().close()
        if not self.core.inherited:
            with self._state:
                self._pending.clear()
            self.release()

    def _locked(self) -> threading.RLock:
        """The lock of the batches; refused to a forked child, which may never get it."""
        refuse_forked(self.core.pid, type(self).__name__)
        return self._state

    def _append(self, asked: _Rollouts, policy_version: int | None) -> None:
        self._pending.append(self.add(asked))
        if len(self._pending) == 1:
            self._begin_next()
        if policy_version is not None:
            self._policy_version = policy_version

    def _begin_next(self) -> None:
        if self._pending:
            self._pending[0].begin(0.0 if self._is_awaited else YIELD_S)

    def _awaited(self, key: Hashable, seen: _Rollouts | None) -> bool:
        """Wait for what is on its way if `key` is among it; whether another batch than `seen` is in use now."""
        with self._turn:  # of several threads that look for one, the first takes the batch into use
            with self._state:
                is_pending = any(key in asked.keys.values() for asked in self._pending)
            taken = self._take_next(None) if is_pending else None
            changed = self._in_use is not seen
        if taken is not None:
            self.report(taken)  # with no lock held
        return changed

    def _take_next(self, timeout_s: float | str | None) -> _Rollouts | None:
        """Take what is on its way into use, and give it, whatever ended its fetch; None when nothing is.

        What was in use is released, and the next is begun. An interrupt leaves all that as it was, or completes it.
        """
        self.check_usable()
        with self._turn:
            with self._state:
                asked = self._pending[0] if self._pending else None
            if asked is None:
                return None
            self._is_awaited = not asked.is_ready
            asked.settle(timeout_s)
            done: _Rollouts | None = asked
            with self._state:
                if self._pending:  # else it was closed meanwhile, and this one is not used at all
                    done, self._in_use = self._in_use, asked
                    del self._pending[0]  # no call in between, at which an interrupt comes
                    self.untaken.pop(asked, None)
                    self._begin_next()
            if done is not None:
                done.batch.release()
            return asked
