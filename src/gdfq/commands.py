"""The command line's jobs: the pipeline with files around it."""

import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from gdfq.allocation import parse_bits
from gdfq.artifacts.onnx import to_onnx
from gdfq.artifacts.packed import STUDENT_FILE
from gdfq.bench import in_full_precision, side_by_side, size_of
from gdfq.capture import Captured, capture
from gdfq.checkpoints import Checkpoints
from gdfq.data import load_data
from gdfq.devices import Group, Precision, find_device, joined
from gdfq.doctor import diagnose
from gdfq.errors import GdfqError, UsageError
from gdfq.evidence import gather
from gdfq.export import Exported, Format
from gdfq.making import generate
from gdfq.models import load_model, weights_hash
from gdfq.pipeline import load_test, quantize
from gdfq.progress import History, Listener, Step, Terminal
from gdfq.quantized import QuantizedNetwork, load
from gdfq.recipes import FAST, find_recipe
from gdfq.report import write_report
from gdfq.report.read import read_run
from gdfq.report.terminal import print_run
from gdfq.report.verdict import size_words, smaller
from gdfq.runs import EXPORT, ONNX_FILE, RunFolder, as_values, check_export, note_bench
from gdfq.saving import ImageFiles
from gdfq.scheme import Keep, Placement, Scheme
from gdfq.stopping import stoppable
from gdfq.sweep import read_sweep
from gdfq.sweeping import TABLE_CSV, TABLE_JSON, Row, run_sweep, table, usable_cores
from gdfq.tensorboard import TensorBoard, require_tensorboard
from gdfq.version import __version__


def run(*, device: str, precision: Precision, **options: Any) -> None:
    """`gdfq quantize`, by as many processes as torchrun started."""
    with joined(find_device(device), precision) as group:
        _run(device=device, group=group, **options)


def _run(
    *,
    model: str,
    weights: Path | None,
    input_shape: tuple[int, ...] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    bits: str,
    size: int | None,
    recipe: str,
    out: Path,
    placement: Placement | None,
    keep: tuple[str, ...],
    test: Path | None,
    data: Path | None,
    steps: int | None,
    batch: int | None,
    seed: int,
    device: str,
    classifier: bool | None,
    onnx: bool,
    report: bool,
    tensorboard: bool,
    checkpoint_every: float,
    resume: bool,
    group: Group,
) -> None:
    chosen = find_recipe(recipe).with_steps(steps)
    widths = parse_bits(bits, size)
    for text in keep:
        Keep.parse(text)
    if tensorboard:
        require_tensorboard()
    folder = RunFolder(out, checkpoint_every)
    if resume and not folder.checkpoints.exists():
        raise UsageError(
            f"a run that goes on has a checkpoint; {out} has none. Leave --resume away to begin."
        )
    loaded = load_model(model, weights)
    network = loaded.module
    shape, preprocessing = loaded.input(input_shape, mean, std)
    chosen = chosen.fitted(shape).with_batch(batch)
    if loaded.preprocessing is None and group.rank == 0:
        _warn_about_normalisation(mean, std)
    config = {
        "gdfq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(find_device(device)),
        "precision": group.precision,
        "processes": group.size,
        "command": shlex.join(["gdfq", *sys.argv[1:]]),
        "model": model,
        "weights": None if weights is None else str(weights),
        "weights_sha256": weights_hash(network),
        "input": list(shape),
        "normalisation": as_values(preprocessing),
        "bits": bits,
        "size": size,
        "placement": placement or chosen.placement,
        "keep": list(keep),
        "recipe": as_values(chosen),
        "seed": seed,
        "data": None if data is None else str(data),
        "test": None if test is None else str(test),
    }
    example = torch.zeros(1, *shape)
    teacher = capture(network, example, classifier=classifier)
    resize = preprocessing.resize
    # Read before there is a folder, which stays away when they cannot be used.
    given = None if data is None else load_data(data, shape, teacher.classes, resize)
    held_out = None if test is None else load_test(test, teacher, resize)
    scheme = Scheme(widths, placement or chosen.placement, tuple(map(Keep.parse, keep)))
    if size is None:  # else widths are yet to be chosen
        diagnosis = diagnose(teacher, scheme, chosen)
        if diagnosis.problems and data is None:  # with given images it may lack nothing
            raise UsageError(diagnosis.problems[0])
        if group.rank == 0:
            click.echo(f"{'network':10}{diagnosis.summary()}")
    do = partial(_quantize_into, folder, config) if group.rank == 0 else partial(_take_part, folder)
    quantized = do(
        teacher,
        example,
        bits=bits,
        size=size,
        recipe=chosen,
        data=given,
        test=held_out,
        placement=placement,
        keep=keep,
        seed=seed,
        mean=preprocessing.mean,
        std=preprocessing.std,
        resize=resize,
        device=device,
        onnx=onnx,
        report=report,
        tensorboard=tensorboard,
        group=group,
    )
    if group.rank:
        return
    if allocation := quantized.metrics.get("allocation"):
        _print_widths(allocation["widths"])
    print_run(read_run(out))
    if report:
        _report_at_once(out)


