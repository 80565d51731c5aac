"""A program with everything open that ends: `python -m tests.e2e.programs.exits END LAST STORE [OBJECT…]`.

What its last moments do works, or is one of our errors; anything else is a traceback on standard error.

| END         | how its main thread ends                                  |
|-------------|-----------------------------------------------------------|
| falls-off   | after its last line                                       |
| reads-on    | the same, while two daemon threads read on                |
| raises      | by an error of its own                                    |
| exits       | by sys.exit in the middle of a blocking read              |
| exits-loop  | the same, of a read in an event loop                      |
| interrupted | by SIGINT in the middle of a blocking read                |
| terminated  | by SIGTERM, as Python is by default                       |

| LAST         | what it does after that                                                                 |
|--------------|-----------------------------------------------------------------------------------------|
| nothing      | nothing: it has closed nothing                                                          |
| used-first   | uses all, in an exit handler before the objects' own                                    |
| used-late    | the same, after them                                                                    |
| closed-first | closes all, in an exit handler before the objects' own                                  |
| closed-late  | the same, after them                                                                    |
| deleted      | closes all in a `__del__`, when modules are torn down                                   |
| made-late    | makes, uses and closes all in an exit handler, none of which it had before              |
| made-beside  | the same in a thread that the interpreter waits for                                     |
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

from tests.e2e.programs.request_lines import log_to_stderr
from ucxx_transport import (
    ClientConfig,
    EpisodeStream,
    HeartbeatPublisher,
    RankGroup,
    RingConfig,
    RolloutFeed,
    ServerConfig,
    SharedRingBuffer,
    SlotRef,
    SourceWatcher,
    SyncUCXXClient,
    TransportError,
    UCXXClient,
    UCXXDataPackerMixin,
    UCXXRolloutMixin,
    UCXXServer,
    open_store,
)
from ucxx_transport.config import PublisherConfig
from ucxx_transport.server import RingSource

LARGE = 3 << 20
"""Bytes that the asyncio client copies in a thread."""


class Base:
    def get_policy_input(self, sample: Any = None, *rest: Any, **options: Any) -> Any:
        return sample, rest, options


class Packer(UCXXDataPackerMixin, Base):
    pass


class Worker(UCXXRolloutMixin):
    pass


Uses = tuple[Callable[[], object], Callable[[], object]]
"""How an object is used, and how it is closed."""


class Job:
    """What the objects work on: a ring with a server, in this process and of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ring = SharedRingBuffer.create(RingConfig(slots=64, slot_bytes=LARGE, on_full="overwrite", prefault=False))
        self.server = UCXXServer(self.ring, ServerConfig(ports=1, host="127.0.0.1", mode="thread"))
        self.server.start()

    def ref(self, nbytes: int = 1000) -> SlotRef:
        return self.ring.write_raw(bytes(nbytes))

    def served(self) -> Uses:
        """By threads; a worker's ring is served by a process."""
        with ExitStack() as made:
            ring = made.enter_context(SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=1000)))
            server = made.enter_context(UCXXServer(ring, ServerConfig(ports=1, host="127.0.0.1", mode="thread")))
            return server.statistics, made.pop_all().close

    def client(self) -> Uses:
        client = SyncUCXXClient(ClientConfig(local="off"))
        return lambda: client.read(self.ref()).release(), client.close

    def named(self) -> Uses:
        """A host whose name is looked up."""
        client = SyncUCXXClient(ClientConfig(local="off"))
        return lambda: client.read(replace(self.ref(), host="localhost")).release(), client.close

    def loop(self) -> Uses:
        """Over UCX, in place, and by a copy in a thread."""
        kept = UCXXClient(ClientConfig(local="off"))

        async def use() -> None:
            (await kept.read(self.ref())).release()
            async with (
                UCXXClient(ClientConfig(local="view")) as viewer,
                UCXXClient(ClientConfig(local="copy")) as copier,
            ):
                (await viewer.read(self.ref(LARGE))).release()
                (await copier.read(self.ref(LARGE))).release()

        return lambda: asyncio.run(use()), lambda: asyncio.run(kept.aclose())

    def fronts(self) -> Uses:
        """What starts and stops beside a loop."""
        ring = SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=1000))

        async def use() -> None:
            async with (
                UCXXServer(ring, ServerConfig(ports=1, host="127.0.0.1", mode="thread")),
                SourceWatcher(self.url),
            ):
                pass

        return lambda: asyncio.run(use()), ring.close

    def feed(self) -> Uses:
        feed = RolloutFeed(ClientConfig(local="off"))
        feed.start([self.ref()])

        def use() -> None:
            feed.collect()
            feed.start([self.ref()])

        return use, feed.close

    def stream(self) -> Uses:
        def references() -> Iterator[SlotRef]:
            while True:
                yield self.ref()

        stream = EpisodeStream(references(), ClientConfig(local="off"), ahead=2)
        return lambda: next(stream), stream.close

    def watcher(self) -> Uses:
        watcher = SourceWatcher(self.url, on_add=lambda _: None)
        watcher.start()

        def use() -> None:
            watcher.sources()
            watcher.subscribe(on_add=lambda _: None)

        return use, watcher.stop

    def publisher(self) -> Uses:
        publisher = HeartbeatPublisher(self.url, "w0", RingSource(self.ring), PublisherConfig(keeper="thread"))
        publisher.start()
        publisher.wait_published(60)
        return lambda: publisher.wait_published(60), publisher.stop

    def group(self) -> Uses:
        group = RankGroup(open_store(self.url), "trainers", 0, config=PublisherConfig(keeper="thread"))
        group.join_group(60)
        return lambda: group.join_group(60), group.leave

    def worker(self) -> Uses:
        worker = Worker()
        worker.setup_ucxx(
            "w1", ring={"slots": 4, "on_full": "overwrite"}, server={"ports": 1, "host": "127.0.0.1"}, store=self.url
        )
        worker.write_to_buffer({"obs": [1.0, 2.0]})
        return lambda: worker.write_to_buffer({"obs": [1.0, 2.0]}), worker.cleanup_ucxx

    def packer(self) -> Uses:
        packer = Packer()
        packer.setup_ucxx_data_packer(client={"local": "off"})
        packer.start_prefetch([self.ref()])

        def use() -> None:
            packer.collect_prefetch()
            packer.start_prefetch([self.ref()])

        return use, packer.shutdown_ucxx_data_packer


