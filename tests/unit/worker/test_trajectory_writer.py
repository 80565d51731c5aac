from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import (
    ConfigError,
    PublisherConfig,
    RingFullError,
    Schema,
    SlotError,
    SlotState,
    SourceWatcher,
    StoreConfig,
    TensorSpec,
    open_store,
)
from ucxx_transport.ring.layout import SLEEPERS_WORD
from ucxx_transport.schema.episode_record import EpisodeRecord, RewardSummary
from ucxx_transport.worker import TrajectoryWriter, UCXXRolloutMixin

SCHEMA = Schema(
    [TensorSpec("obs", (100, 2), "float32", varlen=True), TensorSpec("reward", (100,), "float32", varlen=True)]
)
RING = {"slots": 2, "on_full": "raise"}


def episode(steps: int = 4, **other: object) -> dict[str, Any]:
    return {"obs": np.ones((steps, 2), np.float32), "reward": np.arange(steps, dtype=np.float32), **other}


def writer(**settings: Any) -> TrajectoryWriter:
    return TrajectoryWriter(
        "worker-0", **{"schema": SCHEMA, "ring": RING, "serve": False, "reward": "reward", **settings}
    )


def test_a_record_says_what_the_control_plane_needs() -> None:
    with writer() as end:
        record = end.write(episode(), policy_version=9, meta={"seed": 1})
        assert record.ref is not None
        assert (record.worker_id, record.sequence, record.episode_length) == ("worker-0", 0, 4)
        assert record.rewards == RewardSummary(total=6.0, mean=1.5, least=0.0, most=3.0)
        assert (record.policy_version, record.ref.meta, record.dropped) == (9, {"seed": 1}, None)
        assert end.ring is not None
        np.testing.assert_array_equal(end.ring.read(record.ref)["reward"], [0, 1, 2, 3])
        assert end.write(episode()).sequence == 1
        found = end.statistics()
        assert (found.written, found.nbytes, found.dropped) == (2, 2 * record.ref.nbytes, {})


def test_a_trajectory_that_is_taken_comes_with_its_whole_record() -> None:
    for meta, narrow in ((None, ()), ({"seed": 1}, ("obs",))):
        with row(meta=meta, narrow=narrow), writer(narrow=narrow) as end:
            obs = np.ones((4, 2), np.float64 if narrow else np.float32)
            record = end.write(episode(obs=obs), policy_version=9, meta=meta)
            assert end.ring is not None
            (lease,) = end.ring.take(1)
            assert lease.record is not None
            assert EpisodeRecord.from_envelope(lease.record, end.ring.reference(lease)) == record
            assert EpisodeRecord.from_dict({**lease.record, "ref": end.ring.reference(lease).to_dict()}) == record


def test_the_schema_may_come_with_the_first_trajectory() -> None:
    with writer(schema=None, varlen={"obs": 50, "reward": 50}) as end:
        before: object = end.ring
        end.write(episode())
        assert before is None
        assert end.ring is not None
        schema = end.ring.schema
        assert schema is not None
        assert {field.name: field.shape for field in schema} == {"obs": (50, 2), "reward": (50,)}
        end.write(episode(50))


def test_one_number_is_the_maximum_of_every_field_that_has_rows() -> None:
    with writer(schema=None, varlen=50) as end:
        end.write(episode(4, seed=7))
        assert end.ring is not None
        schema = end.ring.schema
        assert schema is not None
        assert {field.name: field.shape for field in schema} == {"obs": (50, 2), "reward": (50,), "seed": ()}
        end.write(episode(50, seed=8))


def test_a_first_trajectory_that_is_no_payload_is_an_error_and_the_next_may_do() -> None:
    with writer(schema=None, varlen={"obs": 50, "reward": 50}, on_error="drop") as end:
        with pytest.raises(ConfigError, match="obs"):
            end.write(episode(obs=["text"]))
        assert end.write(episode()).ref is not None


def test_a_failed_write_is_an_exception() -> None:
    with writer() as end:
        for _ in range(2):
            end.write(episode())
        with pytest.raises(RingFullError):
            end.write(episode())
        assert end.statistics().dropped == {}


