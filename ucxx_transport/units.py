"""Values as people write them: sizes and durations, `"512MiB"` and `"250ms"`, to numbers and back; kinds of settings.

A bare prefix is binary (`4k` is 4096), as it is for UCX; `iB` says so, and `KB` `MB` `GB` are the decimal ones.

A kind is the annotation of a setting: a function from what was given, maybe text, to what is held, which raises
ValueError that says what it expected. `Optional...` of a kind is one that may be unset.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import NoneType
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar, cast, get_args, get_origin

MAX_PORTS: Final = 64  # as many as a segment's published address holds

Parse = Callable[[Any], object]
GotT_co = TypeVar("GotT_co", covariant=True)
GivenT_contra = TypeVar("GivenT_contra", contravariant=True)

_TEXT = re.compile(r"\s*([0-9]{1,400}(?:\.[0-9]{1,400})?(?:e[+-]?[0-9]{1,3})?)\s*([a-zµμ]*)\s*", re.IGNORECASE)

_BINARY = {letter: 1024**power for power, letter in enumerate("kmgtp", start=1)}
_BYTE_UNITS: Final[Mapping[str, int]] = (
    {"": 1, "b": 1}
    | _BINARY
    | {f"{letter}ib": size for letter, size in _BINARY.items()}
    | {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)}
)
_BOOLEANS: Final = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0"), False),
}
_A_SIZE: Final = "a size, for example 4096, '64KiB' or '512MiB'"
_A_DURATION: Final = "a finite duration, for example 5, '5s', '250ms' or '2m'"
_SECOND: Final = 10**9
_NANOSECONDS: Final[Mapping[str, int]] = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": _SECOND,
    "": _SECOND,
    "m": 60 * _SECOND,
    "min": 60 * _SECOND,
    "h": 3600 * _SECOND,
}


def parse_bytes(value: object) -> int:
    """A size in bytes from a number, or text such as `"512MiB"`; a ValueError that says what would be one."""
    if not isinstance(value, str):
        with suppress(ValueError):
            return _count(value)
        raise ValueError(f"expected {_A_SIZE}")
    size = _scaled(value, _BYTE_UNITS, f"expected {_A_SIZE}", "use B, KiB, MiB, GiB or TiB (or kB, MB, GB, TB)")
    if isinstance(size, float):
        size = round(size, 2)  # of "1.1kB" more than its whole bytes are rounding
        if not size.is_integer():
            raise ValueError(f"expected a whole number of bytes, not {value!r}")
    return int(size)


def parse_duration(value: object) -> float:
    """A duration in seconds from a number, or text such as `"250ms"`; a ValueError that says what would be one."""
    seconds = math.nan
    with suppress(OverflowError):
        if isinstance(value, str):
            seconds = _scaled(value, _NANOSECONDS, f"expected {_A_DURATION}", "use ns, us, ms, s, m or h") / _SECOND
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"expected {_A_DURATION}")
    if seconds < 0:
        raise ValueError("expected 0 seconds or more")
    return seconds


def format_bytes(nbytes: float) -> str:
    """A size for people, in binary units with three figures: `"512 MiB"`, `"7.72 KiB"`, `"999 B"`."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}" if abs(size) < 1000 else f"{size:.0f} {units[0]}"


def format_duration(seconds: float) -> str:
    """A duration for people with three figures: `"50 µs"`, `"250 ms"`, `"5 s"`, `"2.5 min"`."""
    if seconds == 0:
        return "0 s"
    for scale, unit in ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min")):
        limit = 60.0 if unit == "s" else 999.5
        if abs(seconds) / scale < limit:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def _scaled(text: str, units: Mapping[str, int], expected: str, known: str) -> float:
    """The number of a text times its unit; an int if it is written as one."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(expected)
    number, unit = match.groups()
    scale = units.get(unit.lower().replace("μ", "µ"))
    if scale is None:
        raise ValueError(f"unknown unit in {text!r}: {known}")
    return (int(number) if number.isdecimal() else float(number)) * scale


class Secret:
    """Bytes that no `repr`, log line or traceback shows."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        return self._value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)


