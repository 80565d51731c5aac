"""What each way to an episode hands out: whether it may be written to, and whether it lies in the worker's slot."""

from __future__ import annotations

import gc
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import (
    ChecksumError,
    ClientConfig,
    EpisodeStream,
    RingConfig,
    RolloutFeed,
    Schema,
    ServerConfig,
    SharedRingBuffer,
    SlotState,
    SyncUCXXClient,
    UCXXDataPackerMixin,
    UCXXServer,
)
from ucxx_transport.testing import MemoryNetwork
from ucxx_transport.trainer import Prefetcher
from ucxx_transport.trainer.loss_policy import record_of

IMAGE = np.arange(6, dtype=np.float32).reshape(2, 3)
FLAG = np.array([True, False])
EPISODE = {"obs": {"image": IMAGE}, "flag": FLAG}
HAS_TORCH = importlib.util.find_spec("torch") is not None

Way = Callable[[ExitStack, Any, Any, dict[str, Any]], Any]


class EchoPacker:
    def get_policy_input(self, *given: Any, **_: Any) -> Any:
        return given[1]


class Packer(UCXXDataPackerMixin, EchoPacker):
    pass


def by_read(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    return stack.enter_context(SyncUCXXClient(config, **settings)).read(ref).arrays


def by_take(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    return stack.enter_context(SyncUCXXClient(config, **settings)).take(ref)[0].arrays


def by_fetch(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    prefetcher = stack.enter_context(Prefetcher(config, **settings))
    return prefetcher.unpack(prefetcher.fetch([record_of(ref)]).payloads[0])


def by_collect(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    feed = stack.enter_context(RolloutFeed(config, **settings))
    feed.start([ref])
    return feed.resolve(*feed.collect())


def by_resolve(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    return stack.enter_context(RolloutFeed(config, **settings)).resolve(ref)


def by_packer(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    packer = Packer()
    stack.callback(packer.shutdown_ucxx_data_packer)
    packer.setup_ucxx_data_packer(client=config, **settings)
    return packer.get_policy_input(None, ref)


def by_stream(stack: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    return next(stack.enter_context(EpisodeStream([ref], config, **settings))).arrays


def by_dataset(_: ExitStack, ref: Any, config: Any, settings: dict[str, Any]) -> Any:
    from ucxx_transport.integrations.torch import EpisodeDataset

    (episode,) = EpisodeDataset([ref], config, **settings)
    return episode


OF_A_CLIENT: list[Way] = [by_read, by_take]
OF_A_TRAINER: list[Way] = [by_fetch, by_collect, by_resolve, by_packer, by_stream]


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=1, schema=Schema.from_example(EPISODE), on_full="raise")) as ring:
        yield ring


def test_arrays_are_read_only_by_every_way_and_tensors_the_readers_own_unless_views_are_asked_for(
    ring: SharedRingBuffer,
) -> None:
    network, is_free = MemoryNetwork(), partial(all_free, ring)
    ways: list[tuple[Way, str | None]] = [(way, None) for way in (*OF_A_CLIENT, *OF_A_TRAINER)]
    if HAS_TORCH:
        ways += [(way, "cpu") for way in (*OF_A_TRAINER, by_dataset)]
    with UCXXServer(ring, ServerConfig(ports=1, mode="thread"), link_factory=network.link):
        for local in ("auto", "view", "copy", "off"):
            for way, device in ways:
                in_slot = local == "view" or (local == "auto" and device is None)
                settings = {"link_factory": network.link} | ({} if device is None else {"device": device})
                with row(local=local, way=way.__name__, device=device):
                    with ExitStack() as stack, warnings.catch_warnings():
                        warnings.simplefilter("error")
                        arrays = way(stack, ring.write(EPISODE), ClientConfig(local=local), settings)
                    for leaf, written in ((arrays["obs"]["image"], IMAGE), (arrays["flag"], FLAG)):
                        assert np.array_equal(leaf, written)
                        if device is None:
                            assert_read_only(leaf, for_good=in_slot)
                        else:
                            leaf[:] = 0
                    if in_slot:
                        assert ring.slot_state(0) is SlotState.READING
                    else:
                        wait_until(is_free, what="its end has been heard of")
                    del arrays, leaf
                    gc.collect()
                    wait_until(is_free, what="its end has been heard of")


def all_free(ring: SharedRingBuffer) -> bool:
    return set(ring.slot_states()) == {SlotState.FREE}


def assert_read_only(array: Any, *, for_good: bool) -> None:
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0
    if for_good:
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_memory_of_the_caller_s_stays_the_caller_s(ring: SharedRingBuffer) -> None:
    network, is_free = MemoryNetwork(), partial(all_free, ring)
    with UCXXServer(ring, ServerConfig(ports=1, mode="thread"), link_factory=network.link):
        for local in ("view", "copy", "off"):
            with row(local=local), SyncUCXXClient(ClientConfig(local=local), link_factory=network.link) as client:
                into = bytearray(ring.slot_bytes)
                payload = client.read(ring.write(EPISODE), into=into)
                payload.arrays["obs"]["image"][:] = 7
                payload.release()
                assert ring.schema is not None
                assert ring.schema.views(into)["obs"]["image"].tolist() == [[7] * 3] * 2
                wait_until(is_free, what="its end has been heard of")
    ring.write(EPISODE)
    ring.read(ring.ready_refs()[0])["flag"][:] = False  # what `SharedRingBuffer.read` gives is a copy by its name


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_a_write_into_a_slot_through_a_tensor_is_found_by_the_checksum() -> None:
    config = RingConfig(slots=1, schema=Schema.from_example(EPISODE), readers=2, checksum=True)
    with SharedRingBuffer.create(config) as ring:
        ref = ring.write(EPISODE)
        with RolloutFeed(ClientConfig(local="view"), device="cpu") as feed:
            tree = feed.resolve(ref)
            assert tree is not None
            tree["obs"]["image"] -= 100
        with SyncUCXXClient() as client, pytest.raises(ChecksumError):
            client.read(ref)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_a_trainer_that_writes_into_its_tensors_changes_nothing_for_the_next_reader() -> None:
    schema = Schema.from_example(EPISODE)
    with SharedRingBuffer.create(RingConfig(slots=1, schema=schema, readers=2)) as ring:
        ref = ring.write(EPISODE)
        with RolloutFeed(device="cpu") as feed:
            tree = feed.resolve(ref)
            assert tree is not None
            tree["obs"]["image"] -= 100
        with SyncUCXXClient() as client, client.read(ref) as payload:
            assert payload.arrays["obs"]["image"].tolist() == IMAGE.tolist()
