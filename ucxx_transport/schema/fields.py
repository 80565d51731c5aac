"""TensorSpec: one field of a payload, the element types that it may have, and the trees that paths of fields name.

Element types are numpy's numbers and bool, stored little-endian, and bfloat16 and float8 as ml_dtypes defines them. A
long double is named after its size (`float128`), so a platform without that size refuses the schema.

| in a tree             | in a path                    | comes back as |
|-----------------------|------------------------------|---------------|
| a mapping's key       | itself ("obs")               | dict          |
| a list's, a tuple's   | its position ("layers/0/w")  | list          |

A list or tuple of nothing but numbers (Python's, numpy's, arrays and tensors of 0 dimensions), however nested, is one
array; any other is a container. Where a schema is known, its paths say which. A mapping's key may itself be a path
({"obs/image": …} is {"obs": {"image": …}}). One of decimal digits is refused, since it would come back as a list; so is
an empty container, since it would not come back at all.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Final, SupportsIndex, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import FOREIGN_ERRORS, ConfigError
from ucxx_transport.schema.wire_form import describe, is_plain_text, misfit, refuse, take_fields, untrusted

MAX_NAME_CHARS = 255
MAX_NAME_DEPTH = 32
MAX_DIMENSIONS = 32
MAX_FIELD_BYTES = 1 << 48  # far above any memory, far below where a product of sizes could leave 64 bits

NUMBERS: Final = (bool, int, float, complex)
DType: TypeAlias = np.dtype[Any]

_BUILTIN = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble"),
)
_EXTENSION = ("bfloat16", *sorted(name for name in dir(ml_dtypes) if name.startswith("float8_")))
_MAX_TEXT = 32
_REMEDIES = {
    "O": "make it an array of numbers of 64 bits at most: objects cannot be shared without pickle",
    "U": "encode the text and pass it as uint8, or put it into the SlotRef's meta",
    "S": "pass bytes as uint8 (np.frombuffer(data, np.uint8))",
    "V": "make each member of a structured type a field of its own",
    "M": "view it as int64 (array.view('int64')) and keep the unit in the field's name",
    "m": "view it as int64 (array.view('int64')) and keep the unit in the field's name",
}


DTYPES: dict[str, DType] = {
    dtype.name: dtype for dtype in map(np.dtype, (*_BUILTIN, *(getattr(ml_dtypes, name) for name in _EXTENSION)))
}
"""Every supported dtype by its canonical name: numpy's own objects, so that identity means equality."""


