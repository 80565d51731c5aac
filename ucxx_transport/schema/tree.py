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

from ucxx_transport.errors import FOREIGN_ERRORS, ConfigError
from ucxx_transport.schema.tensor_spec import MAX_NAME_DEPTH
from ucxx_transport.schema.wire_form import describe

ArrayTree: TypeAlias = dict[str, Any]
"""Arrays by name; a value is an array, or again a dict or a list of these. `Any`, so that callers may index freely."""


def flatten(tree: object, paths: Sequence[str] = ()) -> dict[str, object]:
    """Leaves by path, in the tree's order, or a ConfigError. Where their `paths` are known, a list there is a leaf.

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


def nesting_of(paths: Sequence[str]) -> Any:
    """The dicts and lists that names of fields stand for, whose leaves are the indices of the fields.

    A ConfigError: a name is another's or begins it, or the positions of a list have gaps.
    """
    if positions := [path for path in paths if path.partition("/")[0].isdecimal()]:
        raise ConfigError(
            "the root of a tree is a mapping: a field's name may not begin with a list position", field=positions[0]
        )
    return _nested([(path.split("/"), index) for index, path in enumerate(paths)], "")


def _nested(fields: Iterable[tuple[Sequence[str], int]], path: str) -> Any:
    """The nesting of the fields below `path`, given the rest of each name, and its index."""
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


def collect(shape: Any, tree: Any, leaves: list[object]) -> None:
    """Put the leaves of a tree of dicts and lists of this shape to their places; a LookupError: it has another."""
    if type(tree) is not type(shape) or len(tree) != len(shape):
        raise LookupError
    for key, child in shape.items() if type(shape) is dict else enumerate(shape):
        if type(child) is int:
            leaves[child] = tree[key]
        else:
            collect(child, tree[key], leaves)


def grown(shape: Any, leaves: Sequence[object]) -> Any:
    """A tree of this shape and of these leaves."""
    if type(shape) is dict:
        return {key: grown(child, leaves) for key, child in shape.items()}
    return leaves[shape] if type(shape) is int else [grown(child, leaves) for child in shape]


def listed(paths: Sequence[str]) -> str:
    """Names for an error: the first of them, and how many more there are."""
    shown = ", ".join(describe(path) for path in paths[:5])
    return shown if len(paths) <= 5 else f"{shown} and {len(paths) - 5} more"
