"""What a new user writes wrong, and the one line that says so: the field, the value, and what to do instead."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import anyio
import numpy as np
import pytest

from scripts.messages import messages
from tests.support.one_for_many import one_for_many
from tests.support.rows import row
from tests.support.served_ring import client_of, served_ring
from ucxx_transport import (
    AuthenticationError,
    ConfigError,
    DeadlineExceededError,
    EpisodeStream,
    HeartbeatPublisher,
    PeerLostError,
    ProtocolError,
    RolloutFeed,
    Schema,
    SharedRingBuffer,
    SourceWatcher,
    StaleSlotError,
    SyncUCXXClient,
    TensorSpec,
    TrajectoryWriter,
    TransportError,
    UCXXClient,
    UCXXDataPackerMixin,
    UCXXRolloutMixin,
    UCXXServer,
)
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Prefetcher, fetch_batch

MAXIMA = {"obs": 500, "reward": 500}


class Mistake(NamedTuple):
    """What a user did, the error's class, and what its one line must say: the field, the value, the remedy."""

    name: str
    make: Callable[[], object]
    error: type[TransportError]
    field: str
    value: str
    remedy: str


class FrameworksPacker:
    def get_policy_input(self, *outputs: Any, **_: Any) -> Any:
        return outputs[1]


class Packer(UCXXDataPackerMixin, FrameworksPacker):
    pass


@contextmanager
def writer(**settings: Any) -> Iterator[TrajectoryWriter]:
    ring = {"slots": 4, "block_timeout_s": 0.05, **settings.pop("ring", {})}
    with TrajectoryWriter("worker-0", serve=False, ring=ring, **{"varlen": MAXIMA, **settings}) as made:
        yield made


@contextmanager
def packing(**settings: Any) -> Iterator[Packer]:
    packer = Packer()
    packer.setup_ucxx_data_packer(**settings)
    try:
        yield packer
    finally:
        packer.shutdown_ucxx_data_packer()


def episode(steps: int, **other: Any) -> dict[str, Any]:
    return {"obs": np.zeros((steps, 4), "f4"), "reward": np.ones(steps, "f4"), **other}


def writing(*episodes: dict[str, Any], **settings: Any) -> Callable[[], object]:
    def run() -> None:
        with writer(**settings) as worker:
            for each in episodes:
                worker.write(each)

    return run


def using(use: Callable[[SimpleNamespace], object], **settings: Any) -> Callable[[], object]:
    """A worker, a client and a packer on one host."""

    def run() -> None:
        with writer(**settings) as worker, SyncUCXXClient() as client, packing() as packer:
            use(SimpleNamespace(worker=worker, client=client, packer=packer, record=worker.write(episode(3))))

    return run


def reading_twice(job: SimpleNamespace) -> None:
    job.client.read(job.record).release()
    job.client.read(job.record)


def reading_what_is_gone() -> None:
    with writer() as worker:
        record = worker.write(episode(3))
    with SyncUCXXClient() as client:
        client.read(record.to_dict())


def keeping_arrays(job: SimpleNamespace) -> None:
    kept = job.client.read(job.record).arrays
    for _ in range(4):
        kept = kept, job.client.read(job.worker.write(episode(3))).arrays


def a_batch_as_large_as_the_ring(job: SimpleNamespace) -> None:
    job.packer.start_prefetch([job.record, *(job.worker.write(episode(3)) for _ in range(3))])
    batch = job.packer.collect_prefetch()
    assert len(batch) == 4
    job.worker.write(episode(3))


def starting_twice(job: SimpleNamespace) -> None:
    job.packer.start_prefetch([job.record, job.worker.write(episode(3))])
    job.packer.start_prefetch([job.worker.write(episode(3))])


def reading_over_loopback_of_another_host(job: SimpleNamespace) -> None:
    with client_of() as client:
        client.read(replace(job.record.ref, host_id="elsewhere", host="127.0.0.1", ports=(1,)))


def setting_up(**settings: Any) -> Callable[[], object]:
    def run() -> None:
        schema = Schema([TensorSpec("obs", (4,), "float32")])
        TrajectoryWriter("worker-0", schema=schema, **settings).close()

    return run


