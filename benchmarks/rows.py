"""Results of a script: a JSON list of rows, each of which is written as soon as it is measured."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """The rows of a file of results; none if there is no file."""
    found: list[Row] = json.loads(file.read_text()) if file.exists() else []
    return found


def complete(
    file: Path,
    names: Sequence[str],
    wanted: Iterable[tuple[Any, ...]],
    measured: Callable[..., Row],
    shown: Sequence[str],
) -> list[Row]:
    """Measure the rows that a file of results does not have yet, and return all of its rows.

    Args:
        file: The file.
        names: The columns that tell one row from another.
        wanted: Values of these columns, in the order in which their rows are measured.
        measured: Takes such values, and returns their row.
        shown: The other columns that are printed of each new row.
    """
    for values in wanted:
        if any(tuple(row[name] for name in names) == values for row in read_rows(file)):
            continue
        row = measured(*values)
        file.write_text(json.dumps([*read_rows(file), row], indent=1) + "\n")
        print({name: row[name] for name in (*names, *shown)}, flush=True)
    return read_rows(file)