def _count(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,20}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    with suppress(TypeError):  # of an array, too, though it has an `__index__`
        if not isinstance(value, bool):
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


def parse_token(value: object) -> Secret:
    """`OptionalToken` at run time."""
    if isinstance(value, Secret):
        return value
    if not isinstance(value, str | bytes):
        raise ValueError("expected bytes or text")
    if not value:
        raise ValueError("an empty token protects nothing; leave the setting out to run without one")
    return Secret(value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value)


def parse_store_url(value: object) -> str:
    """`OptionalStoreURL` at run time; `membership.store_url` reads the rest of it."""
    if not isinstance(value, str) or "://" not in value:
        raise ValueError("expected a URL: local://, local:///abs/path or etcd://host:2379")
    if "@" in value and not value.startswith("local:"):
        raise ValueError("it has a user or a password in it: they go into the settings store.user and store.password")
    return value


def parse_ports(value: object) -> int | tuple[int, ...]:
    """`Ports` at run time."""
    if isinstance(value, str) and {"[", ","} & {*value}:
        value = value.strip().strip("[]").split(",")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        ports = tuple(_count(port) for port in value)
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ValueError(f"expected 1 to {MAX_PORTS} port numbers")
        if wrong := [port for port in ports if not 0 <= port <= 65535]:
            raise ValueError(f"{wrong[0]} is not a port number (0 to 65535, 0 for any free one)")
        if any(port and ports.count(port) > 1 for port in ports):
            raise ValueError("expected each port number once")
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
            raise ValueError(f"expected names to text, numbers or booleans, not {name!r} to {setting!r}")
        held[name.upper().removeprefix("UCX_")] = "ny"[setting] if isinstance(setting, bool) else str(setting)
    return held


def _one_of(words: tuple[object, ...], value: object) -> object:
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"expected one of {', '.join(map(repr, words))}")
    return value


def _instance_of(classes: tuple[type, ...], value: object) -> object:
    if not isinstance(value, classes):
        raise ValueError(f"expected {' or '.join(one.__name__ for one in classes)}")
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
OptionalCount = Annotated[int | None, _count]
Bytes = Annotated[_Field[int, int | str], parse_bytes]
OptionalBytes = Annotated[_Field[int | None, int | str | None], parse_bytes]
Seconds = Annotated[_Field[float, float | str], parse_duration]
Folder = Annotated[_Field[str, str | os.PathLike[str]], _folder]
Name = Annotated[str, _NAME]
OptionalName = Annotated[str | None, _NAME]
OptionalText = Annotated[str | None, partial(_matching, r"(?s:.)+", "text that is not empty")]
OptionalHost = Annotated[str | None, partial(_matching, r"\S{1,255}", "an address, or the name of a host")]
OptionalToken = Annotated[_Field[Secret | None, Secret | bytes | str | None], parse_token]
OptionalStoreURL = Annotated[str | None, parse_store_url]
Ports = Annotated[_Field[int | tuple[int, ...], int | Sequence[int]], parse_ports]
OptionalPortRange = Annotated[_Field[tuple[int, int] | None, Sequence[int] | str | None], _port_range]
UCXSettings = Annotated[_Field[Mapping[str, str], Mapping[str, str | int | float | bool]], parse_ucx_settings]


def kind_of(hint: Any) -> Parse:  # `Any`: a type expression has no type of its own
    """The kind that an annotation, evaluated at run time, stands for; any class is one of its instances."""
    if get_origin(hint) is Annotated:
        return cast("Parse", hint.__metadata__[0])
    if hint is bool:
        return _boolean
    if get_origin(hint) is Literal:
        return partial(_one_of, get_args(hint))
    return partial(_instance_of, tuple(one for one in get_args(hint) or (hint,) if one is not NoneType))
