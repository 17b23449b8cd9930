"""Cases that `make check` has and `make test` does without."""

from typing import Any

import pytest


def checked(value: Any) -> Any:
    """A value of a parameter, or a tuple of several parameters, that waits for `make check`."""
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.check)