OBJECTS = (
    "served",
    "client",
    "named",
    "loop",
    "fronts",
    "feed",
    "stream",
    "watcher",
    "publisher",
    "group",
    "worker",
    "packer",
)


def attempt(name: str, call: Callable[[], object]) -> None:
    """It works, or is refused by one of our errors: standard error has what is neither."""
    try:
        call()
    except TransportError as error:
        sys.stderr.write(f"{name} is refused: {error}\n")
    except BaseException:  # noqa: BLE001 - the test looks for it
        traceback.print_exc()


class Things:
    """The objects; each is made and used, so that all its threads run."""

    def __init__(self, job: Job, names: Sequence[str]) -> None:
        self.job, self.names, self.made = job, names, dict[str, Uses]()

    def make(self) -> None:
        for name in self.names:
            self.made[name] = uses = getattr(self.job, name)()
            uses[0]()

    def use(self) -> None:
        for name, (use, _) in self.made.items():
            attempt(name, use)

    def close(self) -> None:
        for name, (_, close) in self.made.items():
            attempt(name, close)

    def make_late(self) -> None:
        for name in self.names:

            def whole(name: str = name) -> None:
                use, close = getattr(self.job, name)()
                attempt(name, use)
                attempt(name, close)

            attempt(name, whole)


class ClosedInDel:
    def __init__(self, things: Things) -> None:
        self.things = things

    def __del__(self) -> None:
        self.things.close()
        os.write(2, b"closed in __del__\n")


closing = threading.Event()
"""The job's server is about to stop: what fails to read then is none of what is tested."""


def read(job: Job) -> None:
    client = SyncUCXXClient(ClientConfig(local="off"))
    with suppress(TransportError):
        while not closing.is_set():
            client.take(job.ref(), wait_s=1)


async def read_in_loop(job: Job, exit_s: float = math.inf) -> None:
    if exit_s < math.inf:
        # A handler of signals that raises may do so between two steps of asyncio's, whose task then never ends.
        asyncio.get_running_loop().call_later(exit_s, sys.exit, 3)
    client = UCXXClient(ClientConfig(local="off"))
    with suppress(TransportError):
        while not closing.is_set():
            await client.take(job.ref(), wait_s=1)


def leave(_number: int, _frame: object) -> None:
    sys.exit(3)


def send_until_heard(number: signal.Signals) -> None:
    """Send a signal to this process soon; again when Python ignores what its handler raised, as in a finaliser."""
    send = partial(os.kill, os.getpid(), number)

    def heard(ignored: sys.UnraisableHookArgs) -> None:
        if isinstance(ignored.exc_value, (SystemExit, KeyboardInterrupt)):
            threading.Timer(0.01, send).start()
        else:
            sys.__unraisablehook__(ignored)

    sys.unraisablehook = heard
    threading.Timer(0.2, send).start()


def fail() -> None:
    raise ValueError("the program's own")


def main(end: str, last: str, url: str, *names: str) -> None:
    log_to_stderr()
    job = Job(url)
    atexit.register(closing.set)
    late: list[Callable[[], object]] = []
    atexit.register(lambda: [call() for call in late])  # before the objects' own handlers, so it runs after them
    things = Things(job, names or OBJECTS)
    if not last.startswith("made"):
        things.make()

    def beside() -> None:
        threading.main_thread().join()
        things.make_late()

    lasts: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "used-first": lambda: atexit.register(things.use),
        "used-late": lambda: late.append(things.use),
        "closed-first": lambda: atexit.register(things.close),
        "closed-late": lambda: late.append(things.close),
        "deleted": lambda: sys.modules.__setitem__("deleted", cast("Any", ClosedInDel(things))),  # freed as they are
        "made-late": lambda: late.append(things.make_late),
        "made-beside": threading.Thread(target=beside).start,
    }
    lasts[last]()
    signal.signal(signal.SIGALRM, leave)
    numbers = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}
    ends: dict[str, Callable[[], object]] = {
        "falls-off": lambda: None,
        "reads-on": lambda: None,
        "raises": fail,
        "exits-loop": lambda: asyncio.run(read_in_loop(job, 0.2)),
    }
    if end == "reads-on":
        threading.Thread(target=read, args=(job,), daemon=True).start()
        threading.Thread(target=lambda: asyncio.run(read_in_loop(job)), daemon=True).start()
    elif end not in ends:
        send_until_heard(numbers.get(end, signal.SIGALRM))
    ends.get(end, lambda: read(job))()


if __name__ == "__main__":
    main(*sys.argv[1:])
