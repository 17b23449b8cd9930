"""The commands: their arguments and help. Each command's work is in a module of its own.

Torch is imported by the commands that need it, not to print help.
"""

import time
from pathlib import Path
from typing import Any

import click

from gdfq.cli.exit_codes import exit_code_of, warnings_in_a_line
from gdfq.cli.options import (
    batch_option,
    denoiser_options,
    effort_options,
    equalizer_option,
    export_target_option,
    generation_options,
    generator_steps_option,
    group_size_option,
    layer_bits_option,
    memory_option,
    network_options,
    placement_option,
    proxy_option,
    recipe_option,
    seed_option,
    target_option,
)
from gdfq.cli.types import PATH, DataPath, Seconds, Shape, Size
from gdfq.execution.malloc import keep_freed_memory_
from gdfq.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gdfq")
def cli() -> None:
    """Make a trained neural network small and fast when its training data cannot be had.

    \b
    MODEL is one of
      timm:NAME, torchvision:NAME, ptcv:NAME   a pretrained network of a library
      hf:ID or hf:FOLDER                       an image classifier or a causal language model of
                                               Hugging Face
      diffusers:ID or diffusers:FOLDER         the denoiser of a diffusion model
      path/to/file.py:factory                  a function without arguments that returns an
      package.module:factory                   nn.Module; this runs its code
      path/to/program.pt2                      from torch.export.save; loading it can run code

    DATA is an .npz file with `images` (uint8, N x C x H x W) and, for a test, `labels`, or a folder
    with one sub-folder of images for each class. Of a language model it is an .npz file with
    `tokens` (integers, sequences x tokens), or a .txt file for the model's own tokenizer.
    """


