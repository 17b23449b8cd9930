"""Files that are whole or absent."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdfq.errors import UsageError


def make_folder(path: Path) -> None:
    """Make the folder if it is not there. Raises UsageError when it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the out folder must be writable; {path} cannot be made: {error.strerror}. "
            "Choose another --out."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"the out folder must be writable; {path} is not. Choose another --out.")


def write_atomically(
    path: Path, data: bytes, check: Callable[[Path], object] | None = None
) -> None:
    """Write under a temporary name in the same folder, force it to disk, then rename.

    `check` gets the temporary file; when it raises, the file is not kept.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
