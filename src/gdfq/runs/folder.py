"""The folder of a run: what a run writes, and in which order.

config.json is written first. history.jsonl and the checkpoints grow during the run. The student, a
few of the images it was tuned on, its ONNX file and the evidence for its report follow.
metrics.json is written last: a folder with metrics.json is a finished run. Then the checkpoints are
removed, and the report is made from these files alone.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from gdfq.deploy.export import TARGETS
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.errors import UsageError
from gdfq.execution.checkpoints import INTERVAL, Checkpoints
from gdfq.files.atomic import check_folder, make_folder, remove_partial, write_json
from gdfq.files.untrusted import within
from gdfq.quantized import QuantizedNetwork
from gdfq.runs.metrics import is_run, read_metrics
from gdfq.runs.names import (
    CHECKPOINTS,
    CONFIG,
    EVIDENCE,
    EVIDENCE_ARRAYS,
    EXAMPLES,
    HISTORY,
    LOCK,
    METRICS,
    REPORT,
    REPORT_NUMBERS,
)

_REPORTED = (EVIDENCE, EVIDENCE_ARRAYS, REPORT, REPORT_NUMBERS)
_EXPORTED = tuple(target.file_name for target in TARGETS.values())
_MADE = (HISTORY, STUDENT_FILE, EXAMPLES, *_EXPORTED, *_REPORTED)
_FILES = (CONFIG, METRICS, *_MADE)


class RunFolder:
    """The folder that a run writes into. It is created when the run begins.

    No other process can use the folder within the `with` block. The lock of a process that died is
    free. An unfinished run resumes if it has a checkpoint; otherwise it restarts.

    Args:
        path: The folder.
        checkpoint_every: Minimum time between checkpoints, in seconds.

    Raises:
        UsageError: The folder cannot be written or is in use; or it holds a finished run, files of
            the same names that no run wrote, or links that lead out of it.
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
        ours = is_run(path / CONFIG)
        if ours and (path / METRICS).exists():
            raise UsageError(
                f"{path} already holds a run, which has finished. Choose another --out or remove "
                f"it; gdfq report {path} writes its report again."
            )
        present = [name for name in _FILES if (path / name).exists()]
        if present and not ours:
            raise UsageError(
                f"the out folder must not hold files with the names that a run writes; {path} "
                f"has {', '.join(present)}. Choose another --out."
            )

    @property
    def history(self) -> Path:
        return self.path / HISTORY

    def begin(self, config: dict[str, Any]) -> None:
        """Remove the files of an unfinished run and write the configuration.

        A run that resumes keeps its files, apart from a report of the unfinished run.
        """
        resumes = self.checkpoints.exists()
        for name in _REPORTED if resumes else _MADE:
            (self.path / name).unlink(missing_ok=True)
        if not resumes:
            self.write_config(config)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the configuration; a resumed run may have other test images or versions."""
        write_json(self.path / CONFIG, config)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which finishes the run, and remove the checkpoints."""
        write_json(self.path / METRICS, metrics)
        self.checkpoints.remove()


def load_folder(folder: Path) -> QuantizedNetwork:
    """The quantized network of a finished run, or of a folder that `QuantizedNetwork.save` wrote.

    Raises:
        UsageError: The run has not finished, or a file is damaged or of another version.
    """
    return QuantizedNetwork.read_folder(folder, read_metrics(folder))
