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
from typing import Final

_TEXT = re.compile(r"\s*([0-9]{1,400})(?:\.([0-9]{1,400}))?(?:e([+-]?[0-9]{1,3}))?\s*([a-zµμ]*)\s*", re.IGNORECASE)

_BINARY = {letter: 1024**power for power, letter in enumerate("kmgtp", start=1)}
_BYTE_UNITS: Final[Mapping[str, int]] = (
    {"": 1, "b": 1}
    | _BINARY
    | {f"{letter}ib": size for letter, size in _BINARY.items()}
    | {f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)}
)
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
    """A size in bytes from a number, or text such as `"512MiB"` with a unit of the table above.

    Raises:
        ValueError: not a size, or not a whole number of bytes; the message says what would be.
    """
    if isinstance(value, str):
        numerator, denominator, unit = _split(value, "a size, for example 4096, '64KiB' or '512MiB'")
        scale = _BYTE_UNITS.get(unit)
        if scale is None:
            raise ValueError(f"unknown unit in {value!r}: use B, KiB, MiB, GiB or TiB (or kB, MB, GB, TB)")
        size, rest = divmod(numerator * scale, denominator)
        if rest:
            raise ValueError(f"{value!r} is not a whole number of bytes")
        return size
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("expected a size, for example 4096, '64KiB' or '512MiB'")


def parse_duration(value: object) -> float:
    """A duration in seconds from a number, or text such as `"250ms"` with a unit of the table above.

    Raises:
        ValueError: not a finite duration; the message says what would be.
    """
    seconds = math.nan
    try:
        if isinstance(value, str):
            numerator, denominator, unit = _split(value, "a duration, for example 5, '5s', '250ms' or '2m'")
            scale = _NANOSECONDS.get(unit)
            if scale is None:
                raise ValueError(f"unknown unit in {value!r}: use ns, us, ms, s, m or h")
            seconds = numerator * scale / (denominator * 10**9)  # of integers: rounded once
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
    except OverflowError:
        pass
    if not math.isfinite(seconds):
        raise ValueError("expected a finite duration, for example 5, '5s', '250ms' or '2m'")
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


def _split(text: str, expected: str) -> tuple[int, int, str]:
    """The number as a fraction, and the unit."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected {expected}")
    whole, decimals, exponent, unit = match.groups(default="")
    power = int(exponent or 0) - len(decimals)
    return int(whole + decimals) * 10 ** max(power, 0), 10 ** max(-power, 0), unit.lower().replace("μ", "µ")
