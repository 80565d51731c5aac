"""An error's message and facts reach another process."""

from __future__ import annotations

import pickle
from typing import Any

from tests.support.rows import row
from ucxx_transport import errors


def test_an_error_survives_a_trip_through_a_process_pool() -> None:
    kinds: list[Any] = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        for facts in ({}, {"slot": 3, "host": "10.0.0.1"}):
            with row(kind=kind, facts=facts):
                error = kind("the message", **facts)
                found = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
                assert (type(found), str(found), found.message, found.facts) == (kind, str(error), "the message", facts)
    assert len(kinds) > 15
