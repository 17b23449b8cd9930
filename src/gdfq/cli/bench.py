"""`gdfq bench`: size, memory and speed of a run's files, compared with full precision."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from gdfq.api import load
from gdfq.deploy.benchmark import Candidate, Timing, side_by_side, size_of
from gdfq.deploy.onnx.target import ONNX_RUNTIME
from gdfq.deploy.target import Job, Runtime, Target
from gdfq.errors import UsageError
from gdfq.graph.ends import output_names
from gdfq.quantized import QuantizedNetwork
from gdfq.report.wording import size_words, smaller
from gdfq.runs.metrics import exported_files, note_bench
from gdfq.student.integer_network import IntegerNetwork

_FULL = "full precision"


def bench(
    folder: Path,
    against: Path | None,
    seconds: float,
    batches: Sequence[int],
    threads: Sequence[int],
) -> None:
    """Measure and print, and note the result in the metrics of the run.

    Args:
        folder: The run folder.
        against: ONNX file of the full-precision network; None: the same network in float32.
        seconds: Time for each measurement.
        batches: Batch sizes.
        threads: Numbers of threads.
    """
    if not folder.is_dir():
        raise UsageError(
            f"DIR must be the folder of a run that holds exported files; {folder} is not a "
            "folder. Give the folder that gdfq quantize --out wrote."
        )
    if min(threads) > (os.cpu_count() or 1):
        raise UsageError(
            f"--threads must be at most the number of cores, which is {os.cpu_count()}; got "
            f"{', '.join(map(str, threads))}."
        )
    quantized = load(folder)
    files = exported_files(folder)
    if not any(target.runtime and target.runtime.calls for target in files.values()):
        raise UsageError(
            f"{folder} must hold an exported file. Create it with: gdfq export {folder}"
        )
    with TemporaryDirectory(prefix="gdfq-") as place:
        candidates = list(_candidates(quantized, files, against, Path(place)))
        sizes = [
            size_of(file.path) if file.path == against else file.path.stat().st_size
            for file in candidates
        ]
        _print_heading()
        shapes = [spec.shape for spec in quantized.card.inputs]
        found = []
        for timings in side_by_side(
            candidates, shapes, seconds=seconds, batches=batches, threads=threads
        ):
            for file, size, timing in zip(candidates, sizes, timings, strict=True):
                _print_row(file, (sizes[0], size), (timings[0], timing))
                runtime = file.runtime.name
                noted = {"file": file.name, "runtime": runtime, "bytes": size, **asdict(timing)}
                found.append(noted)
    for path, target in files.items():
        if reason := _why_not_measured(target.runtime):
            _print_start(path.name, target.runtime, path.stat().st_size, sizes[0])
            click.echo(f"  {reason}")
    note_bench(folder, found)


def _candidates(
    quantized: QuantizedNetwork,
    files: Mapping[Path, Target],
    against: Path | None,
    place: Path,
) -> Iterator[Candidate]:
    """Return what is measured, full precision first.

    Args:
        quantized: The network.
        files: The files of its run.
        against: ONNX file of the full-precision network; None: the same network in float32.
        place: Folder for temporary files.
    """
    if against is not None:
        yield Candidate(_FULL, against, ONNX_RUNTIME)
    measured = {path: t for path, t in files.items() if not _why_not_measured(t.runtime)}
    full: dict[str, Runtime] = {}
    for path, target in measured.items():
        assert target.runtime is not None
        if against is None and target.runtime.name not in full:
            full[target.runtime.name] = target.runtime
            written = place / f"{len(full)}{target.suffix}"
            written.write_bytes(_written(quantized, target, quantized.whole.as_float()))
            yield Candidate(_FULL, written, target.runtime)
        if target.loads_code:  # not the file of the folder, which others may have written
            path, name = place / f"{len(full)}.quantized{target.suffix}", path.name
            path.write_bytes(_written(quantized, target, quantized.whole))
            yield Candidate(name, path, target.runtime)
        else:
            yield Candidate(path.name, path, target.runtime)


def _written(quantized: QuantizedNetwork, target: Target, network: IntegerNetwork) -> bytes:
    """Return the file of a target for this network, or for another with its inputs and outputs."""
    names = tuple(output_names(quantized.card, quantized.ends))
    return target.write(Job(network, quantized.card, Path(), quantized.examples, outputs=names))


def _why_not_measured(runtime: Runtime | None) -> str:
    """Return why files of a runtime are not measured, or an empty text."""
    if runtime is None or runtime.calls is None:
        return "not measured on this machine"
    return "" if runtime.is_installed else f"not installed: {runtime.installation}"


def _print_heading() -> None:
    click.echo(
        f"{'file':24}{'runs in':14}{'size':>10}  {'':20}{'memory':>9}{'batch':>7}{'threads':>9}  "
        f"{'milliseconds a call (quartiles)':33}{'inputs/s':>9}  faster"
    )


def _print_start(name: str, runtime: Runtime | None, size: int, full: int) -> None:
    where = "" if runtime is None else runtime.name
    ratio = "" if size == full else smaller(full, size)
    click.echo(f"{name:24}{where:14}{size_words(size):>10}  {ratio:20}", nl=False)


def _print_row(file: Candidate, sizes: tuple[int, int], timings: tuple[Timing, Timing]) -> None:
    """Print the measurements of a file.

    Args:
        file: The file.
        sizes: Bytes of full precision, and of the file.
        timings: Timing of full precision, and of the file.
    """
    full, size = sizes
    reference, timing = timings
    memory = "" if timing.memory is None else size_words(timing.memory)
    spread = f"{timing.median:.3f} ({timing.low:.3f} to {timing.high:.3f})"
    _print_start(file.name, file.runtime, size, full)
    click.echo(
        f"{memory:>9}{timing.batch:7}{timing.threads:9}  {spread:33}"
        f"{timing.images_per_second:9.0f}  {reference.median / timing.median:5.2f}x"
    )
