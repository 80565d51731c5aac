"""How many workers does a store carry, and how soon does a trainer see that one has gone?

1,000 sources, by real calls of four threads in one process, in the embedded store and in etcd; then a real worker at
default settings, for each way to end. Renewals are no changes: a watcher sees nothing of them.

| figure       | what is measured                                                                    |
|--------------|-------------------------------------------------------------------------------------|
| publish_per_s| sources published a second: epoch, lease, record "starting", record "ready"         |
| renew_per_s  | leases renewed a second                                                             |
| resync_s     | seconds until a new watcher knows all sources                                       |
| delay_us     | from a change being asked for to a watcher's listener being called, median          |
| gone_us      | from a worker's end to a watcher's listener being called                            |
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bench.core.control import BenchError
from bench.core.figures import Row, SkippedError
from bench.core.lineup import Lineup
from bench.core.rounds import Plan
from ucxx_transport import SourceWatcher, StoreConfig, open_store
from ucxx_transport.membership import SourceRecord, SourceStatus, Store
from ucxx_transport.membership.sources import Publication, next_epoch
from ucxx_transport.ring.segment import sweep_orphans

__all__ = ["measure"]

SOURCES: Final = 1000
QUICK_SOURCES: Final = 100
TTL_S: Final = 600.0  # long: here the rate of renewals is the question, not whether they keep up
THREADS: Final = 4
CHANGES: Final = 100
CHANGE_EVERY_S: Final = 0.01
LIMIT_S: Final = 120.0

ENDS: Final = {"stop()": 0, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
SIDECAR_TOO: Final = "SIGKILL, and its sidecar"


class Watching:
    """A watcher in a process of its own."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._delays_us: list[float] = []

    def known(self, *, url: str, namespace: str, sources: int) -> float:
        """Watch; seconds until that many are known."""
        self.close()
        store = self._open.enter_context(open_store(url, StoreConfig(namespace=namespace)))
        began_s = time.monotonic()
        watcher = self._open.enter_context(SourceWatcher(store, on_update=self._changed))
        watcher.wait_for(sources, LIMIT_S)
        return time.monotonic() - began_s

    def delays_us(self) -> list[float]:
        """Those of all changes since the last call, once they have all been seen."""
        until_s = time.monotonic() + LIMIT_S
        while len(self._delays_us) < CHANGES:
            if time.monotonic() > until_s:
                raise BenchError(f"a watcher saw {len(self._delays_us)} of {CHANGES} changes")
            time.sleep(CHANGE_EVERY_S)
        delays, self._delays_us = self._delays_us, []
        return delays

    def close(self) -> None:
        """Stop watching."""
        self._open.close()

    def _changed(self, source: SourceRecord) -> None:
        asked_ns = source.meta.get("asked_ns")
        if isinstance(asked_ns, int):
            self._delays_us.append((time.monotonic_ns() - asked_ns) / 1e3)


def measure(question: str, plan: Plan) -> list[Row]:
    """Both stores.

    Raises:
        SkippedError: the tests' programs are not there: this is no clone.
    """
    try:
        import tests.support.programs  # noqa: F401 - a worker to end
    except ModuleNotFoundError as error:
        raise SkippedError(f"it needs a clone: {error}") from error
    rows = []
    sources = QUICK_SOURCES if plan.quick else SOURCES
    with _stores() as urls:
        for label, url in urls.items():
            figures: dict[str, list[float]] = {}
            for number in range(plan.rounds):
                for figure, value in _carried(url, f"bench-{number}", sources).items():
                    figures.setdefault(figure, []).append(value)
                plan.on_turn(f"{question}: {label}, round {number + 1} of {plan.rounds}")
            rows.append(Row(question=question, case=label, subject=f"{sources} sources", figures=figures))
            for end in (*ENDS, SIDECAR_TOO):
                gone_us = [_gone_us(url, f"bench-end-{number}", end) for number in range(plan.rounds)]
                rows.append(Row(question=question, case=label, subject=f"ended by {end}", figures={"gone_us": gone_us}))
                plan.on_turn(f"{question}: {label}, workers that end by {end}")
    return rows


