"""Atomic writes: a file is complete or absent."""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gdfq.errors import UsageError

Found = TypeVar("Found")


def check_folder(path: Path) -> None:
    """Raise UsageError if the folder cannot be written, or created if it does not exist."""
    there = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
    if there.is_file():
        raise UsageError(f"the out folder must be a folder; {there} is a file. Give a folder.")
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"the out folder must be writable; {there} is not. Choose another.")


def make_folder(path: Path) -> None:
    """Create the folder if it does not exist.

    Raises:
        UsageError: It cannot be created or written.
    """
    check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the out folder must be writable; {path} cannot be created: {error.strerror}. "
            "Choose another."
        ) from error


def write_checked(path: Path, data: bytes, check: Callable[[Path], Found]) -> Found:
    """Write under a temporary name in the same folder, force it to disk, check it, then rename.

    Args:
        path: The file to create or replace.
        data: Its contents.
        check: Called with the temporary file, whose name is unique to this call.

    Returns:
        What `check` returns.

    Raises:
        Exception: Whatever `check` raises; the temporary file is then deleted, and a file that was
            at `path` stays as it is.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        found = check(temporary)
        temporary.replace(path)
        _keep_names(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return found


def _keep_names(folder: Path) -> None:
    """Force the entries of a folder to disk. Only POSIX systems support this."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, force it to disk, then rename."""
    write_checked(path, data, lambda _: None)


def remove_partial(folder: Path) -> None:
    """Remove partial files that a killed process left. No other process may be writing here."""
    for path in folder.glob(".*.????????.partial"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
