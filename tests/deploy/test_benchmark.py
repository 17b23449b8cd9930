"""Files side by side, each in a process of its own."""

import os
from pathlib import Path

import pytest
from support import networks, timed_files

from gdfq.deploy.benchmark import Candidate, side_by_side
from gdfq.deploy.calls import Load
from gdfq.deploy.onnx.target import ONNX_RUNTIME
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.deploy.target import Runtime
from gdfq.errors import GdfqError, UsageError
from gdfq.quantized import QuantizedNetwork

_MIB = 2**20


def _candidate(path: Path, calls: Load) -> Candidate:
    return Candidate("its name", path, Runtime("a runtime", "numpy", calls=calls))


def test_full_precision_file_has_the_function_without_rounding(
    small: QuantizedNetwork, tmp_path: Path
) -> None:
    network = small.network.as_float()
    names = [str(node.target) for node in network.graph.nodes]
    assert not any("quantize" in name and "float" not in name for name in names)
    files = [tmp_path / "full.onnx", tmp_path / "quantized.onnx"]
    for path, written in zip(files, (network, small.network), strict=True):
        path.write_bytes(to_onnx(written, small.card.inputs, {}))
    candidates = [Candidate(path.name, path, ONNX_RUNTIME) for path in files]
    (a, b), *_ = side_by_side(
        candidates, [networks.SHAPE], seconds=0.01, batches=(1,), threads=(1,)
    )
    assert 0 < a.low <= a.median <= a.high
    assert (b.batch, b.threads) == (1, 1)
    assert b.images_per_second == pytest.approx(1000 / b.median)


def test_time_and_memory_are_those_of_each_file(tmp_path: Path) -> None:
    """A call of N images sleeps 2 N ms, over the threads; files hold 1 and 65 MiB."""
    files = []
    for name, size in (("small", "1"), ("large", "65")):
        (tmp_path / name).write_text(size)
        files.append(_candidate(tmp_path / name, timed_files.calls))
    settings = list(side_by_side(files, [(2,)], seconds=1e-3, batches=(4, 1), threads=(1, 2, 999)))
    threads = [count for count in (1, 2) if count <= (os.cpu_count() or 1)]
    expected = [(count, batch) for count in threads for batch in (1, 4)]
    assert [(row[0].threads, row[0].batch) for row in settings] == expected
    for small, large in settings:
        for timing in (small, large):
            assert timing.low >= 2 * timing.batch / timing.threads
        if small.memory is not None:
            assert large.memory is not None
            assert large.memory - small.memory == pytest.approx(64 * _MIB, abs=4 * _MIB)


def test_process_that_ends_is_reported(tmp_path: Path) -> None:
    candidate = _candidate(tmp_path / "broken.file", timed_files.ends)
    with pytest.raises(GdfqError, match=r"exit code 3 and wrote: cannot read broken\.file\."):
        list(side_by_side([candidate], [(1,)], threads=(1,)))


def test_refusal_of_a_file_names_it(tmp_path: Path) -> None:
    candidate = _candidate(tmp_path / "file", timed_files.refuses)
    with pytest.raises(UsageError, match=r"^its name: it must be another file\.$"):
        list(side_by_side([candidate], [(1,)], threads=(1,)))
