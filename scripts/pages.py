"""The generated documents: whole pages, and marked parts of pages, made from the code that they describe.

`python -m scripts.pages` writes them; with `--check` it lists those that are out of date and exits 1.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import ucxx_transport
from scripts.messages import Message, heading_of, headings, messages
from ucxx_transport import config, errors, machine, teardown
from ucxx_transport.groups.view import TRANSITIONS as RANK_TRANSITIONS
from ucxx_transport.groups.view import RankState
from ucxx_transport.link import address, endpoint, ucx
from ucxx_transport.ring import layout, states
from ucxx_transport.settings import Rule
from ucxx_transport.sidecar import main as sidecar
from ucxx_transport.units import format_bytes, format_duration
from ucxx_transport.wire import frames, server_side

__all__ = ["DOCS", "PARTS", "Part", "logged", "main", "row_of"]

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
_NOTICE: Final = "<!-- Made by scripts/pages.py from {source}: change that, then run `scripts/check --fix`. -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One generated part of the documents.

    Attributes:
        page: file name below docs/.
        name: of the part, as in `<!-- name -->`; None for a whole page.
        make: gives its text.
    """

    page: str
    name: str | None
    make: Callable[[], str]

    def is_current(self) -> bool:
        """Whether the page holds what the code says now."""
        path = DOCS / self.page
        return path.exists() and path.read_text(encoding="utf-8") == self._written()

    def write(self) -> None:
        """Bring the page up to date."""
        (DOCS / self.page).write_text(self._written(), encoding="utf-8")

    def _written(self) -> str:
        if self.name is None:
            return self.make()
        page = (DOCS / self.page).read_text(encoding="utf-8")
        place = re.compile(rf"(?<=<!-- {self.name} -->\n).*?(?=<!-- /{self.name} -->)", re.DOTALL)
        if place.search(page) is None:
            raise ValueError(f"docs/{self.page} has no <!-- {self.name} --> … <!-- /{self.name} -->")
        return place.sub(lambda _: f"\n{self.make()}\n", page)


