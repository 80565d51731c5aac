"""docs/UCXX.md says what the code does, where the two can be compared."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from tests.support.state_diagrams import DIAGRAMS, PAGE, StateDiagram
from ucxx_transport import errors
from ucxx_transport.config import ClientConfig, PublisherConfig, RingConfig, ServerConfig, StoreConfig
from ucxx_transport.errors import TransportError
from ucxx_transport.wire.frames import Status


@pytest.mark.parametrize("diagram", DIAGRAMS, ids=[diagram.name for diagram in DIAGRAMS])
def test_a_state_diagram_is_that_of_its_table(diagram: StateDiagram) -> None:
    assert diagram.drawn() == diagram.draw()


def test_every_status_of_the_wire_has_its_row() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| ([A-Z_]+) +\|", page, re.MULTILINE))
    assert {status.name for status in Status} <= rows


def test_every_setting_the_page_names_exists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    sections = (RingConfig, ServerConfig, ClientConfig, StoreConfig, PublisherConfig)
    known = {spec.name for config in sections for spec in fields(config)}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)*_(?:s|bytes|attempts|connections|reads|endpoints))`", page))
    assert named, "the page names no setting: the pattern is wrong"
    assert named <= known


def test_the_table_of_errors_says_what_the_classes_say() -> None:
    assert errors.__doc__ is not None
    rows = re.findall(r"^\| `(\w+)` +\| (yes|no) +\|", errors.__doc__, re.MULTILINE)
    assert {name for name, _ in rows} == set(errors.__all__) - {"TransportError"}
    for name, retried in rows:
        cls = getattr(errors, name)
        assert issubclass(cls, TransportError)
        assert cls.retryable == (retried == "yes"), name


def test_every_test_the_page_names_for_an_invariant_exists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = PAGE.parents[1] / "tests"
    defined = {
        name for path in tests.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    assert len(named) >= 12
    assert named <= defined