def _quantize_into(
    folder: RunFolder,
    config: dict[str, Any],
    teacher: Captured,
    example: torch.Tensor,
    *,
    onnx: bool,
    report: bool,
    tensorboard: bool = False,
    **options: Any,
) -> QuantizedNetwork:
    """Quantize with all that a run writes written into the folder, but for the report."""
    with _told_of_files(folder), ExitStack() as stack:
        checkpoints = stack.enter_context(folder).checkpoints
        goes_on = checkpoints.exists()
        folder.begin(config)
        history = checkpoints.hold("history", stack.enter_context(History(folder.history)))
        listeners: list[Listener] = [history, stack.enter_context(Terminal())]
        if tensorboard:
            listeners.append(stack.enter_context(TensorBoard(folder.path)))
        check = stack.enter_context(stoppable())

        def listener(step: Step) -> None:
            for hears in listeners:
                hears(step)
            check()

        if goes_on:
            click.echo(f"{'run':10}goes on from its checkpoint in {folder.path}")
        quantized = quantize(
            teacher, example, listener=listener, checkpoints=checkpoints, **options
        )
        folder.write_config(config)
        quantized.metrics["seconds"]["checkpoints"] = round(checkpoints.seconds, 3)
        quantized.save(folder.path)
        check()
        if onnx:
            _export_at_once(quantized, folder.path / ONNX_FILE)
        check()
        if report:
            started = time.perf_counter()
            gather(teacher, quantized).write(folder.path)
            quantized.metrics["seconds"]["evidence"] = round(time.perf_counter() - started, 3)
        folder.finish(quantized.metrics)
    return quantized


