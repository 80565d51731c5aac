"""Nested dicts and lists of arrays, as flat paths and back.

| in a tree             | in a path                    | comes back as |
|-----------------------|------------------------------|---------------|
| a mapping's key       | itself ("obs")               | dict          |
| a list's, a tuple's   | its position ("layers/0/w")  | list          |

A list or tuple of nothing but numbers (Python's, numpy's, arrays and tensors of 0 dimensions), however nested, is one
array; any other is a container. Where a schema is known, its paths say which.

The root is a mapping. A key may itself be a path ({"obs/image": …} is {"obs": {"image": …}}). A key of decimal digits
is refused, since it would come back as a list; so is an empty container, since it would not come back at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from ucxx_transport.errors import FOREIGN_ERRORS, ConfigError, nearest_remedy
from ucxx_transport.schema.tensor_spec import MAX_NAME_DEPTH, TensorSpec
from ucxx_transport.schema.wire_form import describe

ArrayTree: TypeAlias = dict[str, Any]
"""Arrays by name; a value is an array, or again a dict or a list of these. `Any`, so that callers may index freely."""


class TreeShape:
    """The nesting that the names of fields stand for: dicts and lists, whose leaves are the indices of the fields."""

    __slots__ = ("_fields", "_flat", "_root", "paths")

    def __init__(self, fields: Sequence[TensorSpec]) -> None:
        """Nest the fields; a ConfigError: a path is another's or begins it, or the positions of a list have gaps."""
        self._fields = fields
        self.paths = tuple(field.name for field in fields)
        if positions := [path for path in self.paths if path.partition("/")[0].isdecimal()]:
            raise ConfigError(
                "the root of a tree is a mapping: a field's name may not begin with a list position", field=positions[0]
            )
        self._root = _nested([(path.split("/"), index) for index, path in enumerate(self.paths)], "")
        self._flat = not any("/" in path for path in self.paths)

    def gather(self, tree: object) -> list[Any]:
        """The leaves of `tree` in field order, as they are; a ConfigError that names fields missing or unknown."""
        try:
            if self._flat and type(tree) is dict and len(tree) == len(self.paths):
                return [tree[path] for path in self.paths]
            leaves: list[object] = [None] * len(self.paths)
            _collect(self._root, tree, leaves)
        except LookupError:
            return self._gather_any(tree)
        return leaves

    def build(self, leaves: Sequence[object]) -> ArrayTree:
        """A new tree of these leaves, given in field order."""
        if self._flat:
            return dict(zip(self.paths, leaves, strict=True))
        built: ArrayTree = _grown(self._root, leaves)
        return built

    def _gather_any(self, tree: object) -> list[object]:
        """The same by definition rather than by structure: accepts keys that are paths, words what does not fit."""
        known = dict(zip(self.paths, self._fields, strict=True))
        found = flatten(tree, self.paths)
        missing = [path for path in known if path not in found]
        unknown = [path for path in found if path not in known]
        if missing or unknown:
            words = [f"missing: {listed(missing)}"] * bool(missing) + [f"unknown: {listed(unknown)}"] * bool(unknown)
            near = (nearest_remedy(path, missing[:_COMPARED]) for path in unknown[:_COMPARED])
            remedy = next(filter(None, near), None) or (
                known[missing[0]].absence_remedy
                if missing
                else "name in schema= every field that any episode has, and give 0 rows where one has none"
            )
            raise ConfigError(
                f"the data does not fit the schema; {'; '.join(words)}: {remedy}", field=(missing or unknown)[0]
            )
        return [found[path] for path in self.paths]


