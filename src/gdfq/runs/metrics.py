"""The metrics of a run: what metrics.json holds. A folder with this file is a finished run."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from gdfq.errors import UsageError, first_line
from gdfq.files.atomic import write_json
from gdfq.files.untrusted import read_json, within
from gdfq.runs.names import CONFIG, METRICS, ONNX_FILE

EXPORT: Final = "export"
BENCH: Final = "bench"
"""Keys of the metrics that describe the run's ONNX file."""
EXPORTS: Final = "exports"
"""Key of the metrics that describe the run's other exported files, by their names."""


class Top1(TypedDict, total=False):
    """Of teacher or student, on test images."""

    top1: float
    """In percent, of a classifier."""
    error_percent: dict[str, float]
    """Relative error of each output, of any other network; of the logits in front of a sigmoid or
    softmax."""
    cosine: dict[str, float]
    """Mean cosine with the teacher's vectors, of outputs that are unit vectors."""
    decisions_percent: dict[str, float]
    """Share of equal decisions, probabilities on the same side of one half, behind a sigmoid."""


class Metrics(TypedDict, total=False):
    """What a run measured."""

    seconds: dict[str, float]
    """Of each stage, and in total."""
    steps: int
    teacher: Top1
    student: Top1
    test_images: int
    float_bytes: int
    """Of the full-precision network."""
    allocation: dict[str, Any]
    """Of bits "auto": the size asked for, the size reached, and the bits of each layer."""
    collapsed: str
    """Why a generator restarted."""
    export: dict[str, Any]
    exports: dict[str, dict[str, Any]]
    bench: list[dict[str, Any]]


def is_run(config: Path) -> bool:
    """Whether a file is the configuration of a run."""
    try:
        return "gdfq" in read_json(config)
    except (OSError, ValueError, TypeError):
        return False


def read_metrics(folder: Path) -> Metrics:
    """Read the metrics of a finished run; they are empty in a folder that no run wrote.

    Raises:
        UsageError: The run has not finished, or the file is damaged.
    """
    path, config = (within(folder, folder / name) for name in (METRICS, CONFIG))
    if not path.exists():
        if is_run(config):
            raise UsageError(
                f"the run in a folder must have finished; the one in {folder} has not: it has "
                f"{CONFIG} and no {METRICS}. Run gdfq quantize again."
            )
        return {}
    try:
        metrics: dict[str, Any] = read_json(path)
        for part in ("teacher", "student", EXPORT, EXPORTS):
            if not isinstance(metrics.get(part, {}), dict):
                raise ValueError(f"its {part!r} is no object")
        for who in ("teacher", "student"):
            if "top1" in metrics.get(who, {}):
                metrics[who]["top1"] = float(metrics[who]["top1"])
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{path} must be as a run wrote it; it is damaged or was changed "
            f"({first_line(error)}). Remove it to continue without the run's figures."
        ) from error
    return cast(Metrics, metrics)


def note_export(folder: Path, path: Path, exported: Mapping[str, Any]) -> None:
    """Write into the metrics of a run what an exported file is, if it is in the run's folder."""
    if (folder / METRICS).exists():
        _note(folder, noted_export(folder, path, exported, read_metrics(folder)))


def noted_export(
    folder: Path, path: Path, exported: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metrics that an exported file changes.

    What was measured of an ONNX file before it is dropped.

    Args:
        folder: The run folder.
        path: The exported file.
        exported: What was written.
        metrics: The metrics of the run.
    """
    if path.resolve() == (folder / ONNX_FILE).resolve():
        return {EXPORT: dict(exported), **({BENCH: []} if BENCH in metrics else {})}
    if path.resolve().parent != folder.resolve():
        return {}
    return {EXPORTS: {**metrics.get(EXPORTS, {}), path.name: dict(exported)}}


def note_bench(folder: Path, timings: Sequence[Mapping[str, Any]]) -> None:
    """Write into the metrics of a run how fast its ONNX file is."""
    _note(folder, {BENCH: list(timings)})


def _note(folder: Path, changes: Mapping[str, Any]) -> None:
    """Update the metrics of a finished run; a folder that no run wrote has none."""
    if (folder / METRICS).exists():
        write_json(folder / METRICS, {**read_metrics(folder), **changes})


def check_export(folder: Path) -> None:
    """Check that the ONNX file of a run is the one that was compared with the network.

    A folder that no run wrote has nothing to compare with.

    Raises:
        UsageError: The file was changed.
    """
    expected = read_metrics(folder).get(EXPORT, {}).get("sha256")
    found = hashlib.sha256(within(folder, folder / ONNX_FILE).read_bytes()).hexdigest()
    if expected is not None and found != expected:
        raise UsageError(
            f"{folder / ONNX_FILE} must be the file that was compared with the network; it was "
            f"changed afterwards. Export it again: gdfq export {folder}"
        )
