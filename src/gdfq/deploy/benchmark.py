"""Size, latency and memory of files, each measured in its runtime on the CPU.

Each file is loaded in a process of its own, so that its memory is known and runtimes do not disturb
one another. The processes take turns of some milliseconds, so that other load affects all equally.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdfq.deploy import timed_process
from gdfq.deploy.line_process import LineProcess
from gdfq.deploy.target import Runtime
from gdfq.errors import UsageError, first_line
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
            processes = [_Process(file, count) for file in files]
            for process in processes:
                stack.enter_context(process)
                process.load()
            for process in processes:
                process.answer()
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


class _Process(LineProcess):
    """The process of one file (`gdfq.deploy.timed_process`)."""

    def __init__(self, file: Candidate, threads: int) -> None:
        super().__init__(timed_process.__name__, f"{file.runtime.name} must run {file.name}")
        self.file = file
        self.threads = threads

    def load(self) -> None:
        """Ask for the file; `answer` waits until it is loaded."""
        load = self.file.runtime.calls
        assert load is not None
        self.send(
            load=f"{load.__module__}:{load.__qualname__}",
            file=str(self.file.path.resolve()),
            threads=self.threads,
        )

    def answer(self) -> dict[str, Any]:
        try:
            return super().answer()
        except UsageError as error:
            raise UsageError(f"{self.file.name}: {error}") from error

    def prepare(self, shapes: Sequence[tuple[int, ...]]) -> int | None:
        """Prepare calls on inputs of some shapes; return the most memory so far, in bytes."""
        peak: int | None = self.ask(shapes=[list(shape) for shape in shapes])["peak"]
        return peak

    def time(self, seconds: float) -> list[float]:
        """Return the seconds of each of as many calls as fit into a time, at least one."""
        times: list[float] = self.ask(seconds=seconds)["times"]
        return times