def streaming_text() -> None:
    with EpisodeStream(["abc"]) as stream:
        next(stream)


def forgetting_the_version() -> None:
    with packing(max_staleness=1) as packer:
        packer.start_prefetch([])


DATA = [
    Mistake(
        "forgotten varlen, a longer episode",
        writing(episode(10), episode(20), varlen=()),
        ConfigError,
        "'obs'",
        "20 rows.*first episode.* 10",
        r"varlen=\{'obs': N\}",
    ),
    Mistake(
        "forgotten varlen, a shorter episode",
        writing(episode(10), episode(5), varlen=()),
        ConfigError,
        "'obs'",
        "5 rows.*first episode.* 10",
        r"varlen=\{'obs': N\}",
    ),
    Mistake(
        "longer than varlen",
        writing(episode(10), episode(501)),
        ConfigError,
        "'obs'",
        "501 rows, at most 500",
        r"varlen=\{'obs': N\}",
    ),
    Mistake(
        "the first longer than varlen",
        writing(episode(501)),
        ConfigError,
        "'obs'",
        "501 rows, at most 500",
        r"varlen=\{'obs': N\}",
    ),
    Mistake(
        "a dimension too few",
        writing(episode(10), episode(10, obs=np.zeros(10, "f4"))),
        ConfigError,
        "'obs'",
        r"\(10,\)",
        "2 dimensions.*schema=",
    ),
    Mistake(
        "wrong width",
        writing(episode(3), episode(3, obs=np.zeros((3, 5), "f4"))),
        ConfigError,
        "'obs'",
        r"\(3, 5\)",
        r"rows of shape \(4,\).*schema=",
    ),
    Mistake(
        "missing key",
        writing(episode(3), {"obs": np.zeros((3, 4), "f4")}),
        ConfigError,
        "field=reward",
        "missing: 'reward'",
        r"an episode without 'reward' must give 0 rows, np\.zeros\(\(0,\), 'float32'\)",
    ),
    Mistake(
        "misspelt key",
        writing(episode(3), {"obs": np.zeros((3, 4), "f4"), "rewrad": np.ones(3, "f4")}),
        ConfigError,
        "missing: 'reward'",
        "unknown: 'rewrad'",
        "did you mean 'reward'",
    ),
    Mistake(
        "a reward fewer than observations",
        writing(episode(10), episode(10, reward=np.ones(9, "f4"))),
        ConfigError,
        "'obs': 10 rows",
        "'reward' has 9",
        "lengths='any'",
    ),
    Mistake(
        "a reward fewer in the first episode",
        writing(episode(10, reward=np.ones(9, "f4")), varlen=["obs", "reward"]),
        ConfigError,
        "'obs': 10 rows",
        "'reward' has 9",
        "lengths='any'",
    ),
    Mistake(
        "a reward that is no field",
        writing(episode(3), reward="rewards"),
        ConfigError,
        "^reward names",
        "'rewards', which is no field",
        "did you mean 'reward'",
    ),
    Mistake(
        "a name as a list", setting_up(narrow="obs", serve=False), ConfigError, "narrow", "'obs'", "a list of names"
    ),
    Mistake("unknown keyword", setting_up(on_eror="drop"), ConfigError, "TrajectoryWriter", "on_eror", "'on_error'"),
    Mistake(
        "unknown store",
        setting_up(store="redis://host", serve=False),
        ConfigError,
        "store",
        "redis",
        "local:///abs/path or etcd://",
    ),
    Mistake(
        "extra key",
        writing(episode(3), episode(3, value=np.ones(3))),
        ConfigError,
        "field=value",
        "unknown: 'value'",
        "name in schema= every field.*give 0 rows where one has none",
    ),
    Mistake(
        "float64 after float32",
        writing(episode(3), episode(3, obs=np.zeros((3, 4)))),
        ConfigError,
        "'obs'",
        "float64.*not keep its values in float32",
        r"schema=Schema\(\[TensorSpec\('obs', …, 'float64'\), …\]\)",
    ),
    Mistake(
        "integers after floats",
        writing(episode(3), episode(3, reward=np.ones(3, int))),
        ConfigError,
        "'reward'",
        "int64.*not keep its values in float32",
        r"array\.astype\('float64'\).*and the field float64 by schema=",
    ),
    Mistake(
        "floats after integers",
        writing(episode(3, reward=np.ones(3, int)), episode(3)),
        ConfigError,
        "'reward'",
        "float32.*not keep its values in int64",
        r"schema=Schema\(\[TensorSpec\('reward', …, 'float64'\), …\]\)",
    ),
    Mistake(
        "ring typo",
        setting_up(ring={"slotz": 8}, serve=False),
        ConfigError,
        "RingConfig",
        "slotz",
        "did you mean 'slots'",
    ),
    Mistake(
        "unresolvable host",
        setting_up(server={"host": "nosuchhost.invalid"}),
        ConfigError,
        "^host = ",
        r"'nosuchhost\.invalid'",
        "no address, interface of this machine or name that resolves: give one",
    ),
    Mistake(
        "port in the host",
        setting_up(server={"host": "10.0.0.1:5000"}),
        ConfigError,
        r"server\.host = ",
        r"10\.0\.0\.1:5000: it has a port",
        r"give '10\.0\.0\.1', and the port by ports or base_port",
    ),
]
HOLDER = rf"of 4 on host \S+: pid {os.getpid()} \(\S+\), reader \S+, holds 4, the longest for \d"
RINGS = [
    Mistake(
        "arrays kept",
        using(keeping_arrays),
        DeadlineExceededError,
        "slots=4 reading=4",
        HOLDER,
        r"a trainer that keeps arrays keeps their slots: clone them, or read with local='copy'",
    ),
    Mistake(
        "ring too small for the batch in use",
        using(a_batch_as_large_as_the_ring),
        DeadlineExceededError,
        "slots=4 reading=4",
        HOLDER,
        r"What helps: .*more ring\.slots",
    ),
    Mistake(
        "worker gone before the read",
        reading_what_is_gone,
        StaleSlotError,
        r"ring=\d+-\w+",
        "the ring of this payload is gone: its worker closed it, or died",
        r"go on with the next record, and let workers wait for their readers: close\(drain_s=…\)",
    ),
    Mistake(
        "read twice",
        using(reading_twice),
        StaleSlotError,
        "slot=0 generation=1",
        "already received or discarded this payload",
        "keep the first read's payload or a copy of its arrays, and write what several read with readers=N",
    ),
    Mistake(
        "loopback host",
        using(reading_over_loopback_of_another_host),
        PeerLostError,
        "needs a server with host=",
        r"peer=127\.0\.0\.1:1\b",
        "this is loopback: a worker on another host",
    ),
]
CALLS = [
    Mistake(
        "collect before start",
        using(lambda job: job.packer.collect_prefetch()),
        ConfigError,
        "nothing",
        "on its way or in use",
        r"start\(rollouts\) first, of a packer start_prefetch",
    ),
    Mistake(
        "wait before start",
        using(lambda job: job.packer.wait_prefetch()),
        ConfigError,
        "nothing",
        "on its way",
        r"start\(rollouts\) first, of a packer start_prefetch",
    ),
    Mistake(
        "start twice", using(starting_twice), ConfigError, "batch", "rollouts=2", "collect_prefetch.*defer_prefetch"
    ),
    Mistake(
        "set up twice",
        using(lambda job: job.packer.setup_ucxx_data_packer()),
        ConfigError,
        "packer",
        "already",
        "shutdown_ucxx_data_packer",
    ),
    Mistake(
        "not set up", lambda: Packer().start_prefetch([]), ConfigError, "packer", "not set up", "setup_ucxx_data_packer"
    ),
    Mistake(
        "policy_version forgotten",
        forgetting_the_version,
        ConfigError,
        "field=policy_version",
        "max_staleness = 1",
        "the trainer's policy_version: give it with the rollouts",
    ),
    Mistake(
        "text that is no record",
        using(lambda job: job.client.read("abc")),
        ConfigError,
        "ref",
        "'abc'",
        "SlotRef.*record",
    ),
    Mistake(
        "text in a ring",
        using(lambda job: job.worker.ring.read("abc")),
        ConfigError,
        "ref",
        "'abc'",
        "record",
    ),
    Mistake(
        "a record as Python's text",
        using(lambda job: job.client.read(str(job.record.to_dict()))),
        ProtocolError,
        "record",
        "ucxx_transport",
        r"json\.dumps",
    ),
    Mistake(
        "a list of records as one",
        using(lambda job: job.client.read([job.record])),
        ProtocolError,
        "record",
        "a list of 1",
        "by itself",
    ),
    Mistake(
        "one reference as a list",
        using(lambda job: job.client.read_many(job.record)),
        ConfigError,
        "refs",
        "EpisodeRecord",
        r"give a list: \[ref\]",
    ),
    Mistake("a number as a store", lambda: SourceWatcher(cast("str", 5)), ConfigError, "store", "int", "or its URL"),
    Mistake(
        "text as what is published",
        lambda: HeartbeatPublisher("local://", "w", cast("UCXXServer", "src")),
        ConfigError,
        "source",
        "str",
        "a UCXXServer",
    ),
    Mistake(
        "text as a ring", lambda: UCXXServer(cast("SharedRingBuffer", "ring")), ConfigError, "ring", "str", "a Shared"
    ),
    Mistake(
        "a truth as a version",
        using(lambda job: job.worker.write(episode(3), policy_version=True)),
        ConfigError,
        "policy_version",
        "True",
        "an i64",
    ),
    Mistake(
        "a setting of the packer's",
        lambda: cast("Any", RolloutFeed)(client={}),
        ConfigError,
        "setting",
        "'client'",
        "config",
    ),
    Mistake("text as a source", using(lambda job: job.client.take("abc")), ConfigError, "ref", "'abc'", "record"),
    Mistake("text in a stream", streaming_text, ConfigError, "references", "'abc'", "record.*SlotRef"),
    Mistake(
        "text to resolve",
        using(lambda job: job.packer.ucxx_feed.resolve("abc")),
        ConfigError,
        "output",
        "'abc'",
        "needs no resolving",
    ),
    Mistake(
        "a record that was dropped",
        using(lambda job: job.client.read(EpisodeRecord(worker_id="w", sequence=7, dropped="RingFullError: x"))),
        StaleSlotError,
        "record",
        "sequence=7.*RingFullError",
        "go on with the next",
    ),
]


