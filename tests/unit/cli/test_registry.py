"""`registry ls|watch|reap`: what operators see of a store, to people and as JSON."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import call, running
from tests.support.source_records import record
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.membership import SourceStatus, Store, open_store
from ucxx_transport.membership.entries import source_key

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"local://{tmp_path}/store.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as opened:
        opened.snapshot()
        yield opened


def publish(store: Store, worker_id: str, epoch: int = 1, **fields: object) -> int:
    lease_id = store.grant(600.0).lease_id
    source = record(worker_id, epoch, **fields)
    store.put(source_key(worker_id), source.to_bytes(), lease_id=lease_id)
    return lease_id


def test_ls_prints_a_row_a_source(url: str, store: Store, capsys: Capture) -> None:
    publish(store, "a/b ü", 7, ttl_s=6.0)
    publish(store, "plain", host=None, ports=(), status=SourceStatus.STALE)
    answer = call(capsys, "registry", "ls", "--store", url)
    assert (answer.code, answer.err) == (0, "")
    assert f"2 source(s) in {url}" in answer.out
    first, second = (line for line in answer.out.splitlines() if "ucxx_transport-" in line)
    for word in ("a/b ü", "7", "ready", "10.0.0.1", "5001,5002", "6 s"):
        assert word in first
    for word in ("plain", "stale", "–"):
        assert word in second


def test_ls_prints_names_as_they_are(url: str, store: Store, capsys: Capture) -> None:
    for name in ("[red]w[/red]", "[/nonsense]"):  # the console's own mark-up, were it taken for that
        publish(store, name)
    answer = call(capsys, "registry", "ls", "--store", url)
    assert answer.code == 0
    assert "[red]w[/red]" in answer.out
    assert "[/nonsense]" in answer.out


def test_ls_as_json_is_one_document_with_whole_records(url: str, store: Store, capsys: Capture) -> None:
    publish(store, "a", 7, meta={"gpu": 1})
    store.put("sources/junk", b"{}")
    answer = call(capsys, "registry", "ls", "--store", url, "--json")
    assert answer.code == 0
    assert answer.document == {
        "store": url,
        "revision": store.snapshot().revision,
        "sources": [record("a", 7, meta={"gpu": 1}).to_dict()],
        "malformed": 1,
    }


def test_ls_of_an_empty_store_is_no_failure(url: str, capsys: Capture) -> None:
    answer = call(capsys, "registry", "ls", "--store", url)
    assert answer.code == 0
    assert "0 source(s)" in answer.out
    assert call(capsys, "registry", "ls", "--store", url, "--json").document["sources"] == []


def test_ls_says_what_it_cannot_read(url: str, store: Store, capsys: Capture) -> None:
    store.put("sources/junk", b"of another version")
    answer = call(capsys, "registry", "ls", "--store", url)
    assert answer.code == 0
    assert "1 record(s) of another version" in answer.err


def test_a_job_sees_its_own_namespace_alone(url: str, store: Store, capsys: Capture) -> None:
    publish(store, "of the default")
    with open_store(url, StoreConfig(namespace="job-7")) as other:
        publish(other, "of job 7")
    (found,) = call(capsys, "registry", "ls", "--store", url, "--namespace", "job-7", "--json").document["sources"]
    assert found["worker_id"] == "of job 7"


def test_reap_ends_a_source_and_all_that_its_lease_kept(url: str, store: Store, capsys: Capture) -> None:
    lease_id = publish(store, "a/b")
    publish(store, "b")
    store.put("sources/by-hand", record("by-hand").to_bytes())
    answer = call(capsys, "registry", "reap", "a/b", "by-hand", "--store", url)
    assert (answer.code, answer.out.splitlines()) == (0, ["reaped a/b", "reaped by-hand"])
    assert [entry.key for entry in store.snapshot("sources/")] == ["sources/b"]
    with pytest.raises(LeaseLostError):
        store.keep_alive(lease_id)


def test_reap_of_an_unknown_worker_fails_and_ends_the_others(url: str, store: Store, capsys: Capture) -> None:
    publish(store, "a")
    answer = call(capsys, "registry", "reap", "nobody", "a", "--store", url)
    assert (answer.code, answer.out) == (1, "reaped a\n")
    assert "no source 'nobody'" in answer.err
    publish(store, "a")
    answer = call(capsys, "registry", "reap", "nobody", "a", "--store", url, "--json")
    assert (answer.code, answer.document) == (1, {"reaped": ["a"], "missing": ["nobody"]})
    assert list(store.snapshot("sources/")) == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "Missing argument"),
        (["nonsense"], 2, "nonsense"),
        (["ls", "--nonsense"], 2, "nonsense"),
        (["ls", "worker"], 1, "ls takes no worker ids"),
        (["watch", "worker"], 1, "watch takes no worker ids"),
        (["reap"], 1, "reap needs the ids"),
        (["ls", "--store", "redis://host"], 1, "redis"),
        (["ls", "--namespace", "a/b"], 1, "namespace"),
    ],
)
def test_wrong_use_says_so(words: list[str], code: int, says: str, url: str, capsys: Capture) -> None:
    store = [] if "--store" in words else ["--store", url]
    answer = call(capsys, "registry", *words, *store)
    assert answer.code == code
    assert says in answer.err


def test_wrong_use_is_json_where_json_was_asked_for(url: str, capsys: Capture) -> None:
    answer = call(capsys, "registry", "reap", "--store", url, "--json")
    assert (answer.code, answer.document["error"]["kind"]) == (1, "ConfigError")
    assert answer.document["error"]["facts"] == {"field": "workers"}


class Lines:
    """What a process prints, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def next(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it has ended"
        return line.rstrip("\n")


def test_watch_prints_every_change_until_it_is_interrupted(url: str, store: Store) -> None:
    publish(store, "a")
    with running("registry", "watch", "--store", url, "--json") as process:
        lines = Lines(process)
        heard: list[dict[str, Any]] = [json.loads(lines.next())]
        publish(store, "a", ports=(7,))
        heard.append(json.loads(lines.next()))
        store.delete("sources/a")
        heard.append(json.loads(lines.next()))
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (130, "")
    assert [(one["change"], one["source"]["ports"]) for one in heard] == [
        ("add", [5001, 5002]),
        ("update", [7]),
        ("remove", [7]),
    ]
    assert heard[0]["source"] == record("a").to_dict()


def test_watch_tells_people_a_line_a_change(url: str, store: Store) -> None:
    publish(store, "a", 3)
    publish(store, "b", host=None, ports=(), status=SourceStatus.STARTING)
    with running("registry", "watch", "--store", url) as process:
        lines = Lines(process)
        first, second = lines.next(), lines.next()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert first.endswith("add    a epoch 3 ready 10.0.0.1:5001,5002")
    assert second.endswith(f"add    b epoch 1 starting {record('b').ring_name}")
    assert process.returncode == 130


def test_watch_ends_when_its_reader_has_gone(url: str, store: Store) -> None:
    publish(store, "a")
    with running("registry", "watch", "--store", url) as process:
        Lines(process).next()
        assert process.stdout is not None
        process.stdout.close()
        publish(store, "b")
        assert process.wait(60) == 1