def flatten(tree: object, paths: Sequence[str] = ()) -> dict[str, object]:
    """Leaves by path, in the order of the tree. Where their `paths` are known, a list there is a leaf.

    Raises:
        ConfigError: not a mapping, a key that is not text or is all digits, an empty container, a path that occurs
            twice, nesting deeper than 32.

    >>> flatten({"obs": {"image": 1}, "layers": [{"w": 2}, {"w": [3, 4]}]})
    {'obs/image': 1, 'layers/0/w': 2, 'layers/1/w': [3, 4]}
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"data must be a mapping of names to arrays, not {describe(tree)}", field="data")
    is_leaf = dict.fromkeys(paths, True)
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in is_leaf:
            is_leaf[path] = False
    try:
        found = list(_walk(tree, "", 0, is_leaf))
    except ConfigError:
        raise
    except FOREIGN_ERRORS as exc:  # of a mapping that is no dict
        raise ConfigError(
            f"{describe(tree)} cannot be gone through as a mapping of names to arrays ({type(exc).__name__}: {exc}); "
            "give a dict of its arrays",
            field="data",
        ) from exc
    leaves = dict(found)
    if len(leaves) < len(found):
        twice = Counter(path for path, _ in found).most_common(1)[0][0]
        raise ConfigError(f"the tree names {twice!r} twice; give each field a path of its own", field=twice)
    return leaves


def _walk(node: object, path: str, depth: int, is_leaf: Mapping[str, bool]) -> Iterator[tuple[str, object]]:
    is_mapping = isinstance(node, Mapping)
    if not isinstance(node, (Mapping, list, tuple)) or is_leaf.get(path, not is_mapping and _holds_numbers(node)):
        yield path, node
        return
    if depth >= MAX_NAME_DEPTH:
        raise ConfigError(f"at most {MAX_NAME_DEPTH} levels, not {describe(path)}", field=describe(path))
    is_empty = True  # asked of its items, since a TensorDict is not to be asked for its truth
    for key, child in node.items() if isinstance(node, Mapping) else ((str(i), item) for i, item in enumerate(node)):
        is_empty = False
        if is_mapping:
            _check_key(key, path)
        yield from _walk(child, f"{path}/{key}" if path else key, depth + 1, is_leaf)
    if is_empty and not depth:
        raise ConfigError("data has no fields: give a mapping of names to arrays", field="data")
    if is_empty:
        remedy = "leave it out" if is_mapping else "leave it out, or give 0 rows: np.zeros((0, …), 'float32')"
        raise ConfigError(f"an empty container at {path!r} would not come back: {remedy}", field=path)


_COMPARED: Final = 20
"""Names, at most, that are looked at for the one that was meant: each takes some µs."""

_NUMBERS: Final = frozenset({bool, int, float, complex})


def _is_number(value: object) -> bool:
    """Whether `value`, an item of a list, is one number: Python's, numpy's, an array or tensor of 0 dimensions."""
    if type(value) in _NUMBERS or isinstance(value, (bool, int, float, complex)):
        return True
    if isinstance(value, (np.str_, np.bytes_, Mapping)):
        return False
    try:
        return getattr(value, "ndim", None) == 0
    except FOREIGN_ERRORS:  # a nested tensor has none
        return False


def _holds_numbers(node: object) -> bool:
    """Whether `node` is nested lists and tuples of numbers alone, and of one at least."""
    kinds = are_numbers(node)
    return next(kinds, False) and all(kinds)


def are_numbers(node: object, depth: int = 0) -> Iterator[bool]:
    """Of each item of nested lists and tuples, in turn, whether it is a number; what is too deep is none."""
    if isinstance(node, (list, tuple)) and depth <= MAX_NAME_DEPTH:
        for item in node:
            yield from are_numbers(item, depth + 1)
    else:
        yield _is_number(node)


def _check_key(key: object, path: str) -> None:
    place = f"under {path!r}" if path else "of the root"
    if not isinstance(key, str) or not key:
        raise ConfigError(
            f"a key {place} is {describe(key)}: keys must be text, and not empty; name it, as in "
            f"'agent_{key if type(key) is int else 0}'",
            field=path or "data",
        )
    if key.isdecimal():
        raise ConfigError(
            f"the key {key!r} {place} reads as a list position: name it, as in 'agent_{key}'", field=path or "data"
        )


def _nested(fields: Iterable[tuple[Sequence[str], int]], path: str) -> Any:
    """The nesting of the fields below `path`, given the rest of each name, and its index: a leaf."""
    groups: dict[str, list[tuple[Sequence[str], int]]] = {}
    for (key, *rest), index in fields:
        groups.setdefault(key, []).append((rest, index))
    children: dict[str, Any] = {}
    for key, group in groups.items():
        below = f"{path}/{key}" if path else key
        if all(rest for rest, _ in group):
            children[key] = _nested(group, below)
        elif len(group) == 1:
            children[key] = group[0][1]
        else:
            one, other, *_ = sorted("/".join((below, *rest)) for rest, _ in group)
            raise ConfigError(f"{one!r} and {other!r} cannot both be fields of a schema; rename one", field=other)
    if not any(key.isdecimal() for key in children):
        return children
    positions = [str(i) for i in range(len(children))]
    if set(children) != set(positions):
        raise ConfigError(
            f"the segments under {path!r} must be all names, or all positions 0 to {len(children) - 1}", field=path
        )
    return [children[key] for key in positions]


def _collect(shape: Any, tree: Any, leaves: list[object]) -> None:
    """Put the leaves of a tree of dicts and lists of this shape to their places; a LookupError: it has another."""
    if type(tree) is not type(shape) or len(tree) != len(shape):
        raise LookupError
    for key, child in shape.items() if type(shape) is dict else enumerate(shape):
        if type(child) is int:
            leaves[child] = tree[key]
        else:
            _collect(child, tree[key], leaves)


def _grown(shape: Any, leaves: Sequence[object]) -> Any:
    if type(shape) is dict:
        return {key: _grown(child, leaves) for key, child in shape.items()}
    return leaves[shape] if type(shape) is int else [_grown(child, leaves) for child in shape]


def listed(paths: Sequence[str]) -> str:
    """Names for an error: the first of them, and how many more there are."""
    shown = ", ".join(describe(path) for path in paths[:5])
    return shown if len(paths) <= 5 else f"{shown} and {len(paths) - 5} more"
