"""The metrics of a run: what metrics.json holds. A folder with this file is a finished run."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict, cast

from gdfq.deploy.export import TARGETS
from gdfq.deploy.target import Target
from gdfq.errors import UsageError, first_line
from gdfq.files.atomic import write_json
from gdfq.files.untrusted import read_json, within
from gdfq.runs.names import CONFIG, METRICS, ONNX_FILE, STUDENT_FILE

EXPORT: Final = "export"
BENCH: Final = "bench"
"""Keys of the metrics that describe the run's ONNX file, and the speed of all exported files."""
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
    effort: dict[str, int | None]
    """The options `images`, `iterations` and `steps` that repeat the run; None for one that it has
    without being told."""
    teacher: Top1
    student: Top1
    test_images: int
    test_data: str
    """Of a classifier: number of test images, and a hash of labels and pixels
    (`gdfq.data.tensors.summary_of`), by which `gdfq compare` recognises them."""
    own_text: dict[str, float]
    """Of a language model on text that its original wrote and no stage saw."""
    test_sequences: int
    language: dict[str, float]
    """Of a language model on test sequences (`gdfq.analysis.language.LanguageMeasures`)."""
    float_bytes: int
    """Of the full-precision network."""
    allocation: dict[str, Any]
    """Of bits "auto": the size asked for, the size reached, and the bits of each layer."""
    candidates: dict[str, Any]
    """Of images from elsewhere: how many were kept, why the others were not, distances."""
    samples: dict[str, Any]
    """Of a denoiser: how the images of both networks from the same noise compare."""
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


def finished(folder: Path) -> bool:
    """Whether a folder is that of a finished run."""
    return (folder / METRICS).exists()


def run_of(path: Path) -> Path:
    """Return the finished run whose network a file is; any other path as it is.

    The network alone has neither the figures of its run nor the images that files are compared on.
    """
    return path.parent if path.name == STUDENT_FILE and finished(path.parent) else path


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
            f"({first_line(error)}). Restore it from a copy: without it the run counts as "
            "unfinished, and gdfq quantize would make it again. The network itself can be used "
            f"without the run's figures: gdfq.load({str(folder / STUDENT_FILE)!r})"
        ) from error
    return cast(Metrics, metrics)


def note_export(folder: Path, path: Path, exported: Mapping[str, Any]) -> None:
    """Write into the metrics of a run what an exported file is, if it is in the run's folder."""
    if finished(folder):
        _note(folder, noted_export(folder, path, exported, read_metrics(folder)))


def noted_export(
    folder: Path, path: Path, exported: Mapping[str, Any], metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metrics that an exported file changes.

    What was measured of another file with this name is dropped.

    Args:
        folder: The run folder.
        path: The exported file.
        exported: What was written.
        metrics: The metrics of the run.
    """
    if path.resolve().parent != folder.resolve():
        return {}
    bench = {BENCH: _without(metrics[BENCH], path.name)} if BENCH in metrics else {}
    if path.name == ONNX_FILE:
        return {EXPORT: dict(exported), **bench}
    return {EXPORTS: {**metrics.get(EXPORTS, {}), path.name: dict(exported)}, **bench}


def _without(timings: Sequence[Any], name: str) -> list[Any]:
    """Return timings without those of a file, or of an older version, which names no files."""
    return [
        timing
        for timing in timings
        if isinstance(timing, dict) and "runtime" in timing and timing.get("file") != name
    ]


def note_bench(folder: Path, timings: Sequence[Mapping[str, Any]]) -> None:
    """Write into the metrics of a run how fast its exported files are."""
    _note(folder, {BENCH: list(timings)})


def _note(folder: Path, changes: Mapping[str, Any]) -> None:
    """Update the metrics of a finished run; a folder that no run wrote has none."""
    if finished(folder):
        write_json(folder / METRICS, {**read_metrics(folder), **changes})


def exported_files(folder: Path) -> dict[Path, Target]:
    """Return the exported files of a run, each with its target, in the order of the targets.

    They are those with the usual names, and those that an export noted.

    Raises:
        UsageError: A file was changed since it was compared with the network.
    """
    noted = {
        name: str(exported.get("target"))
        for name, exported in read_metrics(folder).get(EXPORTS, {}).items()
        if isinstance(exported, dict)
    }
    usual = {target.file_name: target.name for target in TARGETS.values()}
    names = {**usual, **{name: target for name, target in noted.items() if name not in usual}}
    found = {}
    for name, target in sorted(names.items(), key=lambda item: _place(item[1])):
        if target in TARGETS and within(folder, folder / name).is_file():
            check_export(folder, name)
            found[folder / name] = TARGETS[target]
    return found


def _place(target: str) -> int:
    return list(TARGETS).index(target) if target in TARGETS else len(TARGETS)


def check_export(folder: Path, name: str = ONNX_FILE) -> None:
    """Check that an exported file of a run is the one that was compared with the network.

    A folder that no run wrote has nothing to compare with.

    Args:
        folder: The run folder.
        name: Name of the file.

    Raises:
        UsageError: The file was changed.
    """
    metrics = read_metrics(folder)
    noted: Any = metrics.get(EXPORT) if name == ONNX_FILE else metrics.get(EXPORTS, {}).get(name)
    expected = noted.get("sha256") if isinstance(noted, dict) else None
    found = hashlib.sha256(within(folder, folder / name).read_bytes()).hexdigest()
    if expected is not None and found != expected:
        raise UsageError(
            f"{folder / name} must be the file that was compared with the network; it was "
            f"changed afterwards. Export it again: gdfq export {folder}"
        )
