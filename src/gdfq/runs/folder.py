"""The run folder: what a run writes, in which order, and what makes it finished.

config.json is written first, history.jsonl and checkpoints grow, the student, a few of the images
it was tuned on, its ONNX file and the evidence for its report follow, metrics.json is last: a
folder with metrics.json is a finished run. Then the checkpoints are removed, and the report is made
from these files alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import UsageError, first_line
from gdfq.execution.checkpoints import INTERVAL, Checkpoints
from gdfq.files.atomic import check_folder, make_folder, remove_partial, write_json
from gdfq.files.untrusted import read_json, within

CONFIG, METRICS, HISTORY = "config.json", "metrics.json", "history.jsonl"
EXAMPLES, ONNX_FILE = "examples.npz", "student.onnx"
CHECKPOINTS, LOCK = "checkpoints", ".lock"
EVIDENCE, EVIDENCE_ARRAYS = "evidence.json", "evidence.npz"
REPORT, REPORT_NUMBERS = "report.html", "report.json"
EXPORT, BENCH = "export", "bench"
"""Where the metrics of a run say what its ONNX file is, and how fast."""

_REPORTED = (EVIDENCE, EVIDENCE_ARRAYS, REPORT, REPORT_NUMBERS)
_MADE = (HISTORY, STUDENT_FILE, EXAMPLES, ONNX_FILE, *_REPORTED)
_FILES = (CONFIG, METRICS, *_MADE)


def _is_ours(config: Path) -> bool:
    """Whether a file is the configuration of a run."""
    try:
        return "gdfq" in read_json(config)
    except (OSError, ValueError, TypeError):
        return False


class RunFolder:
    """A folder that is about to hold a run; it is made when the run begins.

    Within its `with` block no other process can use it; the lock of a process that died is free.

    Raises UsageError when it cannot be written, is in use, or holds a finished run or files of such
    names that no run wrote, or links that lead out of it. An unfinished run goes on if it has a
    checkpoint, else it begins again.
    """

    def __init__(self, path: Path, checkpoint_every: float = INTERVAL) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, timeout=0, thread_local=False)
        self.checkpoints = Checkpoints(path / CHECKPOINTS, interval=checkpoint_every)
        check_folder(path)
        self._check()

    def __enter__(self) -> "RunFolder":
        make_folder(self.path)
        try:
            self._lock.acquire()
        except Timeout:
            raise UsageError(
                f"one process at a time may write into a run; another one is using {self.path}. "
                "Wait until it has finished, or choose another --out."
            ) from None
        self._check()  # it may have finished in the meantime
        remove_partial(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
        if (self.path / METRICS).exists():
            (self.path / LOCK).unlink(missing_ok=True)

    def _check(self) -> None:
        path = self.path
        for name in (*_FILES, LOCK, CHECKPOINTS):
            within(path, path / name)
        ours = _is_ours(path / CONFIG)
        if ours and (path / METRICS).exists():
            raise UsageError(
                f"{path} already holds a run, which has finished. Choose another --out or remove "
                f"it; gdfq report {path} writes its report."
            )
        present = [name for name in _FILES if (path / name).exists()]
        if present and not ours:
            raise UsageError(
                f"the out folder must not hold files of the names that a run writes; {path} "
                f"has {', '.join(present)}. Choose another --out."
            )

    @property
    def history(self) -> Path:
        return self.path / HISTORY

    def begin(self, config: dict[str, Any]) -> None:
        """Remove what an unfinished run left and write the configuration.

        A run that goes on keeps what it has.
        """
        if self.checkpoints.exists():
            return
        for name in _MADE:
            (self.path / name).unlink(missing_ok=True)
        self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the configuration; a run that goes on may have other test images or versions."""
        write_json(self.path / CONFIG, config)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which makes the run a finished one."""
        write_json(self.path / METRICS, metrics)
        self.checkpoints.remove()


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics of a finished run; empty in a folder that no run wrote.

    Raises UsageError for a run that has not finished, and for a file that no run wrote.
    """
    path, config = (within(folder, folder / name) for name in (METRICS, CONFIG))
    if not path.exists():
        if _is_ours(config):
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
    """Where a file that was just exported is the ONNX file of a run, let the metrics say so.

    What was measured of the file before it is forgotten.
    """
    if path.name == ONNX_FILE:
        _note(path.parent, {EXPORT: exported, BENCH: []})


def note_bench(folder: Path, timings: Sequence[Mapping[str, Any]]) -> None:
    """Let the metrics of a run say how fast its ONNX file is."""
    _note(folder, {BENCH: list(timings)})


def _note(folder: Path, news: Mapping[str, Any]) -> None:
    """Add to the metrics of a finished run; a folder that no run wrote has none."""
    if (folder / METRICS).exists():
        write_json(folder / METRICS, {**read_metrics(folder), **news})


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
