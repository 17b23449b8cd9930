"""Reads a run folder into plain values; files that are missing or damaged are named."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gdfq.deploy.export import TARGETS
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import parse_json, read_json, read_npz, within
from gdfq.report.old_evidence import converted_from_1
from gdfq.runs.diagnostics import VERSION
from gdfq.runs.names import CONFIG, EVIDENCE, EVIDENCE_ARRAYS, HISTORY, METRICS, ONNX_FILE
from gdfq.version import __version__

Found = TypeVar("Found")
Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Run:
    """What could be read of a run.

    Attributes:
        folder: The run folder.
        config: Contents of the configuration file.
        metrics: Contents of the metrics file.
        history: Losses and rates by step.
        evidence: Measurements by section, with the keys of the current version.
        arrays: Arrays of the evidence as `section.name`.
        sizes: Bytes of the files that hold the network, the one to deploy first.
        problems: Why a part is empty, by file.
    """

    folder: Path
    config: Record
    metrics: Record
    history: tuple[Record, ...]
    evidence: Record
    arrays: Mapping[str, np.ndarray[Any, Any]]
    sizes: Mapping[str, int]
    problems: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def file(self) -> tuple[str, int] | None:
        """Name and bytes of the file to deploy: that of the run's target if there is one."""
        return next(iter(self.sizes.items()), None)

    @property
    def exported(self) -> Record:
        """What was written and proven as the file to deploy; empty if nothing was."""
        name, _ = self.file or ("", 0)
        if name == ONNX_FILE:
            return self.metrics.get("export") or {}
        return (self.metrics.get("exports") or {}).get(name) or {}

    @property
    def drop(self) -> float | None:
        """The measured drop of top-1 accuracy in points; None if it was not measured."""
        try:
            return float(self.metrics["teacher"]["top1"]) - float(self.metrics["student"]["top1"])
        except (LookupError, TypeError, ValueError, OverflowError):
            return None


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: The folder holds no run.
    """
    folder = Path(folder)
    known = (CONFIG, METRICS, STUDENT_FILE)
    if not folder.is_dir() or not any((folder / name).exists() for name in known):
        raise UsageError(
            f"a report needs a run folder, which has {CONFIG}; {folder} is not one. "
            "Give a folder that gdfq quantize wrote (its --out)."
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
            problems[name] = f"{name} is damaged or was modified ({first_line(error)})."
            return None

    config = part(CONFIG, _document, f"{CONFIG} is missing: the options of the run are not known.")
    unfinished = (
        f"the run has not finished: it has no {METRICS}. The page shows the files that exist."
    )
    metrics = part(METRICS, _document, unfinished)
    history = part(HISTORY, _lines, f"{HISTORY} is missing: the losses by step are not known.")
    # Evidence is measured last, so a run that has not finished does not have it yet.
    absent = _NO_EVIDENCE if (folder / METRICS).exists() else unfinished
    evidence = part(EVIDENCE, _evidence, absent)
    arrays = part(EVIDENCE_ARRAYS, read_npz, absent)
    newer = str((config or {}).get("gdfq", __version__))
    if _version(newer) > _version(__version__):
        problems["version"] = (
            f"the run was made by gdfq {newer}, which is newer than this version ({__version__}). "
            "The page leaves out what this version does not know."
        )
    target = TARGETS.get(str((config or {}).get("target")))
    deployed = () if target is None else (target.file_name,)
    sizes = {
        name: _size(folder / name)
        for name in (*deployed, ONNX_FILE, STUDENT_FILE)
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


def _size(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


_NO_EVIDENCE = (
    "no evidence was measured (gdfq quantize --no-report, or a run of another version). Parts that "
    "need the original network, such as the errors of layers, cannot be measured later."
)


def _document(path: Path) -> Record:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _lines(path: Path) -> tuple[Record, ...]:
    """All complete lines; the last line of an interrupted run can be incomplete."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            record["stage"], float(record["step"])
        except (ValueError, LookupError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"line {number} is not a step") from None
        found.append(record)
    return tuple(found)


def _evidence(path: Path) -> Record:
    value = _document(path)
    version = value.get("version")
    if version == 1:
        return converted_from_1(value)
    if version != VERSION:
        raise ValueError(f"it has version {version!r}; versions 1 to {VERSION} can be read")
    return value


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else 0 for part in text.split("."))


def text(value: object) -> str | None:
    """The value if it is text, else None: a damaged file can hold anything."""
    return value if isinstance(value, str) else None


def number(value: object) -> float | None:
    """The value if it is a finite number, else None: a damaged file can hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
