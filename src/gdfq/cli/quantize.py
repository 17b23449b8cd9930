"""`gdfq quantize`: a run, and all that it writes into its folder."""

import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from gdfq.analysis.preflight import diagnose
from gdfq.analysis.run_costs import Following
from gdfq.cli.console import (
    budget_in_words,
    print_bits,
    print_run,
    repetition,
    warn,
    warn_about_normalisation,
)
from gdfq.cli.export import print_export
from gdfq.deploy.export import TARGETS
from gdfq.deploy.target import Target
from gdfq.errors import GdfqError, UsageError
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.context import Context
from gdfq.execution.distributed import joined
from gdfq.execution.listeners import History, Terminal
from gdfq.execution.precision import Precision, find_device
from gdfq.execution.progress import Listener, Step
from gdfq.execution.signals import stoppable
from gdfq.execution.stopwatch import Countdown
from gdfq.execution.tensorboard import TensorBoard, require_tensorboard
from gdfq.pipeline import run
from gdfq.plan.elsewhere import check_images
from gdfq.plan.method import resolve_method
from gdfq.plan.network import resolve_network
from gdfq.plan.options import ImageOptions, NetworkOptions
from gdfq.plan.plan import Plan, Timing
from gdfq.plan.resolve import plan_of
from gdfq.quantized import QuantizedNetwork
from gdfq.report import write_report
from gdfq.report.read import read_run
from gdfq.runs.diagnostics import gather, write_evidence
from gdfq.runs.folder import RunFolder
from gdfq.runs.metrics import noted_export
from gdfq.version import __version__


@dataclass(frozen=True)
class Outputs:
    """What a run writes beside the network."""

    onnx: bool = True
    report: bool = True
    tensorboard: bool = False


def quantize(
    *,
    model: str,
    bits: str | None,
    recipe: str,
    out: Path,
    given: ImageOptions,
    seed: int,
    memory: int | None,
    precision: Precision,
    onnx: bool,
    report: bool,
    tensorboard: bool,
    checkpoint_every: float,
    resume: bool,
    started: float,
    **options: Any,
) -> None:
    """Quantize, by as many processes as torchrun started."""
    if tensorboard:
        require_tensorboard()
    if not onnx and (target := options.get("target")) is not None:
        raise UsageError(
            "--target names the file that a run writes, and --no-onnx writes none; got both, with "
            f"target {target!r}. Remove one; gdfq export writes a file afterwards."
        )
    folder = RunFolder(out, checkpoint_every)
    if resume and not folder.checkpoints.exists():
        raise UsageError(
            f"--resume needs a run with a checkpoint; {out} has none. Remove --resume to start one."
        )
    of_network = {
        name: options.pop(name) for name in NetworkOptions.__annotations__ if name in options
    }
    method = resolve_method(bits, recipe, **options)
    check_images(method, given)
    with joined(find_device(of_network["device"])) as group:
        network = resolve_network(model, **of_network)
        if group.rank == 0:
            warn_about_normalisation(network.assumed)
        context = Context(
            seed=seed,
            precision=precision,
            group=group,
            memory=MemoryBudget.of(memory),
            checkpointer=Checkpoints(folder.checkpoints.folder, writes=False)
            if group.rank
            else folder.checkpoints,
        )
        timing = Timing(started, Following(export=onnx, report=report))
        plan = plan_of(network, method, context=context, timing=timing, **given)
        _check(plan, onnx=onnx, says=group.rank == 0)
        if group.rank:
            _take_part(plan, context)
            return
        config = config_of(plan, context) | {
            "model": model,
            "weights": _text(of_network["weights"]),
            **{name: _text(given.get(name)) for name in ("data", "proxy", "test")},
        }
        countdown = None if plan.budget is None else Countdown(plan.budget, started)
        outputs = Outputs(onnx, report, tensorboard)
        quantized = quantize_into(folder, config, plan, context, outputs, countdown)
    if allocation := quantized.metrics.get("allocation"):
        print_bits(allocation["bits"])
    if quantized.card.candidates is not None:
        click.echo(f"{'images':10}{quantized.card.candidates}")
    print_run(read_run(out))
    if report:
        report_after(out)
    if countdown is not None:
        used = f"{countdown.used():.0f} s of {countdown.seconds:g} s"
        click.echo(f"{'budget':10}{used}; the same run: {repetition(plan)}")


def _text(path: object | None) -> str | None:
    return None if path is None else str(path)


