"""The messages of the package's errors, found in its code, and where the documents say what helps.

A message is what stands beside an error's class: its first argument, or the element behind the class in a call or in a
table of errors: `ConfigError("…")`, `(StorePermissionError, _RIGHTS)`, `{LeaseLostError: {5: "…"}}`. It is read from
literals. A name stands for what its function or module gives it; a parameter for what callers give, where too little is
left to look for without it. What is only known when it is raised is `…`. The text of a ValueError in units.py and
settings.py ends a ConfigError.

What a user finds who looks for a message is one of these, and `scripts/pages.py --check` fails where there is none:

- a heading of docs/troubleshooting.md that reads like it;
- a heading with a comment `<!-- errors: ProtocolError wire/ link/ -->`: those of that class from these parts of the
  package, which have one cause and one remedy;
- its own words: what to do (`; give …`, `: call …`), or, of a ConfigError, the permitted (`must be …`, `at most …`).
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from ucxx_transport import errors

__all__ = ["Heading", "Message", "heading_of", "headings", "messages"]

ROOT: Final = Path(__file__).resolve().parents[1]
_GAP: Final = "…"
_FEW_WORDS: Final = 4
_MOST: Final = 64
_DEEPEST: Final = 6
_VERBS: Final = (
    "add|allow|ask|begin|build|call|choose|clone|close|convert|copy|correct|drop|end|fetch|find|free|give|go on|grant"
    "|hold|install|keep|leave|let|look|lower|make|mount|move|name|note|open|override|pass|percent-encode|pip install"
    "|promote|put|raise|read|receive|recreate|release|remove|rename|report|run|scale|see|send|set|share|shorten|start|stop"
    "|take|try|unpack|unset|use|wait|watch|write"
)
_REMEDY: Final = re.compile(
    rf"(?:[;:,.(] |\bor |\band )(?:first |instead )?(?:(?:{_VERBS})\b|`?\w+\([^)]*\) first|did you mean|known:)"
    rf"|^(?:(?:{_VERBS}) |\w+\([^)]*\) )|\bmust (?:{_VERBS})\b",
    re.IGNORECASE,
)
_PERMITTED: Final = re.compile(
    r"\bmust (?:be|have|name) .|\bat (?:most|least) .|(?:^|: )expected .|\bbetween .|\bwanted$|\bneeds ."
    r"|\btakes (?:a|no) .|\bsupported are .|\bor more\b|\b[01] to .|\bfrom 0 on|\bmade of ."
    r"|\b(?:is|are) (?:text|seconds|a list|a mapping|a number|a file name)\b"
)


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """One message.

    Attributes:
        cls: the class of errors.py whose error has it.
        text: its words, `…` for what is filled in.
        module: where it is raised, such as `client/connections.py`.
    """

    cls: str
    text: str
    module: str

    @property
    def says_what_to_do(self) -> bool:
        """Whether it has a remedy in its own words; of a setting or argument, what is permitted is one."""
        return bool(_REMEDY.search(self.text) or (self.cls == "ConfigError" and _PERMITTED.search(self.text)))

    def reads(self, said: str) -> bool:
        """Whether an error says this, maybe behind the words of what passes it on."""
        return re.search(rf"(?:\A|: ){_pattern_of(self.text).pattern}\Z", said, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class Heading:
    """One heading of docs/troubleshooting.md that is no event of the log.

    Attributes:
        section: the heading above it.
        title: its text.
        quoted: the messages in it.
        groups: classes of errors, each with the parts of the package whose messages of that class it is for.
    """

    section: str
    title: str
    quoted: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def link(self) -> str:
        """To it, or to its section: only of plain words do GitHub and the site make the same anchor."""
        title = self.section if self.quoted else self.title
        return f"[{title}](troubleshooting.md#{title.lower().replace(' ', '-')})"

    def quotes(self, message: Message) -> bool:
        """Whether the message reads like one in the heading."""
        return any(_pattern_of(text).search(message.text) for text in self.quoted)

    def is_for(self, message: Message) -> bool:
        """Whether the message is of a class and a part that it is for."""
        return any(cls == message.cls and message.module.startswith(parts) for cls, parts in self.groups)


@cache
def _pattern_of(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split(_GAP))), re.DOTALL)


def headings(page: str) -> list[Heading]:
    """The headings in the text of docs/troubleshooting.md, but those of the log's events."""
    found = []
    for section in re.split(r"^## ", page.partition("\n## In the log\n")[0], flags=re.MULTILINE)[1:]:
        name = section.partition("\n")[0]
        for title, body in re.findall(r"^### (.+)\n((?:(?!### ).*\n?)*)", section, re.MULTILINE):
            groups = [line.split() for line in re.findall("<!-- errors: (.+) -->", body)]
            quoted = tuple(re.findall(r"`([^`]+)`", title))
            found.append(Heading(name, title, quoted, tuple((cls, tuple(parts)) for cls, *parts in groups)))
    return found


