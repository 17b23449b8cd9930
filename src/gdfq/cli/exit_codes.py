"""From what a command raises to what the user reads and the exit code.

0 success; 1 the run failed; 2 wrong usage; 130 interrupted; 128 + n stopped by signal n.
"""

import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from gdfq.errors import GdfqError, GdfqWarning, UsageError
from gdfq.execution.signals import StoppedError
from gdfq.version import __version__


def exit_code_of(command: Callable[[], object], words: Sequence[str] | None) -> int:
    """Run a command and return its exit code; errors are printed.

    Args:
        command: What to run; it may return an exit code.
        words: The words of the command line, for the advice how to resume.
    """
    try:
        code = command()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UsageError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        return 2
    except GdfqError as error:
        click.secho(f"failed: {error}", fg="red", err=True)
        return 1
    except StoppedError as stop:
        resume = _resuming(sys.argv[1:] if words is None else words)
        click.secho(f"{stop}; to resume, run: {resume}", fg="yellow", err=True)
        return stop.code
    except (click.Abort, KeyboardInterrupt):
        click.secho("stopped; the run was not finished.", fg="yellow", err=True)
        return 130
    except (OSError, MemoryError) as error:
        click.secho(f"failed: {type(error).__name__}: {error}", fg="red", err=True)
        return 1
    except Exception:
        traceback.print_exc()
        click.secho(f"This is a bug in gdfq {__version__}; please report it.", fg="red", err=True)
        return 1
    return code if isinstance(code, int) else 0


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Print our own warnings in a line each, always; others as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", GdfqWarning)
        otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, GdfqWarning):
                click.secho(f"warning: {message}", fg="yellow", err=True)
            else:
                otherwise(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _resuming(words: Sequence[str]) -> str:
    """The command that resumes the one that was stopped."""
    words = list(words)
    if words[0] == "quantize" and "--resume" not in words:
        words = [words[0], "--resume", *words[1:]]
    return shlex.join(["gdfq", *words])
