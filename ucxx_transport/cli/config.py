"""`ucxx-transport config`: the settings a program started here would get, and where each comes from."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from pydantic import SecretBytes

from ucxx_transport.cli.output import AsJson, console, print_json
from ucxx_transport.config import ClientConfig, PublisherConfig, RingConfig, ServerConfig, StoreConfig
from ucxx_transport.settings.section import outside_values
from ucxx_transport.settings.sources import ENV_PREFIX, TOML_NAME

__all__ = ["config"]


def config(*, as_json: AsJson = False) -> None:
    """Show every setting, its value and its source; what is wrong with them is an error here too."""
    sections = {
        "ring": _described(_ring_as_set()),
        "server": _described(ServerConfig()),
        "client": _described(ClientConfig()),
        "store": _described(StoreConfig()),
        "publisher": _described(PublisherConfig()),
    }
    for name, settings in sections.items():
        for field, origin in outside_values(name).origins.items():
            settings[field]["source"] = origin
    if as_json:
        print_json({"file": _file_in_use(), **sections})
        return
    from rich.table import Table

    table = Table(title=f"{ENV_PREFIX}*  over  {_file_in_use() or f'./{TOML_NAME} (none here)'}", title_justify="left")
    for column in ("setting", "value", "source", "meaning"):
        table.add_column(column)
    for name, settings in sections.items():
        for field, facts in settings.items():
            table.add_row(f"{name}.{field}", str(facts["value"]), str(facts["source"]), str(facts["description"]))
        table.add_section()
    console().print(table)


def _ring_as_set() -> RingConfig:
    """The ring's settings, though what a slot holds is often said in code alone."""
    if "slot_bytes" in outside_values("ring").values:
        return RingConfig()
    # Any size makes it complete; it is taken out again.
    settings = RingConfig(slot_bytes=1)
    object.__setattr__(settings, "slot_bytes", None)
    return settings


def _described(
    settings: RingConfig | ServerConfig | ClientConfig | StoreConfig | PublisherConfig,
) -> dict[str, dict[str, Any]]:
    return {
        field.name: {
            "value": _shown(getattr(settings, field.name)),
            "source": "default",
            "description": getattr(field.default, "description", ""),
        }
        for field in dataclasses.fields(settings)
    }


def _shown(value: object) -> object:
    return "(set, hidden)" if isinstance(value, SecretBytes) else value


def _file_in_use() -> str | None:
    return os.path.abspath(TOML_NAME) if os.path.exists(TOML_NAME) else None
