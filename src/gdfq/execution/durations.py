"""Durations as text: "5m", "90s", "1h", "2m30s"."""

import math
import re

from gdfq.errors import UsageError

_UNIT = r"(?:([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?){})?"
_DURATION = re.compile(r"".join(_UNIT.format(unit) for unit in ("h", "m", "s")))
_SECONDS = (3600, 60, 1)


def parse_seconds(text: str) -> float | None:
    """Return the seconds of a duration such as "90s", "5m" or "2m30s"; None for other text.

    A number without a unit is seconds.
    """
    text = "".join(text.lower().split())
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        text += "s"
    match = _DURATION.fullmatch(text)
    if match is None or not any(match.groups()):
        return None
    return sum(
        float(number or 0) * unit for number, unit in zip(match.groups(), _SECONDS, strict=True)
    )


def seconds_of(duration: str | float) -> float:
    """Return the seconds of a duration that a user gives.

    Args:
        duration: Seconds, or text such as "90s", "5m" or "2m30s".

    Raises:
        UsageError: It is no duration, or not positive.
    """
    seconds = parse_seconds(duration) if isinstance(duration, str) else duration
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not math.isfinite(seconds)
        or seconds <= 0
    ):
        raise UsageError(
            "a budget must be a positive time, such as 90s, 5m, 2m30s or 1h, or a number of "
            f"seconds; got {duration!r}."
        )
    return float(seconds)


def as_text(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
