"""The functions of the Python API: `quantize`, `generate`, `load`, `compare_samples`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack, cast

from torch import Tensor

from gdfq.analysis.samples import SAMPLES, Features, SampleComparison
from gdfq.analysis.samples import compare_samples as _compare_samples
from gdfq.errors import UsageError, warn_renamed
from gdfq.execution.budget import MemoryBudget
from gdfq.execution.checkpoints import Checkpoints
from gdfq.execution.context import Context
from gdfq.execution.distributed import ALONE, Group
from gdfq.execution.modes import without_modes_of_caller
from gdfq.execution.precision import Precision
from gdfq.execution.progress import Listener, silent
from gdfq.execution.seeding import check_seed
from gdfq.functional.grid import Bits
from gdfq.generation.generation import Generation
from gdfq.graph.capture import ExampleInputs
from gdfq.models.registry import load_model
from gdfq.pipeline import make_images, run
from gdfq.plan.network import resolve_network
from gdfq.plan.options import Data, Model, NetworkOptions, Settings
from gdfq.plan.plan import Timing
from gdfq.plan.resolve import resolve
from gdfq.quantized import QuantizedNetwork
from gdfq.recipes import Recipe, find_recipe
from gdfq.runs.folder import load_folder
from gdfq.sources.candidates import Candidates


class RunOptions(Settings, total=False):
    """Options of `quantize` beside its arguments: its settings, and old spellings.

    Attributes:
        keep: Old spelling of `layer_bits`.
    """

    keep: Sequence[str]


@without_modes_of_caller()
def quantize(
    model: Model,
    example_input: ExampleInputs | None = None,
    bits: str | Bits | None = None,
    recipe: str | Recipe = "fast",
    *,
    data: Data | None = None,
    test: Data | None = None,
    proxy: Data | Candidates | None = None,
    generate_with: Generation | None = None,
    samples: int | None = None,
    seed: int = 0,
    listener: Listener = silent,
    checkpoints: str | Path | Checkpoints | None = None,
    precision: Precision = "float32",
    group: Group = ALONE,
    memory: str | int | MemoryBudget | None = None,
    **options: Unpack[RunOptions],
) -> QuantizedNetwork:
    """Quantize a trained network. Without `data` no real image is used.

    Args:
        model: An nn.Module that maps images to logits, or to other tensors (see `classifier`); a
            network that `gdfq.capture` returned; or a name as the command line takes it, such as
            "timm:resnet18" or "path/to/file.py:factory". It is not changed.
        example_input: One input or more [N, ...] as the network takes them (normalised): a tensor,
            or of a network with several inputs a tuple of tensors, or a mapping of the names of its
            arguments to tensors. Only a module needs it.
        bits: Bits of weights and activations, 2 to 8 each, as "w4a8", or 4 or 8 on floating-point
            grids, as "wfp4afp8"; or "auto", which chooses each layer's bits so that the ONNX file
            is no larger than `size` bytes. By default w4a8, or w4a4 in placement relu.
        recipe: A name in `gdfq.RECIPES`, or a `Recipe` of your own.
        data: Real images to tune on instead of synthetic ones: an .npz file, an image folder, a
            tensor, or a pair of images and labels. A network with several inputs, or with
            integers, needs it: a mapping of the inputs' names to tensors [N, ...].
        test: Labelled images. Teacher and student are measured on them at the end, into the
            result's `metrics`; they are used for nothing else, except that floats that no pixel can
            be normalised to show that the input's grid must not end where pixels do. For a network
            that is no classifier they need no labels: the error of its outputs against the
            teacher's is measured.
        proxy: Unlabelled photographs that have nothing to do with the lost data, in the forms of
            `data`; a folder may have any folders in it, and images are resized. Those that the
            network knows join the synthetic images (see "Images from elsewhere" in the docs);
            `metrics["candidates"]` has what was kept and why. They must not be private.
        generate_with: A text-to-image or class-conditional model of the library diffusers, whose
            images of the network's classes join the synthetic images as those of `proxy` do. They
            are made when the run begins, into a folder that other runs can use again.
        samples: Images that a denoiser of a diffusion model and its student generate at the end
            from the same noise; `metrics["samples"]` says how they compare. 64 by default.
        seed: Seed of all randomness.
        listener: Called with every step of the run.
        checkpoints: A folder that the run writes its state into about once a minute, and whenever
            the listener raises. The same call with the same folder resumes there, and ends with
            the same result to the bit. The folder stays when the run has finished.
        precision: "bfloat16" rounds the products in layers to bfloat16 while images are made and
            the student is tuned.
        group: The processes that do the work together (see "Use several GPUs" in the docs). All
            of them make the same call; the first alone measures on `test` and writes checkpoints.
        memory: Memory for the activations of images that pass a network together, as "2GiB" or in
            bytes. The default is 1.25 GiB on a CPU and half of the free memory of a GPU.
        **options: Further options, by name:

            - target: Where the result is to run: a name in `gdfq.TARGETS` or a `Target`. What it
              cannot express is refused before the run. `QuantizedNetwork.export` writes the file.
            - size: With bits "auto": the size of the ONNX file, at most, as "300KB" or in bytes.
            - placement: "full" (deployable) or "relu" (the protocol of the published tables).
            - layer_bits: Layers with other bits, as ["stage1.*=float", "last=8"].
            - group_size: Of a language model: most columns of a weight that share a scale.
            - equalizer: Of a language model: "hadamard", "reassembly", "smooth" or "none".
            - budget: The time of the call, in seconds or as "5m" or "2m30s", without that of
              measuring on `test`. One step of each kind is measured first; images, iterations and
              steps are chosen for the time that is left. `metrics["effort"]` has them; as
              options (`**effort`) they repeat the run.
            - images: Images that are made before the student learns.
            - iterations: Updates of each of these images.
            - steps: Batches in total; 0 without tuning.
            - batch: Images in a batch.
            - mean, std: Input normalisation per channel, for pixels in 0..1.
            - resize: How the files of an image folder get the network's size.
            - classifier: Whether the output is the logits of classes.
            - weights, input_shape: Weights file and shape of one input, of a model that is a name.
            - device: "cpu", "cuda" or "auto", or a `torch.device`.
            - scheduler: Of a denoiser of a diffusion model: the scheduler of diffusers that it is
              sampled with, its configuration, or the file of that. The denoiser is quantized on
              its own trajectories; `input_shape` is the shape of its image.
            - sampling_steps: Steps of a trajectory.
            - conditions: Conditions of the denoiser [M, ...], of which each trajectory gets one.

    Returns:
        The quantized network, which runs as a module, and can be evaluated, saved and exported.

    Raises:
        UsageError: The input cannot be used.
        GdfqError: The run fails.
    """
    timing = Timing(started=time.perf_counter())
    context = Context(
        seed=check_seed(seed),
        listener=listener,
        group=group,
        precision=precision,
        memory=MemoryBudget.of(memory),
    )
    if checkpoints is not None:
        checkpointer = Checkpoints.of(checkpoints, writes=group.rank == 0)
        context = replace(context, checkpointer=checkpointer)
    plan = resolve(
        model,
        example_input,
        bits,
        recipe,
        data=data,
        test=test,
        proxy=proxy,
        generate_with=generate_with,
        samples=samples,
        context=context,
        timing=timing,
        **_renamed(options),
    )
    return run(plan, context)


@without_modes_of_caller()
def generate(
    model: Model,
    example_input: ExampleInputs | None = None,
    count: int = 1024,
    recipe: str | Recipe = "fast",
    *,
    steps: int | None = None,
    seed: int = 0,
    listener: Listener = silent,
    memory: str | int | MemoryBudget | None = None,
    **options: Unpack[NetworkOptions],
) -> tuple[Tensor, Tensor | None]:
    """Make synthetic images alone.

    Args:
        model: As in `quantize`.
        example_input: As in `quantize`.
        count: How many images.
        recipe: The recipe whose source makes the images.
        steps: Steps of a generator that learns. Other sources make each image once.
        seed: Seed of all randomness.
        listener: Called with every step.
        memory: As in `quantize`.
        **options: `classifier`, `device`, `weights`, `input_shape`, as in `quantize`.

    Returns:
        Images [count, *input_shape], normalised floats, and their labels [count], or None for a
        network whose outputs are not classes. Both on the CPU.

    Raises:
        UsageError: The input cannot be used.
        GdfqError: A loss is not finite.
    """
    chosen = find_recipe(recipe)
    network = resolve_network(model, example_input, **options)
    context = Context(seed=check_seed(seed), listener=listener, memory=MemoryBudget.of(memory))
    return make_images(network.teacher, chosen, count, context, steps=steps)


@without_modes_of_caller()
def load(path: str | Path) -> QuantizedNetwork:
    """Load a quantized network.

    Args:
        path: The folder of a run, a folder that `QuantizedNetwork.save` wrote, or a .safetensors
            file that was saved or exported. Neither your code nor the original network is needed.

    Raises:
        UsageError: There is no finished network, or it is damaged or of another version.
    """
    path = Path(path)
    return load_folder(path) if path.is_dir() else QuantizedNetwork.read(path)


@without_modes_of_caller()
def compare_samples(
    student: QuantizedNetwork,
    model: Model,
    example_input: ExampleInputs | None = None,
    *,
    samples: int | None = None,
    features: Features | str | None = None,
    seed: int = 0,
    listener: Listener = silent,
    memory: str | int | MemoryBudget | None = None,
    **options: Unpack[NetworkOptions],
) -> SampleComparison:
    """Compare the images that a denoiser of a diffusion model and its student generate.

    Both start from the same noise. The images of full precision are the reference: the distance to
    a data set would also measure what the original network does wrong.

    Args:
        student: The quantized denoiser.
        model: The denoiser that it was made from, as in `quantize`.
        example_input: As in `quantize`.
        samples: Images of each; 64 by default.
        features: Gives the features [N, D] of images [N, *shape] for a Fréchet distance: a
            function, or a MODEL as the command line takes it.
        seed: Seed of the noise.
        listener: Called with every call of a denoiser.
        memory: As in `quantize`.
        **options: As in `quantize`: `scheduler`, `sampling_steps`, `conditions`, `input_shape`,
            `weights`, `device`.

    Raises:
        UsageError: The model is no denoiser, or not the one that the student was made from.
    """
    network = resolve_network(model, example_input, **options)
    teacher, sampler = network.teacher, network.sampler
    if sampler is None:
        raise UsageError(
            "images are generated by denoisers of diffusion models, which have a scheduler; none "
            "was given. Give scheduler, or evaluate on test images."
        )
    if teacher.inputs != student.card.inputs:
        raise UsageError(
            "a student is compared with the network that it was made from; this one takes "
            f"{', '.join(map(str, student.card.inputs))}, and the model "
            f"{', '.join(map(str, teacher.inputs))}. Give the options of the run."
        )
    if isinstance(features, str):
        features = load_model(features).module.eval().to(teacher.device)
    return _compare_samples(
        teacher,
        student.to(teacher.device).network,
        sampler,
        SAMPLES if samples is None else samples,
        features,
        Context(seed=check_seed(seed), listener=listener, memory=MemoryBudget.of(memory)),
    )


def _renamed(options: RunOptions) -> Settings:
    """The options with old spellings replaced."""
    values = dict(options)
    if "keep" in values:
        warn_renamed("keep", "layer_bits")
        values["layer_bits"] = values.pop("keep")
    return cast(Settings, values)