@pytest.mark.parametrize("mistakes", [DATA, RINGS, CALLS], ids=["data", "rings", "calls"])
def test_a_mistake_is_one_line_with_field_value_and_remedy(mistakes: list[Mistake]) -> None:
    for mistake in mistakes:
        with row(mistake=mistake.name):
            with pytest.raises(mistake.error) as caught:
                mistake.make()
            assert_says(caught.value, mistake.field, mistake.value, mistake.remedy)


def assert_says(error: TransportError, *patterns: str) -> None:
    """Each pattern by words of its own, the last first."""
    said = str(error)
    assert any(one.cls == type(error).__name__ and one.reads(error.message) for one in messages()), (
        "not in docs/troubleshooting.md"
    )
    assert "\n" not in said
    assert "overwrite" not in said  # a remedy loses nothing
    assert "astype('int" not in said
    left = said
    for pattern in reversed(patterns):
        assert re.search(pattern, left), f"{pattern!r} is not in {said!r}, or another pattern's"
        left = re.sub(pattern, "…", left, count=1)


FORMS: list[tuple[str, Callable[[EpisodeRecord], object]]] = [
    ("a record", lambda record: record),
    ("its dict", lambda record: record.to_dict()),
    ("its JSON", lambda record: json.dumps(record.to_dict())),
    ("its JSON, sorted, as bytes", lambda record: json.dumps(record.to_dict(), sort_keys=True, indent=1).encode()),
    ("the JSON of its JSON", lambda record: json.dumps(json.dumps(record.to_dict()))),
    ("its reference", lambda record: record.ref),
    ("the reference in its dict", lambda record: record.to_dict()["ref"]),
    ("the reference's JSON", lambda record: json.dumps(record.to_dict()["ref"])),
    ("the reference's bytes", lambda record: record.ref and record.ref.to_bytes()),
    ("a view of the reference's bytes", lambda record: record.ref and memoryview(record.ref.to_bytes())),
    ("a view of its JSON", lambda record: memoryview(json.dumps(record.to_dict()).encode())),
    ("an object with an output", lambda record: SimpleNamespace(output=record.to_dict())),
    ("a mapping with a completion", lambda record: {"prompt": "…", "completion": json.dumps(record.to_dict())}),
]


