"""The command line. Torch is imported by the commands that need it, not to print help."""

import math
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import click

from gdfq.errors import GdfqError, GdfqWarning, UsageError
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.execution.signals import StoppedError
from gdfq.version import __version__

_PATH = click.Path(path_type=Path)


class _Shape(click.ParamType):
    name = "CxHxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        text = str(value).lower()
        if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})+", text):
            self.fail(f"a shape is written as for instance 3x32x32; got {value!r}.", param, ctx)
        return tuple(map(int, text.split("x")))


class _Data(click.ParamType):
    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not Path(value).exists():
            self.fail(f"there is no data at {value}. Give an .npz file or a folder.", param, ctx)
        return Path(value)


class _Numbers(click.ParamType):
    name = "a,b,c"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"give numbers with commas between, as 0.5,0.5,0.5; got {value!r}.", param, ctx
            )


class _Seconds(click.FloatRange):
    """Numbers of seconds: those that no comparison tells from others, as nan, are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"give a number of seconds; got {value!r}.", param, ctx)
        return seconds


class _Size(click.ParamType):
    name = "SIZE"
    units: ClassVar = {
        unit: base**power
        for base, units in ((1000, ("B", "KB", "MB", "GB")), (1024, ("", "KIB", "MIB", "GIB")))
        for power, unit in enumerate(units)
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(
            r"([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMG]?I?B|)", str(value).strip().upper()
        )
        size = 0 if match is None else int(float(match[1]) * self.units.get(match[2], 0))
        if size < 1:
            self.fail(
                "a size is a number of bytes, or of KB, MB (thousands, millions) or KiB, MiB "
                f"(2^10, 2^20), as 300KB; got {value!r}.",
                param,
                ctx,
            )
        return size


def _network_options(command: Any) -> Any:
    """The options that say which network it is."""
    options = [
        click.argument("model"),
        click.option(
            "--weights",
            type=_PATH,
            help="safetensors file or torch state dict of the network; random: a library's network "
            "untrained  [default: the library's pretrained weights]",
        ),
        click.option(
            "--input",
            "input_shape",
            type=_Shape(),
            help="shape of one input, e.g. 3x32x32  [default: the network's own, if it has one]",
        ),
        click.option(
            "--mean",
            type=_Numbers(),
            help="of the input normalisation, for pixels in 0..1  "
            "[default: the network's own, else 0]",
        ),
        click.option(
            "--std",
            type=_Numbers(),
            help="of the input normalisation, for pixels in 0..1  "
            "[default: the network's own, else 1]",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
        ),
        click.option(
            "--classifier/--no-classifier",
            default=None,
            help="whether the output are logits of classes  [default: if it is one tensor N x C]",
        ),
        click.option("--steps", type=int, help="batches in all  [default: the recipe's]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of all randomness"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gdfq")
def cli() -> None:
    """Make a trained neural network small and fast when its training data cannot be had.

    \b
    MODEL is one of
      timm:NAME, torchvision:NAME, ptcv:NAME   a library's network, pretrained
      hf:ID                                    an image classifier of Hugging Face, or hf:FOLDER
      path/to/file.py:factory                  a callable without arguments that returns an
      package.module:factory                   nn.Module; naming it runs its code
      path/to/program.pt2                      from torch.export.save; loading it can run code

    DATA is an .npz file with `images` (uint8, N x C x H x W) and, to test on, `labels`, or a folder
    with one sub-folder of images for each class.
    """


@cli.command("quantize")
@_network_options
@_SEED
@click.option(
    "--bits",
    default="w4a4",
    show_default=True,
    help="of weights and activations, 2..8; auto chooses each layer's to fit --size",
)
@click.option(
    "--size", type=_Size(), help="with --bits auto: of the ONNX file at most, as 300KB or 1.5MiB"
)
@click.option(
    "--recipe",
    default="fast",
    show_default=True,
    help="fast, quick, paper, paper-imagenet, round, zeroq, real, ... (gdfq recipes lists all)",
)
@click.option("--batch", type=click.IntRange(min=1), help="images a step  [default: the recipe's]")
@click.option("--out", type=_PATH, required=True, help="folder for the run; must not hold one yet")
@click.option(
    "--placement",
    type=click.Choice(["relu", "full", "t1"]),
    help="relu: weights and ReLU outputs, as published; full: deployable  [default: the recipe's]",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN=WIDTH",
    help="layers of another width, as 'stage1.*=float' or last=8 (first and last are the first "
    "and the last layer); may be given several times",
)
@click.option(
    "--test",
    type=_Data(),
    help="DATA to measure on, used for nothing else; labelled for a classifier's accuracy",
)
@click.option("--data", type=_Data(), help="real DATA to tune on instead of synthetic images")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="of the products in layers while it tunes; grids and statistics are float32",
)
@click.option("--onnx/--no-onnx", default=True, show_default=True, help="export the result at once")
@click.option(
    "--report/--no-report", default=True, show_default=True, help="gather evidence and report"
)
@click.option(
    "--tensorboard", is_flag=True, help="also write event files (pip install 'gdfq[tensorboard]')"
)
@click.option(
    "--checkpoint-every",
    type=_Seconds(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="how often at most the run is written down, to go on from there",
)
@click.option(
    "--resume",
    is_flag=True,
    help="go on with the run in --out; without it, that is done if there is one to go on with",
)
def quantize_command(**options: Any) -> None:
    """Quantize MODEL without its data and write the run into a folder."""
    from gdfq.cli.quantize import run

    run(**options)


@cli.command("doctor")
@_network_options
@click.option("--bits", default="w4a4", show_default=True, help="of weights and activations, 2..8")
@click.option("--recipe", default="fast", show_default=True)
@click.option(
    "--placement", type=click.Choice(["relu", "full", "t1"]), help="[default: the recipe's]"
)
@click.option("--keep", multiple=True, metavar="PATTERN=WIDTH", help="as in gdfq quantize")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def doctor_command(**options: Any) -> None:
    """Tell what gdfq quantize would do to MODEL, before anything runs.

    Lists each layer and what becomes of it, what stays float, sizes, operations, and time and
    memory as one step of each stage shows them. Exits with 1 when the run could not begin.
    """
    from gdfq.cli.doctor import doctor

    sys.exit(doctor(**options))


@cli.command("evaluate")
@click.argument("folder", metavar="DIR", type=_PATH)
@click.option("--test", type=_Data(), required=True, help="labelled DATA")
def evaluate_command(folder: Path, test: Path) -> None:
    """Top-1 accuracy of the quantized network in DIR."""
    from gdfq.execution.listeners import Terminal
    from gdfq.quantized import load

    with Terminal() as terminal:
        accuracy = load(folder).evaluate(test, listener=terminal)
    click.echo(f"top-1 {accuracy:.2f} %")


@cli.command("export")
@click.argument("folder", metavar="DIR", type=_PATH)
@click.option(
    "--format",
    type=click.Choice(["onnx", "pt2", "safetensors"]),
    help="[default: by the name of --out, else onnx]",
)
@click.option("--out", type=_PATH, help="the file  [default: DIR/student.FORMAT]")
@click.option("--raw-input", is_flag=True, help="ONNX: take uint8 pixels, normalise in the file")
@click.option(
    "--safe-x86", is_flag=True, help="7-bit weights where 8 bits overflow on x86 without VNNI"
)
def export_command(**options: Any) -> None:
    """Write the quantized network in DIR as one file that deploys.

    The file is loaded by its own runtime and compared with the network, on images as they come and
    three times as large; it is kept only if the answers are the same.

    \b
    onnx         standard operators; int4 on disk, integer kernels when it runs
    pt2          torch.export program; runs with torch alone
    safetensors  codes at their true width; gdfq.load reads it
    """
    from gdfq.cli.export import export

    export(**options)


@cli.command("bench")
@click.argument("folder", metavar="DIR", type=_PATH)
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="ONNX file of the full-precision network",
)
@click.option(
    "--seconds",
    type=_Seconds(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="for each measurement",
)
def bench_command(folder: Path, against: Path | None, seconds: float) -> None:
    """Size, latency and throughput of DIR's ONNX file in ONNX Runtime.

    Without --against it is compared with the same network with float weights and no rounding,
    made for the purpose; that is as large and as fast as full precision.
    """
    from gdfq.cli.bench import bench

    bench(folder, against, seconds)


@cli.command("report")
@click.argument("folder", metavar="DIR", type=_PATH)
def report_command(folder: Path) -> None:
    """Write DIR/report.html from what the run in DIR left: what you got, and what to do next.

    The page needs no network. Its figures (SVG and PNG) are in DIR/report, its numbers in
    DIR/report.json. A part of the run that is missing or damaged is named; the rest appears.
    """
    from gdfq.report import write_report

    click.echo(write_report(folder))


@cli.command("compare")
@click.argument("folders", metavar="DIR DIR ...", type=_PATH, nargs=-1, required=True)
@click.option(
    "--out",
    type=_PATH,
    default=Path("comparison.html"),
    show_default=True,
    help="the page",
)
def compare_command(folders: tuple[Path, ...], out: Path) -> None:
    """Put runs side by side: accuracy, size, time, expected loss.

    Runs of other networks, or with other test images, are named and kept apart.
    """
    from gdfq.report.compare import compare
    from gdfq.report.terminal import print_comparison

    print_comparison(compare(folders, out))
    click.echo(f"{'page':10}{out}")


@cli.command("generate")
@_network_options
@_SEED
@click.option(
    "--recipe",
    default="fast",
    show_default=True,
    help="whose source makes the images; --steps is for those that learn, as paper's",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=1024, show_default=True, help="how many images"
)
@click.option("--out", type=_PATH, required=True, help="folder for the files")
@click.option("--png", is_flag=True, help="write PNG files as well, in a folder for each class")
def generate_command(**options: Any) -> None:
    """Make synthetic images from MODEL alone.

    \b
    images.npz           uint8 `images` and `labels`, as --test and --data read them
    images.npy           normalised float32, as the network takes them
    png/CLASS/N.png      with --png: an image folder, as --test and --data read it
    """
    from gdfq.cli.generate import write_images

    write_images(**options)


@cli.command("recipes")
def recipes_command() -> None:
    """List all recipes."""
    from gdfq.recipes import RECIPES

    for recipe in RECIPES.values():
        click.echo(f"{recipe.name:24}{recipe.summary}")


@cli.command("sweep")
@click.argument("file", metavar="SWEEP.yaml", type=_PATH)
@click.option(
    "--out", type=_PATH, help="folder for all runs  [default: beside the file, named after it]"
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="runs at a time  [default: the cores over --threads]"
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="of each run"
)
def sweep_command(**options: Any) -> None:
    """Quantize a grid of networks, widths, recipes and seeds, many at a time.

    Each run has a folder of its own, as from gdfq quantize, and a process of its own. Started
    again, it skips those that have finished. One that fails does not stop the others; the exit
    code is then 1. The table of all runs is also in sweep.json and sweep.csv.

    \b
    networks: [MODEL, ...] or a list of mappings with model, name, weights, input, mean, std,
              classifier, device, test, data and size; paths are relative to the file
    bits, recipes, placement, keep, seeds: one value or a list of them
    steps:    one number
    """
    from gdfq.cli.sweep import sweep

    sweep(**options)


@cli.command("demo")
@click.option("--out", type=_PATH, default=Path("demo-run"), show_default=True)
def demo_command(out: Path) -> None:
    """Train a small network on handwritten digits, lose the data, quantize it, compare."""
    from gdfq.cli.demo import demo

    demo(out)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0 for success, 1 failure, 2 wrong usage, 130 interrupted."""
    keep_freed_memory_()
    with warnings.catch_warnings():
        warnings.simplefilter("always", GdfqWarning)
        warnings.showwarning = _shown(warnings.showwarning)
        return _outcome(arguments)