def _diagram(first: Enum, transitions: Mapping[Any, Enum]) -> str:
    """A transition table as a Mermaid state diagram: one arrow for all events from one state to another.

    Args:
        first: the state that a life begins in.
        transitions: (state, event) → state.
    """
    events: dict[tuple[str, str], list[str]] = {}
    for (source, event), target in transitions.items():
        events.setdefault((source.name, target.name), []).append(event.name.lower())
    arrows = [f"    {source} --> {target}: {', '.join(names)}" for (source, target), names in events.items()]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}", *arrows, "```", ""])


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows), ""]


def _settings() -> str:
    lines = [
        "# Settings",
        "",
        _NOTICE.format(source="config.py"),
        "",
        "Every setting can stand in four places. The first that names it wins:",
        "",
        "1. a keyword argument: `ServerConfig(ports=8)`, or a dict in its place: `{'ports': 8}`;",
        "2. the environment: `UCXX_TRANSPORT_SERVER__PORTS=8`;",
        "3. `./ucxx_transport.toml`: `[server]`, `ports = 8`;",
        "4. the default.",
        "",
        'Sizes may be text such as `"512MiB"`, durations such as `"250ms"`. A mapping such as `ucx` is merged by key:',
        "`UCXX_TRANSPORT_SERVER__UCX__TLS=tcp`. An unknown name is an error in any of these places.",
        "A configuration is frozen; `dataclasses.replace` makes a changed copy. `ucxx-transport config` prints what is",
        "in force and where each value comes from. `UCX_*` variables belong to UCX and win over `ucx=`.",
        "",
    ]
    for name, cls in _sections():
        lines += [f"## {name}", "", f"`{cls.__name__}`. {inspect.getdoc(cls)}", ""]
        lines += _table(("setting", "default", "allowed", "meaning"), map(_setting, fields(cls)))
    return "\n".join(lines).rstrip() + "\n"


def _sections() -> Iterator[tuple[str, type[Any]]]:
    """Name and class of each section, in the order of config.py."""
    for cls in vars(config).values():
        if isinstance(cls, type) and cls.__module__ == config.__name__ and is_dataclass(cls):
            yield cls.__name__.removesuffix("Config").lower(), cls


def _setting(field: Field[Any]) -> tuple[str, str, str, str]:
    rule: Rule = field.metadata["rule"]
    kind = str(field.type)

    def shown(value: object) -> str:
        if "Seconds" in kind and isinstance(value, (int, float)):
            return format_duration(float(value))
        if "Bytes" in kind and isinstance(value, int) and value >= 1024:
            return format_bytes(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    allowed = [
        f"{sign} {shown(bound)}"
        for sign, bound in ((">", rule.gt), ("≥", rule.ge), ("≤", rule.le))
        if bound is not None
    ]
    if kind.startswith("Literal"):
        allowed = [f"`{choice}`" for choice in ast.literal_eval(kind.removeprefix("Literal"))]
    elif kind == "bool":
        allowed = ["`true`, `false`"]
    if rule.code_only:
        allowed.append("in code only")
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return (
        f"`{field.name}`",
        "–" if default is None else f"`{shown(default)}`",
        ", ".join(allowed) or "–",
        rule.description,
    )


def _errors() -> str:
    assert errors.__doc__ is not None
    remedies = dict(re.findall(r"^\| `(\w+)` +\| (?:yes|no) +\| (.+?) +\|$", errors.__doc__, re.MULTILINE))
    lines = ["# Errors", "", _NOTICE.format(source="errors.py"), ""]
    lines += [
        "Every error that the package raises on purpose is a `TransportError`. It has a `message` with the remedy, the",
        "values behind it in `facts`, and `retryable`: whether the same call may succeed if made again.",
        "[Troubleshooting](troubleshooting.md#every-message) goes by the message, and has all of them.",
        "",
    ]
    found = (one for _, one in sorted(vars(errors).items()) if isinstance(one, type))
    classes = [cls for cls in found if issubclass(cls, errors.TransportError)]
    lines += ["```text", *_tree(errors.TransportError, classes, ""), "```", ""]
    in_source_order = sorted(
        (cls for cls in classes if cls.__name__ in remedies), key=lambda c: list(remedies).index(c.__name__)
    )
    rows = [
        (f"`{cls.__name__}`", "yes" if cls.retryable else "no", inspect.getdoc(cls), remedies[cls.__name__])
        for cls in in_source_order
    ]
    lines += _table(("class", "retryable", "means", "what the caller does"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _messages() -> str:
    """Every message, by class, with what helps: where it has a heading, that one's section."""
    lines: list[str] = []
    known = headings((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    for name, of_class in itertools.groupby(messages(), key=lambda message: message.cls):
        links: dict[str, dict[str, None]] = {}
        for message in of_class:
            heading = heading_of(message, known)
            links.setdefault(row_of(message), {}).update({} if heading is None else {heading.link: None})
        rows = ((text, " or ".join(places) or "in the message") for text, places in links.items())
        lines += [f"### {name}", "", *_table(("message", "what helps"), rows)]
    return "\n".join(lines)


def row_of(message: Message) -> str:
    """A message as it stands in the table."""
    return f"`{message.text.replace('`', chr(39))}`"


def _tree(cls: type, classes: Sequence[type], indent: str) -> Iterator[str]:
    foreign = [base.__name__ for base in cls.__bases__ if base not in classes and base is not Exception]
    yield f"{indent}{cls.__name__}" + (f"  (also a {', '.join(foreign)})" if foreign else "")
    for child in classes:
        if child.__bases__[0] is cls:
            yield from _tree(child, classes, indent + "  ")


def _document_of(module: Any) -> str:
    """A module's docstring as Markdown, without its first line, which the page's heading stands for."""
    lines: list[str] = []
    is_open = False
    for line in inspect.cleandoc(module.__doc__).splitlines()[1:]:
        if line == "```":
            is_open = not is_open
        lines += ["", "```text"] if line == "```" and is_open else [line, ""] if line == "```" else [line]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _table_of(module: Any) -> str:
    """The first table of a module's docstring."""
    lines = inspect.cleandoc(module.__doc__).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    return "\n".join(itertools.takewhile(lambda line: line.startswith("|"), lines[first:])) + "\n"


def _layers() -> str:
    """The layers that the import contract allows, highest first."""
    contracts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return "\n".join(
        ["```text", *next(contract["layers"] for contract in contracts if contract["type"] == "layers"), "```", ""]
    )


def _members(enum: type[Enum]) -> list[str]:
    return _table(("value", "name"), ((member.value, f"`{member.name}`") for member in enum))


def _wire() -> str:
    sizes = (
        "VERSION",
        "FRAME_BYTES",
        "MAX_NAMES",
        "MAX_ENDS",
        "PACK_BYTES",
        "HEADER_BYTES",
        "TRAILER_BYTES",
        "ERROR_TEXT_BYTES",
        "NONCE_BYTES",
        "MAC_BYTES",
        "MAX_SCHEMA_BYTES",
        "MAX_BODY_BYTES",
    )
    source = "wire/frames.py, wire/server_side.py and link/endpoint.py"
    lines = ["# Wire: the byte map", "", _NOTICE.format(source=source), ""]
    lines += ["What the frames mean, and what follows from each, is in [the reference](UCXX.md#the-wire).", ""]
    lines += [_document_of(frames), "", "## Kinds of request", "", *_members(frames.Kind)]
    lines += ["## Statuses", "", *_members(frames.Status)]
    lines += ["## Numbers", "", *_table(("name", "value"), ((f"`{name}`", getattr(frames, name)) for name in sizes))]
    lines += ["## A connection, as the server sees it", "", _document_of(server_side), ""]
    lines += ["## Below the frames: how channels become UCX's tags", "", _document_of(endpoint)]
    return "\n".join(lines).rstrip() + "\n"


