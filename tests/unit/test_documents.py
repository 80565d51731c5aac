"""The documents say what the code does, where the two can be compared. What scripts/pages.py makes is checked by it."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from scripts.messages import Message, heading_of, headings, messages
from scripts.pages import logged, row_of
from tests.support.rows import row
from ucxx_transport import ClientStatistics, RingStatistics, errors
from ucxx_transport.cli.program import VERBS
from ucxx_transport.config import ClientConfig, PublisherConfig, RingConfig, ServerConfig, StoreConfig
from ucxx_transport.errors import TransportError
from ucxx_transport.server.counters import PortStatistics
from ucxx_transport.settings import SECTIONS
from ucxx_transport.wire.frames import Status

ROOT = Path(__file__).parents[2]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "examples/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
ARGUMENTS = {"drain_s", "max_bytes", "max_fetch_rounds", "timeout_s", "wait_s"}
OTHERS = {
    "`the sources cannot be compiled. Tried: …`": "native/build.py",
    "`this machine refuses what the command needs`": "cli/program.py",
    "`assignment destination is read-only`": "client/payload.py",
}
"""Headings of messages that are no errors of the package's own, and where those stand."""
NOT_RUN = {"sh", "text", "toml", "yaml", "mermaid"}
"""Languages of blocks that are shown. `python` is run: as a doctest, or as a program with its output behind it."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, text, and what follows, of each fenced block."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```\n?", page, re.MULTILINE | re.DOTALL):
        yield found[1], found[2], page[found.end() :]


def test_a_block_that_looks_runnable_is_run() -> None:
    for path in PAGES:
        before = ""
        for language, text, after in blocks(read(path)):
            is_output = before == "python" and not language
            place = f"{path.name}: {text[:60]!r}"
            assert is_output or language in NOT_RUN | {"python"}, f"a block of no language, {place}"
            if language == "toml":
                tomllib.loads(text)
            is_doctest = text.startswith(">>> ")
            if language == "python" and not is_doctest:
                assert after.startswith("\n```\n"), f"a program without its output behind it, {place}"
            before = "" if is_doctest else language


def test_every_setting_that_is_named_exists() -> None:
    settings = (RingConfig, ServerConfig, ClientConfig, StoreConfig, PublisherConfig)
    counts = (RingStatistics, PortStatistics, ClientStatistics)
    known = {spec.name for section in (*settings, *counts) for spec in dataclasses.fields(section)} | ARGUMENTS
    for path in PAGES:
        page = read(path) if path.parent.name != "bench" else ""  # which names its programs' own options
        for name in re.findall(r"`([a-z]+(?:_[a-z]+)*_(?:s|bytes|attempts|connections|reads|endpoints))`", page):
            assert name in known or name.startswith("test_"), f"{path.name}: {name}"
        for section, name in re.findall(r"UCXX_TRANSPORT_([A-Z]+)__([A-Z_]+?)(?:__|\b)", page):
            assert name.lower() in SECTIONS[section.lower()], f"{path.name}: {section}__{name}"


def test_every_file_script_verb_and_extra_that_is_named_exists() -> None:
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for path in PAGES:
        page = read(path)
        for verb in re.findall(r"ucxx-transport ([a-z]+)", page):
            assert verb in VERBS, f"{path.name}: {verb}"
        named = re.findall(r"`((?:ucxx_transport|tests|scripts|bench|examples|docs)/[\w/.-]+)`", page)
        named = [] if path.name == "CHANGELOG.md" else named  # which names what was
        for file in named + re.findall(r"\bscripts/\w+(?:\.py)?", page):
            assert (ROOT / file).exists(), f"{path.name}: {file}"
        for extra in re.findall(r"(?:'\.|ucxx_transport)\[(\w+)\]", page):
            assert extra in extras, f"{path.name}: [{extra}]"


def test_every_name_of_the_package_that_is_named_exists() -> None:
    for path in PAGES:
        page = "" if path.name == "CHANGELOG.md" else read(path)  # which names what was
        for name in set(re.findall(r"(?:`|::: )(ucxx_transport(?:\.\w+)+)", page)) - {"ucxx_transport.toml"}:
            if "integrations" not in name:  # those need their frameworks
                assert pkgutil.resolve_name(name) is not None, f"{path.name}: {name}"


def test_every_link_leads_somewhere_on_github_too() -> None:
    for path in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", read(path)):
            file = path.parent / target if target else path
            assert file.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors_of(file), f"{path.name}: {target}#{anchor}"


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", read(path), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_status_of_the_wire_has_its_row() -> None:
    rows = set(re.findall(r"^\| ([A-Z_]+) +\|", read(ROOT / "docs" / "UCXX.md"), re.MULTILINE))
    assert {status.name for status in Status} <= rows


def test_the_table_of_errors_says_what_the_classes_say() -> None:
    assert errors.__doc__ is not None
    rows = re.findall(r"^\| `(\w+)` +\| (yes|no) +\|", errors.__doc__, re.MULTILINE)
    named = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    classes = {name for name, value in named.items() if issubclass(value, errors.TransportError)}
    assert {name for name, _ in rows} == classes - {"TransportError"}
    for name, retried in rows:
        cls = getattr(errors, name)
        assert issubclass(cls, TransportError)
        assert cls.retryable == (retried == "yes"), name


def test_every_test_that_is_named_for_an_invariant_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", read(ROOT / "docs" / "internals.md")))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", read(path))
    }
    assert len(named) >= 14
    assert named <= defined, named - defined


def test_every_message_of_troubleshooting_stands_in_the_code() -> None:
    page = read(ROOT / "docs" / "troubleshooting.md")
    known = headings(page)
    assert len(known) >= 80
    for heading in known:
        assert any(heading.quotes(one) or heading.is_for(one) for one in messages()) or heading.title in OTHERS, heading
        for quoted in heading.quoted:
            alone = dataclasses.replace(heading, quoted=(quoted,))
            assert any(map(alone.quotes, messages())) or heading.title in OTHERS, f"no message reads {quoted!r}"
    for title, file in OTHERS.items():
        assert title.strip("`").partition("…")[0] in read(ROOT / "ucxx_transport" / file)
    events = {event for _, event, _, _ in logged()}
    assert {f"`{event}`" for event in events_of(page)} <= events


def test_every_warning_and_error_in_the_log_has_its_heading() -> None:
    events = {event.strip("`") for level, event, _, _ in logged() if level in {"warning", "error"}}
    assert len(events) >= 40
    missing = sorted(events - set(events_of(read(ROOT / "docs" / "troubleshooting.md"))))
    assert not missing, f"docs/troubleshooting.md, In the log, has no heading for {', '.join(missing)}"


def test_every_message_of_an_error_has_its_heading_or_says_what_to_do() -> None:
    known = headings(read(ROOT / "docs" / "troubleshooting.md"))
    found = messages()
    assert len(found) >= 500
    missing = [one for one in found if heading_of(one, known) is None and not one.says_what_to_do]
    assert not missing, f"neither a remedy of their own, nor a heading in docs/troubleshooting.md: {missing}"


def test_every_message_of_an_error_stands_under_its_class_with_what_helps() -> None:
    page = read(ROOT / "docs" / "troubleshooting.md")
    known = headings(page)
    _, *classes = re.split(r"^### ", page.partition("\n## Every message\n")[2], flags=re.MULTILINE)
    rows = {
        (name, *line.replace("\\|", "|").strip("| ").rpartition(" | ")[::2])
        for name, _, table in (each.partition("\n") for each in classes)
        for line in table.splitlines()
    }
    helps = {(name, message): what for name, message, what in rows}
    for message in messages():
        heading = heading_of(message, known)
        with row(message=message):
            what = helps[message.cls, row_of(message)]
            assert what == "in the message" or "](troubleshooting.md#" in what
            assert heading is None or heading.link in what


def test_messages_are_found_wherever_they_stand_beside_a_class(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        """
_RIGHTS = "no right; grant it"
_TABLE = {1: (StorePermissionError, _RIGHTS), 2: (BusyError, f"busy with {x}; wait")}
_BY_CLASS = {CompactedError: {"compacted": "read again", 5: _OLD}}
_OLD = "it is old; take a snapshot"
_WORDS = {"reset": "the peer is gone", "cut": "it was cut short"}

