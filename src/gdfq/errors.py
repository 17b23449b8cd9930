"""What a caller can expect to go wrong. Each message says what must hold, what came, what to do."""

import warnings


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class GdfqError(Exception):
    """A run that could not go on (the command line exits with 1)."""


class UsageError(GdfqError, ValueError):
    """An input that cannot be used as given (the command line exits with 2)."""


class GdfqWarning(UserWarning):
    """Something a run got over, which its user should know."""


class GdfqDeprecationWarning(GdfqWarning):
    """An option that has another name now; the old spelling works for two minor releases."""


def warn_renamed(old: str, new: str) -> None:
    """Warn that an option has another name now."""
    message = f"{old} is now called {new}; the old spelling will be removed in version 0.4."
    warnings.warn(message, GdfqDeprecationWarning, stacklevel=3)