def _check(plan: Plan, *, onnx: bool, says: bool) -> None:
    """Raise UsageError for a plan that could not begin, as far as its bits are known.

    Without a target the run is worth something without its ONNX file: a warning says that there
    will be none.
    """
    if plan.size is not None:
        return
    diagnosis = diagnose(plan.teacher, plan.scheme, plan.carried_out)
    if diagnosis.problems:
        raise UsageError(diagnosis.problems[0])
    if says:
        click.echo(f"{'output':10}{diagnosis.task}")
        click.echo(f"{'network':10}{diagnosis.summary()}")
        click.echo(f"{'effort':10}{diagnosis.effort}{budget_in_words(plan)}")
        if onnx and plan.target is None and plan.teacher.vocabulary is None:
            _warn_without_file(plan)


def _warn_without_file(plan: Plan) -> None:
    try:
        TARGETS["onnx"].check_scheme(plan.teacher, plan.scheme)
    except UsageError as error:
        warn(f"the run will write no ONNX file: {error}")


def config_of(plan: Plan, context: Context) -> dict[str, Any]:
    """The configuration of a run, as config.json holds it."""
    return {
        "gdfq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": str(plan.teacher.device),
        "precision": context.precision,
        "processes": context.group.size,
        "command": shlex.join(["gdfq", *sys.argv[1:]]),
        **plan.as_values(),
        "seed": context.seed,
    }


def quantize_into(
    folder: RunFolder,
    config: dict[str, Any],
    plan: Plan,
    context: Context,
    outputs: Outputs,
    countdown: Countdown | None = None,
) -> QuantizedNetwork:
    """Quantize, and write all that a run writes into its folder, apart from the report."""
    with _file_errors_explained(folder), ExitStack() as stack:
        checkpoints = stack.enter_context(folder).checkpoints
        resumes = checkpoints.exists()
        folder.begin(config)
        history = checkpoints.register("history", stack.enter_context(History(folder.history)))
        terminal = stack.enter_context(Terminal(countdown=countdown))
        listeners: list[Listener] = [history, terminal]
        if countdown is not None:
            checkpoints.register("countdown", countdown)
        if outputs.tensorboard:
            listeners.append(stack.enter_context(TensorBoard(folder.path)))
        check = stack.enter_context(stoppable())

        def listener(step: Step) -> None:
            for receives in listeners:
                receives(step)
            check()

        if resumes:
            click.echo(f"{'run':10}resumes from its checkpoint in {folder.path}")
        quantized = run(plan, replace(context, listener=listener, checkpointer=checkpoints))
        if countdown is not None:
            countdown.exclude(quantized.metrics["seconds"].get("test", 0.0))
        folder.write_config(config)
        quantized.metrics["seconds"]["checkpoints"] = round(checkpoints.seconds, 3)
        quantized.save(folder.path)
        check()
        # The saved network is the file of a language model, unless a target was named.
        if outputs.onnx and (plan.target or plan.teacher.vocabulary is None):
            target = plan.target or TARGETS["onnx"]
            _export_after(quantized, folder.path, target, context.memory.bytes, config.get("model"))
        check()
        if outputs.report:
            started = time.perf_counter()
            write_evidence(gather(plan.teacher, quantized, context.memory), folder.path)
            quantized.metrics["seconds"]["evidence"] = round(time.perf_counter() - started, 3)
        folder.finish(quantized.metrics)
    return quantized


def _take_part(plan: Plan, context: Context) -> None:
    """Quantize together with the process that writes the folder.

    Only that one handles signals: it stops at a checkpoint, for which it needs the others.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    run(plan, context)


@contextmanager
def _file_errors_explained(folder: RunFolder) -> Iterator[None]:
    """Convert an error of the file system into a GdfqError that says what to do."""
    try:
        yield
    except OSError as error:
        raise GdfqError(
            f"the folder of a run must stay there and be writable, with free space; in "
            f"{folder.path}: {error.strerror or error}. What is finished is kept: correct this, "
            "then give the same command again."
        ) from error


def report_after(folder: Path) -> None:
    """Write the report of a run. The run is of use without it, so a failure is a warning."""
    try:
        page = write_report(folder)
    except Exception as error:
        warn(f"no report was written: {type(error).__name__}: {error}")
        return
    click.echo(f"{'report':10}{page}")


def _export_after(
    quantized: QuantizedNetwork, folder: Path, target: Target, memory: int | None, model: str | None
) -> None:
    """Export a run's file. The run is of use without it, so a failure is a warning."""
    started = time.perf_counter()
    try:
        exported = quantized.export(
            folder / target.file_name, target=target, memory=memory, original=model
        )
    except Exception as error:  # whatever it is, the run is worth more
        what = str(error) if isinstance(error, GdfqError) else f"{type(error).__name__}: {error}"
        warn(f"no {target.name.upper()} file was written: {what}")
        return
    seconds = round(time.perf_counter() - started, 3)
    values = {"seconds": seconds, **exported.as_values()}
    quantized.metrics |= noted_export(folder, exported.path, values, quantized.metrics)
    print_export(exported)
