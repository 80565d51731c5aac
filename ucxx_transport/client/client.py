"""SyncUCXXClient: payloads by reference, from this host's rings in place and from other hosts over UCX; blocking.

There is no thread and no event loop behind it: a call runs the reactor until it has what it asked for. Of several
threads that share a client one runs it for the others too; see `lead`.
"""

from __future__ import annotations

import atexit
import time
from typing import TYPE_CHECKING, Final, Self

from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.errands import DEFAULT_MAX_BYTES, DEFAULT_MAX_PAYLOADS
from ucxx_transport.client.jobs import Call, Job, Takeable
from ucxx_transport.client.lead import Lead
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.reads import Reads
from ucxx_transport.errors import TransportError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import several, slot_ref_of
from ucxx_transport.teardown import OfOneProcess, refuse_forked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ucxx_transport.client.errands import Selector
    from ucxx_transport.client.local import Into
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import LinkFactory
    from ucxx_transport.schema.episode_record import Referring

_CLOSE_WAIT_S: Final = 5.0


class SyncUCXXClient(OfOneProcess):
    """Reads payloads from code without an event loop. Thread-safe; close it with `close()` or `with`.

    One client is one reader: of a payload meant for several readers (`RingConfig(readers=N)`) it gets one share, and a
    payload it has delivered once is `StaleSlotError` ever after.

    Args:
        config: settings, a dict or a `ClientConfig`; the default reads local rings in place and everything else over
            UCX.
        watcher: a `SourceWatcher`: reads over UCX from a source that it says is gone fail at once, and the ports of one
            that it says is there are worth a try again. Its owner stops it.
        link_factory: opens the link on the first read that needs one; the default is UCX.

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
    ) -> None:
        # At exit the link is closed too, but after this, which is registered later.
        self._core = ClientCore(config, link_factory, watcher=watcher, on_link=lambda: atexit.register(self.close))
        self._lead = Lead(self._core)

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    @property
    def reader_id(self) -> int:
        """This client's random id, u64, as servers and rings see it."""
        return self._core.reader

    def read(self, ref: Referring, *, into: Into | None = None, deadline_s: float | str | None = None) -> Payload:
        """Read one payload.

        Args:
            ref: names it and says where it is; a record, or what became of either in a queue (`to_dict()`, JSON), will
                do as well, here and wherever references are taken.
            into: writable contiguous buffer of at least `ref.nbytes` bytes to copy the payload into; by default it
                stays in a pooled buffer, or in the slot itself.
            deadline_s: seconds this call may take in all, retries included, or text such as `"5s"`; default
                `ClientConfig.deadline_s`.

        Returns:
            The payload. Release it when its data is used up.

        Raises:
            StaleSlotError: it is gone (recycled, overwritten, its ring closed) or was delivered to this client before.
            DeadlineExceededError: not in time. PeerLostError, BusyError, NotReadyError: not after all retries.
            ChecksumError: the bytes differ from what was written. ProtocolError, AuthenticationError: the peer.
            ConfigError: `ref` is no reference, has no address or is too large, `into` is unfit, or `deadline_s` no
                duration.
        """
        core = self._core
        if core.closed or core.pid != core.process:
            core.require_usable()
        limit_s = core.config.deadline_s if deadline_s is None else core.limit_s(deadline_s)
        try:
            if type(ref) is not SlotRef:
                ref = slot_ref_of(ref)
            ring = core.admit(ref, into)
            if ring is not None:
                return core.local.read(ring, ref, into, limit_s, time.perf_counter())
        except TransportError as error:
            core.count_failure(error)
            raise
        job = Job([ref], core.reactor.now() + limit_s)
        if into is not None:
            job.into = into
        self._lead.perform(job, Reads.start_one, job)
        return job.payload()

    def read_many(
        self, refs: Iterable[Referring], *, deadline_s: float | str | None = None
    ) -> list[Payload | TransportError]:
        """Read payloads, those over UCX together and fairly across sources; one that fails costs the others nothing.

        Args:
            refs: what to read.
            deadline_s: for all of them together, as for `read`.

        Returns:
            A list as long as `refs`: the payload, or the error that `read` would have raised.
        """
        core = self._core
        core.require_usable()
        job = Job([*several(refs, "refs")], core.reactor.now() + core.limit_s(deadline_s))
        remote, here = core.look_at(job, range(job.left))
        if remote or here:
            self._lead.perform(job, lambda _: core.go_on(job, remote, here))
        return [outcome for outcome in job.outcomes if outcome is not None]

    def discard(self, refs: Iterable[Referring], *, deadline_s: float | str | None = None) -> int:
        """Let payloads go unread: each counts as this client's read of it, and none of its bytes is moved.

        Args:
            refs: payloads that this trainer will not read; without it they would stay in their slots.
            deadline_s: for all of them together, as for `read`.

        Returns:
            How many were still there. Never raises for one that is not, nor for a worker that does not answer: it is
            notified with the next read from it (of the last 1024 payloads a ring).

        Raises:
            ConfigError: the client is closed, or `deadline_s` is no duration.
        """
        call = self._core.discard_call(refs, deadline_s)
        if call.elsewhere or call.here:
            self._lead.perform(call, lambda _: self._core.discard(call))
        return call.found

    def take(
        self,
        source: Takeable | Referring,
        *,
        max_payloads: int = DEFAULT_MAX_PAYLOADS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        selector: Selector = "oldest",
        wait_s: float | str = 0.0,
    ) -> list[Payload]:
        """Take payloads that no reader has had yet, without knowing their references.

        Args:
            source: whose: a watcher's record, or any reference of the ring.
            max_payloads: how many at most, 1 to 64.
            max_bytes: of them all.
            selector: "oldest" first, or "newest".
            wait_s: how long to wait for a first one.

        Returns:
            The payloads, in the selector's order, each with the `record` that its writer gave it; none of them is
            given to another taker too. [] when there was none in time. Release them when their data is used up.

        Raises:
            PeerLostError, DeadlineExceededError, BusyError, NotReadyError, …: as `read`; nothing was taken.
            ConfigError: the next payload is larger than `max_bytes`, an argument is out of its range, the source has no
                address, or the client is closed.
        """
        core = self._core
        take = core.take_call(source, wait_s, max_payloads=max_payloads, max_bytes=max_bytes, selector=selector)
        ring = core.local.ring_of(take.source)
        if ring is None:
            self._lead.perform(take, Reads.begin, take)
            return take.result()
        while not (payloads := core.local.take(ring, take, core.config.deadline_s)):
            left_s = take.wait_until_s - core.reactor.now()
            if left_s <= 0 or not ring.wait_for_ready(left_s, reader=core.reader):
                break
        return payloads

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        core = self._core
        refuse_forked(core.pid, "client")
        if not core.reactor.has_link or core.closed:
            return core.statistics()
        question = Call(core.reactor.now() + core.config.deadline_s)
        answers: list[ClientStatistics] = []

        def answer(_: Reads) -> None:
            answers.append(core.statistics())
            question.finish()

        self._lead.perform(question, answer)  # UCX's endpoints are of the thread that leads
        return answers[0]

    def close(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        core = self._core
        if core.inherited or core.reactor.closed:
            return  # a forked child's copy: the connections are its parent's
        atexit.unregister(self.close)
        core.closed = True
        if not self._lead.try_to_lead(0.0):
            core.reactor.submit(core.fail_all)  # so that the thread that leads has no reason to
            if not self._lead.try_to_lead(_CLOSE_WAIT_S):
                return  # it hangs in a callback of the application: whatever is closed now would be in use
        try:
            core.close()
        finally:
            self._lead.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
