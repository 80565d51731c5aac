"""The house's figures: how large the package is, how finely divided, and whether its modules import in circles.

`scripts/check` runs it. It prints each figure beside its bound and fails above one. The bounds stand in pyproject.toml,
`[tool.ucxx_transport.house]`, and only ever go down: one that is higher than in the last commit fails as well.

| figure          | what is counted                                                                                   |
|-----------------|---------------------------------------------------------------------------------------------------|
| lines           | all lines of the package's `.py` and `.pyi` files, blank ones and docstrings too                  |
| modules         | `.py` files, `__init__` too                                                                       |
| circles         | groups of modules that reach each other by imports (strongly connected, more than one module)     |
| imports         | lines of `import` and `from` statements of `.py` files, wherever they stand                       |
| longest         | lines of the longest `.py` file                                                                   |
| small           | modules under 80 lines with exactly one class or function at their top level, `__init__` excepted |

An import counts for the circles wherever it stands: in a function, and under TYPE_CHECKING too. It leads to the module
that defines the name: `from package import Name` is an import of the module from which the package's `__init__` (or the
stub beside it) has `Name`. That a module's parent packages run before it is no import of theirs.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SMALL_LINES = 80
Bounds = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One file of the package."""

    name: str
    path: Path
    lines: int
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.stem == "__init__"

    @property
    def imports(self) -> Iterator[ast.Import | ast.ImportFrom]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom))

    @property
    def import_lines(self) -> int:
        return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in self.imports)

    @property
    def is_small(self) -> bool:
        definitions = [
            node for node in self.tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        return not self.is_package and len(definitions) == 1 and self.lines < SMALL_LINES


class House:
    """A package's modules, and its stubs.

    Args:
        package: the package's folder.
    """

    def __init__(self, package: Path) -> None:
        def read(suffix: str) -> dict[str, Module]:
            found = (_module(path, package.parent) for path in sorted(package.rglob(f"*{suffix}")))
            return {module.name: module for module in found}

        self.modules = read(".py")
        self.stubs = read(".pyi")

    def figures(self) -> dict[str, float]:
        """Each figure by its name, as in the table above."""
        files = [*self.modules.values(), *self.stubs.values()]
        return {
            "lines": sum(module.lines for module in files),
            "modules": len(self.modules),
            "circles": len(self.circles()),
            "imports": sum(module.import_lines for module in self.modules.values()),
            "longest": max((module.lines for module in self.modules.values()), default=0),
            "small": len(self.small()),
        }

    def small(self) -> list[str]:
        """The modules under 80 lines with one definition."""
        return [name for name, module in self.modules.items() if module.is_small]

    def circles(self) -> list[list[str]]:
        """Groups of modules, each of which imports each, directly or through others of the group."""
        graph = {name: set(self.imported_by(module)) - {name} for name, module in self.modules.items()}
        reach = {name: _reachable(graph, name) for name in graph}
        groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
        return sorted(sorted(group) for group in groups if len(group) > 1)

    def imported_by(self, module: Module) -> Iterator[str]:
        """The modules of this package that one of them imports; a re-exported name's is the one that defines it."""
        for node in module.imports:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.modules)
            else:
                source = _absolute(module, node)
                yield from (home for alias in node.names if (home := self._home(source, alias.name)) is not None)

    def _home(self, source: str, name: str) -> str | None:
        """The module that defines what `from source import name` gives, if it is one of this package."""
        if f"{source}.{name}" in self.modules:
            return f"{source}.{name}"
        module = self.modules.get(source)
        if module is None or not module.is_package:
            return source if module is not None else None
        exporter = self.stubs.get(source, module)
        for node in exporter.tree.body:
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                return self._home(_absolute(exporter, node), name) or source
        return source


def _module(path: Path, root: Path) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text()
    return Module(name=name, path=path, lines=len(text.splitlines()), tree=ast.parse(text, str(path)))


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    up = node.level - module.is_package
    base = module.name.split(".")
    return ".".join([*base[: len(base) - up], *([node.module] if node.module else [])])


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found = {start}
    todo = [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo.extend(new)
    return found


def bounds_in(pyproject: str) -> dict[str, float]:
    """The bounds that a pyproject.toml's text sets; empty where it sets none."""
    house: dict[str, float] = tomllib.loads(pyproject).get("tool", {}).get("ucxx_transport", {}).get("house", {})
    return house


def faults(figures: Mapping[str, float], bounds: Bounds, earlier: Bounds) -> list[str]:
    """What is wrong: a figure above its bound or without one, a bound above the one of an earlier commit."""
    found = []
    for name, figure in figures.items():
        if name not in bounds:
            found.append(f"{name}: no bound in [tool.ucxx_transport.house] of pyproject.toml")
        elif figure > bounds[name]:
            found.append(f"{name}: {figure:,g} is above its bound of {bounds[name]:,g}")
    found += [
        f"{name}: its bound went up, from {earlier[name]:,g} to {bound:,g}; bounds only go down"
        for name, bound in bounds.items()
        if bound > earlier.get(name, bound)
    ]
    return found


def _committed_bounds(root: Path) -> dict[str, float]:
    """The lowest bounds of the last two commits: the second last is what a check of a fresh commit compares with."""
    lowest: dict[str, float] = {}
    for commit in ("HEAD", "HEAD~1"):
        shown = subprocess.run(
            ["git", "-C", str(root), "show", f"{commit}:pyproject.toml"],  # noqa: S607 - whichever git is on PATH
            capture_output=True,
            text=True,
            check=False,
        )
        for name, bound in bounds_in(shown.stdout).items() if shown.returncode == 0 else ():
            lowest[name] = min(bound, lowest.get(name, bound))
    return lowest


def main(arguments: list[str]) -> int:
    """Prints the figures beside their bounds, with `--names` the modules behind them; 1 if one is above."""
    root = Path(__file__).resolve().parents[1]
    house = House(root / "ucxx_transport")
    figures = house.figures()
    bounds = bounds_in((root / "pyproject.toml").read_text())
    for name, figure in figures.items():
        print(f"{name:<16} {figure:>9,g}  of at most {bounds.get(name, float('nan')):>9,g}")
    circles, longest = house.circles(), max(house.modules.values(), key=lambda module: module.lines)
    if circles or "--names" in arguments:
        print(*(f"circle: {' <-> '.join(circle)}" for circle in circles), sep="\n")
    if "--names" in arguments:
        print(f"longest: {longest.name}", *(f"small: {name}" for name in house.small()), sep="\n")
    found = faults(figures, bounds, _committed_bounds(root))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