def test_a_failed_write_is_a_record_with_the_reason_and_a_count_where_that_was_chosen(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    with writer(on_error="drop") as end:
        records = [end.write(episode(), policy_version=1) for _ in range(4)]
        misfit = end.write({"obs": np.ones((1, 2), np.float32)})
    assert [record.ref is None for record in records] == [False, False, True, True]
    assert str(records[3].dropped).startswith("RingFullError: ")
    assert (records[3].sequence, records[3].episode_length, records[3].policy_version) == (3, 4, 1)
    assert EpisodeRecord.from_dict(records[3].to_dict()) == records[3]
    assert str(misfit.dropped).startswith("ConfigError: ")
    assert end.statistics().dropped == {"RingFullError": 2, "ConfigError": 1}
    assert [event["kind"] for event in log_events] == ["RingFullError", "RingFullError", "ConfigError"]


def test_lasting_drops_are_logged_again_with_their_number(log_events: list[MutableMapping[str, Any]]) -> None:
    with writer(on_error="drop") as end:
        for _ in range(1000):
            assert "float64" in str(end.write(episode(reward=np.array([0.5]))).dropped)
        end.write(episode(other=1))
        assert end.statistics().dropped == {"ConfigError": 1001}
    logged = [event for event in log_events if event["event"] == "episode_dropped"]
    assert [event["dropped"] for event in logged] == [2**power for power in range(10)]
    assert {(event["worker"], event["kind"]) for event in logged} == {("worker-0", "ConfigError")}


def test_a_number_that_json_has_not_is_named_in_meta_or_none_where_that_was_chosen() -> None:
    meta = {"loss": np.float32("nan"), "kl": 0.5, "more": {"norms": [1.0, float("-inf")]}}
    rows: list[tuple[dict[str, Any], str]] = [
        (meta, r"meta\['loss'\] must be a finite number, not nan .*nonfinite_meta='none'"),
        ({"more": meta["more"]}, r"meta\['more'\]\['norms'\] must be a finite number, not -inf"),
        ({"more": {"a": {1, 2}}}, r"meta\['more'\]\['a'\] must be made of .*, not a set"),
        ({"more": {1: 2}}, r"meta\['more'\] must be keyed by text, not 1"),
    ]
    with writer() as end:
        for given, words in rows:
            with row(meta=given), pytest.raises(ConfigError, match=words):
                end.write(episode(), meta=given)
    with writer(nonfinite_meta="none") as end:
        record = end.write(episode(), meta=meta)
        assert record.ref is not None
        assert record.ref.meta == {"loss": None, "kl": 0.5, "more": {"norms": [1.0, None]}}


@pytest.mark.parametrize("reward", [np.array(["a"]), np.array([1j]), [None], np.array([object()])])
def test_rewards_that_are_no_numbers_are_refused_as_any_field(reward: object) -> None:
    with writer() as end, pytest.raises(ConfigError, match="'reward'"):
        end.write(episode(reward=reward))
    with writer() as end, pytest.raises(ConfigError, match="mapping"):
        end.write([1, 2])  # type: ignore[arg-type]  # what is refused


def test_a_full_ring_costs_no_episode_unless_that_was_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, environment, written, overwritten, dropped in (
        ({}, None, 8, 0, {"DeadlineExceededError": 56}),
        ({"on_full": "raise"}, "overwrite", 8, 0, {"RingFullError": 56}),
        ({"on_full": "overwrite"}, None, 64, 56, {}),
        ({}, "overwrite", 64, 56, {}),
    ):
        with row(chosen=chosen, environment=environment), monkeypatch.context() as patch:
            if environment is not None:
                patch.setenv("UCXX_TRANSPORT_RING__ON_FULL", environment)
            with writer(ring={"slots": 8, "block_timeout_s": 1e-3, **chosen}, on_error="drop") as end:
                records = [end.write(episode()) for _ in range(64)]
                assert end.ring is not None
                assert end.ring.statistics().overwritten == overwritten
                assert (end.statistics().written, end.statistics().dropped) == (written, dropped)
                assert sum(record.ref is not None for record in records) == written


def test_a_write_that_waits_for_a_slot_gets_the_one_that_a_reader_frees_and_fails_with_the_ring() -> None:
    with writer(ring={"slots": 1}) as end, ThreadPoolExecutor(1) as pool:
        first = end.write(episode())
        assert end.ring is not None
        assert first.ref is not None
        ring, results = end.ring, []
        for way_out in (partial(ring.read, first.ref), end.close):
            results.append(pool.submit(end.write, episode()))
            wait_until(lambda: ring.statistics().blocked == len(results), MINUTE, what="it waits")
            way_out()
        assert results[0].result(MINUTE).sequence == 1
        with pytest.raises(SlotError, match="closed"):
            results[1].result(MINUTE)


@pytest.mark.parametrize("rewards", [[], [np.nan], [np.inf, -np.inf], [3e38] * 100])
def test_rewards_without_a_finite_summary_have_none(rewards: list[float]) -> None:
    with writer() as end:
        record = end.write(episode(reward=np.array(rewards, np.float32)))
        assert record.episode_length == len(rewards)
        assert record.rewards is None or np.isfinite(record.rewards.total)
        assert (record.rewards is None) == (len(rewards) < 100)


def test_rewards_may_be_nested_or_one_for_all() -> None:
    schema = Schema([TensorSpec("step/reward", (2,), "float32")])
    with writer(schema=schema, reward="step/reward") as end:
        summary = end.write({"step": {"reward": np.ones(2, np.float32)}}).rewards
        assert summary is not None
        assert summary.total == 2.0
    with writer(schema=Schema([TensorSpec("score", (), "float32")]), reward="score") as end:
        record = end.write({"score": 0.5})
        assert (record.episode_length, record.rewards) == (1, RewardSummary(total=0.5, mean=0.5, least=0.5, most=0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nonfinite_meta": "null"}, "nonfinite_meta"),
        ({"on_error": "ignore"}, "on_error"),
        ({"reward": "rewards"}, "'rewards'"),
        ({"narrow": ["rewards"]}, "'rewards'"),
        ({"ring": {"slots": 0}}, "slots"),
        ({"ring": {"schema": SCHEMA}}, "'schema' out of `ring`"),
    ],
)
def test_a_wrong_setting_is_named_and_leaves_nothing(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words), writer(**settings) as end:
        end.write(episode())


def test_every_setting_is_checked_before_there_is_a_trajectory() -> None:
    for settings, words in (
        ({"ring": {"slotz": 2}}, "did you mean 'slots'"),
        ({"ring": {"slots": 0}}, "ring.slots = 0"),
        ({"ring": {"slot_bytes": 64}}, "'slot_bytes'"),
        ({"ring": {"folder": "/nowhere"}}, "ring.folder"),
        ({"ring": 8}, "ring must be a dict"),
        ({"server": {"portz": 1}}, "did you mean 'ports'"),
        ({"server": {"ports": 0}}, "server.ports"),
        ({"server": "127.0.0.1"}, "server takes a ServerConfig, or a dict"),
        ({"serve": True, "server": {"host": "255.255.255.254"}}, "publish_host"),
        ({"serve": True, "server": {"host": "no-such-host.invalid"}}, "or name that resolves"),
        ({"server": {"host": "127.0.0.1:5000"}}, "a port in it"),
        ({"server": {"publish_host": "lb.example:5000"}}, "a port in it"),
        ({"publisher": {"interval_s": 0}}, "publisher.interval_s"),
        ({"publisher": {"interval": 1}}, "did you mean 'interval_s'"),
        ({"store_config": {"timeout": 1}}, "did you mean 'timeout_s'"),
        ({"store": "nowhere"}, "store.url"),
        ({"store": "redis://host"}, "unknown scheme 'redis'"),
        ({"store": "etcd://host:port"}, "which is not host:port"),
        ({"store_meta": {"gpus": [float("nan")]}}, "store_meta['gpus'] must be a finite number"),
        ({"store_meta": [1]}, "store_meta must be a mapping, not a list of 1"),
        ({"on_eror": "drop"}, "did you mean 'on_error'"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'drop', not 'ignore'"),
        ({"nonfinite_meta": "null"}, "nonfinite_meta must be 'refuse' or 'none', not 'null'"),
        ({"lengths": "same"}, "lengths must be None or 'equal' or 'any', not 'same'"),
        ({"reward": 1}, "reward must be the name of a field, not 1"),
        ({"narrow": "obs"}, "narrow must be a list of names of fields, not 'obs'"),
        ({"varlen": "obs"}, "varlen must be names of fields"),
        ({"varlen": {"obs": 0}}, "not {'obs': 0}"),
        ({"serve": "no"}, "serve must be True or False, not 'no'"),
        ({"schema": [TensorSpec("obs", (4,), "f4")]}, "schema must be a Schema, such as Schema([TensorSpec("),
        ({"varlen": 5, "schema": SCHEMA}, "varlen must be left out where there is a schema="),
    ):
        with row(settings=settings):
            worker = Worker()
            given: Any = {"serve": False, **settings}
            with pytest.raises(ConfigError) as caught:
                worker.setup_ucxx("w", **given)
            assert words in str(caught.value)
            assert worker.ucxx_writer is None


def test_a_setting_that_names_no_field_says_so_with_the_first_trajectory() -> None:
    for settings, words in (
        ({"reward": "rewrad"}, "reward names 'rewrad', which is no field of the schema; did you mean 'reward'?"),
        ({"reward": "loss"}, "reward names 'loss', which is no field of the schema; its fields are 'obs', 'reward'"),
        ({"narrow": ["obs", "score"]}, "narrow names 'score', which is no field of the schema; its fields are 'obs'"),
        ({"narrow": ["ops"]}, "narrow names 'ops', which is no field of the schema; did you mean 'obs'?"),
        ({"varlen": ["rewards"]}, "varlen names 'rewards', which the example lacks; did you mean 'reward'?"),
    ):
        with row(settings=settings), writer(schema=None, on_error="drop", **settings) as end:
            with pytest.raises(ConfigError) as caught:
                end.write(episode())
            assert words in str(caught.value)
            assert end.ring is None


def test_rows_of_one_step_each_are_as_many_in_every_field_unless_chosen_otherwise() -> None:
    short: dict[str, Any] = episode(reward=np.zeros(3, np.float32))
    for settings, refused in (
        ({"schema": None, "varlen": 50}, True),
        ({"schema": None, "varlen": 50, "lengths": "any"}, False),
        ({}, False),  # a schema says itself what it takes
        ({"lengths": "equal"}, True),
        ({"schema": Schema(SCHEMA, "equal")}, True),
        ({"schema": Schema(SCHEMA, "equal"), "lengths": "any"}, False),
    ):
        for narrow in ((), ("obs",)):
            with row(settings=settings, narrow=narrow), writer(narrow=narrow, **settings) as end:
                end.write(episode())
                end.write(episode(reward=np.zeros(0, np.float32)))
                assert end.ring is not None
                end.ring.read(end.ring.ready_refs()[0])
                if refused:
                    with pytest.raises(ConfigError, match=r"'obs': 4 rows, but 'reward' has 3.*lengths='any'"):
                        end.write(short)
                else:
                    end.write(short)


def test_dicts_are_settings_like_those_that_were_made() -> None:
    with writer(serve=True, server={"host": "127.0.0.1", "ports": 1, "mode": "thread"}, publisher={}) as end:
        assert end.server is not None
        assert (end.server.address, len(end.server.ports)) == ("127.0.0.1", 1)


def test_a_server_publishes_what_stands_in_front_of_its_machine() -> None:
    server = {"host": "127.0.0.1", "publish_host": "lb.example", "ports": 1, "mode": "thread"}
    with writer(serve=True, server=server) as end:
        ref = end.write(episode()).ref
        assert ref is not None
        assert (ref.host, len(ref.ports)) == ("lb.example", 1)


def test_a_wrong_option_of_a_write_has_the_right_one_in_its_error() -> None:
    worker = Worker()
    worker.setup_ucxx("w", schema=SCHEMA, ring=RING, serve=False)
    given: Any = {"policy_versoin": 1}
    assert worker.ucxx_writer is not None
    for write in (worker.write_to_buffer, worker.ucxx_writer.write):
        with row(write=write), pytest.raises(ConfigError, match=r"option of write .*did you mean 'policy_version'"):
            write(episode(), **given)
    assert worker.ucxx_writer.statistics().written == 0
    worker.cleanup_ucxx()


def test_what_a_write_is_given_beside_its_trajectory_is_checked_whether_the_ring_is_full_or_not() -> None:
    for options, words in (
        ({"deadline_s": "soon"}, "deadline_s = 'soon': expected a finite duration"),
        ({"deadline_s": -1}, "deadline_s = -1: expected 0 seconds or more"),
        ({"readers": "two"}, "readers must be 1 to the ring's own 1 .*, not two"),
        ({"readers": 2}, "readers must be 1 to the ring's own 1"),
        ({"meta": 5}, "meta must be a mapping, not 5"),
    ):
        with row(options=options), writer() as end:
            given: Any = options
            with pytest.raises(ConfigError, match=words):
                end.write(episode(), **given)
            as_good: dict[str, Any] = {"deadline_s": "250ms", "readers": np.int64(1)}
            assert end.write(episode(), **as_good).ref is not None


def test_the_mixin_s_keywords_are_the_writer_s_for_type_checkers_too() -> None:
    worker = Worker()
    with pytest.raises(ConfigError, match="did you mean 'reward'"):
        worker.setup_ucxx("w", rewrad="reward")  # type: ignore[call-arg]  # what is tested
    worker.setup_ucxx("w", schema=SCHEMA, ring=RING, serve=False)
    with pytest.raises(ConfigError, match="did you mean 'policy_version'"):
        worker.write_to_buffer(episode(), policy_versoin=1)  # type: ignore[arg-type]  # likewise
    worker.cleanup_ucxx()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 129])
