"""An error's message and facts reach another process."""

from __future__ import annotations

import pickle
from copy import copy
from typing import Any, ClassVar

from tests.support.rows import row
from ucxx_transport import errors


def test_an_error_survives_a_trip_through_a_process_pool() -> None:
    named: list[Any] = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in named if issubclass(kind, errors.TransportError)]
    for kind in kinds:
        for facts in ({}, {"slot": 3, "host": "10.0.0.1"}):
            with row(kind=kind, facts=facts):
                error = kind("the message", **facts)
                found = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
                assert (type(found), str(found), found.message, found.facts) == (kind, str(error), "the message", facts)
    assert len(kinds) > 15


def test_what_is_noted_of_a_copied_error_is_noted_of_no_other() -> None:
    error = errors.PeerLostError("gone", host="10.0.0.1")
    copies = [copy(error), copy(error)]
    for number, one in enumerate(copies):
        one.facts["slot"] = number
    assert [one.facts for one in copies] == [{"host": "10.0.0.1", "slot": number} for number in range(2)]
    assert (type(copies[0]), copies[0].message, error.facts) == (errors.PeerLostError, "gone", {"host": "10.0.0.1"})


def test_a_subclass_of_an_application_s_own_may_have_another_base_that_looks_at_subclasses() -> None:
    class Noting:
        noted: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, code: str, **others: Any) -> None:
            super().__init_subclass__(**others)
            cls.noted.append(code)

    class Lost(errors.PeerLostError, Noting, code="lost"):
        pass

    class Final(errors.PeerLostError, Noting, code="final", retryable=False):
        pass

    assert (Lost.retryable, Final.retryable, Noting.noted) == (True, False, ["lost", "final"])
