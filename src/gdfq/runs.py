"""The run folder: what a run writes, in which order, and what makes it finished.

config.json is written first, history.jsonl grows, the student, a few of the images it was tuned on
and its ONNX file follow, metrics.json is last: a folder with metrics.json is a finished run.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from gdfq.artifacts.packed import STUDENT_FILE
from gdfq.errors import UsageError, first_line
from gdfq.files import make_folder, write_json
from gdfq.limits import read_json, within

CONFIG, METRICS, HISTORY = "config.json", "metrics.json", "history.jsonl"
EXAMPLES, ONNX_FILE = "examples.npz", "student.onnx"
EXPORT = "export"
"""Where the metrics of a run say what its ONNX file is."""

_MADE = (HISTORY, STUDENT_FILE, EXAMPLES, ONNX_FILE)
_FILES = (CONFIG, METRICS, *_MADE)


def _is_ours(config: Path) -> bool:
    """Whether a file is the configuration of a run."""
    try:
        return "gdfq" in read_json(within(config.parent, config))
    except (OSError, ValueError, TypeError):
        return False


class RunFolder:
    """A folder that is about to hold a run.

    Raises UsageError when it cannot be written, or holds a finished run or files of such names
    that no run wrote. An unfinished run may be begun again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path)
        if (path / METRICS).exists():
            raise UsageError(f"{path} already holds a run. Choose another --out or remove it.")
        present = [name for name in _FILES if (path / name).exists()]
        if present and not _is_ours(path / CONFIG):
            raise UsageError(
                f"the out folder must not hold files of the names that a run writes; {path} "
                f"has {', '.join(present)}. Choose another --out."
            )

    @property
    def history(self) -> Path:
        return self.path / HISTORY

    def begin(self, config: dict[str, Any]) -> None:
        """Remove what an unfinished run left and write the configuration."""
        for name in _MADE:
            (self.path / name).unlink(missing_ok=True)
        write_json(self.path / CONFIG, config)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which makes the run a finished one."""
        write_json(self.path / METRICS, metrics)


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run; empty in a folder that no run wrote.

    Raises UsageError for a run that has not finished, and for a file that no run wrote.
    """
    path = within(folder, folder / METRICS)
    if not path.exists():
        if _is_ours(folder / CONFIG):
            raise UsageError(
                f"the run in a folder must have finished; the one in {folder} has not: it has "
                f"{CONFIG} and no {METRICS}. Run gdfq quantize again."
            )
        return {}
    try:
        metrics: dict[str, Any] = read_json(path)
        for part in ("teacher", "student", EXPORT):
            if not isinstance(metrics.get(part, {}), dict):
                raise ValueError(f"its {part!r} is no object")
        for who in ("teacher", "student"):
            if "top1" in metrics.get(who, {}):
                metrics[who]["top1"] = float(metrics[who]["top1"])
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{path} must be as a run wrote it; it is damaged or was changed "
            f"({first_line(error)}). Remove it to go on without the run's figures."
        ) from error
    return metrics


def note_export(path: Path, exported: Mapping[str, Any]) -> None:
    """Where a file that was just exported is the ONNX file of a run, let the metrics say so."""
    if path.name == ONNX_FILE and (path.parent / METRICS).exists():
        metrics = read_metrics(path.parent)
        write_json(path.parent / METRICS, {**metrics, EXPORT: exported})


def check_export(folder: Path) -> None:
    """Raise UsageError when the ONNX file of a run is another than was written.

    A folder that no run wrote says nothing about it.
    """
    expected = read_metrics(folder).get(EXPORT, {}).get("sha256")
    found = hashlib.sha256(within(folder, folder / ONNX_FILE).read_bytes()).hexdigest()
    if expected is not None and found != expected:
        raise UsageError(
            f"{folder / ONNX_FILE} must be as it was when it was compared with the network; it was "
            f"changed after it was written. Export it again: gdfq export {folder}"
        )


def as_values(value: object) -> Any:
    """A frozen configuration as plain JSON values, each with the name of its class."""
    if is_dataclass(value) and not isinstance(value, type):
        inside = {field.name: as_values(getattr(value, field.name)) for field in fields(value)}
        return {"class": type(value).__name__, **inside}
    if isinstance(value, tuple | list):
        return [as_values(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
