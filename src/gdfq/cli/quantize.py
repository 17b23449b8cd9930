"""A run: the pipeline with a folder around it, by as many processes as were started."""

import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import click
import torch
from torch import nn

from gdfq.analysis.bit_allocation import parse_bits
from gdfq.analysis.evidence import gather
from gdfq.analysis.preflight import diagnose
from gdfq.cli.export import print_export
from gdfq.cli.network import NetworkOptions, open_network
from gdfq.data.datasets import load_data
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.distributed import ALONE, Group, joined
from gdfq.execution.listeners import History, Terminal
from gdfq.execution.precision import Precision, find_device
from gdfq.execution.progress import Listener, Step
from gdfq.execution.signals import stoppable
from gdfq.execution.tensorboard import TensorBoard, require_tensorboard
from gdfq.files.plain_values import as_values
from gdfq.graph.capture import Captured, capture
from gdfq.models.registry import weights_hash
from gdfq.pipeline import load_test, quantize
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import find_recipe
from gdfq.report import write_report
from gdfq.report.read import read_run
from gdfq.report.terminal import print_run
from gdfq.runs.folder import EXPORT, ONNX_FILE, RunFolder
from gdfq.student.scheme import LayerBits, Scheme, parse_placement
from gdfq.version import __version__


def run(*, device: str, precision: Precision, **options: Any) -> None:
    """`gdfq quantize`, by as many processes as torchrun started."""
    with joined(find_device(device)) as group:
        _run(device=device, precision=precision, group=group, **options)


def _run(
    *,
    bits: str,
    size: int | None,
    recipe: str,
    out: Path,
    placement: str | None,
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
    precision: Precision,
    group: Group,
    **options: Unpack[NetworkOptions],
) -> None:
    chosen = find_recipe(recipe).with_steps(steps)
    widths = parse_bits(bits, size)
    for text in keep:
        LayerBits.parse(text)
    if tensorboard:
        require_tensorboard()
    folder = RunFolder(out, checkpoint_every)
    if resume and not folder.checkpoints.exists():
        raise UsageError(
            f"a run that goes on has a checkpoint; {out} has none. Leave --resume away to begin."
        )
    network, shape, preprocessing = open_network(warns=group.rank == 0, **options)
    chosen = chosen.fitted(shape).with_batch(batch)
    config = written_down(network, device, precision, group) | {
        "model": options["model"],
        "weights": None if options["weights"] is None else str(options["weights"]),
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
    scheme = Scheme(
        widths, parse_placement(placement or chosen.placement), tuple(map(LayerBits.parse, keep))
    )
    if size is None:  # else widths are yet to be chosen
        diagnosis = diagnose(teacher, scheme, chosen)
        if diagnosis.problems and data is None:  # with given images it may lack nothing
            raise UsageError(diagnosis.problems[0])
        if group.rank == 0:
            click.echo(f"{'network':10}{diagnosis.summary()}")
    do = partial(quantize_into, folder, config) if group.rank == 0 else partial(_take_part, folder)
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
        precision=precision,
        group=group,
    )
    if group.rank:
        return
    if allocation := quantized.metrics.get("allocation"):
        _print_widths(allocation["widths"])
    print_run(read_run(out))
    if report:
        report_at_once(out)


def written_down(
    network: nn.Module, device: str, precision: Precision = "float32", group: Group = ALONE
) -> dict[str, Any]:
    """What a run's config.json holds of every run: what with, and of which network."""
    return {
        "gdfq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(find_device(device)),
        "precision": precision,
        "processes": group.size,
        "command": shlex.join(["gdfq", *sys.argv[1:]]),
        "weights_sha256": weights_hash(network),
    }


def quantize_into(
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
        history = checkpoints.register("history", stack.enter_context(History(folder.history)))
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


def report_at_once(folder: Path) -> None:
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
    print_export(exported)


def _print_widths(widths: Mapping[str, int]) -> None:
    """Which layers have which width, a line for each width."""
    for bits in sorted(set(widths.values())):
        names = [name for name, chosen in widths.items() if chosen == bits]
        click.echo(f"{f'{bits} bits':10}{len(names)} layers: {', '.join(names)}")
