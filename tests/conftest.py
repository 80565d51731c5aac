"""What every test gets: a guard that fails it for what it leaves behind, and warnings that are errors."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Generator, Iterator, MutableMapping
from multiprocessing import resource_tracker
from typing import Any

import hypothesis
import pytest

from tests.support.leaks import KINDS, leaks_since, mark_own_processes, snapshot
from tests.support.ports import reserve_ports
from tests.support.segment_folder import VARIABLE, SegmentFolder

# A busy machine makes no example late. `--hypothesis-profile exhaustive` is how the nightly run looks deeper.
hypothesis.settings.register_profile("gate", deadline=None, max_examples=50)
hypothesis.settings.register_profile("exhaustive", deadline=None, max_examples=500)
hypothesis.settings.load_profile("gate")


def pytest_configure() -> None:
    """Hear SIGINT: a shell's background job is started with it ignored, and every child would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    *("test_ray", "test_etcd_cluster", "test_data_loader", "test_exit", "test_examples", "test_demo", "test_kill"),
    *("test_ring_processes", "test_membership", "test_rank_group"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: at the end no test process waits for another one's.

    Ray's before all: what stands first is not handed on to a process with no cluster yet.
    """
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.path.parent.name != "e2e":
        return len(LONGEST) + 1
    return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the guard's garbage collections, hundreds of them, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """UCX needs asyncio futures, so asyncio is the one backend."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _folder_of_segments() -> Iterator[str]:
    """A folder of this test process's own; nothing may be left in it at the end."""
    mark_own_processes()
    reserve_ports()
    # multiprocessing starts it when it is first needed and keeps it, with its pipe, for the whole process.
    resource_tracker.ensure_running()
    folder = SegmentFolder(os.environ.get("PYTEST_XDIST_WORKER", "main"))
    for name in [name for name in os.environ if name.startswith("UCXX_TRANSPORT_")]:
        del os.environ[name]
    os.environ[VARIABLE] = str(folder.path)
    yield str(folder.path)
    left = folder.remove()
    assert not left, f"left in the folder of segments at the end of the run: {left}"


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note that a test failed: its traceback keeps alive what it held, which is no leak of its own."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def _nothing_left_by_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    allowed = {kind for mark in request.node.iter_markers("may_leave") for kind in mark.args}
    for mark in request.node.iter_markers("may_leave"):
        assert allowed <= set(KINDS), f"may_leave knows {KINDS}"
        assert mark.kwargs.get("reason"), "may_leave needs a reason"
    before = snapshot()
    yield
    if request.node.stash.get(_FAILED, False):
        return
    request.node.funcargs.clear()  # of fixtures that have ended; pytest lets go of them only after this one
    left = leaks_since(before, allowed=allowed)
    assert not left, f"the test left behind: {left}"


@pytest.fixture
def log_events() -> Iterator[list[MutableMapping[str, Any]]]:
    """The log events of the test, each a dict with `event`, `log_level` and its keys, in order."""
    recorder = _Recorder(logging.DEBUG)
    logger = logging.getLogger("ucxx_transport")
    level = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.DEBUG)
    yield recorder.events
    logger.setLevel(level)
    logger.removeHandler(recorder)


class _Recorder(logging.Handler):
    """Keeps each event's keys."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.events: list[MutableMapping[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append({**vars(record), "log_level": record.levelname.lower()})
