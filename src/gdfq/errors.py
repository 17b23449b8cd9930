"""What a caller can expect to go wrong. Each message says what must hold, what came, what to do."""


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
