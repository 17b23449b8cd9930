"""Size and latency of ONNX files, measured in ONNX Runtime on the CPU."""

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdfq.deploy.runtimes import onnx_session, run_once
from gdfq.errors import UsageError, first_line
from gdfq.files.untrusted import within

BATCHES, THREADS = (1, 32), (1, 2)
_MIN_ROUNDS = 11
"""Minimum number of calls per measurement, also if they exceed the given time."""


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

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.median


def size_of(file: bytes | Path) -> int:
    """Return the bytes of an ONNX file and of its external weights.

    Raises:
        UsageError: The file does not exist, or is not an ONNX model.
    """
    if isinstance(file, bytes):
        return len(file)
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
    files: Sequence[bytes | Path],
    shape: tuple[int, ...],
    *,
    seconds: float = 1.0,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = THREADS,
) -> Iterator[list[Timing]]:
    """Measure the latency of ONNX files in turn, so that other load affects all equally.

    Args:
        files: Files that take images [N, *shape], any N.
        shape: Shape of one image.
        seconds: Approximate time for each file in each setting.
        batches: Batch sizes.
        threads: Numbers of threads; those above the number of cores are left out.

    Yields:
        For each setting (a batch size and a number of threads), the timings of all files.

    Raises:
        UsageError: A file takes other inputs.
    """
    cores = os.cpu_count() or 1
    for count in (n for n in threads if n <= cores):
        sessions = [onnx_session(file, count) for file in files]
        for batch in batches:
            feeds = [_feed(session, (batch, *shape)) for session in sessions]
            yield [
                Timing(batch, count, *spread)
                for spread in _latency_quartiles(sessions, feeds, seconds)
            ]


_INPUT_TYPES = ("tensor(float)", "tensor(uint8)")


def _feed(session: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Return noise [N, ...] for the one input of a session.

    Raises:
        UsageError: The session takes other inputs.
    """
    inputs = session.get_inputs()
    try:
        found = [(value.type, tuple(value.shape)) for value in inputs]
        names = [value.name for value in inputs]
    except UnicodeDecodeError as error:
        raise UsageError(
            "the inputs of an ONNX file must have names in UTF-8; those of one have not. "
            "Export it again."
        ) from error
    type, (batch, *rest) = found[0] if found and found[0][1] else ("nothing", (0,))
    if (
        len(found) != 1
        or type not in _INPUT_TYPES
        or isinstance(batch, int)
        or rest != [*shape[1:]]
    ):
        expected = "x".join(map(str, ("N", *shape[1:])))
        raise UsageError(
            f"files that are compared must take one batch of images {expected} of any size N, "
            f"floats or uint8; one takes {', '.join(f'{t} {list(s)}' for t, s in found)}. Export "
            "it with a dynamic batch dimension and sizes that are known."
        )
    draw = np.random.default_rng(0)
    if type == "tensor(uint8)":
        return {names[0]: draw.integers(0, 256, shape, dtype=np.uint8)}
    return {names[0]: draw.standard_normal(shape, dtype=np.float32)}


def _latency_quartiles(
    sessions: Sequence[Any], feeds: Sequence[Mapping[str, Any]], seconds: float
) -> list[tuple[float, float, float]]:
    """Return median, first and third quartile of each session's milliseconds."""
    times: list[list[float]] = [[] for _ in sessions]
    for session, feed in zip(sessions, feeds, strict=True):
        run_once(session, None, feed)  # the first call allocates
    until = time.perf_counter() + seconds * len(sessions)
    while time.perf_counter() < until or len(times[0]) < _MIN_ROUNDS:
        for session, feed, found in zip(sessions, feeds, times, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            found.append(1000 * (time.perf_counter() - started))
    quartiles = [statistics.quantiles(found, n=4) for found in times]
    return [(middle, low, high) for low, middle, high in quartiles]
