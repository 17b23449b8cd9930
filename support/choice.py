"""Cases that `make check` has and `make test` does without."""

from collections.abc import Iterable
from typing import Any

import pytest


def checked(value: Any) -> Any:
    """A value of a parameter, or a tuple of several parameters, that waits for `make check`."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.check)


def every_second(values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, of which every second one waits for `make check`."""
    return [checked(value) if index % 2 else value for index, value in enumerate(values)]
