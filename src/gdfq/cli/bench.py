"""`gdfq bench`: size and speed of the exported file of a run, compared with full precision."""

from dataclasses import asdict
from pathlib import Path

import click

from gdfq.api import load
from gdfq.deploy.benchmark import side_by_side, size_of
from gdfq.deploy.onnx.writer import to_onnx
from gdfq.errors import UsageError
from gdfq.graph.ends import output_names
from gdfq.report.wording import size_words, smaller
from gdfq.runs.metrics import check_export, note_bench
from gdfq.runs.names import ONNX_FILE


def bench(folder: Path, against: Path | None, seconds: float) -> None:
    """Measure and print, and note the result in the metrics of the run.

    Args:
        folder: The run folder.
        against: ONNX file of the full-precision network; None: the same network in float32.
        seconds: Time for each measurement.
    """
    if not folder.is_dir():
        raise UsageError(
            f"DIR must be the folder of a run that holds {ONNX_FILE}; {folder} is not a folder. "
            "Give the folder that gdfq quantize --out wrote."
        )
    quantized = load(folder)
    shape = quantized.card.input_shape
    file = folder / ONNX_FILE
    if not file.exists():
        raise UsageError(f"{folder} must hold {ONNX_FILE}. Create it with: gdfq export {folder}")
    check_export(folder)
    files: dict[str, bytes | Path] = {
        "full precision": against
        or to_onnx(
            quantized.whole.as_float(),
            quantized.card.inputs,
            {},
            outputs=output_names(quantized.card, quantized.ends),
        ),
        f"{quantized.card.bits}": file,
    }
    sizes = list(map(size_of, files.values()))
    click.echo(
        f"size      {size_words(sizes[0])} full precision, {size_words(sizes[1])} "
        f"{quantized.card.bits}: {smaller(*sizes)}"
    )
    heading = "milliseconds a call (quartiles)"
    click.echo(f"\n{'batch':>5}{'threads':>8}  {heading:48}images/s  faster")
    found = []
    for timings in side_by_side(list(files.values()), shape, seconds=seconds):
        for name, timing in zip(files, timings, strict=True):
            found.append({"file": name, **asdict(timing)})
            spread = f"{timing.median:.3f} ({timing.low:.3f} to {timing.high:.3f})"
            click.echo(
                f"{timing.batch:5}{timing.threads:8}  {name:16}{spread:32}"
                f"{timing.images_per_second:8.0f}  {timings[0].median / timing.median:5.2f}x"
            )
    note_bench(folder, found)