@contextmanager
def _stores() -> Iterator[dict[str, str]]:
    """URLs: an embedded store and, where it is installed, an etcd of its own."""
    from tests.support.etcd_server import EtcdServer, find_etcd

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ucxx-transport-bench-")))
        found = {"embedded": f"local://{folder}/store.db"}
        if find_etcd() is not None:
            found["etcd"] = stack.enter_context(EtcdServer(folder)).url
        yield found


def _carried(url: str, namespace: str, sources: int) -> dict[str, float]:
    with Lineup() as lineup:
        watching = lineup.source("a watcher", Watching)
        store = lineup.enter_context(open_store(url, StoreConfig(namespace=namespace, timeout_s=30.0)))
        workers = lineup.enter_context(ThreadPoolExecutor(THREADS))
        began_s = time.monotonic()
        publications = list(workers.map(lambda index: _publish(store, index), range(sources)))
        published_s = time.monotonic()
        list(workers.map(lambda one: store.keep_alive(one.lease.lease_id), publications))
        renewed_s = time.monotonic()
        resync_s = watching.call("known", url=url, namespace=namespace, sources=sources)
        _change(publications, store)
        delays_us = watching.call("delays_us")
        for publication in publications:
            store.revoke(publication.lease.lease_id)
    return {
        "publish_per_s": sources / (published_s - began_s),
        "renew_per_s": sources / (renewed_s - published_s),
        "resync_s": resync_s,
        "delay_us": statistics.median(delays_us),
    }


def _publish(store: Store, index: int) -> Publication:
    """What a worker's publisher does, from nothing to ready."""
    record = SourceRecord(
        worker_id=f"worker-{index}",
        epoch=1,
        session=f"{index:032x}",
        status=SourceStatus.STARTING,
        ring_id=index.to_bytes(16, "little"),
        ring_name=f"bench-{index}",
        host_id="0" * 32,
        host="10.0.0.1",
        ports=(5000, 5001, 5002, 5003),
    )
    epoch = next_epoch(store, record.worker_id, known=0)
    publication = Publication(store, replace(record, epoch=epoch), ttl_s=TTL_S)
    publication.update(SourceStatus.READY)
    return publication


def _change(publications: Sequence[Publication], store: Store) -> None:
    """Change records one after the other, each with the moment in it."""
    for turn in range(CHANGES):
        publication = publications[turn % len(publications)]
        record = replace(publication.record, meta={"asked_ns": time.monotonic_ns()})
        store.put(f"sources/{record.worker_id}", record.to_bytes(), lease_id=publication.lease.lease_id)
        time.sleep(CHANGE_EVERY_S)


def _gone_us(url: str, namespace: str, end: str) -> float:
    """One worker, from nothing to its end; µs from that to a watcher's listener being called."""
    from tests.support.programs import program
    from tests.support.sidecars import sidecars_of

    gone = threading.Event()
    os.environ["UCXX_TRANSPORT_STORE__NAMESPACE"] = namespace
    with (
        open_store(url, StoreConfig(namespace=namespace)) as store,
        SourceWatcher(store, on_remove=lambda _: gone.set()),
        program("source_worker", url, "w", "unserved") as running,
    ):
        running.hear()
        running.ask(published=LIMIT_S)
        while not _kept(running.ask(look=True)):
            time.sleep(CHANGE_EVERY_S)
        sidecars = sidecars_of(running.pid)
        began_s = time.monotonic()
        if end == SIDECAR_TOO:
            for pid in (*sidecars, running.pid):
                os.kill(pid, signal.SIGKILL)
        elif ENDS.get(end):
            os.kill(running.pid, ENDS[end])
        else:
            running.tell(stop=True)
        if not gone.wait(LIMIT_S):
            raise BenchError(f"a worker ended by {end} is not missed")
        took_s = time.monotonic() - began_s
    sweep_orphans()
    return took_s * 1e6


def _kept(answer: dict[str, Any]) -> bool:
    """Whether the worker's sidecar renews its lease."""
    return bool(answer["statistics"]["keeper_keeps"])