def refuse(field, words):
    raise ConfigError(f"{field} must be {words}")

def read(ref, other):
    refuse("ref", "a reference that a ring made")
    text = "too late for this one"
    if other:
        text += "; begin sooner"
    raise errors.DeadlineExceededError(text)

def lost(reason):
    words = _WORDS[reason]
    return PeerLostError(words if reason else "the connection is closed", peer=1)
"""
    )
    found = {(one.cls, one.text, one.says_what_to_do) for one in messages(tmp_path)}
    assert found == {
        ("StorePermissionError", "no right; grant it", True),
        ("BusyError", "busy with …; wait", True),
        ("CompactedError", "read again", True),
        ("CompactedError", "it is old; take a snapshot", True),
        ("ConfigError", "… must be a reference that a ring made", True),
        ("DeadlineExceededError", "too late for this one…", False),
        ("PeerLostError", "the peer is gone", False),
        ("PeerLostError", "it was cut short", False),
        ("PeerLostError", "the connection is closed", False),
    }


def test_a_heading_is_for_the_messages_it_quotes_and_for_those_of_its_comment() -> None:
    (quoting, whole) = headings(
        "## Reading\n\n### `no … is there: …`, `too late`\n\n- **Cause:** x\n\n"
        "### A broken peer\n\n<!-- errors: ProtocolError wire/ link/ -->\n\n- **Cause:** x\n\n"
        "## In the log\n\n### `an_event`\n"
    )
    for cls, text, module, heading in (
        ("ConfigError", "no ring is there: it ended", "ring/segment.py", quoting),
        ("ProtocolError", "too late", "wire/codec.py", quoting),
        ("ProtocolError", "cut short", "wire/codec.py", whole),
        ("ProtocolError", "cut short", "ring/layout.py", None),
        ("PeerLostError", "cut short", "wire/codec.py", None),
    ):
        with row(text=text, module=module):
            assert heading_of(Message(cls, text, module), [whole, quoting]) == heading
    assert [heading.link for heading in (quoting, whole)] == [
        "[Reading](troubleshooting.md#reading)",
        "[A broken peer](troubleshooting.md#a-broken-peer)",
    ]


def events_of(page: str) -> list[str]:
    """The events of the log that have a heading; one heading may have several: ### `one`, `other`."""
    found = re.findall(r"^### `(.+)`$", page.partition("\n## In the log\n")[2], re.MULTILINE)
    return [event for heading in found for event in heading.split("`, `")]


def test_code_and_documents_use_the_field_s_terms() -> None:
    # written so that this file does not hold them
    idioms = re.compile(r"let[ ]go|who[e]ver|pati[e]nce|stan[d]ing|aut[o]psy|less[o]n|an[e]w|prete[n]ce", re.IGNORECASE)
    folders = ("ucxx_transport", "tests", "bench", "examples", "scripts")
    files = [*(path for folder in folders for path in (ROOT / folder).rglob("*.py")), ROOT / "hatch_build.py", *PAGES]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(read(path).splitlines(), 1)
        if idioms.search(line)
    ]
    assert not found, found
