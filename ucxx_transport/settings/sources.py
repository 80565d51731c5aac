"""Where settings come from: keyword arguments over the environment over `./ucxx_transport.toml`.

| source                          | example                                  |
|---------------------------------|------------------------------------------|
| keyword argument                | `ServerConfig(ports=8)`                  |
| `UCXX_TRANSPORT_SECTION__FIELD` | `UCXX_TRANSPORT_SERVER__PORTS=8`         |
| a key of a mapping field        | `UCXX_TRANSPORT_SERVER__UCX__TLS=tcp`    |
| `./ucxx_transport.toml`         | `[server]`, `ports = 8`                  |
| a name of its own               | `UCXX_TRANSPORT_PUBLISH_TIMEOUT_S=60`    |

Mapping fields are merged key by key, every other value is replaced as a whole. A name that is unknown in any section is
an error wherever it stands: a misspelt setting never passes in silence.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ucxx_transport.errors import ConfigError

__all__ = ["ENV_PREFIX", "TOML_NAME", "SectionValues", "gather"]

ENV_PREFIX: Final = "UCXX_TRANSPORT_"
TOML_NAME: Final = "ucxx_transport.toml"

_SHORT_NAMES: Final = {"PUBLISH_TIMEOUT_S": "PUBLISHER__PUBLISH_TIMEOUT_S"}

KnownNames = Mapping[str, frozenset[str]]
"""The fields of every section that may stand in the environment or in TOML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionValues:
    """The raw values of one section and where each of them came from.

    Attributes:
        values: field name to the value as it stood in its source, not validated yet.
        origins: field name to its source in words, such as `environment UCXX_TRANSPORT_SERVER__PORTS`.
    """

    values: Mapping[str, object]
    origins: Mapping[str, str]


def gather(
    section: str, arguments: Mapping[str, object], *, known: KnownNames, mappings: frozenset[str]
) -> SectionValues:
    """What the three sources say about `section`, the stronger one winning.

    Args:
        section: one of `known`.
        arguments: the keyword arguments of the call.
        known: every section's field names, for the check of names.
        mappings: the fields of this section that are mappings, merged by key.

    Raises:
        ConfigError: an unknown name in any source, or a TOML file that cannot be read.
    """
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    layers = (_from_toml(section, known), _from_environment(section, known, mappings))
    for layer in (*layers, ((name, value, "keyword argument") for name, value in arguments.items())):
        for name, value, origin in layer:
            before = values.get(name)
            if name in mappings and isinstance(before, Mapping) and isinstance(value, Mapping):
                values[name] = {**before, **value}
                origins[name] = f"{origins[name]}, {origin}" if origins[name] != origin else origin
            else:
                values[name], origins[name] = value, origin
    return SectionValues(values=values, origins=origins)


def unknown_name(what: str, name: str, choices: Iterable[str], **facts: object) -> ConfigError:
    """The error for a name that is not in `choices`, with the nearest one as a suggestion."""
    ordered = sorted(choices)
    near = difflib.get_close_matches(name.lower(), ordered, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ordered)}"
    return ConfigError(f"Unknown {what} {name!r}; {remedy}", field=name, **facts)


Found = tuple[str, object, str]


def _from_environment(section: str, known: KnownNames, mappings: frozenset[str]) -> list[Found]:
    found: list[Found] = []
    # Iterating decodes each name once (0.3 µs); the values of foreign variables are never looked at.
    for variable in os.environ:
        if not variable.startswith(ENV_PREFIX):
            continue
        words = variable.removeprefix(ENV_PREFIX)
        own_section, name, *rest = [*_SHORT_NAMES.get(words, words).split("__", 2), ""][:3]
        _check_names(own_section.lower(), name.lower(), known, source=f"environment {variable}")
        if own_section.lower() != section:
            continue
        field, text, origin = name.lower(), os.environ[variable], f"environment {variable}"
        if field in mappings:
            found.append((field, _mapping_value(rest[0] if rest else "", text, field, origin), origin))
        elif rest and rest[0]:
            raise ConfigError(f"{variable}: {section}.{field} has no parts; drop '__{rest[0]}'", field=field)
        else:
            found.append((field, text, origin))
    # `SERVER__UCX` before `SERVER__UCX__TLS`, whatever the order of the environment.
    return sorted(found, key=lambda item: item[2])


def _mapping_value(key: str, text: str, field: str, origin: str) -> Mapping[str, object]:
    if key:
        return {key: text}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{field} from {origin} is not JSON: {error}", field=field, value=text) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{field} from {origin} must be a JSON object, as {{'TLS': 'tcp'}}", field=field, value=text)
    return value


def _from_toml(section: str, known: KnownNames) -> list[Found]:
    document = _toml_document()
    sections = ", ".join(f"[{name}]" for name in sorted(known))
    for own_section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{TOML_NAME}: {own_section!r} stands outside a section; use one of {sections}")
        _check_names(own_section, None, known, source=TOML_NAME)
        for name in table:
            _check_names(own_section, name, known, source=TOML_NAME)
    origin = f"{TOML_NAME} [{section}]"
    return [(name, value, origin) for name, value in document.get(section, {}).items()]


def _check_names(section: str, field: str | None, known: KnownNames, *, source: str) -> None:
    if section not in known:
        raise unknown_name("settings section", section, known, source=source)
    if field is not None and field not in known[section]:
        raise unknown_name(f"setting in [{section}]", field, known[section], source=source)


_Stamp = tuple[int, int, int, int]
_cache: tuple[_Stamp, dict[str, dict[str, object]]] | None = None


def _toml_document() -> dict[str, dict[str, object]]:
    """The parsed file of the working directory; parsed again only when it is another file or has changed."""
    global _cache  # noqa: PLW0603 - one file, one parse of it a process
    try:
        status = os.stat(TOML_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    stamp = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if _cache is not None and _cache[0] == stamp:
        return _cache[1]
    try:
        with open(TOML_NAME, "rb") as file:
            document = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{os.path.abspath(TOML_NAME)} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{os.path.abspath(TOML_NAME)} cannot be read: {error}") from error
    _cache = (stamp, document)
    return document
