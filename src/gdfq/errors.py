"""Errors and warnings. Each message says what must hold, what came, and what to do.

GdfqError                   a run fails                     exit code 1
  UsageError                an input cannot be used         exit code 2
GdfqWarning                 the user should know it; the run continues
  GdfqDeprecationWarning    an old spelling was used
"""

import re
import warnings

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def first_line(error: BaseException) -> str:
    """The first line of another library's error, without colours of terminals."""
    lines = _TERMINAL_CODES.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class GdfqError(Exception):
    """A run failed (the command line exits with 1)."""


class UsageError(GdfqError, ValueError):
    """An input cannot be used as given (the command line exits with 2)."""


class GdfqWarning(UserWarning):
    """The user should know something; the run continues."""


class GdfqDeprecationWarning(GdfqWarning):
    """An old spelling was used. It works for two minor releases after it was renamed."""


def warn_renamed(old: str, new: str) -> None:
    """Warn that an option has another name now."""
    message = f"{old} is now called {new}; the old spelling will be removed in version 0.4."
    warnings.warn(message, GdfqDeprecationWarning, stacklevel=3)
