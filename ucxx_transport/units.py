"""Sizes and durations as people write them: `"512MiB"` and `"250ms"` to numbers, and back.

| text             | number        |
|------------------|---------------|
| `512MiB`, `512M` | 536 870 912   |
| `4 KiB`, `4k`    | 4 096         |
| `1GB`            | 1 000 000 000 |
| `4096`, `4096B`  | 4 096         |
| `5s`, `5`        | 5.0           |
| `250ms`          | 0.25          |
| `50us`, `50µs`   | 0.00005       |
| `2m`, `2min`     | 120.0         |

A bare prefix is binary (`4k` is 4096), as it is for UCX; `iB` says so, and `KB` `MB` `GB` are the decimal ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

__all__ = ["format_bytes", "format_duration", "parse_bytes", "parse_duration"]

_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,3})?)\s*([a-zµμ]*)\s*", re.IGNORECASE)

_BINARY = {letter: 1024**power for power, letter in enumerate("kmgtp", start=1)}
_BYTE_UNITS: Mapping[str, int] = MappingProxyType(
    {"": 1, "b": 1}
    | _BINARY
    | {f"{letter}ib": size for letter, size in _BINARY.items()}
    | {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)}
)
_SECOND_UNITS: Mapping[str, Fraction] = MappingProxyType(
    {
        "": Fraction(1),
        "s": Fraction(1),
        "ms": Fraction(1, 1000),
        "us": Fraction(1, 10**6),
        "µs": Fraction(1, 10**6),
        "ns": Fraction(1, 10**9),
        "m": Fraction(60),
        "min": Fraction(60),
        "h": Fraction(3600),
    }
)


def parse_bytes(value: object) -> int:
    """A size in bytes from a number or from text such as `"512MiB"`.

    Args:
        value: an int, a whole float, or text: a number and an optional unit (see the table above).

    Raises:
        ValueError: not a size, or not a whole number of bytes; the message says what would be.
    """
    if isinstance(value, str):
        number, unit = _split(value, "a size, for example 4096, '64KiB' or '512MiB'")
        scale = _BYTE_UNITS.get(unit)
        if scale is None:
            raise ValueError(f"unknown unit in {value!r}: use B, KiB, MiB, GiB or TiB (or kB, MB, GB, TB)")
        size = number * scale
        if size.denominator != 1:
            raise ValueError(f"{value!r} is not a whole number of bytes")
        return int(size)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise ValueError("expected a size, for example 4096, '64KiB' or '512MiB'")
    return int(value)


def parse_duration(value: object) -> float:
    """A duration in seconds from a number or from text such as `"250ms"`.

    Args:
        value: an int or float of seconds, or text: a number and an optional unit (see the table above).

    Raises:
        ValueError: not a finite duration; the message says what would be.
    """
    if isinstance(value, str):
        number, unit = _split(value, "a duration, for example 5, '5s', '250ms' or '2m'")
        scale = _SECOND_UNITS.get(unit)
        if scale is None:
            raise ValueError(f"unknown unit in {value!r}: use ns, us, ms, s, m or h")
        return float(number * scale)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("expected a finite duration, for example 5, '5s', '250ms' or '2m'")
    return float(value)


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


def _split(text: str, expected: str) -> tuple[Fraction, str]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected {expected}")
    return Fraction(match[1]), match[2].lower().replace("μ", "µ")
