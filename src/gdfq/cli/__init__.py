"""The command line. `main` runs it and returns its exit code."""

from gdfq.cli.app import main

__all__ = ["main"]
