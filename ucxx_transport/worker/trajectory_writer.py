"""TrajectoryWriter: the ring, the server and the bookkeeping of one rollout worker; and a mixin for its class."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, Literal, Never, ParamSpec, TypeVar

from ucxx_transport.config import PublisherConfig, RingConfig, ServerConfig, StoreConfig, checked_seconds
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.gpu import RuntimeFinder, runtime_of
from ucxx_transport.gpu.runtime import PageLockError
from ucxx_transport.link.address import choose_address
from ucxx_transport.link.ucx_api import NOT_INSTALLED
from ucxx_transport.logs import get_logger
from ucxx_transport.membership import HeartbeatPublisher
from ucxx_transport.membership.store_url import parse_store_url
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.segment import host_id
from ucxx_transport.schema.episode_record import MAX_REASON_CHARS, EpisodeRecord, as_policy_version, record_envelope
from ucxx_transport.schema.schema import Schema, checked_varlen
from ucxx_transport.schema.wire_form import checked_meta, finite_meta, refuse
from ucxx_transport.server import RingSource, UCXXServer
from ucxx_transport.settings import check_names, gather, known_options, made_of
from ucxx_transport.sidecar.launch import interpreter
from ucxx_transport.teardown import Closing, may_end, refuse_forked
from ucxx_transport.worker.packing import TrajectoryPacker, without_devices

_log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutStatistics:
    """What a writer has done.

    Attributes:
        written: episodes in the ring, ever.
        nbytes: their bytes.
        dropped: episodes given up under `on_error="drop"`, by the class of the error.
    """

    written: int
    nbytes: int
    dropped: Mapping[str, int]


class TrajectoryWriter(Closing):
    """A rollout worker's end of the transport. Thread-safe; close it with `close()` or `with`.

    It loses no episode by itself: with no free slot `write` waits, up to `ring.block_timeout_s` (30), and is then a
    DeadlineExceededError, or what `on_error` says. Another policy is chosen by name: `ring={"on_full": "overwrite"}`.

    Args:
        worker_id: this worker's name in every record, 1 to 128 printable characters.
        schema: the fields of every trajectory; None takes them from the first one, and makes ring and server then.
        varlen: for `schema=None`: names of the fields whose leading dimension varies, with their maximum lengths, or
            without: then the first trajectory has the maximum. A number alone is that of every field with rows.
        lengths: "equal": varlen fields of one maximum have as many rows as each other, or none, in every trajectory;
            "any": as many as they like. None: "equal" for `schema=None`, else as the schema says.
        ring: settings of the ring (see `RingConfig`), all but its schema. `on_full` is "block" where no source of
            settings has another.
        server: settings of the server, a dict or a `ServerConfig`; None for the defaults.
        serve: whether there is a server: without one only trainers on this host can read.
        on_error: what a failed write is: "raise" an exception, or "drop" a record without a reference, counted. A
            ring or server that cannot be made, or a ring that cannot be page-locked, is an exception in any case. So
            is, for `schema=None`, a first trajectory that makes no schema: before there is one nothing can be dropped
            against it. The same misfit later is dropped.
        narrow: names of the fields whose values may lose precision on the way in.
        nonfinite_meta: what a NaN or an infinity in `meta` does, since JSON has none: "refuse" fails the write, "none"
            writes None in its place.
        reward: name of the field that holds a reward a step, for the records' summaries and lengths; None: neither.
        store: URL of the store in which this worker is published, under `worker_id`, as long as the ring exists; None:
            `store.url`, and where that is unset it is not.
        publisher: settings of that, a dict or a `PublisherConfig`.
        store_config: settings of the store, a dict or a `StoreConfig`.
        store_meta: what else its record there says, JSON values.
        runtimes: what works with leaves on a GPU; by default torch and cupy with their own, either with others.

    Raises:
        ConfigError: a setting is wrong, or the ring does not fit its folder.
        TransportError: the server did not start.
    """

    @known_options
    def __init__(
        self,
        worker_id: str,
        *,
        schema: Schema | None = None,
        varlen: Iterable[str] | Mapping[str, int] | int = (),
        lengths: Literal["equal", "any"] | None = None,
        ring: Mapping[str, object] | None = None,
        server: ServerConfig | Mapping[str, Any] | None = None,
        serve: bool = True,
        on_error: Literal["raise", "drop"] = "raise",
        narrow: Iterable[str] = (),
        nonfinite_meta: Literal["refuse", "none"] = "refuse",
        reward: str | None = None,
        store: str | None = None,
        publisher: PublisherConfig | Mapping[str, Any] | None = None,
        store_config: StoreConfig | Mapping[str, Any] | None = None,
        store_meta: Mapping[str, object] | None = None,
        runtimes: RuntimeFinder = runtime_of,
    ) -> None:
        # refused here rather than with the first episode
        EpisodeRecord(worker_id=worker_id, sequence=0, dropped="never written")
        for name, word, permitted in (
            ("serve", serve, (True, False)),
            ("on_error", on_error, ("raise", "drop")),
            ("nonfinite_meta", nonfinite_meta, ("refuse", "none")),
            ("lengths", lengths, (None, "equal", "any")),
        ):
            if word not in permitted:
                refuse(name, word, " or ".join(map(repr, permitted)))
        self._narrow = _checked_names(narrow, reward)
        self._worker_id, self._reward = worker_id, reward
        self._varlen, self._lengths = checked_varlen(varlen), lengths
        if schema is not None and not isinstance(schema, Schema):
            refuse("schema", schema, "a Schema, such as Schema([TensorSpec('obs', (500, 4), 'float32', varlen=True)])")
        if schema is not None and varlen != ():
            refuse("varlen", varlen, "left out where there is a schema=, whose fields are varlen or not")
        self._ring_settings = _ring_settings(ring)
        self._server_config = made_of(ServerConfig, server, "server")
        if serve:
            if find_spec("ucxx") is None:
                raise ConfigError(NOT_INSTALLED, missing="ucxx")
            choose_address(self._server_config.host)
            if schema is None:
                _check_ucx(self._server_config, self._ring_settings)
        self._serve = serve
        self._on_error = on_error
        self._nonfinite_meta = nonfinite_meta
        self._publisher_config = made_of(PublisherConfig, publisher, "publisher")
        self._store_config = _store_settings(store, store_config)
        self._store_meta, _ = checked_meta(store_meta or {}, "store_meta")
        self._runtimes = runtimes
        self._lock = threading.Lock()
        self._sequence = itertools.count()
        self._written = self._nbytes = 0
        self._dropped: dict[str, int] = {}
        self._open = ExitStack()
        self._closed = False
        self._pid = os.getpid()
        self._packer: TrajectoryPacker | None = None
        self.ring: SharedRingBuffer | None = None
        self.server: UCXXServer | None = None
        self.publisher: HeartbeatPublisher | None = None
        if schema is not None:
            self._packer = self._make(schema if lengths is None else Schema(schema.fields, lengths))

    def write(
        self,
        /,  # without it `_as_in` could not tell `self` from an option of that name
        trajectory: Mapping[str, object],
        *,
        policy_version: int | None = None,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | str | None = None,
        **_unknown: Never,
    ) -> EpisodeRecord:
        """Write one trajectory and say where it is.

        Args:
            trajectory: nested mappings, lists and tuples of arrays, as the schema says: numpy, torch, cupy, jax, or
                anything with DLPack or CUDA's array interface, in host memory or on a GPU. From a GPU each goes by one
                copy into the slot, after what the thread's current stream has to do; the call waits for it.
            policy_version: of the weights it was played with.
            readers: reads that free it, at most the ring's own; None for that.
            meta: what else to say about it; travels in the reference.
            deadline_s: how long to wait for a slot where the ring does; None: `ring.block_timeout_s`.

        Returns:
            Its record. Under `on_error="drop"` a failed write's record has no reference, but the reason.

        Raises:
            ConfigError: the trajectory does not fit the schema, an option is unknown, the writer is closed, or this is
                a forked child.
            DeadlineExceededError: no slot in time.
            RingFullError: no slot, and a ring that does not wait was chosen.
        """
        if _unknown:
            check_names("option of write", _unknown, TrajectoryWriter.write.__kwdefaults__ or ())
        policy_version = as_policy_version(policy_version)
        if deadline_s is not None:
            deadline_s = checked_seconds(deadline_s, "deadline_s")
        packer = self._ready_for(trajectory)
        sequence = next(self._sequence)
        facts: dict[str, Any] = {"worker_id": self._worker_id, "sequence": sequence, "policy_version": policy_version}
        ref, dropped = None, None
        try:
            if meta and self._nonfinite_meta == "none":
                meta = finite_meta(meta)
            facts["episode_length"], facts["rewards"] = packer.rewards_in(trajectory)
            envelope = record_envelope(**facts, meta=meta)
            ref = packer.write(trajectory, readers=readers, meta=meta, deadline_s=deadline_s, envelope=envelope)
        except TransportError as error:
            if self._on_error == "raise" or isinstance(error, PageLockError):
                raise
            dropped = f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
            self._count_drop(error)
        else:
            with self._lock:
                self._written += 1
                self._nbytes += ref.nbytes
        return EpisodeRecord(**facts, ref=ref, dropped=dropped)

    def _count_drop(self, error: TransportError) -> None:
        """Count an episode that is given up; the 1st, 2nd, 4th, 8th … of a kind is logged with their number."""
        kind = type(error).__name__
        with self._lock:
            count = self._dropped[kind] = self._dropped.get(kind, 0) + 1
        if not count & (count - 1):
            _log.warning("episode_dropped", worker=self._worker_id, reason=str(error), kind=kind, dropped=count)

    def statistics(self) -> RolloutStatistics:
        """Counts since the writer was made."""
        refuse_forked(self._pid, "TrajectoryWriter")
        with self._lock:
            return RolloutStatistics(written=self._written, nbytes=self._nbytes, dropped=dict(self._dropped))

    @known_options
    def close(self, *, drain_s: float | str = 0.0) -> int:
        """Stop the server and remove the ring, with the payloads that no one has read. Idempotent.

        Args:
            drain_s: how long to wait first until all payloads have had their readers; no more can be written meanwhile.

        Returns:
            How many were left unread. Where it waited for them, that is logged too.
        """
        wait_s = checked_seconds(drain_s, "drain_s")
        if not may_end(self._pid):
            return 0
        with self._lock:
            self._closed = True
            self._packer = None
            ring = self.ring
        try:
            unread = 0 if ring is None or ring.closed else ring.drain(wait_s)
            if ring is not None and unread and wait_s:
                _log.warning("unread_removed", worker=self._worker_id, ring=ring.name, payloads=unread, waited_s=wait_s)
        finally:
            with self._lock:
                self._open.close()
        return unread

    def _ready_for(self, trajectory: Mapping[str, object]) -> TrajectoryPacker:
        if os.getpid() != self._pid:
            refuse_forked(self._pid, "TrajectoryWriter")
        with self._lock:
            if self._closed:
                raise ConfigError("the writer is closed; make another")
            if self._packer is None:
                example = without_devices(trajectory, self._runtimes)
                self._packer = self._make(Schema.from_example(example, self._varlen, self._lengths or "equal"))
            return self._packer

    def _make(self, schema: Schema) -> TrajectoryPacker:
        with ExitStack() as stack:
            ring = stack.enter_context(SharedRingBuffer.create(RingConfig(schema=schema, **self._ring_settings)))
            packer = TrajectoryPacker(ring, schema, self._narrow, self._reward, runtimes=self._runtimes)
            stack.callback(packer.close)
            if self._serve:
                self.server = stack.enter_context(UCXXServer(ring, self._server_config))
            if self._store_config.url is not None:
                options: Any = {"store_config": self._store_config, "meta": self._store_meta}
                source = self.server or RingSource(ring)
                publisher = HeartbeatPublisher(None, self._worker_id, source, self._publisher_config, **options)
                self.publisher = stack.enter_context(publisher)
            self._open = stack.pop_all()
        self.ring = ring
        return packer


def _as_in(_: Callable[Concatenate[Any, P], object]) -> Callable[[Callable[..., T]], Callable[Concatenate[Any, P], T]]:
    """A method that hands its arguments on to another one, whose they are to type checkers too."""
    return lambda method: method


class UCXXRolloutMixin:
    """Gives a rollout worker `write_to_buffer`. It has no `__init__`, so its place among the bases does not matter.

    ```python
    class Worker(UCXXRolloutMixin):
        def run(self, queue):
            self.setup_ucxx("worker-0", reward="reward", varlen={"obs": 500, "reward": 500})
            queue.put(self.write_to_buffer(self.play(), policy_version=3))
            self.cleanup_ucxx(drain_s=60)
    ```
    """

    ucxx_writer: TrajectoryWriter | None = None
    """The writer behind it, from `setup_ucxx` to `cleanup_ucxx`."""

    @_as_in(TrajectoryWriter.__init__)
    def setup_ucxx(self, worker_id: str, **settings: Any) -> None:
        """Make this worker's writer; arguments and errors as `TrajectoryWriter`, every setting is checked here.

        Raises:
            ConfigError: also where this worker is set up already.
        """
        if self.ucxx_writer is not None:
            raise ConfigError("this worker is set up already; cleanup_ucxx() first")
        self.ucxx_writer = TrajectoryWriter(worker_id, **settings)

    @_as_in(TrajectoryWriter.write)
    def write_to_buffer(self, trajectory: Mapping[str, object], **options: Any) -> dict[str, object]:
        """Write one trajectory; options (`policy_version` …) and errors as `TrajectoryWriter.write`.

        Returns:
            Its record as plain values (`EpisodeRecord.to_dict`), for the control plane to hand to a trainer.
        """
        if self.ucxx_writer is None:
            raise ConfigError("this worker is not set up: call setup_ucxx(worker_id, …) first")
        return self.ucxx_writer.write(trajectory, **options).to_dict()

    @known_options
    def cleanup_ucxx(self, *, drain_s: float | str = 0.0) -> int:
        """Stop the server and remove the ring; arguments and result as `TrajectoryWriter.close`. Idempotent."""
        writer, self.ucxx_writer = self.ucxx_writer, None
        return 0 if writer is None else writer.close(drain_s=drain_s)


def _ring_settings(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ring's settings but its schema, checked, with a writer's own default."""
    if given is not None and not isinstance(given, Mapping):
        refuse("ring", given, "a dict of a ring's settings, all but its schema")
    settings = dict(given or {})
    for name in ("schema", "slot_bytes"):
        if name in settings:
            text = f"leave {name!r} out of `ring`: how large a slot is follows from `schema`, or from `varlen`"
            raise ConfigError(text, field=name)
    if "on_full" not in gather("ring", settings):
        settings["on_full"] = "block"
    host_id(Path(RingConfig(slot_bytes=1, **settings).folder))
    return settings