def _shown(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: ours in a line, others as before."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, GdfqWarning):
            click.secho(f"warning: {message}", fg="yellow", err=True)
        else:
            otherwise(message, category, *where)

    return show


def _again(words: list[str]) -> str:
    """The command that goes on where this one was stopped."""
    if words[0] == "quantize" and "--resume" not in words:
        words = [words[0], "--resume", *words[1:]]
    return shlex.join(["gdfq", *words])


def _outcome(arguments: list[str] | None) -> int:
    try:
        cli.main(arguments, prog_name="gdfq", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UsageError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        return 2
    except GdfqError as error:
        click.secho(f"failed: {error}", fg="red", err=True)
        return 1
    except StoppedError as stop:
        words = sys.argv[1:] if arguments is None else arguments
        click.secho(f"{stop}; it goes on from here with: {_again(words)}", fg="yellow", err=True)
        return stop.code
    except (click.Abort, KeyboardInterrupt):
        click.secho("stopped; no finished run was written.", fg="yellow", err=True)
        return 130
    except (OSError, MemoryError) as error:
        click.secho(f"failed: {type(error).__name__}: {error}", fg="red", err=True)
        return 1
    except Exception:
        traceback.print_exc()
        click.secho(f"This is a bug in gdfq {__version__}; please report it.", fg="red", err=True)
        return 1
    return 0
