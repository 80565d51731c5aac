"""Where settings come from: keyword arguments over the environment over `./ucxx_transport.toml`.

| source                          | example                                  |
|---------------------------------|------------------------------------------|
| keyword argument                | `ServerConfig(ports=8)`                  |
| `UCXX_TRANSPORT_SECTION__FIELD` | `UCXX_TRANSPORT_SERVER__PORTS=8`         |
| a key of a mapping field        | `UCXX_TRANSPORT_SERVER__UCX__TLS=tcp`    |
| `./ucxx_transport.toml`         | `[server]`, `ports = 8`                  |
| a short name                    | `UCXX_TRANSPORT_PUBLISH_TIMEOUT_S=60`    |

Mapping fields are merged key by key, every other value is replaced as a whole. A name that is unknown in any section is
an error wherever it stands: a misspelt setting never passes in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ucxx_transport.errors import ConfigError

ENV_PREFIX: Final = "UCXX_TRANSPORT_"
TOML_NAME: Final = "ucxx_transport.toml"

KNOWN: Final[dict[str, dict[str, bool]]] = {}
"""Section to its settings that may stand in the environment or in TOML, and whether each is a mapping."""

_SHORT_NAMES: Final = {"PUBLISH_TIMEOUT_S": "PUBLISHER__PUBLISH_TIMEOUT_S"}


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it stood in its source, and the source in words: `environment UCXX_TRANSPORT_SERVER__PORTS`."""

    value: object
    source: str


def gather(section: str, arguments: Mapping[str, object]) -> dict[str, Given]:
    """What the three sources say about `section`, the stronger one winning; not validated.

    Raises:
        ConfigError: an unknown name in any source, or a TOML file that cannot be read.
    """
    found: dict[str, Given] = {}
    in_code = [(name, Given(value, "keyword argument")) for name, value in arguments.items()]
    for name, given in (*_from_toml(section), *_from_environment(section), *in_code):
        before = found.get(name)
        if before is not None and isinstance(before.value, Mapping) and isinstance(given.value, Mapping):
            sources = dict.fromkeys([*before.source.split(", "), given.source])
            found[name] = Given({**before.value, **given.value}, ", ".join(sources))
        else:
            found[name] = given
    return found


def unknown_name(what: str, name: str, choices: Iterable[str], **facts: object) -> ConfigError:
    """The error for a name that is not in `choices`, with the nearest one as a suggestion."""
    from difflib import get_close_matches

    ordered = sorted(choices)
    near = get_close_matches(name.lower(), ordered, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ordered)}"
    return ConfigError(f"Unknown {what} {name!r}; {remedy}", field=name, **facts)


def _from_environment(section: str) -> Iterator[tuple[str, Given]]:
    # Iterating decodes each name once (0.3 µs); the values of foreign variables are never looked at.
    # Sorted: `SERVER__UCX` comes before `SERVER__UCX__TLS`, in whatever order the environment has them.
    for variable in sorted(name for name in os.environ if name.startswith(ENV_PREFIX)):
        words = variable.removeprefix(ENV_PREFIX)
        own_section, field, key = (*_SHORT_NAMES.get(words, words).split("__", 2), "", "")[:3]
        own_section, field, source = own_section.lower(), field.lower(), f"environment {variable}"
        _check_names(own_section, field, source)
        if own_section != section:
            continue
        text = os.environ[variable]
        if KNOWN[section][field]:
            yield field, Given({key: text} if key else _json_object(text, field, source), source)
        elif key:
            raise ConfigError(f"{variable}: {section}.{field} has no parts; drop '__{key}'", field=field)
        else:
            yield field, Given(text, source)


def _json_object(text: str, field: str, source: str) -> Mapping[str, object]:
    import json

    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{field} from {source} is not JSON: {error}", field=field, value=text) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{field} from {source} must be a JSON object, as {{'TLS': 'tcp'}}", field=field, value=text)
    return value


def _from_toml(section: str) -> Iterator[tuple[str, Given]]:
    document = _toml_document()
    for own_section, table in document.items():
        if not isinstance(table, dict):
            sections = ", ".join(f"[{name}]" for name in sorted(KNOWN))
            raise ConfigError(f"{TOML_NAME}: {own_section!r} stands outside a section; use one of {sections}")
        _check_names(own_section, None, TOML_NAME)
        for name in table:
            _check_names(own_section, name, TOML_NAME)
        if own_section == section:
            yield from ((name, Given(value, f"{TOML_NAME} [{section}]")) for name, value in table.items())


def _check_names(section: str, field: str | None, source: str) -> None:
    if section not in KNOWN:
        raise unknown_name("settings section", section, KNOWN, source=source)
    if field is not None and field not in KNOWN[section]:
        raise unknown_name(f"setting in [{section}]", field, KNOWN[section], source=source)


_Stamp = tuple[int, int, int, int]
_cache: tuple[_Stamp, dict[str, object]] | None = None


def _toml_document() -> Mapping[str, object]:
    """The parsed file of the working directory; parsed again only when it is another file or has changed."""
    global _cache  # noqa: PLW0603 - one file, one parse of it a process
    try:
        status = os.stat(TOML_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    stamp = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if _cache is not None and _cache[0] == stamp:
        return _cache[1]
    import tomllib

    try:
        with open(TOML_NAME, "rb") as file:
            document = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{os.path.abspath(TOML_NAME)} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{os.path.abspath(TOML_NAME)} cannot be read: {error}") from error
    _cache = (stamp, document)
    return document