def test_what_a_queue_made_of_a_record_is_taken_wherever_a_reference_is() -> None:
    with writer(ring={"slots": 16}) as worker, SyncUCXXClient() as client, packing() as packer:
        for name, form in FORMS:

            def fresh(form: Callable[[EpisodeRecord], object] = form) -> Any:
                return form(worker.write(episode(3)))

            with row(form=name):
                first = fresh()
                assert worker.ring is not None
                assert worker.ring.read(first)["obs"].shape == (3, 4)
                assert worker.ring.discard(fresh())
                client.read(fresh()).release()
                (payload,) = client.read_many([fresh()])
                assert not isinstance(payload, TransportError)
                payload.release()
                assert client.discard([fresh()]) == 1
                (payload,) = client.take(fresh())
                payload.release()
                with EpisodeStream([fresh()]) as stream:
                    assert [each.arrays["obs"].shape for each in stream] == [(3, 4)]
                packer.start_prefetch([fresh()])
                (rollout,) = packer.collect_prefetch()
                assert packer.get_policy_input(None, rollout)["obs"].shape == (3, 4)
                packer.release_prefetch()


def test_one_in_the_place_of_several_is_refused_by_every_call_that_takes_several() -> None:
    async def awaiting(call: Callable[[UCXXClient], Awaitable[object]]) -> None:
        async with UCXXClient() as client:
            await call(client)

    with writer() as worker, SyncUCXXClient() as client, packing() as packer, Prefetcher() as prefetcher:
        record = worker.write(episode(3))

        def what_a_function_makes_of_a_batch(one: Any) -> None:
            with RolloutFeed(on_missing=lambda *_: one) as feed:
                feed.start([EpisodeRecord(worker_id="w", sequence=7, dropped="RingFullError: x")])
                feed.collect()

        entries: list[tuple[str, str, Callable[[Any], object]]] = [
            ("read_many", "refs", client.read_many),
            ("discard", "refs", client.discard),
            ("await read_many", "refs", lambda one: anyio.run(awaiting, lambda client: client.read_many(one))),
            ("await discard", "refs", lambda one: anyio.run(awaiting, lambda client: client.discard(one))),
            ("fetch_batch", "records", lambda one: anyio.run(awaiting, lambda it: fetch_batch(it, one, deadline_s=5))),
            ("begin", "records", prefetcher.begin),
            ("fetch", "records", prefetcher.fetch),
            ("EpisodeStream", "references", EpisodeStream),
            ("start_prefetch", "rollouts", packer.start_prefetch),
            ("defer_prefetch", "rollouts", packer.defer_prefetch),
            ("on_missing", "rollouts", what_a_function_makes_of_a_batch),
        ]
        for name, field, call in entries:
            for one in one_for_many(record):
                with row(call=name, one=one), pytest.raises(ConfigError) as caught:
                    call(one)
                assert_says(caught.value, f"{field} must be a list, not .*; give a list: .{field[:-1]}.")
        assert packer.is_cold_start
        assert prefetcher.statistics().episodes == 0
        (payload,) = client.read_many(iter([record]))
        assert not isinstance(payload, TransportError)
        payload.release()