def canonical_dtype(dtype: npt.DTypeLike | None, field: str) -> DType:
    """The supported dtype that a name, scalar type or dtype means, in the payload's byte order, or a ConfigError."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None or (isinstance(dtype, str) and len(dtype) > _MAX_TEXT):
        raise misfit(field, f"{describe(dtype)} is not a dtype; give its name")
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, DeprecationWarning) as exc:  # numpy parses its own little language here
        raise misfit(field, f"{describe(dtype)} is not a dtype; supported are {', '.join(DTYPES)}") from exc
    known = DTYPES.get(found.name)
    if known is None or known != found.newbyteorder("<"):
        raise misfit(field, f"dtype {found.name} cannot be a payload; {remedy_for(found)}", dtype=found.name)
    return known


def remedy_for(dtype: DType) -> str:
    """What to do about values of a dtype that is not supported."""
    kind = dtype.kind if dtype.kind != "V" or dtype.type is np.void else ""  # extension types are V too
    return _REMEDIES.get(kind) or f"supported are {', '.join(DTYPES)}"


@lru_cache(maxsize=1024)
def casts_exactly(source: DType, target: DType) -> bool:
    """Whether every value of `source` keeps its value in `target`.

    Stricter than numpy's "safe", which lets 64-bit integers into float64 and one float8 format into another.
    """
    if source.newbyteorder("<") == target:
        return True
    if target.name in _EXTENSION or source.name not in DTYPES or not np.can_cast(source, target, "safe"):
        return False
    if source.kind in "iu" and target.kind in "fc":
        return int(np.finfo(target).nmant) + 1 >= 8 * source.itemsize - (source.kind == "i")
    return True


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and element type of one array in a payload.

    Attributes:
        name: the field's path in the payload's tree, 1 to 32 segments joined by "/", none empty, at most 255 printable
            characters: "obs/image", "layers/0/w". A segment of decimal digits is a position in a list.
        shape: sizes of the dimensions, ≥ 0, at most 32 of them; one integer stands for one dimension; () is a scalar.
            For a `varlen` field the first is the maximum.
        dtype: what numpy takes as a numeric, bool or complex dtype, or a bfloat16/float8 of ml_dtypes, or its name;
            always little-endian here.
        varlen: whether the leading dimension varies from payload to payload, between 0 and `shape[0]`.

    Raises:
        ConfigError: one of them is not so; the message names the field.

    >>> TensorSpec("obs/image", (500, 84, 84), "uint8", varlen=True).nbytes
    3528000
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    varlen: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            name: str,
            shape: SupportsIndex | Iterable[SupportsIndex],
            dtype: npt.DTypeLike,
            varlen: bool = False,  # noqa: FBT001, FBT002  # a field reads as one row: name, shape, dtype, varlen
        ) -> None: ...

    def __post_init__(self) -> None:
        name, varlen = self.name, self.varlen
        _check_name(name)
        object.__setattr__(self, "name", str(name))
        object.__setattr__(self, "shape", _checked_shape(self.shape, name))
        object.__setattr__(self, "dtype", canonical_dtype(self.dtype, name))
        if not isinstance(varlen, bool):
            raise misfit(name, f"varlen must be True or False, not {describe(varlen)}")
        if varlen and (not self.shape or self.shape[0] == 0):
            raise misfit(name, "varlen needs a leading dimension, its maximum length ≥ 1")
        # A zero size elsewhere must not hide an absurd one: numpy refuses such shapes when a view is made.
        if prod(max(size, 1) for size in self.shape) * self.dtype.itemsize > MAX_FIELD_BYTES:
            raise misfit(name, f"shape {self.shape} is too large; at most {MAX_FIELD_BYTES} bytes")

    @property
    def nbytes(self) -> int:
        """Bytes of the field at its full size."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def absence_remedy(self) -> str:
        """How an episode says that it has nothing of this field, in words for an error."""
        rows = f"give 0 rows, np.zeros({(0, *self.shape[1:])}, {self.dtype.name!r})"
        if self.varlen:
            return f"an episode without {self.name!r} must {rows}"
        return f"make {self.name!r} varlen (schema= or varlen=) where some episodes lack it, and {rows}, in those"

    def to_dict(self) -> dict[str, object]:
        """The field as plain JSON- and msgpack-safe values, in a fixed order of keys."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype.name, "varlen": self.varlen}

    @classmethod
    def from_dict(cls, data: object) -> TensorSpec:
        """Rebuild a field from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed; the message names the field.
        """
        form = take_fields(data, "tensor spec", required=("name", "shape", "dtype", "varlen"))
        shape, dtype = form["shape"], form["dtype"]
        with untrusted():
            if not isinstance(shape, (list, tuple)):
                refuse("shape", shape, "a list of sizes")
            if not isinstance(dtype, str) or dtype not in DTYPES:
                refuse("dtype", dtype, "a dtype known here, by its name")
            return cls(**form)


def _check_name(name: object) -> None:
    if not is_plain_text(name, MAX_NAME_CHARS):
        text = f"field {describe(name)}: a name is text of 1 to {MAX_NAME_CHARS} printable characters"
        raise ConfigError(text, field=describe(name) if isinstance(name, str) else "name")
    segments = name.split("/")
    if "" in segments or len(segments) > MAX_NAME_DEPTH:
        raise misfit(name, f"a path is 1 to {MAX_NAME_DEPTH} segments joined by '/', none of them empty")


def _checked_shape(shape: object, name: str) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, (str, bytes)) else (shape,)
    if len(sizes) > MAX_DIMENSIONS:
        raise misfit(name, f"{len(sizes)} dimensions; at most {MAX_DIMENSIONS}")
    try:
        checked = tuple(operator.index(size) for size in sizes if not isinstance(size, bool))
    except TypeError:
        checked = ()
    if len(checked) != len(sizes) or any(size < 0 for size in checked):
        raise misfit(name, f"{describe(shape)} is not a shape: sizes must be integers ≥ 0")
    return checked


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
        cause = f"{type(exc).__name__}: {exc}"
        text = f"{describe(tree)} cannot be gone through as a mapping of names to arrays ({cause})"
        raise ConfigError(f"{text}; give a dict of its arrays", field="data") from exc
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


def _holds_numbers(node: object) -> bool:
    """Whether `node` is nested lists and tuples of numbers alone, and of one at least."""
    kinds = are_numbers(node)
    return next(kinds, False) and all(kinds)


def are_numbers(node: object, depth: int = 0) -> Iterator[bool]:
    """Of each item of nested lists and tuples, in turn, whether it is a number; what is too deep is none."""
    if isinstance(node, NUMBERS):
        yield True
    elif isinstance(node, (list, tuple)) and depth <= MAX_NAME_DEPTH:
        for item in node:
            yield from are_numbers(item, depth + 1)
    else:
        try:
            is_number = not isinstance(node, (np.str_, np.bytes_, Mapping)) and getattr(node, "ndim", None) == 0
        except FOREIGN_ERRORS:  # a nested tensor has no `ndim`
            is_number = False
        yield is_number


def _check_key(key: object, path: str) -> None:
    place = f"under {path!r}" if path else "of the root"
    if not isinstance(key, str) or not key:
        number = key if type(key) is int else 0
        text = f"a key {place} is {describe(key)}: keys must be text, and not empty; name it, as in 'agent_{number}'"
        raise ConfigError(text, field=path or "data")
    if key.isdecimal():
        text = f"the key {key!r} {place} reads as a list position: name it, as in 'agent_{key}'"
        raise ConfigError(text, field=path or "data")


def nesting_of(paths: Sequence[str]) -> Any:
    """The dicts and lists that names stand for, their leaves the fields' indices; a ConfigError: they are no tree."""
    if positions := [path for path in paths if path.partition("/")[0].isdecimal()]:
        text = "the root of a tree is a mapping: a field's name may not begin with a list position"
        raise ConfigError(text, field=positions[0])
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
        text = f"the segments under {path!r} must be all names, or all positions 0 to {len(children) - 1}"
        raise ConfigError(text, field=path)
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
