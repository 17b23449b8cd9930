"""The folder of a run as values, whatever state it is in: what is missing or damaged is named."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import parse_json, read_json, read_npz, within
from gdfq.runs.diagnostics import VERSION
from gdfq.runs.names import CONFIG, EVIDENCE, EVIDENCE_ARRAYS, HISTORY, METRICS, ONNX_FILE
from gdfq.version import __version__

Found = TypeVar("Found")
Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """What could be read of a run. Empty parts are explained in `problems`, by file."""

    folder: Path
    config: Record
    metrics: Record
    history: tuple[Record, ...]
    evidence: Record
    arrays: Mapping[str, np.ndarray[Any, Any]]
    sizes: Mapping[str, int]
    """Bytes of the files that hold the network."""
    problems: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def file(self) -> tuple[str, int] | None:
        """The file to deploy and its bytes: ONNX if there is one."""
        for name in (ONNX_FILE, STUDENT_FILE):
            if name in self.sizes:
                return name, self.sizes[name]
        return None

    @property
    def drop(self) -> float | None:
        """Points of accuracy that were lost, where they were measured."""
        try:
            return float(self.metrics["teacher"]["top1"]) - float(self.metrics["student"]["top1"])
        except (LookupError, TypeError, ValueError, OverflowError):
            return None


def read_run(folder: str | Path) -> Run:
    """Read a run's folder. Raises UsageError when no run is in it at all."""
    folder = Path(folder)
    known = (CONFIG, METRICS, STUDENT_FILE)
    if not folder.is_dir() or not any((folder / name).exists() for name in known):
        raise UsageError(
            f"a report is of the folder of a run, which has {CONFIG}; {folder} is none. "
            "Give the folder that gdfq quantize wrote (its --out)."
        )
    problems: dict[str, str] = {}

    def part(name: str, read: Callable[[Path], Found], absent: str) -> Found | None:
        path = folder / name
        if not path.exists():
            problems[name] = absent
            return None
        try:
            return read(within(folder, path))
        except Exception as error:  # zipfile and zlib raise types of their own
            problems[name] = f"{name} is damaged or was changed ({first_line(error)})."
            return None

    config = part(CONFIG, _document, f"{CONFIG} is missing: how the run was made is not known.")
    unfinished = f"the run has not finished: it has no {METRICS}. What it left is shown."
    metrics = part(METRICS, _document, unfinished)
    history = part(HISTORY, _lines, f"{HISTORY} is missing: losses over steps are not known.")
    # Evidence is gathered last, so a run that has not finished could not have it yet.
    without = _NO_EVIDENCE if (folder / METRICS).exists() else unfinished
    evidence = part(EVIDENCE, _evidence, without)
    arrays = part(EVIDENCE_ARRAYS, read_npz, without)
    newer = str((config or {}).get("gdfq", __version__))
    if _version(newer) > _version(__version__):
        problems["version"] = (
            f"the run was made by gdfq {newer}, which is newer than this one ({__version__}): "
            "what this version does not know is left out."
        )
    sizes = {
        name: (folder / name).stat().st_size
        for name in (ONNX_FILE, STUDENT_FILE)
        if (folder / name).exists()
    }
    return Run(
        folder,
        config or {},
        metrics or {},
        history or (),
        evidence or {},
        arrays or {},
        sizes,
        problems,
    )


_NO_EVIDENCE = (
    "no evidence was gathered (gdfq quantize --no-report, or a run of another version): what needs "
    "the original network, such as errors by layer, cannot be made up for later."
)


def _document(path: Path) -> Record:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _lines(path: Path) -> tuple[Record, ...]:
    """All whole lines; the last one of a run that was stopped may be cut off."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            record["stage"], float(record["step"])
        except (ValueError, LookupError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"line {number} is no step") from None
        found.append(record)
    return tuple(found)


def _evidence(path: Path) -> Record:
    value = _document(path)
    if value.get("version") != VERSION:
        raise ValueError(f"it has version {value.get('version')!r}, and {VERSION} can be read")
    return value


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in text.split("."))


def number(value: object) -> float | None:
    """A finite number, or None for anything else that a damaged file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
