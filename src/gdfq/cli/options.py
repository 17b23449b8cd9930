"""Options that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from gdfq.cli.types import PATH, DataPath, Duration, Numbers, Shape, Size
from gdfq.errors import warn_renamed

Command = TypeVar("Command", bound=Callable[..., Any])


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return a decorator that applies all options, in this order in the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _renamed(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    """Add the values of an old spelling to those of the new one."""
    if value:
        warn_renamed(f"--{parameter.name}", "--layer-bits")
        context.params["layer_bits"] = (*context.params.get("layer_bits", ()), *value)
    return value


def _with_old(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001 (as click calls it)
    value: tuple[str, ...],
) -> tuple[str, ...]:
    """The values, after those that an old spelling gave before."""
    return (*context.params.get("layer_bits", ()), *value)


def _old_format(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001 (as click calls it)
    value: str | None,
) -> str | None:
    """Take an old spelling for the target."""
    if value is not None:
        warn_renamed("--format", "--target")
        context.params["target"] = value
    return value


def _target(
    context: click.Context,
    parameter: click.Parameter,  # noqa: ARG001 (as click calls it)
    value: str | None,
) -> str | None:
    """The target, or the one that an old spelling gave before."""
    return value or context.params.get("target")


target_option = click.option(
    "--target",
    metavar="NAME",
    help="Where the result is to run (gdfq targets lists all). What it cannot express is refused "
    "before the run, and the exported file is of this kind.  [default: onnx; of a language model "
    "none]",
)
export_target_option = together(
    click.option(
        "--target",
        metavar="NAME",
        callback=_target,
        help="Where the file is to run (gdfq targets lists all).  [default: from the name of "
        "--out, else onnx]",
    ),
    click.option(
        "--format",
        hidden=True,
        is_eager=True,
        expose_value=False,
        callback=_old_format,
    ),
)
network_options = together(
    click.argument("model"),
    click.option(
        "--weights",
        type=PATH,
        help="Safetensors file or torch checkpoint with the network's weights; FILE#KEY chooses "
        "one of several state dicts; 'random' leaves a library's network untrained.  [default: the "
        "library's pretrained weights]",
    ),
    click.option(
        "--input",
        "input_shape",
        type=Shape(),
        help="Shape of one input, such as 3x32x32.  [default: the network's own, if known]",
    ),
    click.option(
        "--mean",
        type=Numbers(),
        help="Mean of the input normalisation, one number for each channel or for all, for pixels "
        "in 0..1.  "
        "[default: the network's own, else 0]",
    ),
    click.option(
        "--std",
        type=Numbers(),
        help="Standard deviation of the input normalisation, as --mean.  "
        "[default: the network's own, else 1]",
    ),
    click.option(
        "--classifier/--no-classifier",
        default=None,
        help="Whether the output is the logits of classes.  [default: if it is one tensor N x C]",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Device to compute on; auto takes the GPU if there is one.",
    ),
)
"""Which network it is, and what it takes."""

denoiser_options = together(
    click.option(
        "--scheduler",
        type=PATH,
        metavar="FILE",
        help="For the denoiser of a diffusion model: the scheduler_config.json of diffusers that "
        "it is sampled with (pip install 'gdfq[diffusion]').  [default: that of a diffusers:ID]",
    ),
    click.option(
        "--sampling-steps",
        type=click.IntRange(min=1),
        help="Steps of a trajectory of the scheduler.  [default: 50]",
    ),
    click.option(
        "--conditions",
        type=DataPath(),
        help="An .npz file with `conditions`, M x ...: labels of classes or embeddings of prompts, "
        "of which each trajectory gets one.  [default: the classes of a diffusers:ID]",
    ),
)
"""How a denoiser of a diffusion model is called."""


def _steps_option(least: int, note: str = "") -> Callable[[Any], Any]:
    return click.option(
        "--steps",
        type=click.IntRange(min=least),
        help=f"Batches in total{note}.  [default: the recipe's own]",
    )


generator_steps_option = _steps_option(1)
"""Steps of a generator that learns."""

effort_options = together(
    click.option(
        "--budget",
        type=Duration(),
        help="Time of the whole run, such as 90s, 5m or 2m30s, without that of measuring on "
        "--test. Images, iterations and steps are chosen for it from one measured step of each "
        "kind.",
    ),
    click.option(
        "--images",
        type=click.IntRange(min=1),
        help="Images that are made.  [default: the recipe's own]",
    ),
    click.option(
        "--iterations",
        type=click.IntRange(min=1),
        help="Updates of each of these images.  [default: the recipe's own]",
    ),
    _steps_option(0, "; 0 without tuning"),
)
"""How much work the run does."""

batch_option = click.option(
    "--batch", type=click.IntRange(min=1), help="Images in a batch.  [default: the recipe's own]"
)
placement_option = click.option(
    "--placement",
    type=click.Choice(["full", "relu", "t1"]),
    metavar="[full|relu]",
    help="Which tensors are quantized. full: all that an integer runtime computes with "
    "(deployable); relu: weights and ReLU outputs, as in published tables.  "
    "[default: the recipe's own]",
)
equalizer_option = click.option(
    "--equalizer",
    type=click.Choice(["hadamard", "reassembly", "smooth", "none"]),
    help="Language models: how outliers of activations are spread before rounding.  "
    "[default: hadamard, where the model allows it]",
)
group_size_option = click.option(
    "--group-size",
    type=click.IntRange(min=2),
    help="Language models: most columns of a weight that share a scale.  [default: all columns of "
    "an output channel]",
)
layer_bits_option = together(
    click.option(
        "--layer-bits",
        multiple=True,
        metavar="PATTERN=BITS",
        callback=_with_old,
        help="Other bits for matching layers, such as 'stage1.*=float' or last=8 (first and last "
        "are the first and the last layer; narrow are depthwise convolutions, and others whose "
        "outputs are sums of 32 products or fewer). May be given several times; the first match "
        "counts. In placement full narrow=7 is the default below 8 bits, and where weights or "
        "activations have 2 bits first=7 and last=7; of a language model last=float, its head.",
    ),
    click.option(
        "--keep", multiple=True, hidden=True, is_eager=True, expose_value=False, callback=_renamed
    ),
)
proxy_option = click.option(
    "--proxy",
    type=DataPath(),
    help="Unlabelled photographs that have nothing to do with the lost data: a folder of images, "
    "or an .npz file. Those that the network knows join the synthetic images.",
)
generation_options = together(
    click.option(
        "--generate-with",
        metavar="diffusers:ID",
        help="A text-to-image or class-conditional pipeline, as diffusers:ID_OR_FOLDER, whose "
        "images of the network's classes join the synthetic ones as those of --proxy do (pip "
        "install 'gdfq[diffusion]').",
    ),
    click.option(
        "--classes",
        type=PATH,
        metavar="FILE",
        help="Text file with the name of one class a line, in the order of the network's outputs.  "
        "[default: the network's own names]",
    ),
    click.option(
        "--guidance",
        type=click.FloatRange(min=0),
        help="Scale of classifier-free guidance of --generate-with.  [default: 3.5]",
    ),
    click.option(
        "--denoising-steps",
        type=click.IntRange(min=1),
        help="Steps of an image of --generate-with.  [default: the pipeline's own]",
    ),
    click.option(
        "--classes-per-prompt",
        type=click.IntRange(min=1),
        help="Classes that a prompt of --generate-with names.  [default: 1]",
    ),
    click.option(
        "--generate-batch",
        type=click.IntRange(min=1),
        help="Images that --generate-with makes together.  [default: 4]",
    ),
)
"""Images of a text-to-image model."""

seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of all randomness.",
)
recipe_option = click.option(
    "--recipe",
    default="fast",
    show_default=True,
    help="Method: fast, quick, paper, ...; text for language models (gdfq recipes lists all).",
)
memory_option = click.option(
    "--memory",
    type=Size(),
    help="Memory for the activations of images that pass a network together, such as 512MiB or "
    "2GiB.  [default: 1.25GiB; on a GPU half of its free memory]",
)