def heading_of(message: Message, known: Iterable[Heading]) -> Heading | None:
    """The heading that a message has: one that quotes it, else one for its class and part."""
    ways = (Heading.quotes, Heading.is_for)
    return next((heading for way in ways for heading in known if way(heading, message)), None)


@cache
def messages(folder: Path = ROOT / "ucxx_transport") -> list[Message]:
    """Every message of a package, by class."""
    return sorted(set(_Package(folder).messages()))


_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class _Module:
    name: str
    tree: ast.Module
    functions: Mapping[ast.AST, _Function]  # the innermost one around each node


_Scope = tuple[_Module, _Function | None]
_Given = Mapping[str, tuple[ast.expr, _Scope]]


class _Package:
    def __init__(self, folder: Path) -> None:
        self.modules = [_module(path, folder) for path in sorted(folder.rglob("*.py"))]
        self.kinds = {name: name for name, value in vars(errors).items() if isinstance(value, type)}
        self.constants: dict[str, list[tuple[ast.expr, _Scope]]] = defaultdict(list)
        self.calls: dict[str, list[tuple[ast.Call, _Scope]]] = defaultdict(list)
        self.functions: dict[str, list[tuple[ast.expr, _Scope]]] = defaultdict(list)  # and what they return
        for module in self.modules:
            for node in ast.walk(module.tree):
                self._learn(node, (module, module.functions.get(node)))
            for statement in module.tree.body:
                for name, value in _assigned(statement):
                    self.constants[name].append((value, (module, None)))

    def _learn(self, node: ast.AST, scope: _Scope) -> None:
        match node:
            case ast.Call(func=function):
                self.calls[_name_of(function)].append((node, scope))
            case ast.Return(value=ast.expr() as value) if scope[1] is not None:
                self.functions[scope[1].name].append((value, scope))
            case ast.ClassDef(bases=bases):
                for base in map(_name_of, bases):
                    if base in self.kinds:
                        self.kinds.setdefault(node.name, self.kinds[base])
            case ast.Dict():  # of a server's statuses, and the errors that they are to a client
                for key, value in zip(node.keys, node.values, strict=True):
                    first = _name_of(value.elts[0]) if isinstance(value, ast.Tuple) and value.elts else ""
                    if key is not None and _owner_of(key) == "Status" and first in self.kinds:
                        self.kinds[ast.unparse(key)] = self.kinds[first]

    def messages(self) -> Iterator[Message]:
        for module in self.modules:
            for node in ast.walk(module.tree):
                for cls, text in self._beside(node, module):
                    for words in self._whole(text, (module, module.functions.get(node))):
                        if len(_words(words)) > 1:  # else it is another error's message, passed on
                            yield Message(cls, re.sub(rf"{_GAP}+", _GAP, words), module.name)

    def _beside(self, node: ast.AST, module: _Module) -> Iterator[tuple[str, ast.expr]]:
        """Class and message, where a node has them."""
        if isinstance(node, ast.Call) and node.args:
            name = _name_of(node.func)
            if name in self.kinds:
                yield self.kinds[name], node.args[0]
            elif name == "ValueError" and module.name in {"units.py", "settings.py"}:
                yield "ConfigError", node.args[0]
            elif isinstance(node.func, ast.Call) and _name_of(node.func.func) == "type":  # of another error's class
                yield "TransportError", node.args[0]
        row = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else itertools.pairwise(row)
        for cls, text in pairs:
            if cls is not None and _name_of(text) not in self.kinds:
                yield from ((self.kinds[name], text) for name in self._status(cls) if name in self.kinds)

    def _status(self, node: ast.expr) -> list[str]:
        """The name of an error's class or of a status that an expression is, or that its constant is."""
        if _owner_of(node) == "Status":
            return [ast.unparse(node)]
        aliases = [value for value, _ in self.constants[name]] if (name := _name_of(node)) not in self.kinds else []
        return [name] + [ast.unparse(value) for value in aliases if _owner_of(value) == "Status"]

    def _whole(self, node: ast.expr, scope: _Scope, depth: int = 0) -> list[str]:
        """What an expression may read as; by what callers give, where little is left without."""
        found = self._texts(node, scope, {}, depth)
        module, function = scope
        if depth < _DEEPEST and function is not None and any(len(_words(text)) < _FEW_WORDS for text in found):
            calls = [
                (call, at)
                for call, at in self.calls[function.name]
                if at[0] is module or not function.name.startswith("_")
            ]
            by_call = [self._texts(node, scope, _given(function, call, at), depth + 1) for call, at in calls]
            return [text for texts in by_call for text in texts] or found
        return found

    def _texts(self, node: ast.expr, scope: _Scope, given: _Given, depth: int) -> list[str]:  # noqa: C901, PLR0911 - a case a kind of node
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.IfExp(body=one, orelse=other):
                return self._texts(one, scope, given, depth) + self._texts(other, scope, given, depth)
            case ast.BoolOp(values=values) | ast.Dict(values=values):
                return [text for value in values for text in self._texts(value, scope, given, depth)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined([left, right], scope, given, depth)
            case ast.JoinedStr(values=parts):
                return self._joined(parts, scope, given, depth)
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                found = self._texts(value, scope, given, depth)
                return list(dict.fromkeys(text if " " in text and _words(text) else _GAP for text in found))
            case ast.Call(func=ast.Name(id=name)) | ast.Attribute(attr=name) if "remedy" in name and depth < _DEEPEST:
                returned = self.functions[name]
                return [text for value, at in returned for text in self._texts(value, at, {}, depth + 1)] or [_GAP]
            case (
                ast.Subscript(value=ast.Name() as table)
                | ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="get"))
            ):
                return self._texts(table, scope, given, depth + 1)
            case ast.Name(id=name) if name in given:
                return self._whole(*given[name], depth + 1)
            case ast.Name() if depth < _DEEPEST:
                return self._named(node, scope, given, depth + 1) or [_GAP]
        return [_GAP]

    def _joined(self, parts: list[ast.expr], scope: _Scope, given: _Given, depth: int) -> list[str]:
        choices = [self._texts(part, scope, given, depth) for part in parts]
        return list(dict.fromkeys(map("".join, itertools.islice(itertools.product(*choices), _MOST))))

    def _named(self, use: ast.Name, scope: _Scope, given: _Given, depth: int) -> list[str]:
        """What a name stands for: what its function gives it before the use, else the module, else any other."""
        module, function = scope
        while function is not None:
            found: list[str] = []
            first = max(_given_anyway(function, use), default=0)
            for node in ast.walk(function):
                if module.functions.get(node) is function and first <= getattr(node, "lineno", 0) <= use.lineno:
                    for target, value in _assigned(node):
                        if target == use.id and isinstance(node, ast.AugAssign):
                            found = [f"{text}{_GAP}" for text in found]
                        elif target == use.id:
                            found += self._texts(value, scope, given, depth)
            if found or use.id in _parameters(function):
                return found
            function = module.functions.get(function)
        known = self.constants[use.id]
        own = [(value, at) for value, at in known if at[0] is module] or known
        return [text for value, at in own for text in self._texts(value, at, {}, depth)]