def test_a_misspelt_option_of_a_call_is_refused_with_the_one_that_was_meant() -> None:
    def awaited_fetch(**options: Any) -> None:
        anyio.run(partial(fetch_batch, cast("UCXXClient", None), [], **options))

    assert inspect.iscoroutinefunction(fetch_batch), "what retries it has to see that"
    with writer() as worker, packing() as packer, Prefetcher() as prefetcher, RolloutFeed() as feed:
        calls: list[tuple[Callable[..., object], str, str]] = [
            *((call, "policy_verison", "policy_version") for call in (prefetcher.fetch, prefetcher.begin)),
            *((call, "policy_verison", "policy_version") for call in (feed.start, feed.defer)),
            *((call, "polcy_version", "policy_version") for call in (packer.start_prefetch, packer.defer_prefetch)),
            (partial(worker.write, {}), "reader", "readers"),
            (worker.close, "drain", "drain_s"),
            (UCXXRolloutMixin().cleanup_ucxx, "drian_s", "drain_s"),
            (awaited_fetch, "deadline", "deadline_s"),
        ]
        for call, wrong, meant in calls:
            with row(call=call), pytest.raises(ConfigError) as caught:
                call(*[[]] * (meant == "policy_version"), **{wrong: 3})
            assert_says(caught.value, f"'{wrong}'; did you mean '{meant}'")
        assert feed.is_cold_start
        assert packer.is_cold_start