def _check_ucx(config: ServerConfig, ring: Mapping[str, Any]) -> None:
    """Refuse settings of UCX that the server would not start with, which UCX alone can judge: in a process of its own.

    This process may fork before its first episode, which no UCX survives. That takes the second that the start of a
    process takes; where no one has set anything of UCX there is none. Nor is there one for ports that are threads where
    no process can be started: the first episode shows it.
    """
    if config.mode == "thread":
        try:
            interpreter()
        except ConfigError:
            return
    if config.link_settings or any(name.startswith("UCX_") for name in os.environ):
        sizes = {"slots": 1, "slot_bytes": 1, "name": None, "envelope_bytes": 0}
        tried = replace(config, mode="process", ports=1, base_port=None, publish_host="localhost")
        with SharedRingBuffer.create(RingConfig(**{**ring, **sizes})) as tiny, UCXXServer(tiny, tried):
            pass


def _store_settings(url: str | None, given: StoreConfig | Mapping[str, Any] | None) -> StoreConfig:
    config = made_of(StoreConfig, given, "store_config")
    if url is not None:
        config = replace(config, url=url)
    if config.url is not None:
        parse_store_url(config.url)
    return config


def _checked_names(narrow: object, reward: object) -> list[str]:
    """The names in `narrow`, of which, as of `reward`, no more is known without a schema."""
    if reward is not None and not isinstance(reward, str):
        refuse("reward", reward, "the name of a field")
    names: list[Any] = [*narrow] if isinstance(narrow, Iterable) and not isinstance(narrow, str) else [None]
    if not all(isinstance(name, str) for name in names):
        refuse("narrow", narrow, "a list of names of fields")
    return names
