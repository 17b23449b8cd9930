"""Comparison of runs: a table, a plot of quality over size, and runs that are left out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gdfq.errors import GdfqError, UsageError
from gdfq.files.atomic import make_folder, write_atomically
from gdfq.report import figures
from gdfq.report.figures import svg
from gdfq.report.fingerprints import ImageFingerprints, fingerprints_of
from gdfq.report.page import UNEXPECTED, environment, unexpected
from gdfq.report.read import Run, number, read_run, text


@dataclass(frozen=True)
class Row:
    """One run in the table; None stands for values that are not known.

    Attributes:
        name: Name of the run.
        network: Hash of the original network's weights.
        test: What identifies its test images.
        bits: Its default bits.
        recipe: Name of its recipe.
        accuracy: Top-1 accuracy in percent.
        drop: Measured drop in points.
        agreement: Agreement with the original in percent.
        expected: Expected accuracy drop in words.
        bytes: Size of the file to deploy.
        file: Name of the file to deploy.
        seconds: Total time of the run.
    """

    name: str
    network: str | None
    test: ImageFingerprints
    bits: str
    recipe: str
    accuracy: float | None
    drop: float | None
    agreement: float | None
    expected: str
    bytes: int | None
    file: str | None
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows that can be compared, rows of other networks, and notes on what is left out."""

    rows: tuple[Row, ...]
    apart: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(folders: Sequence[str | Path], out: Path) -> Comparison:
    """Compare the runs in the given folders and write the page `out`.

    A note names each folder that holds no run or a damaged one, and the other runs are compared.

    Raises:
        UsageError: No folder holds a run that can be compared, or the page cannot be written.
    """
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except GdfqError as error:
            left_out.append(str(error))
    rows, damaged = rows_of(runs)
    left_out += damaged
    if not rows:
        raise UsageError(
            "at least one folder must hold a run that can be compared; none of these does: "
            f"{', '.join(map(str, folders))}. {' '.join(left_out)}"
        )
    notes = left_out + [
        f"{run.folder}: {problem}"
        for run in runs
        for problem in dict.fromkeys(run.problems.values())
    ]
    comparison = side_by_side(rows, notes)
    make_folder(out.parent)
    try:
        write_atomically(out, _page(comparison).encode())
    except OSError as error:
        raise UsageError(
            f"the page must be writable; {out} is not ({error.strerror}). Choose another --out."
        ) from error
    return comparison


def rows_of(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """A row for each run, and a note for each whose files hold what no run writes.

    A run is named by its folder, or by its path if two folders have one name.
    """
    rows, notes = [], []
    counts = Counter(run.name for run in runs)
    for run in runs:
        try:
            rows.append(row_of(run, run.name if counts[run.name] == 1 else str(run.folder)))
        except UNEXPECTED as error:
            notes.append(
                f"{run.folder} is not compared: its files hold {unexpected(error)}. "
                f"gdfq report {run.folder} shows what can be read."
            )
    return rows, notes


def side_by_side(rows: Sequence[Row], notes: Sequence[str] = ()) -> Comparison:
    """Separate runs of other networks than most, and remove accuracies on other test images.

    An accuracy is removed, too, if it is not known whether it is of the same images.
    """
    notes = list(notes)
    network = _most(row.network for row in rows)
    same = [row for row in rows if row.network == network]
    apart = [row for row in rows if row.network != network]
    notes += [
        f"{row.name} is not compared: it is of another network (its weights have the hash "
        f"{_hash(row.network)}, those of {same[0].name} {_hash(network)})."
        for row in apart
    ]
    reference = _reference([row for row in same if row.accuracy is not None])
    compared = []
    for row in same:
        problem = None if reference is None else _other_images(row, reference)
        if problem is not None:
            notes.append(f"the accuracy of {row.name} is not compared: {problem}")
            row = replace(row, accuracy=None, drop=None)
        compared.append(row)
    return Comparison(tuple(compared), tuple(apart), tuple(notes))


def _reference(tested: Sequence[Row]) -> Row | None:
    """The first row that was tested on the same images as most others."""
    return max(
        tested,
        key=lambda row: sum(bool(row.test.same_as(other.test)) for other in tested),
        default=None,
    )


def _other_images(row: Row, reference: Row) -> str | None:
    """Why the accuracy of a row cannot be compared with that of the reference; None if it can."""
    if row is reference or row.accuracy is None:
        return None
    same = row.test.same_as(reference.test)
    if same is not None:
        return None if same else f"it was tested on other images than {reference.name}."
    return (
        f"it is not known whether it was tested on the same images as {reference.name}, because "
        "their files hold no fingerprint of them in common. Measure both with gdfq evaluate."
    )


def row_of(run: Run, name: str) -> Row:
    """The row of a run; values that are missing from its files or of another type are None.

    Raises:
        UNEXPECTED: A part of a file is not what a run writes there, such as a list for a mapping.
    """
    config, metrics = run.config, run.metrics
    trust = run.evidence.get("trust") or {}
    recipe: Any = config.get("recipe")
    drop = number(run.drop)
    return Row(
        name=name,
        network=text(config.get("weights_sha256")),
        test=fingerprints_of(run),
        bits=str(config.get("bits", "–")),
        recipe=str(recipe.get("name", "–") if isinstance(recipe, dict) else recipe or "–"),
        accuracy=None if drop is None else float(metrics["student"]["top1"]),
        drop=drop,
        agreement=number(trust.get("agreement")),
        expected=_expected(trust),
        bytes=None if run.file is None else run.file[1],
        file=None if run.file is None else run.file[0],
        seconds=number((metrics.get("seconds") or {}).get("total")),
    )


def quality(rows: Sequence[Row]) -> tuple[str, list[tuple[str, float, float]]]:
    """The axis label of the plot, and (name, bytes, quality) of each run that has both.

    The quality is the accuracy if any run has one, else the agreement with the original.
    """
    words, values = "top-1, %", [row.accuracy for row in rows]
    if all(value is None for value in values):
        words, values = "agreement with the original, %", [row.agreement for row in rows]
    points = [
        (row.name, float(row.bytes), value)
        for row, value in zip(rows, values, strict=True)
        if row.bytes is not None and value is not None
    ]
    return words, points


def _expected(trust: Any) -> str:
    points, interval = number(trust.get("expected_drop")), trust.get("interval")
    if points is not None and interval:
        return f"{points:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"
    return "no estimate" if trust else "–"


def _most(values: Iterator[str | None]) -> str | None:
    """The most frequent value; of several, the first."""
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else None


def _hash(value: str | None) -> str:
    return "unknown" if value is None else f"{value[:12]}…"


def _page(comparison: Comparison) -> str:
    words, points = quality(comparison.rows)
    figure = figures.pareto(points, words)
    drawn = {name for name, *_ in points}
    return (
        environment()
        .get_template("compare.html")
        .render(
            comparison=comparison,
            quality=words.removesuffix(", %"),
            left_out=[row.name for row in comparison.rows if row.name not in drawn],
            figures={} if figure is None else {"pareto": Markup(svg(figure))},  # noqa: S704
        )
    )