def _segment() -> str:
    sizes = (
        "LAYOUT_VERSION",
        "PAGE_BYTES",
        "HEADROOM_BYTES",
        "TAILROOM_BYTES",
        "MAX_SLOTS",
        "MAX_READERS",
        "MAX_SCHEMA_BYTES",
        "MAX_SLOT_BYTES",
    )
    words = [
        (name.removesuffix("_WORD").lower().replace("_", " "), value)
        for name, value in vars(layout).items()
        if name.endswith("_WORD") and value < layout.HEADER_WORDS
    ]
    counters = ((number, f"`{name.upper()}`") for number, name in enumerate(layout.COUNTERS))
    lines = ["# Segment: the byte map", "", _NOTICE.format(source="ring/layout.py"), ""]
    lines += ["What the words are for is in [the reference](UCXX.md#the-ring).", ""]
    lines += [
        _document_of(layout),
        "",
        "## Words of the header",
        "",
        *_table(("word", "holds"), ((f"{value}", name) for name, value in sorted(words, key=lambda item: item[1]))),
    ]
    lines += [
        "## Counters",
        "",
        f"From word {layout.COUNTER_WORD} on, one word each.",
        "",
        *_table(("value", "name"), counters),
    ]
    lines += ["## Numbers", "", *_table(("name", "value"), ((f"`{name}`", getattr(layout, name)) for name in sizes))]
    return "\n".join(lines).rstrip() + "\n"


def _names() -> str:
    """What `ucxx_transport` itself exports, each with the first line of its docstring; settings and errors apart."""
    exported: list[str] = vars(ucxx_transport)["__all__"]
    named = ((name, getattr(ucxx_transport, name)) for name in sorted(exported, key=str.lower))
    apart = {config.__name__, errors.__name__}
    rows = (
        (f"`{name}`", inspect.cleandoc(value.__doc__).partition("\n")[0])
        for name, value in named
        if callable(value) and value.__doc__ is not None and value.__module__ not in apart
    )
    return "\n".join(_table(("name", "is"), rows))


def _log_events() -> str:
    lines = ["# Log events", "", _NOTICE.format(source="the package's log calls"), ""]
    lines += [
        "How to see them is in [Logging](operations.md#logging). What warnings and errors mean is in",
        "[Troubleshooting](troubleshooting.md#in-the-log).",
        "",
    ]
    for level in ("error", "warning", "info", "debug"):
        rows = sorted({(event, keys, logger) for named, event, keys, logger in logged() if named == level})
        lines += [f"## {level.upper()}", "", *_table(("event", "keys", "logger"), rows)] if rows else []
    return "\n".join(lines).rstrip() + "\n"


def logged() -> Iterator[tuple[str, str, str, str]]:
    """Level, event, keys and logger of each call of a module's `_log`; an exception is an error."""
    for path in sorted((DOCS.parent / "ucxx_transport").rglob("*.py")):
        logger = ".".join(path.relative_to(DOCS.parent).with_suffix("").parts[:2])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="_log"), attr=level), args=[ast.Constant(value=str(event))]
                ):
                    keys = " ".join(keyword.arg for keyword in node.keywords if keyword.arg is not None)
                    yield level.replace("exception", "error"), f"`{event}`", keys, f"`{logger}`"


PARTS: Final = (
    Part(page="settings.md", name=None, make=_settings),
    Part(page="errors.md", name=None, make=_errors),
    Part(page="troubleshooting.md", name="messages", make=_messages),
    Part(page="log-events.md", name=None, make=_log_events),
    Part(page="wire.md", name=None, make=_wire),
    Part(page="segment.md", name=None, make=_segment),
    Part(page="api.md", name="names", make=_names),
    Part(page="operations.md", name="machine-table", make=lambda: _table_of(machine)),
    Part(page="operations.md", name="address-table", make=lambda: _table_of(address)),
    Part(page="operations.md", name="ucx-settings-table", make=lambda: _table_of(ucx)),
    Part(page="operations.md", name="teardown-table", make=lambda: _table_of(teardown)),
    Part(page="internals.md", name="layers", make=_layers),
    Part(page="internals.md", name="sidecar-table", make=lambda: _table_of(sidecar)),
    Part(page="UCXX.md", name="slot-diagram", make=lambda: _diagram(states.SlotState.FREE, states.TRANSITIONS)),
    Part(
        page="groups.md",
        name="rank-diagram",
        make=lambda: _diagram(RankState.ISOLATED, RANK_TRANSITIONS),
    ),
)


def main(arguments: list[str]) -> int:
    """Write the parts, or with `--check` say which are out of date."""
    old = [part for part in PARTS if not part.is_current()]
    if arguments == ["--check"]:
        for part in old:
            sys.stderr.write(f"docs/{part.page} is out of date: scripts/check --fix\n")
        return 1 if old else 0
    for part in old:
        part.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