@cli.command("quantize")
@network_options
@denoiser_options
@click.option(
    "--bits",
    help="Bits of weights and activations, 2 to 8 each, or fp4 and fp8 for floating-point grids, "
    "as wfp4afp8; a16 leaves activations of language models float; auto chooses each layer's to "
    "fit --size.  "
    "[default: w4a8; w4a4 in placement relu]",
)
@click.option(
    "--size",
    type=Size(),
    help="With --bits auto: maximum size of the ONNX file, such as 300KB or 1.5MiB.",
)
@recipe_option
@target_option
@placement_option
@group_size_option
@equalizer_option
@layer_bits_option
@effort_options
@batch_option
@memory_option
@seed_option
@click.option("--data", type=DataPath(), help="Real DATA to tune on instead of synthetic images.")
@proxy_option
@generation_options
@click.option(
    "--test",
    type=DataPath(),
    help="DATA to measure on; it is used for nothing else. A classifier needs labels.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    help="Images that a denoiser and its student generate at the end, to be compared.  "
    "[default: 64]",
)
@click.option("--out", type=PATH, required=True, help="Folder for the run.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the products in layers while images are made and the student is tuned.",
)
@click.option(
    "--onnx/--no-onnx",
    default=True,
    show_default=True,
    help="Export the result: as an ONNX file, or as the file of --target.",
)
@click.option(
    "--report/--no-report",
    default=True,
    show_default=True,
    help="Measure what the report shows, and write the report.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Also write TensorBoard event files (pip install 'gdfq[tensorboard]').",
)
@click.option(
    "--checkpoint-every",
    type=Seconds(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Minimum time between checkpoints.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Resume the run in --out, and fail if there is none. Without this flag a checkpoint in "
    "--out is resumed automatically.",
)
def quantize_command(**options: Any) -> None:
    """Quantize MODEL without its data and write the run into a folder."""
    started = time.perf_counter()
    from gdfq.cli.generation import taken_from
    from gdfq.cli.quantize import quantize
    from gdfq.runs.names import GENERATED

    generation = taken_from(options, options["out"] / GENERATED)
    given: Any = {name: options.pop(name) for name in ("data", "proxy", "test", "samples")}
    given["generate_with"] = generation
    quantize(started=started, given=given, **options)


@cli.command("doctor")
@network_options
@denoiser_options
@click.option(
    "--bits",
    help="Bits of weights and activations, 2 to 8 each, or fp4 and fp8 for floating-point grids.  "
    "[default: w4a8; w4a4 in placement relu]",
)
@recipe_option
@target_option
@placement_option
@group_size_option
@equalizer_option
@layer_bits_option
@effort_options
@batch_option
@memory_option
@click.option("--data", type=DataPath(), help="Real DATA to tune on instead of synthetic images.")
@proxy_option
@click.option("--test", type=DataPath(), help="DATA to measure on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(**options: Any) -> int:
    """Show what gdfq quantize would do to MODEL, without a run.

    Lists the layers with their bits, the operators that stay in float, sizes and operations, and
    which weights and images were read; estimates time and memory from one step of each stage.
    With --target it also says whether the network fits, what the target asks of it, and whether its
    runtime is installed. Exits with 1, or with 2 if an option is the reason, if the run could not
    start.
    """
    from gdfq.cli.doctor import doctor

    return doctor(**options)


@cli.command("evaluate")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--test", type=DataPath(), help="Labelled DATA, or the text of a language model.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Of a denoiser: images that it and --model generate from the same noise.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="What the network in DIR was made from: needed with --samples; a language model is then "
    "also compared with it.",
)
@click.option(
    "--features",
    metavar="MODEL",
    help="With --samples: a network of images, as a MODEL, whose outputs are the features of a "
    "Fréchet distance.",
)
@click.option("--weights", type=PATH, help="Weights of --model, as for gdfq quantize.")
@click.option("--input", "input_shape", type=Shape(), help="Shape of the image of --model.")
@denoiser_options
@seed_option
@memory_option
def evaluate_command(folder: Path, **options: Any) -> None:
    """Measure the accuracy of the network in DIR, its perplexity, or the images of a denoiser.

    With --samples the quantized denoiser in DIR and the original, --model, generate images from the
    same noise. The PSNR says how equal they are; the Fréchet distance compares them as sets.
    """
    from gdfq.cli.evaluate import evaluate

    evaluate(folder, **options)


@cli.command("export")
@click.argument("folder", metavar="DIR", type=PATH)
@export_target_option
@click.option(
    "--out", type=PATH, help="The file.  [default: student and the suffix of the target, in DIR]"
)
@click.option(
    "--raw-input",
    is_flag=True,
    help="ONNX, LiteRT and OpenVINO: take uint8 pixels and normalise them inside the file.",
)
@click.option(
    "--safe-x86",
    is_flag=True,
    help="ONNX and OpenVINO: use 7-bit weights in layers whose 8-bit sums could saturate on x86 "
    "without VNNI (quantizing to w7a8 loses less).",
)
@click.option(
    "--model",
    help="MODEL that the network was made from, for target compressed-tensors: hf:ID or hf:FOLDER.",
)
@memory_option
def export_command(**options: Any) -> None:
    """Write the quantized network in DIR as one file that deploys.

    The file is loaded by its own runtime and compared with the network, on usual inputs and on
    extreme ones: images three times as large, texts of another length. It is kept only if its
    outputs are the same. A target that cannot hold the network as it is says which layers would
    have to be quantized again.
    """
    from gdfq.cli.export import export

    export(**options)


@cli.command("bench")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="ONNX file of the full-precision network.",
)
@click.option(
    "--seconds",
    type=Seconds(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Time for each measurement.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 32),
    show_default=True,
    help="Images in a call; repeat it for several.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Threads of the runtime; repeat it for several. More than there are cores are left out.",
)
def bench_command(**options: Any) -> None:
    """Compare DIR's exported files in their runtimes: size, memory, latency and throughput.

    Each file runs in a process of its own, in the runtime of its target. A file whose runtime is
    not installed is listed with the extra that installs it. They are compared with the same network
    in float32, once for each runtime, or with the file of --against. "faster" is relative to the
    first row.
    """
    from gdfq.cli.bench import bench

    bench(**options)


