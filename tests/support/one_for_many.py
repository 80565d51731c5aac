"""What a caller may give by mistake where several records or references are wanted."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

from ucxx_transport.schema.episode_record import EpisodeRecord

__all__ = ["one_for_many"]


class _Rollout(NamedTuple):
    """One rollout that is iterable by itself."""

    prompt: str
    output: object


def one_for_many(record: EpisodeRecord) -> list[Any]:
    """One thing in the place of several, of every kind; a record of a payload among them, in all its forms."""
    assert record.ref is not None
    form = record.to_dict()
    text = json.dumps(form)
    records = [record, form, text, text.encode(), bytearray(text.encode()), SimpleNamespace(output=form)]
    references = [record.ref, record.ref.to_dict(), record.ref.to_bytes(), memoryview(record.ref.to_bytes())]
    return [
        *records,
        *references,
        _Rollout("…", form),
        SimpleNamespace(completion=text),
        "abc",
        b"",
        {},
        None,
        3,
        object(),
    ]