def test_a_wrong_worker_id_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match="worker_id"):
        TrajectoryWriter(name)


def test_a_closed_writer_says_so() -> None:
    end = writer()
    end.close()
    end.close()
    with pytest.raises(ConfigError, match="closed"):
        end.write(episode())


def test_a_writer_that_drains_waits_for_the_last_reader(log_events: list[MutableMapping[str, Any]]) -> None:
    end = writer(ring={"slots": 4, "readers": 2})
    first, second = end.write(episode()), end.write(episode(), readers=1)
    assert end.ring is not None
    assert first.ref is not None
    assert second.ref is not None
    ring = end.ring
    lease = ring.acquire(second.ref)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(end.close, drain_s=MINUTE)
        wait_until(lambda: ring.mapping.view("u8")[SLEEPERS_WORD], MINUTE, what="it waits")
        ring.read(first.ref, reader=1)
        assert ring.slot_states() == [SlotState.READY, SlotState.READING, *[SlotState.FREE] * 2]
        with pytest.raises(ConfigError, match="closed"):
            end.write(episode())
        ring.read(first.ref, reader=2)
        assert not closing.done()
        lease.mark_consumed()
        assert closing.result(MINUTE) == 0
    assert ring.closed
    assert log_events == []
    assert end.close(drain_s=MINUTE) == 0


