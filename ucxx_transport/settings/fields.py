"""The kinds of value that a setting holds: what each accepts, and what it is turned into.

| kind                      | accepted                                      | held                                 |
|---------------------------|-----------------------------------------------|--------------------------------------|
| `Count`                   | a whole number, also as text                  | `int`                                |
| `Bytes`                   | a number or text such as `512MiB`             | `int`                                |
| `Seconds`                 | a number or text such as `250ms`              | `float`, finite                      |
| `Name`                    | letters, digits, `.`, `_`, `-`; 128 at most   | `str`                                |
| `Text`                    | text that is not empty                        | `str`                                |
| `Folder`                  | an absolute path, as text or `Path`           | `str`                                |
| `OptionalToken`           | `bytes`, or text, which is taken as UTF-8     | `Secret`, which no `repr` shows      |
| `Ports`                   | a count, or port numbers (`5001,5002`)        | `int`, or a tuple of `int`           |
| `OptionalPortRange`       | first and last (`15100-15131`), 1024 to 65535 | a tuple of two `int`                 |
| `UCXSettings`             | names to values, with or without `UCX_`       | names without `UCX_` to text         |
| `bool`                    | true/false, yes/no, on/off, 1/0, also as text | `bool`                               |
| `Literal[...]`            | one of its words                              | that word                            |

`Optional...` of a kind takes None as well. A kind is a function from what was given to what is held; it raises
ValueError that says what it expected. Any other class is a kind of its instances.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Annotated, Any, Final, Literal, Protocol, SupportsIndex, TypeVar, get_args, get_origin

from ucxx_transport.units import parse_bytes, parse_duration

MAX_PORTS: Final = 64
"""As many ports as a segment's published address holds."""

Parse = Callable[[Any], object]
GotT_co = TypeVar("GotT_co", covariant=True)
GivenT_contra = TypeVar("GivenT_contra", contravariant=True)

_BOOLEANS: Final = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0"), False),
}


class Secret:
    """Bytes that no `repr`, log line or traceback shows."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """The bytes themselves."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)


def _count(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return operator.index(value)
    raise ValueError("expected a whole number")


def _matching(pattern: str, expected: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"expected {expected}")
    return value


def _folder(value: object) -> str:
    if not isinstance(value, str | os.PathLike) or not os.path.isabs(value):
        raise ValueError("expected a folder's absolute path")
    return os.path.normpath(os.fspath(value))


def _boolean(value: object) -> bool:
    if not isinstance(value, bool | int | str) or str(value).strip().lower() not in _BOOLEANS:
        raise ValueError("expected true or false")
    return _BOOLEANS[str(value).strip().lower()]


def parse_token(value: object) -> Secret | None:
    """`OptionalToken` at run time."""
    if value is None or isinstance(value, Secret):
        return value
    if not isinstance(value, str | bytes):
        raise ValueError("expected bytes or text")
    if not value:
        raise ValueError("an empty token protects nothing; leave the setting out to run without one")
    return Secret(value.encode() if isinstance(value, str) else value)


def _ports(value: object) -> int | tuple[int, ...]:
    if isinstance(value, str):
        words = value.strip().strip("[]").split(",")
        value = words[0] if len(words) == 1 and "[" not in value else words
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        ports = tuple(_count(port) for port in value)
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ValueError(f"expected 1 to {MAX_PORTS} port numbers")
        if wrong := [port for port in ports if not 0 <= port <= 65535]:
            raise ValueError(f"{wrong[0]} is not a port number (0 to 65535, 0 for any free one)")
        if any(port and ports.count(port) > 1 for port in ports):
            raise ValueError("the same port number twice")
        return ports
    try:
        count = _count(value)
    except ValueError:
        raise ValueError("expected a number of ports, or a list of port numbers") from None
    if not 1 <= count <= MAX_PORTS:
        raise ValueError(f"expected 1 to {MAX_PORTS} ports; a port number goes in a list: [{count}]")
    return count


def _port_range(value: object) -> tuple[int, int]:
    words = value.strip().strip("[]").replace("-", ",").split(",") if isinstance(value, str) else value
    if not isinstance(words, Sequence) or isinstance(words, bytes) or len(words) != 2:
        raise ValueError("expected the first and the last port, such as (15100, 15131)")
    first, last = map(_count, words)
    if not 1024 <= first <= last <= 65535:
        raise ValueError("expected 1024 <= first <= last <= 65535")
    return first, last


def parse_ucx_settings(value: object) -> dict[str, str]:
    """`UCXSettings` at run time."""
    if not isinstance(value, Mapping):
        raise ValueError("expected names to values, such as {'TLS': 'tcp'}")
    held = {}
    for name, setting in value.items():
        if not isinstance(name, str) or not isinstance(setting, str | int | float):
            raise ValueError(f"{name!r}: {setting!r} is not a name and a text, number or boolean")
        held[name.upper().removeprefix("UCX_")] = "ny"[setting] if isinstance(setting, bool) else str(setting)
    return held


def _optional(parse: Parse) -> Parse:
    return lambda value: None if value is None else parse(value)


def _one_of(words: tuple[object, ...], value: object) -> object:
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"expected one of {', '.join(map(repr, words))}")
    return value


def _instance_of(classes: tuple[type, ...], value: object) -> object:
    if not isinstance(value, classes):
        names = " or ".join(one.__name__ for one in classes if one is not NoneType)
        raise ValueError(f"expected {names}")
    return value


class _Field(Protocol[GotT_co, GivenT_contra]):
    """A field whose constructor takes more types than it then holds, as type checkers understand it."""

    def __get__(self, instance: object, owner: type) -> GotT_co: ...
    def __set__(self, instance: object, value: GivenT_contra) -> None: ...


_NAME: Final = partial(
    _matching,
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
    "letters, digits, '.', '_' and '-', 128 at most, a letter or digit first",
)

Count = Annotated[int, _count]
OptionalCount = Annotated[int | None, _optional(_count)]
Bytes = Annotated[_Field[int, int | str], parse_bytes]
OptionalBytes = Annotated[_Field[int | None, int | str | None], _optional(parse_bytes)]
Seconds = Annotated[_Field[float, float | str], parse_duration]
Folder = Annotated[_Field[str, str | os.PathLike[str]], _folder]
Name = Annotated[str, _NAME]
OptionalName = Annotated[str | None, _optional(_NAME)]
OptionalText = Annotated[str | None, _optional(partial(_matching, r"(?s:.)+", "text that is not empty"))]
OptionalToken = Annotated[_Field[Secret | None, Secret | bytes | str | None], parse_token]
Ports = Annotated[_Field[int | tuple[int, ...], int | Sequence[int]], _ports]
OptionalPortRange = Annotated[_Field[tuple[int, int] | None, Sequence[int] | str | None], _optional(_port_range)]
UCXSettings = Annotated[_Field[Mapping[str, str], Mapping[str, str | int | float | bool]], parse_ucx_settings]


def kind_of(hint: Any) -> Parse:  # `Any`: a type expression has no type of its own
    """The kind that an annotation, evaluated at run time, stands for."""
    if get_origin(hint) is Annotated:  # a kind of the table
        parse: Parse = hint.__metadata__[0]
        return parse
    if hint is bool:
        return _boolean
    if get_origin(hint) is Literal:
        return partial(_one_of, get_args(hint))
    return partial(_instance_of, get_args(hint) or (hint,))
