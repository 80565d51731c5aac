"""Tables as one test: a loop whose failure names its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["row"]


@contextmanager
def row(**facts: object) -> Iterator[None]:
    """Whatever is raised in the block carries the row that it was raised for.

    >>> with row(nbytes=3):
    ...     assert 3 == 4
    Traceback (most recent call last):
    AssertionError
    row: nbytes=3
    """
    try:
        yield
    except BaseException as error:
        error.add_note(f"row: {', '.join(f'{name}={_shortened(value)}' for name, value in facts.items())}")
        raise


def _shortened(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
