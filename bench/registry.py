"""How many workers does a store carry? Publishing, renewing, and how soon a trainer hears of a change.

    python bench/registry.py                                   # 1,000 and 10,000 sources, the embedded store and etcd
    python bench/registry.py --sources 1000 --store local://

For each store and number of sources, by real calls of as many threads in one process:

| figure           | what is measured                                                                        |
|------------------|-----------------------------------------------------------------------------------------|
| publish          | sources published a second: epoch, lease, record "starting", record "ready"             |
| renew            | leases renewed a second, and how many workers that is at one renewal each 2 s           |
| watch delay      | from a change being asked for to a watcher's listener being called, the store at rest   |
| watch delay, busy| the same while all leases are being renewed as often as their workers would             |
| watcher CPU      | of the watcher's process with all sources known and renewed, in shares of one core      |
| resync           | seconds until a new watcher knows all sources                                           |

Renewals are no changes: a watcher hears nothing of them. And for each store, with a real worker at default settings:
how long after its end a watcher is notified, for each way to end. Writes registry.json under --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python bench/registry.py` finds its siblings

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.core.host import commit_of, host_facts
from tests.support.etcd_server import EtcdServer, find_etcd
from tests.support.programs import Program, program
from tests.support.sidecars import sidecars_of
from ucxx_transport import SourceWatcher, StoreConfig, open_store
from ucxx_transport.cli.output import console
from ucxx_transport.membership import SourceRecord, SourceStatus, Store
from ucxx_transport.membership.publication import Publication, next_epoch
from ucxx_transport.ring.orphans import sweep_orphans

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

INTERVAL_S: Final = 2.0
TTL_S: Final = 600.0  # long: here the rate of renewals is the question, not whether they keep up
THREADS: Final = 4
CHANGES: Final = 300
CHANGE_EVERY_S: Final = 0.01
CPU_S: Final = 5.0
_ANSWER_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One store with one number of sources; seconds where nothing else is said."""

    store: str
    sources: int
    publish_per_s: float
    renew_per_s: float
    workers_at_2_s: int
    delay_p50_s: float
    delay_p99_s: float
    busy_delay_p50_s: float
    busy_delay_p99_s: float
    watcher_cpu: float
    resync_s: float


