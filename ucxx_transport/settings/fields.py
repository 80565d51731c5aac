"""The kinds of value a setting holds: what is accepted for each, and what it is turned into.

| kind            | accepted                                   | held                                    |
|-----------------|--------------------------------------------|-----------------------------------------|
| `Count`         | a whole number, also as text               | `int`                                   |
| `Bytes`         | a number or text such as `512MiB`          | `int`                                   |
| `Seconds`       | a number or text such as `250ms`           | `float`, finite                         |
| `OptionalToken` | `bytes`, or text, which is taken as UTF-8  | `SecretBytes`, which no `repr` shows    |
| `Ports`         | a count, or port numbers (`5001,5002`)     | `int`, or a tuple of `int`              |
| `UCXSettings`   | names to values, with or without `UCX_`    | names without `UCX_` to text            |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeVar

from pydantic import BeforeValidator, Field, SecretBytes

from ucxx_transport.units import parse_bytes, parse_duration

__all__ = [
    "MAX_PORTS",
    "Bytes",
    "Count",
    "OptionalBytes",
    "OptionalToken",
    "Ports",
    "Seconds",
    "UCXSettings",
    "setting",
]

MAX_PORTS: Final = 64
"""As many ports as a segment's published address holds."""


def setting(
    *,
    default: object = ...,
    default_factory: Callable[[], object] | None = None,
    description: str,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    pattern: str | None = None,
) -> Any:  # `Any` as every field specifier returns: the value stands for a field of whatever type it is assigned to
    """A field of a section: its default, its meaning in words, and the bounds that hold for it."""
    rules: dict[str, Any] = {
        name: value
        for name, value in (
            ("gt", gt),
            ("ge", ge),
            ("le", le),
            ("min_length", min_length),
            ("max_length", max_length),
            ("pattern", pattern),
        )
        if value is not None
    }
    if default_factory is not None:
        return Field(default_factory=default_factory, description=description, **rules)
    return Field(default=default, description=description, **rules)


def _token(value: object) -> object:
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes) and not value:
        raise ValueError("an empty token protects nothing; leave the setting out to run without one")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a whole number")  # noqa: TRY004 - what pydantic collects and words
    return value


def _ports(value: object) -> object:
    if isinstance(value, str):
        words = [word.strip() for word in value.strip().strip("[]").split(",")]
        value = int(words[0]) if len(words) == 1 and "[" not in value else [int(word) for word in words]
    if isinstance(value, bool):
        raise ValueError("expected a number of ports, or a list of them")  # noqa: TRY004 - as above
    if isinstance(value, int) and not 1 <= value <= MAX_PORTS:
        raise ValueError(f"expected 1 to {MAX_PORTS} ports; a port number goes in a list: [{value}]")
    if isinstance(value, Sequence):
        _check_port_list(value)
        return tuple(value)
    return value


def _check_port_list(ports: Sequence[object]) -> None:
    if not 1 <= len(ports) <= MAX_PORTS:
        raise ValueError(f"expected 1 to {MAX_PORTS} port numbers")
    for port in ports:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ValueError(f"{port!r} is not a port number (0 to 65535, 0 for any free one)")
    named = [port for port in ports if port]
    if len(named) != len(set(named)):
        raise ValueError("a port number stands there twice")


def _ucx_settings(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    words = {True: "y", False: "n"}
    return {
        str(key).upper().removeprefix("UCX_"): words[setting] if isinstance(setting, bool) else str(setting)
        for key, setting in value.items()
    }


if TYPE_CHECKING:
    GotT = TypeVar("GotT")
    GivenT_contra = TypeVar("GivenT_contra", contravariant=True)

    class _Field(Generic[GotT, GivenT_contra]):
        """A field whose constructor takes more types than the field then holds, as type checkers can be told it."""

        def __get__(self, instance: object, owner: type) -> GotT: ...
        def __set__(self, instance: object, value: GivenT_contra) -> None: ...

    Count = int
    Bytes = _Field[int, int | str]
    OptionalBytes = _Field[int | None, int | str | None]
    Seconds = _Field[float, float | str]
    OptionalToken = _Field[SecretBytes | None, SecretBytes | bytes | str | None]
    Ports = _Field[int | tuple[int, ...], int | Sequence[int]]
    UCXSettings = _Field[Mapping[str, str], Mapping[str, str | int | float | bool]]
else:
    Count = Annotated[int, BeforeValidator(_whole)]
    Bytes = Annotated[int, BeforeValidator(parse_bytes)]
    OptionalBytes = Bytes | None
    Seconds = Annotated[float, BeforeValidator(parse_duration)]
    OptionalToken = Annotated[SecretBytes, BeforeValidator(_token)] | None
    Ports = Annotated[int | tuple[int, ...], BeforeValidator(_ports)]
    UCXSettings = Annotated[Mapping[str, str], BeforeValidator(_ucx_settings)]