def _take_part(
    folder: RunFolder,
    teacher: Captured,
    example: torch.Tensor,
    *,
    onnx: bool,  # noqa: ARG001 (what is written the first process writes)
    report: bool,  # noqa: ARG001
    tensorboard: bool,  # noqa: ARG001
    **options: Any,
) -> QuantizedNetwork:
    """Quantize together with the process that writes the folder.

    Only that one heeds signals: it stops at a checkpoint, for which it needs the others.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    checkpoints = Checkpoints(folder.checkpoints.folder, writes=False)
    return quantize(teacher, example, checkpoints=checkpoints, **options)


@contextmanager
def _told_of_files(folder: RunFolder) -> Iterator[None]:
    """Turn what the file system refuses into a GdfqError that says what to do."""
    try:
        yield
    except OSError as error:
        raise GdfqError(
            f"the folder of a run must stay there and writable, with room; in {folder.path}: "
            f"{error.strerror or error}. What is finished is kept: mend it, then give the same "
            "command again."
        ) from error


def _report_at_once(folder: Path) -> None:
    """Report behind a run, which is of use without it: what fails is a warning."""
    try:
        page = write_report(folder)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        click.secho(f"warning: no report was written: {what}", fg="yellow", err=True)
        return
    click.echo(f"{'report':10}{page}")


def _export_at_once(quantized: QuantizedNetwork, path: Path) -> None:
    """Export behind a run, which is of use without it: what fails is a warning."""
    started = time.perf_counter()
    try:
        exported = quantized.export(path)
    except Exception as error:  # whatever it is, the run is worth more
        what = str(error) if isinstance(error, GdfqError) else f"{type(error).__name__}: {error}"
        click.secho(f"warning: no ONNX file was written: {what}", fg="yellow", err=True)
        return
    seconds = round(time.perf_counter() - started, 3)
    quantized.metrics[EXPORT] = {"seconds": seconds, **exported.as_values()}
    _report_export(exported)


def write_images(
    *,
    model: str,
    weights: Path | None,
    input_shape: tuple[int, ...] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    recipe: str,
    out: Path,
    count: int,
    steps: int | None,
    seed: int,
    device: str,
    classifier: bool | None,
    png: bool,
) -> None:
    """`gdfq generate`."""
    files = ImageFiles(out, png)
    loaded = load_model(model, weights)
    shape, preprocessing = loaded.input(input_shape, mean, std)
    if loaded.preprocessing is None:
        _warn_about_normalisation(mean, std)
    files.prepare(shape)
    example = torch.zeros(1, *shape)
    teacher = capture(loaded.module, example, classifier=classifier)
    with Terminal() as terminal:
        images, labels = generate(
            teacher,
            example,
            count,
            recipe,
            steps=steps,
            seed=seed,
            device=device,
            listener=terminal,
        )
    written = files.write(images, labels, preprocessing, teacher.classes or 1)
    click.echo(f"{len(images)} images: {', '.join(map(str, written))}")


def export(
    folder: Path, *, format: Format | None, out: Path | None, raw_input: bool, safe_x86: bool
) -> None:
    """`gdfq export`."""
    if format is None and out is None:
        format = "onnx"
    quantized = load(folder)
    home = folder if folder.is_dir() else folder.parent
    path = out or home / f"student.{format}"
    if path.exists() and path.resolve() == (home / STUDENT_FILE).resolve():
        raise UsageError(f"{path} is the network itself. Give another file with --out.")
    exported = quantized.export(path, format=format, raw_input=raw_input, safe_x86=safe_x86)
    _report_export(exported)


def _report_export(exported: Exported) -> None:
    click.echo(f"{'file':10}{exported.path}, {exported.bytes / 1024:.0f} KiB")
    for kind, parity in (("usual", exported.inside), ("extreme", exported.beyond)):
        same = "" if parity.agreement is None else f"{parity.agreement:.1f} % same answers "
        click.echo(
            f"{'parity':10}{same}on {parity.images} {kind} images; outputs differ by "
            f"{parity.max_difference:.2g} at most ({100 * parity.relative_error:.2g} %)"
        )
    for name, share in exported.differs_first:
        click.echo(f"{'':10}{name}: {100 * share:.2g} % of the codes differ")
    for note in exported.notes:
        click.secho(f"{'note':10}{note}", fg="yellow" if exported.saturates_here else None)


def bench(folder: Path, against: Path | None, seconds: float) -> None:
    """`gdfq bench`."""
    if not folder.is_dir():
        raise UsageError(
            f"what is measured is the folder of a run, with {ONNX_FILE} in it; {folder} is none. "
            "Give the folder."
        )
    quantized = load(folder)
    shape = quantized.card.input_shape
    file = folder / ONNX_FILE
    if not file.exists():
        raise UsageError(f"{folder} must hold {ONNX_FILE}. Make it with: gdfq export {folder}")
    check_export(folder)
    files: dict[str, bytes | Path] = {
        "full precision": against or to_onnx(in_full_precision(quantized.network), shape, {}),
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


def sweep(file: Path, *, out: Path | None, jobs: int | None, threads: int) -> None:
    """`gdfq sweep`."""
    grid = read_sweep(file)
    out = out or file.with_suffix("")
    if out == file:
        raise UsageError(f"a folder cannot have the name of the file {file}. Give --out.")
    jobs = max(1, usable_cores() // threads) if jobs is None else jobs

    def tell(row: Row, ended: int, total: int) -> None:
        measured = row.student_top1 is not None
        result = row.error or (f"top-1 {row.student_top1:.2f} %" if measured else row.status)
        click.echo(f"{ended}/{total}  {row.folder}  {result}", err=True)

    try:
        rows = run_sweep(grid, out, home=file.parent, jobs=jobs, threads=threads, tell=tell)
    except KeyboardInterrupt:
        click.secho(f"stopped; the same command goes on with {out}.", fg="yellow", err=True)
        sys.exit(130)
    click.echo(f"\n{table(rows)}\n\n{'table':10}{out / TABLE_JSON}, {out / TABLE_CSV}")
    failed = [f"\n  {row.folder}: {row.error}" for row in rows if row.status != "finished"]
    if failed:
        raise GdfqError(f"{len(failed)} of {len(rows)} runs:{''.join(failed)}")


def demo(out: Path) -> None:
    """`gdfq demo`."""
    from gdfq import demo as digits

    folder = RunFolder(out)
    training, held_out = digits.load_digits()
    test = (held_out.images, held_out.labels)
    click.echo(f"training a small network on {len(training.labels)} handwritten digits ...")
    network = digits.train(training)
    del training
    click.echo("the training digits are gone; quantizing to W4A4 from the network alone ...")
    example = torch.zeros(1, *digits.INPUT_SHAPE)
    common: dict[str, Any] = {
        "bits": "w4a4",
        "placement": FAST.placement,
        "test": test,
        "mean": digits.PREPROCESSING.mean,
        "std": digits.PREPROCESSING.std,
    }
    config = {
        "gdfq": __version__,
        "torch": torch.__version__,
        "command": "gdfq demo",
        "weights_sha256": weights_hash(network),
        "bits": "w4a4",
        "recipe": as_values(FAST),
        "seed": 0,
    }
    teacher = capture(network, example)
    fast = _quantize_into(
        folder, config, teacher, example, recipe=FAST, onnx=True, report=True, **common
    )
    results = {"fast": fast}
    for name, recipe in (("GDFQ (paper)", digits.RECIPE), ("direct rounding", digits.ROUNDING)):
        with Terminal() as terminal:
            results[name] = quantize(teacher, example, recipe=recipe, listener=terminal, **common)
    rows = [
        (name, result.metrics["student"]["top1"], result.metrics["seconds"]["total"])
        for name, result in reversed(results.items())
    ]
    rows.insert(0, ("full precision", fast.metrics["teacher"]["top1"], 0.0))
    click.echo(f"\n{'':18}{'top-1':>8}{'seconds':>10}   on {len(held_out.labels)} digits")
    for name, accuracy, seconds in rows:
        click.echo(f"{name:18}{accuracy:7.2f}%{seconds:10.0f}")
    click.echo(f"\nthe run is in {out}; load it with gdfq.load({str(out)!r})")
    _report_at_once(out)


def _warn_about_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    missing = " and ".join(
        f"--{name}" for name, value in (("mean", mean), ("std", std)) if value is None
    )
    if missing:
        click.secho(
            f"warning: no {missing} given, so mean 0 and std 1 are used: the network is taken to "
            "expect pixels in 0..1. If it was trained on normalised images, the result will be "
            "poor: give their mean and std.",
            fg="yellow",
            err=True,
        )


def _print_widths(widths: Mapping[str, int]) -> None:
    """Which layers have which width, a line for each width."""
    for bits in sorted(set(widths.values())):
        names = [name for name, chosen in widths.items() if chosen == bits]
        click.echo(f"{f'{bits} bits':10}{len(names)} layers: {', '.join(names)}")
