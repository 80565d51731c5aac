"""The verbs about the installation: `version` says what is installed, `config` which settings a program here gets."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import typer

from ucxx_transport import __version__
from ucxx_transport.cli.output import AsJson, console, print_json


def version(*, as_json: AsJson = False) -> None:
    """Show the version of this package, of Python, ucxx and UCX."""
    found = {
        "ucxx_transport": __version__,
        "python": platform.python_version(),
        "ucxx": installed_version("ucxx-cu12", "ucxx-cu13", "ucxx"),
        "libucx": installed_version("libucx-cu12", "libucx-cu13", "libucx"),
    }
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(f"{name:15} {value or 'not installed'}")


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, or None; nothing is loaded."""
    for name in distributions:
        try:
            return version_of(name)
        except PackageNotFoundError:
            continue
    return None


def config(*, as_json: AsJson = False) -> None:
    """Show every setting, its value and its source; what is wrong with them is an error here too."""
    from ucxx_transport.config import ClientConfig, PublisherConfig, ServerConfig, StoreConfig
    from ucxx_transport.settings import ENV_PREFIX, SECTIONS, TOML_NAME, effective

    for checked in (ServerConfig, ClientConfig, StoreConfig, PublisherConfig):
        checked()  # a ring's is often complete in code alone
    settings = {name: effective(name) for name in SECTIONS}
    file = os.path.abspath(TOML_NAME) if os.path.exists(TOML_NAME) else None
    if as_json:
        sections = {
            name: {
                field: {
                    "value": _shown(one.value),
                    "source": one.source,
                    "description": SECTIONS[name][field].description,
                }
                for field, one in section.items()
            }
            for name, section in settings.items()
        }
        print_json({"file": file, **sections})
        return
    from rich.table import Table

    table = Table(title=f"{ENV_PREFIX}*  over  {file or f'./{TOML_NAME} (none here)'}", title_justify="left")
    for column in ("setting", "value", "source", "meaning"):
        table.add_column(column)
    for name, section in settings.items():
        for field, one in section.items():
            table.add_row(f"{name}.{field}", str(_shown(one.value)), one.source, SECTIONS[name][field].description)
        table.add_section()
    console().print(table)


def _shown(value: object) -> object:
    from ucxx_transport.units import Secret

    return "(set, hidden)" if isinstance(value, Secret) else value
