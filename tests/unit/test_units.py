from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.rows import row
from ucxx_transport.units import format_bytes, format_duration, parse_bytes, parse_duration


def test_sizes_are_read_as_people_write_them() -> None:
    rows: list[tuple[object, int]] = [
        ("512MiB", 512 << 20),
        ("512M", 512 << 20),
        ("4 KiB", 4096),
        ("4k", 4096),
        (" 1.5 GiB ", 3 << 29),
        ("1GB", 10**9),
        ("1kB", 1000),
        ("4096", 4096),
        ("4096B", 4096),
        ("1e6", 10**6),
        (4096, 4096),
        (4096.0, 4096),
        ("0", 0),
        (10**400, 10**400),
    ]
    for text, nbytes in rows:
        with row(text=text, nbytes=nbytes):
            assert parse_bytes(text) == nbytes


def test_what_is_no_size_is_refused() -> None:
    rows: list[object] = [
        "",
        "MiB",
        "-1",
        "1XB",
        "1.5",
        "1.5B",
        "0x10",
        "1_000",
        "ten",
        True,
        None,
        1.5,
        math.inf,
        math.nan,
    ]
    for text in rows:
        with row(text=text), pytest.raises(ValueError, match=r"size|unit|whole"):
            parse_bytes(text)


def test_durations_are_read_as_people_write_them() -> None:
    rows: list[tuple[object, float]] = [
        ("5s", 5.0),
        ("5", 5.0),
        ("250ms", 0.25),
        ("50us", 50e-6),
        ("50µs", 50e-6),
        ("50μs", 50e-6),
        ("20ns", 20e-9),
        ("2m", 120.0),
        ("2 min", 120.0),
        ("1h", 3600.0),
        ("1.5s", 1.5),
        (5, 5.0),
        (0.25, 0.25),
    ]
    for text, seconds in rows:
        with row(text=text, seconds=seconds):
            assert parse_duration(text) == seconds


def test_what_is_no_duration_is_refused() -> None:
    rows: list[object] = [
        "",
        "s",
        "-1s",
        "5 years",
        "inf",
        "nan",
        "1e400",
        10**400,
        True,
        None,
        math.inf,
        math.nan,
        [5],
    ]
    for text in rows:
        with row(text=text), pytest.raises(ValueError, match=r"duration|unit"):
            parse_duration(text)


def test_sizes_are_written_with_three_figures() -> None:
    rows: list[tuple[int, str]] = [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1 << 20, "1 MiB"),
        (512 << 20, "512 MiB"),
        (7 << 50, "7168 TiB"),
    ]
    for nbytes, text in rows:
        with row(nbytes=nbytes, text=text):
            assert format_bytes(nbytes) == text


def test_durations_are_written_with_three_figures() -> None:
    rows: list[tuple[float, str]] = [
        (0, "0 s"),
        (20e-9, "20 ns"),
        (50e-6, "50 µs"),
        (0.25, "250 ms"),
        (0.9999, "1 s"),
        (59.9, "59.9 s"),
        (150, "2.5 min"),
        (7200, "120 min"),
        (360_000, "100 h"),
    ]
    for seconds, text in rows:
        with row(seconds=seconds, text=text):
            assert format_duration(seconds) == text


@given(st.integers(0, 1 << 60))
def test_every_whole_number_of_bytes_reads_back(nbytes: int) -> None:
    assert parse_bytes(str(nbytes)) == nbytes


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_with_a_value_error(text: str) -> None:
    for parse in (parse_bytes, parse_duration):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert value >= 0