def test_what_is_of_one_process_says_so_where_it_is_pickled() -> None:
    with (
        writer(schema=Schema([TensorSpec("obs", (4,), "float32")]), varlen=()) as worker,
        SyncUCXXClient() as client,
        packing() as packer,
        EpisodeStream([]) as stream,
    ):
        for one in (worker, worker.ring, client, UCXXClient(), packer, packer.ucxx_feed, stream):
            with row(one=one), pytest.raises(TypeError, match=r"cannot be pickled .* send records, or a ring's name"):
                pickle.dumps(one)


def test_lists_are_taken_with_varlen_as_arrays_are() -> None:
    with writer() as worker, SyncUCXXClient() as client:
        for steps in (3, 5):
            record = worker.write({"obs": [[0.5] * 4] * steps, "reward": [1.0] * steps})
            with client.read(record) as payload:
                assert payload.arrays["obs"].shape == (steps, 4)


def test_one_of_many_that_is_no_reference_costs_the_others_nothing() -> None:
    with writer() as worker, SyncUCXXClient() as client:
        first, wrong, last = client.read_many([worker.write(episode(3)), "abc", worker.write(episode(3)).to_dict()])
        assert isinstance(wrong, ConfigError)
        assert [each.arrays["obs"].shape for each in (first, last) if not isinstance(each, TransportError)] == [
            (3, 4)
        ] * 2


def test_a_version_that_a_worker_forgot_is_named_in_the_error_and_in_the_loss() -> None:
    losses: list[Any] = []
    with writer() as worker, RolloutFeed(max_staleness=1, on_loss=losses.append) as feed:
        feed.start([worker.write(episode(3))], policy_version=5)
        with pytest.raises(ConfigError, match="worker 'worker-0': max_staleness = 1"):
            feed.collect()
    (loss,) = losses
    assert_says(loss.error, "policy_version", "None", "write policy_version=")


def test_a_wrong_token_says_so() -> None:
    with (
        served_ring(token="right", mode="thread") as served,
        client_of(token="wrong") as client,
        pytest.raises(AuthenticationError) as caught,
    ):
        client.read(served.ring.write_raw(b"secret"))
    assert_says(caught.value, "token", "wrong", "the same one")
    assert "right" not in str(caught.value)


def test_a_packer_of_a_forked_child_s_parent_is_refused() -> None:
    def use(answers: Any) -> None:
        try:
            packer.start_prefetch([])
        except ConfigError as error:
            answers.put(str(error))

    context = multiprocessing.get_context("fork")
    with packing() as packer:
        answers = context.SimpleQueue()
        child = context.Process(target=use, args=(answers,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        said = answers.get()
    for pattern in ("RolloutFeed", "forked child", "make one in the process that uses it"):
        assert pattern in said
