"""Durations as text."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdfq.errors import UsageError
from gdfq.execution.durations import as_text, parse_seconds, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("5m", 300),
        ("1h", 3600),
        ("2m30s", 150),
        ("1h30m", 5400),
        ("1h2m3s", 3723),
        (" 2m 30s ", 150),
        ("5M", 300),
        ("0.5m", 30),
        ("45", 45),
        ("1.5", 1.5),
    ],
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "value",
    [
        *("", "m", "5x", "5min", "m5", "30s2m", "5m5m", "-5m", "1e3s", "nan", "inf", "five"),
        *("1:30", "0", "0s", "0h0m", "9" * 400),
        *(0, -1.0, math.nan, math.inf, True, None, [5]),
    ],
)
def test_what_is_no_positive_duration_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="positive time, such as 90s"):
        seconds_of(value)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_duration_is_the_sum_of_its_parts(hours: int, minutes: int, seconds: int) -> None:
    assert parse_seconds(f"{hours}h{minutes}m{seconds}s") == 3600 * hours + 60 * minutes + seconds


def test_duration_is_written_as_a_clock_shows_it() -> None:
    assert [as_text(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
