"""Lazy names of a package (PEP 562): each is imported when it is first used, so that a process pays for what it uses.

The stub beside the package's `__init__.py` holds the names, for type checkers and for `lazy_names` alike: a line
`from module import Name as Name` each. This module imports nothing, since every process loads it.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def lazy_names(package: str, *own: str) -> "tuple[list[str], Callable[[str], object], Callable[[], list[str]]]":
    """The `__all__`, `__getattr__` and `__dir__` of a package, by its `__name__`, with the names it defines itself."""
    module = sys.modules[package]
    with open(module.__path__[0] + "/__init__.pyi", encoding="utf-8") as stub:
        lines = [words for line in stub if (words := line.split())[::2] == ["from", "import", "as"]]
    homes = {name: home for _, home, _, _, _, name in lines}
    names = sorted([*homes, *own])

    def getattr_(name: str) -> object:
        from importlib import import_module

        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)
        return value

    return names, getattr_, lambda: sorted({*vars(module), *names})