def record_of(index: int) -> SourceRecord:
    """A worker as it would publish itself."""
    return SourceRecord(
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


def publish(store: Store, index: int) -> Publication:
    """What a worker's publisher does, from nothing to ready."""
    record = record_of(index)
    epoch = next_epoch(store, record.worker_id, known=0)
    publication = Publication.begin(store, replace(record, epoch=epoch), ttl_s=TTL_S)
    publication.update(SourceStatus.READY)
    return publication


def watch(url: str, config: StoreConfig, pipe: Connection) -> None:
    """The watcher's process: answers when it knows as many as asked for, and with delays and its CPU."""
    delays: list[float] = []

    def changed(source: SourceRecord) -> None:
        asked_ns = source.meta.get("asked_ns")
        if isinstance(asked_ns, int):
            delays.append((time.monotonic_ns() - asked_ns) / 1e9)

    with open_store(url, config) as store:
        watcher = SourceWatcher(store, on_update=changed)
        began_s = time.monotonic()
        with watcher:
            while True:
                word, value = pipe.recv()
                if word == "known":
                    watcher.wait_for(value, _ANSWER_S)
                    pipe.send(time.monotonic() - began_s)
                elif word == "delays":
                    while len(delays) < value:
                        time.sleep(0.001)
                    pipe.send(list(delays))
                    delays.clear()
                elif word == "cpu":
                    spent_s, since_s = time.process_time(), time.monotonic()
                    time.sleep(value)
                    pipe.send((time.process_time() - spent_s) / (time.monotonic() - since_s))
                else:
                    return


@contextmanager
def watching(url: str, config: StoreConfig) -> Iterator[Callable[[str, object], Any]]:
    """A watcher in a process of its own; yields what asks it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=watch, args=(url, config, theirs))
    process.start()

    def ask(word: str, value: object) -> Any:
        ours.send((word, value))
        if not ours.poll(_ANSWER_S):
            raise SystemExit("the watcher does not answer")
        return ours.recv()

    try:
        yield ask
    finally:
        ours.send(("end", 0))
        process.join(_ANSWER_S)


@contextmanager
def renewing(store: Store, publications: Sequence[Publication]) -> Iterator[None]:
    """All leases renewed as often as their workers would, as well as the store can."""
    stop = threading.Event()

    def renew_share(share: Sequence[Publication]) -> None:
        while not stop.is_set():
            due_s = time.monotonic() + INTERVAL_S
            for publication in share:
                if stop.is_set():
                    return
                store.keep_alive(publication.lease.lease_id)
            stop.wait(max(0.0, due_s - time.monotonic()))

    threads = [threading.Thread(target=renew_share, args=(publications[part::THREADS],)) for part in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def changes(publications: Sequence[Publication], store: Store) -> None:
    """Change records one after the other, each with the moment in it."""
    for turn in range(CHANGES):
        publication = publications[turn % len(publications)]
        record = replace(publication.record, meta={"asked_ns": time.monotonic_ns()})
        store.put(f"sources/{record.worker_id}", record.to_bytes(), lease_id=publication.lease.lease_id)
        time.sleep(CHANGE_EVERY_S)


def measure(label: str, url: str, sources: int, say: Callable[[str], None]) -> Figures:
    """All figures of one store with one number of sources."""
    config = StoreConfig(namespace=f"bench-{sources}", timeout_s=30.0)
    with ExitStack() as stack:
        store = stack.enter_context(open_store(url, config))
        workers = stack.enter_context(ThreadPoolExecutor(THREADS))
        say(f"{label}: publishing {sources} sources")
        began_s = time.monotonic()
        publications = list(workers.map(lambda index: publish(store, index), range(sources)))
        publish_per_s = sources / (time.monotonic() - began_s)
        say(f"{label}: renewing")
        began_s = time.monotonic()
        list(workers.map(lambda one: store.keep_alive(one.lease.lease_id), publications))
        renew_per_s = sources / (time.monotonic() - began_s)
        say(f"{label}: watching")
        ask = stack.enter_context(watching(url, config))
        resync_s = ask("known", sources)
        changes(publications, store)
        delays = ask("delays", CHANGES)
        with renewing(store, publications):
            changes(publications, store)
            busy = ask("delays", CHANGES)
            cpu = ask("cpu", CPU_S)
        return Figures(
            store=label,
            sources=sources,
            publish_per_s=publish_per_s,
            renew_per_s=renew_per_s,
            workers_at_2_s=int(renew_per_s * INTERVAL_S),
            delay_p50_s=float(np.percentile(delays, 50)),
            delay_p99_s=float(np.percentile(delays, 99)),
            busy_delay_p50_s=float(np.percentile(busy, 50)),
            busy_delay_p99_s=float(np.percentile(busy, 99)),
            watcher_cpu=cpu,
            resync_s=resync_s,
        )


def show(figures: Sequence[Figures], terminal: Console) -> None:
    """A table of all."""
    table = Table(title="A store and its sources", title_justify="left")
    for column in (
        "store",
        "sources",
        "publish/s",
        "renew/s",
        "workers at 2 s",
        "delay p50, p99",
        "busy",
        "CPU",
        "resync",
    ):
        table.add_column(column, justify="left" if column == "store" else "right")
    for one in figures:
        table.add_row(
            one.store,
            f"{one.sources}",
            f"{one.publish_per_s:.0f}",
            f"{one.renew_per_s:.0f}",
            f"{one.workers_at_2_s}",
            f"{one.delay_p50_s * 1e3:.1f}, {one.delay_p99_s * 1e3:.1f} ms",
            f"{one.busy_delay_p50_s * 1e3:.1f}, {one.busy_delay_p99_s * 1e3:.1f} ms",
            f"{one.watcher_cpu:.1%}",
            f"{one.resync_s:.2f} s",
        )
    terminal.print(table)


ENDS: Final = {
    "stop": "stop()",
    "term": "SIGTERM",
    "kill": "SIGKILL",
    "both": "SIGKILL, and its sidecar",
    "hang": "SIGSTOP",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """How long after a worker's end its record was reported gone, seconds."""

    store: str
    end: str
    rounds: int
    p50_s: float
    most_s: float


def end_worker(running: Program, end: str) -> None:
    """End a worker one way."""
    if end == "stop":
        running.tell(stop=True)
    elif end == "both":
        for sidecar in sidecars_of(running.pid):
            os.kill(sidecar, signal.SIGKILL)
        running.signal(signal.SIGKILL)
    else:
        running.signal({"term": signal.SIGTERM, "kill": signal.SIGKILL, "hang": signal.SIGSTOP}[end])


def time_removal(store: Store, url: str, namespace: str, end: str) -> float:
    """One worker, from nothing to its end; seconds from that to a watcher's word of it."""
    gone = threading.Event()
    os.environ["UCXX_TRANSPORT_STORE__NAMESPACE"] = namespace
    with (
        SourceWatcher(store, on_remove=lambda _: gone.set()),
        program("source_worker", url, "w", "unserved") as running,
    ):
        running.hear()
        running.ask(published=_ANSWER_S)
        while not running.ask(look=True)["statistics"]["keeper_keeps"]:
            time.sleep(0.05)
        began_s = time.monotonic()
        end_worker(running, end)
        if not gone.wait(_ANSWER_S):
            raise SystemExit(f"a worker ended by {ENDS[end]} is not missed")
        took_s = time.monotonic() - began_s
    sweep_orphans()
    return took_s


def removals(label: str, url: str, rounds: int, say: Callable[[str], None]) -> list[Removal]:
    """Every way to end, `rounds` times each."""
    found = []
    for end, words in ENDS.items():
        say(f"{label}: workers that end by {words}")
        namespace = f"bench-end-{end}"
        with open_store(url, StoreConfig(namespace=namespace)) as store:
            took_s = [time_removal(store, url, namespace, end) for _ in range(rounds)]
        p50_s = float(np.median(took_s))
        found.append(Removal(store=label, end=words, rounds=rounds, p50_s=p50_s, most_s=max(took_s)))
    return found


def show_removals(found: Sequence[Removal], terminal: Console) -> None:
    """A table of all."""
    table = Table(title="From a worker's end to the word of it, renewed every 2 s", title_justify="left")
    for column in ("store", "ended by", "rounds", "p50", "at most"):
        table.add_column(column, justify="left" if column in {"store", "ended by"} else "right")
    for one in found:
        table.add_row(one.store, one.end, f"{one.rounds}", f"{one.p50_s * 1e3:.0f} ms", f"{one.most_s * 1e3:.0f} ms")
    terminal.print(table)


@contextmanager
def stores(named: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Labels and URLs: those named, else an embedded store and, where it is installed, an etcd of its own."""
    if named:
        yield [(url, url) for url in named]
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ucxx-transport-bench-")))
        found = [("embedded", f"local://{folder}/store.db")]
        if find_etcd() is not None:
            found.append(("etcd", stack.enter_context(EtcdServer(folder)).url))
        yield found


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", default="1000,10000", help="how many, one number or several")
    parser.add_argument("--store", action="append", default=[], help="URL of a store that runs already; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="workers ended each way")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    chosen = parser.parse_args(words)
    progress = console(stderr=True)
    figures: list[Figures] = []
    ends: list[Removal] = []
    with stores(chosen.store) as urls:
        for label, url in urls:
            ends += removals(label, url, chosen.rounds, progress.print)
            figures += [measure(label, url, int(sources), progress.print) for sources in chosen.sources.split(",")]
    results = {
        "commit": commit_of(Path(__file__).resolve().parent),
        "host": host_facts(),
        "figures": [asdict(one) for one in figures],
        "removals": [asdict(one) for one in ends],
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "registry.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    if chosen.json:
        sys.stdout.write(json.dumps(results, default=str) + "\n")
    else:
        show(figures, console())
        show_removals(ends, console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
