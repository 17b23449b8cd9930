"""The two errors a caller can expect. Each message says what must hold, what came, what to do."""


class GdfqError(Exception):
    """A run that could not go on (the command line exits with 1)."""


class UsageError(GdfqError, ValueError):
    """An input that cannot be used as given (the command line exits with 2)."""
