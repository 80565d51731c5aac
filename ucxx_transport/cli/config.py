"""`ucxx-transport config`: the settings a program started here would get, and where each comes from."""

from __future__ import annotations

import os

from ucxx_transport.cli.output import AsJson, console, print_json
from ucxx_transport.config import ClientConfig, PublisherConfig, ServerConfig, StoreConfig
from ucxx_transport.settings.fields import Secret
from ucxx_transport.settings.section import effective
from ucxx_transport.settings.sources import ENV_PREFIX, KNOWN, TOML_NAME


def config(*, as_json: AsJson = False) -> None:
    """Show every setting, its value and its source; what is wrong with them is an error here too."""
    for checked in (ServerConfig, ClientConfig, StoreConfig, PublisherConfig):
        checked()  # a ring's is often complete in code alone
    settings = {name: effective(name) for name in KNOWN}
    file = os.path.abspath(TOML_NAME) if os.path.exists(TOML_NAME) else None
    if as_json:
        sections = {
            name: {
                field: {"value": _shown(one.value), "source": one.source, "description": one.rule.description}
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
            table.add_row(f"{name}.{field}", str(_shown(one.value)), one.source, one.rule.description)
        table.add_section()
    console().print(table)


def _shown(value: object) -> object:
    return "(set, hidden)" if isinstance(value, Secret) else value