@cli.command("report")
@click.argument("folder", metavar="DIR", type=PATH)
def report_command(folder: Path) -> None:
    """Write DIR/report.html from the files of the run in DIR.

    The page needs no network connection. Its figures (SVG and PNG) are in DIR/report, its numbers
    in DIR/report.json. Parts of the run that are missing or damaged are named; the rest is shown.
    """
    from gdfq.report import write_report

    click.echo(write_report(folder))


@cli.command("compare")
@click.argument("folders", metavar="DIR DIR ...", type=PATH, nargs=-1, required=True)
@click.option(
    "--out",
    type=PATH,
    default=Path("comparison.html"),
    show_default=True,
    help="The page to write.",
)
def compare_command(folders: tuple[Path, ...], out: Path) -> None:
    """Compare runs: accuracy, size, time, expected accuracy drop.

    Runs of another network are listed separately. A run that was tested on other images is shown
    without its accuracy.
    """
    from gdfq.cli.compare import compare

    compare(folders, out)


@cli.command("generate")
@network_options
@recipe_option
@generator_steps_option
@memory_option
@seed_option
@click.option(
    "--count", type=click.IntRange(min=1), default=1024, show_default=True, help="Number of images."
)
@click.option("--out", type=PATH, required=True, help="Folder for the files.")
@click.option("--png", is_flag=True, help="Also write PNG files, in a folder for each class.")
@generation_options
def generate_command(**options: Any) -> None:
    """Make synthetic images from MODEL alone.

    --steps is for recipes whose generator learns, such as paper.

    \b
    images.npz           uint8 `images` and `labels`, as --test and --data read them
    images.npy           normalised float32, as the network takes them
    png/CLASS/N.png      with --png: an image folder, as --test and --data read it

    With --generate-with the images are PNG files of a text-to-image model, which gdfq quantize
    reads with --proxy. They are made once, for any network with these classes. --recipe, --steps,
    --png and --memory are refused then.
    """
    from gdfq.cli.generate import generate
    from gdfq.cli.generation import check_no_recipe, taken_from

    generation = taken_from(options, options["out"])
    if generation is not None:
        check_no_recipe(click.get_current_context())
    generate(generation=generation, **options)


@cli.command("recipes")
def recipes_command() -> None:
    """List all recipes."""
    from gdfq.recipes import RECIPES

    for recipe in RECIPES.values():
        click.echo(f"{recipe.name:24}{recipe.summary}")


@cli.command("targets")
def targets_command() -> None:
    """List where a quantized network can run: files, runtimes, versions, what is proven."""
    from gdfq.cli.targets import targets

    targets()


@cli.command("sweep")
@click.argument("file", metavar="SWEEP.yaml", type=PATH)
@click.option("--out", type=PATH, help="Folder for all runs.  [default: named after the file]")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Runs at the same time.  [default: number of cores / --threads]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of each run.",
)
def sweep_command(**options: Any) -> int:
    """Quantize a grid of networks, bits, recipes and seeds, several at a time.

    Each run has its own folder, as from gdfq quantize, and its own process. If you start the sweep
    again, finished runs are skipped. A run that fails does not stop the others; the exit code is
    then 1. The table of all runs is also in sweep.json and sweep.csv.

    \b
    networks: [MODEL, ...] or a list of mappings with model, name, weights, input, mean, std,
              classifier, device, test, data, proxy and size; paths are relative to the file
    bits, recipes, placement, layer_bits, seeds: one value or a list of them
    steps:    one number
    budget:   one time, such as 5m, of each run
    """
    from gdfq.cli.sweep import sweep

    return sweep(**options)


@cli.command("demo")
@click.option(
    "--out", type=PATH, default=Path("demo-run"), show_default=True, help="Folder for the run."
)
def demo_command(out: Path) -> None:
    """Train a small network on handwritten digits, drop the data, quantize it, compare."""
    from gdfq.cli.demo import demo

    demo(out)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code (see `gdfq.cli.exit_codes`)."""
    keep_freed_memory_()
    with warnings_in_a_line():
        return exit_code_of(
            lambda: cli.main(arguments, prog_name="gdfq", standalone_mode=False), arguments
        )