def _given_anyway(function: _Function, use: ast.Name) -> Iterator[int]:
    """The lines before a use that give its name a value whatever the way to there."""
    for node in ast.walk(function):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None), getattr(node, "finalbody", None)):
            if isinstance(block, list) and block[:1] and block[0].lineno <= use.lineno <= (block[-1].end_lineno or 0):
                for statement in block:
                    if statement.lineno < use.lineno and not isinstance(statement, ast.AugAssign | ast.For):
                        yield from (statement.lineno for name, _ in _assigned(statement) if name == use.id)


def _module(path: Path, folder: Path) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions: dict[ast.AST, _Function] = {}

    def enter(node: ast.AST, function: _Function | None) -> None:
        for child in ast.iter_child_nodes(node):
            if function is not None:
                functions[child] = function
            enter(child, child if isinstance(child, _Function) else function)

    enter(tree, None)
    return _Module(path.relative_to(folder).as_posix(), tree, functions)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]\w*", text)


def _name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _owner_of(node: ast.AST | None) -> str:
    return _name_of(node.value) if isinstance(node, ast.Attribute) else ""


def _parameters(function: _Function) -> list[str]:
    return [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def _given(function: _Function, call: ast.Call, at: _Scope) -> _Given:
    """What a call gives a function's parameters."""
    names = _parameters(function)
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    named = {keyword.arg: (keyword.value, at) for keyword in call.keywords if keyword.arg is not None}
    return {**dict(zip(names, ((value, at) for value in call.args), strict=False)), **named}


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement or expression gives values, with the values."""
    match node:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.NamedExpr(target=ast.Name(id=name), value=value)
        ):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value
        case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value):
            yield name, value
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            yield from ((_name_of(target), value) for target, value in zip(targets, values, strict=False))
        case ast.For(target=ast.Tuple(elts=targets), iter=ast.Tuple(elts=rows)):
            for row in rows:
                if isinstance(row, ast.Tuple):
                    yield from ((_name_of(target), value) for target, value in zip(targets, row.elts, strict=False))
