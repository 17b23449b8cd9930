"""Size, latency and memory of files, each measured in its runtime on the CPU.

Each file is loaded in a process of its own, so that its memory is known and runtimes do not disturb
one another. The processes take turns of some milliseconds, so that other load affects all equally.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gdfq.deploy import timed_process
from gdfq.deploy.target import Runtime
from gdfq.errors import GdfqError, UsageError, first_line
from gdfq.files.untrusted import within

BATCHES, THREADS = (1, 32), (1, 2)
_MIN_CALLS = 11
"""Minimum number of calls per measurement, also if they exceed the given time."""
_TURN_SECONDS = 0.01
"""Time after which the process of another file is asked for calls."""


@dataclass(frozen=True)
class Candidate:
    """A file that is measured.

    Attributes:
        name: Its name, for people.
        path: The file.
        runtime: The runtime that it is measured in.
    """

    name: str
    path: Path
    runtime: Runtime


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one file, at one batch size and number of threads."""

    batch: int
    threads: int
    median: float
    low: float
    """First quartile, in milliseconds."""
    high: float
    """Third quartile, in milliseconds."""
    memory: int | None = None
    """The most bytes that the process of the file took, at batches of up to this size; with Python
    and the runtime. None where the system does not tell it."""

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.median


def size_of(file: Path) -> int:
    """Return the bytes of an ONNX file and of its external weights.

    Raises:
        UsageError: The file does not exist, or is not an ONNX model.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        tensors = onnx.load(file, load_external_data=False).graph.initializer
        outside = {ExternalDataInfo(t).location for t in tensors if uses_external_data(t)}
        beside = [within(file.parent, file.with_name(name)) for name in outside]
        return sum(path.stat().st_size for path in (file, *beside))
    except Exception as error:  # protobuf's own has no public name
        raise UsageError(
            f"{file} must be an ONNX model, with its external weights, if any, in the same "
            f"folder; reading it failed with: {first_line(error)}."
        ) from error


def side_by_side(
    files: Sequence[Candidate],
    shapes: Sequence[tuple[int, ...]],
    *,
    seconds: float = 1.0,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = THREADS,
) -> Iterator[list[Timing]]:
    """Measure the latency of files in turn, so that other load affects all equally.

    Args:
        files: Files that take batches of any length, whose runtimes are installed.
        shapes: Shape of one entry of each input, such as (3, 32, 32) of an image.
        seconds: Approximate time for each file in each setting.
        batches: Batch sizes.
        threads: Numbers of threads; those above the number of cores are left out.

    Yields:
        For each setting (a number of threads and a batch size), the timings of all files.

    Raises:
        UsageError: A runtime cannot load its file, or a file takes other inputs.
        GdfqError: The process of a file ended.
    """
    cores = os.cpu_count() or 1
    for count in (n for n in threads if n <= cores):
        with ExitStack() as stack:
            processes = [stack.enter_context(_Process(file, count)) for file in files]
            for process in processes:
                process.wait_until_loaded()
            for batch in sorted(batches):
                yield _timings(processes, [(batch, *shape) for shape in shapes], seconds)


def _timings(
    processes: Sequence["_Process"], shapes: Sequence[tuple[int, ...]], seconds: float
) -> list[Timing]:
    peaks = [process.prepare(shapes) for process in processes]
    times: list[list[float]] = [[] for _ in processes]
    while True:
        waiting = [index for index, found in enumerate(times) if _is_short(found, seconds)]
        if not waiting:
            break
        for index in waiting:
            times[index] += processes[index].time(min(seconds, _TURN_SECONDS))
    return [
        Timing(shapes[0][0], process.threads, 1000 * middle, 1000 * low, 1000 * high, peak)
        for process, peak, (low, middle, high) in zip(
            processes, peaks, (statistics.quantiles(found, n=4) for found in times), strict=True
        )
    ]


def _is_short(times: Sequence[float], seconds: float) -> bool:
    return len(times) < _MIN_CALLS or sum(times) < seconds


class _Process:
    """The process of one file (`gdfq.deploy.timed_process`); it ends with the context."""

    def __init__(self, file: Candidate, threads: int) -> None:
        self.file = file
        self.threads = threads

    def __enter__(self) -> "_Process":
        load = self.file.runtime.calls
        assert load is not None
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(  # noqa: S603 (this interpreter, a module of this package)
            [sys.executable, "-P", "-m", timed_process.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._send(
            load=f"{load.__module__}:{load.__qualname__}",
            file=str(self.file.path.resolve()),
            threads=self.threads,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def wait_until_loaded(self) -> None:
        self._answer()

    def prepare(self, shapes: Sequence[tuple[int, ...]]) -> int | None:
        """Prepare calls on inputs of some shapes; return the most memory so far, in bytes."""
        self._send(shapes=[list(shape) for shape in shapes])
        peak: int | None = self._answer()["peak"]
        return peak

    def time(self, seconds: float) -> list[float]:
        """Return the seconds of each of as many calls as fit into a time, at least one."""
        self._send(seconds=seconds)
        times: list[float] = self._answer()["times"]
        return times

    def _send(self, **asked: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{json.dumps(asked)}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UsageError(f"{self.file.name}: {answer['error']}")
        return answer

    def _ended(self) -> GdfqError:
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:] or ["nothing"]
        return GdfqError(
            f"{self.file.runtime.name} must run {self.file.name} in a process of its own; the "
            f"process ended with exit code {code} and wrote: {last[0]}."
        )