def test_what_a_writer_leaves_unread_is_counted_and_logged_once_where_it_waited(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    for drain_s, logged in ((0, 0), ("1ms", 1)):
        with row(drain_s=drain_s):
            worker = Worker()
            worker.setup_ucxx("w", schema=SCHEMA, ring=RING, serve=False)
            worker.write_to_buffer(episode())
            worker.write_to_buffer(episode())
            assert worker.cleanup_ucxx(drain_s=drain_s) == 2
            assert [(event["event"], event["payloads"]) for event in log_events] == [("unread_removed", 2)] * logged
    with writer() as end, pytest.raises(ConfigError, match="drain_s"):
        end.close(drain_s=-1)


def test_a_drain_gives_back_what_the_dead_hold_and_ends_with_the_ring() -> None:
    with writer(ring={"slots": 1}) as end, ThreadPoolExecutor(1) as pool:
        ref = end.write(episode()).ref
        assert end.ring is not None
        assert ref is not None
        closing = pool.submit(end.close, drain_s=MINUTE)
        program = (
            "import os, sys; from ucxx_transport import SharedRingBuffer, SlotRef\n"
            "ref = SlotRef.from_bytes(bytes.fromhex(sys.argv[2]))\n"
            "lease = SharedRingBuffer.attach(sys.argv[1]).acquire(ref); os._exit(0)"
        )
        subprocess.run([sys.executable, "-c", program, end.ring.name, ref.to_bytes().hex()], check=True)
        wait_until(lambda: end.ring and end.ring.statistics().reclaimed_reads, MINUTE, what="the dead reader's hold")
        assert not closing.done()
        end.close()
        assert closing.result(MINUTE) == 1


def test_threads_share_a_writer() -> None:
    with writer(schema=None, varlen={"obs": 9, "reward": 9}, ring={"slots": 64}) as end:
        records: list[EpisodeRecord] = []
        threads = [
            threading.Thread(target=lambda: records.extend(end.write(episode()) for _ in range(10))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(record.sequence for record in records) == list(range(40))
        assert end.statistics().written == 40
        assert end.ring is not None
        assert end.ring.get_ready_count() == 40


class Worker(UCXXRolloutMixin):
    pass


def test_the_mixin_gives_a_worker_its_writer_and_takes_it_away() -> None:
    worker = Worker()
    worker.cleanup_ucxx()
    with pytest.raises(ConfigError, match="setup_ucxx"):
        worker.write_to_buffer(episode())
    worker.setup_ucxx("worker-7", schema=SCHEMA, ring=RING, serve=False, reward="reward")
    try:
        with pytest.raises(ConfigError, match="already"):
            worker.setup_ucxx("worker-7")
        record = EpisodeRecord.from_dict(worker.write_to_buffer(episode(), policy_version=2))
        assert (record.worker_id, record.policy_version, record.episode_length) == ("worker-7", 2, 4)
    finally:
        worker.cleanup_ucxx()
    assert worker.ucxx_writer is None


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_a_policy_version_is_any_integer_and_a_wrong_one_is_refused_before_anything_is_written(on_error: Any) -> None:
    with writer(on_error=on_error) as end:
        version: Any = np.int64(3)
        assert end.write(episode(), policy_version=version).policy_version == 3
        for wrong in (1.5, "3", 1 << 63):
            with pytest.raises(ConfigError, match="policy_version"):
                end.write(episode(), policy_version=wrong)  # type: ignore[arg-type]  # what is refused
        assert end.ring is not None
        assert (end.ring.get_ready_count(), end.statistics().written) == (1, 1)


IN_THE_STORE: dict[str, Any] = {"publisher": PublisherConfig(keeper="thread")}
MINUTE = 60.0


def test_a_writer_is_in_the_store_as_long_as_its_ring_exists(tmp_path: Path) -> None:
    url = f"local://{tmp_path}/store.db"
    with SourceWatcher(url) as watcher, open_store(url) as store:
        with writer(store=url, **IN_THE_STORE) as end:
            (source,) = watcher.wait_for(1, MINUTE)
            assert end.ring is not None
            assert end.publisher is not None
            assert (source.worker_id, source.ring_id, source.ring_name) == ("worker-0", end.ring.ring_id, end.ring.name)
            assert (source.host, source.ports) == (None, ())  # no server: this host's trainers alone
            assert end.publisher.epoch == source.epoch == 1
        assert list(store.snapshot("sources/")) == []


def test_a_writer_without_a_schema_is_published_with_its_first_trajectory(tmp_path: Path) -> None:
    url = f"local://{tmp_path}/store.db"
    with open_store(url) as store, writer(schema=None, varlen=("obs", "reward"), store=url, **IN_THE_STORE) as end:
        before: object = end.publisher
        assert before is None
        assert list(store.snapshot("sources/")) == []
        record = end.write(episode())
        assert end.publisher is not None
        assert end.publisher.wait_published(MINUTE) == 1
        assert end.ring is not None
        assert record.ref is not None
        np.testing.assert_array_equal(end.ring.read(record.ref)["reward"], [0, 1, 2, 3])


def test_a_writer_is_published_in_its_job_s_namespace(tmp_path: Path) -> None:
    url, job = f"local://{tmp_path}/store.db", StoreConfig(namespace="job-7")
    with open_store(url, job) as store, writer(store=url, store_config=job, **IN_THE_STORE) as end:
        assert end.publisher is not None
        end.publisher.wait_published(MINUTE)
        assert [entry.key for entry in store.snapshot("sources/")] == ["sources/worker-0"]


def test_a_writer_without_a_store_is_published_nowhere() -> None:
    with writer() as end:
        assert end.publisher is None


def test_a_store_that_cannot_be_is_refused_and_leaves_no_ring() -> None:
    with pytest.raises(ConfigError, match="redis"):
        writer(store="redis://host")
