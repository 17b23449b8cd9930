"""Options of a plan, as the user gives them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from gdfq.data.datasets import ImageData
from gdfq.data.preprocessing import PerChannel, Resize
from gdfq.data.tensors import TensorData
from gdfq.deploy.target import Target
from gdfq.generation.generation import Generation
from gdfq.graph.capture import Captured
from gdfq.sources.candidates import Candidates
from gdfq.student.scheme import Placement

Model = str | nn.Module | Captured
"""A network: a name as the command line takes it, a module, or a network that was captured."""
Tensors = Mapping[str, Tensor]
Data = (
    str
    | Path
    | Tensor
    | tuple[Tensor, Tensor]
    | ImageData
    | Tensors
    | tuple[Tensors, Tensor]
    | TensorData
)
"""Images: an .npz file, an image folder, a tensor, or images and their labels."""

DEFAULT_BITS: Mapping[Placement, str] = {"full": "w4a8", "relu": "w4a4", "tokens": "w4a8"}
"""Bits by placement. The published protocol is at w4a4. Runtimes compute activations of 4 bits in
containers of 8, so that w4a8 is as small and as fast as w4a4, and loses far less."""


class NetworkOptions(TypedDict, total=False):
    """Options that say which network it is, and what it takes.

    Attributes:
        weights: A safetensors file or a torch state dict to load into the network, or "random" for
            a library's network without its pretrained weights. For a `model` that is a name.
        input_shape: The shape of one input, such as (3, 32, 32), for a `model` that is a name and
            does not say it.
        mean: Mean of the input normalisation for pixels in 0..1: a number for each channel (a
            sequence, an array or a tensor), or one number for all.
        std: Standard deviation of the input normalisation for pixels in 0..1, as `mean`.
        resize: How the files of an image folder get the network's size.
        classifier: Whether the output is of classes: their logits or, behind a softmax, their
            probabilities. By default it is if it is one tensor [N, C] with C >= 2 that is no
            sigmoid and no unit vector. Any other network (detection, segmentation, regression) has
            no labels: its outputs themselves are matched, relative to their size.
        device: "cpu", "cuda" or "auto", or a `torch.device`.
        scheduler: The scheduler of a diffusion model, of which the network is the denoiser: its
            configuration of diffusers, or the file of it. By default that of the pipeline, for a
            `model` that is one.
        sampling_steps: Steps of a trajectory of this scheduler. 50 by default.
        conditions: Conditions [M, ...] of the denoiser, of which each trajectory gets one: labels
            of classes or embeddings of prompts, as a tensor or in an .npz file. By default the
            classes of the network, where it says them.
    """

    weights: str | Path | None
    input_shape: tuple[int, ...] | None
    mean: PerChannel | None
    std: PerChannel | None
    resize: Resize | None
    classifier: bool | None
    device: str | torch.device
    scheduler: str | Path | Mapping[str, Any] | None
    sampling_steps: int | None
    conditions: str | Path | Tensor | None


class SchemeOptions(TypedDict, total=False):
    """Options that say what is quantized, apart from the bits.

    Attributes:
        size: With bits "auto": the size of the ONNX file, at most, as "300KB" or in bytes.
        placement: "full" (deployable) or "relu" (weights and ReLU outputs alone, the protocol of
            the published tables). By default the recipe's own.
        group_size: Of a language model: most columns of a weight that share a scale. By default
            each output channel has one.
        equalizer: Of a language model: "hadamard", "reassembly", "smooth" or "none". By default
            the recipe's own, where the model has a form that it can change.
        layer_bits: Layers with other bits, as "stage1.*=float" or "last=8"; the first pattern that
            matches a layer counts. Narrow layers of a deployable network (depthwise convolutions,
            and others whose outputs are sums of 32 products or fewer) have 7 bits unless they are
            named here, as "narrow=4"; so have the first and the last layer with 2 bits of weights
            or activations. They have 8 where the weights of other layers have. The last layer of a
            language model, its head, stays float unless it is named: "last=8".
    """

    size: str | int | None
    placement: str | None
    group_size: int | None
    equalizer: str | None
    layer_bits: Sequence[str]


class EffortOptions(TypedDict, total=False):
    """Options that say how much work a run does.

    Attributes:
        steps: Batches in total; 0 without tuning. By default the recipe's own.
        images: Images that are made before the student learns. By default the recipe's own.
        iterations: Updates of each of these images. By default the recipe's own.
        batch: Images in a batch. By default the recipe's own.
        budget: The time of the whole run, in seconds or as "5m": images, iterations and steps are
            chosen for it from one measured step of each kind.
    """

    steps: int | None
    images: int | None
    iterations: int | None
    batch: int | None
    budget: str | float | None


class MethodOptions(SchemeOptions, EffortOptions, total=False):
    """Options that change a recipe.

    Attributes:
        target: Where the result is to run: a name in `gdfq.TARGETS` or a `Target`. What it cannot
            express is refused before the run.
    """

    target: str | Target | None


class ImageOptions(TypedDict, total=False):
    """Images that the user gives, or has made by another model.

    Attributes:
        data: Real images instead of synthetic ones.
        test: Images to measure on; they are used for nothing else.
        proxy: Images that have nothing to do with the network, to join the synthetic ones.
        generate_with: Images of a text-to-image model, to join them in the same way.
        samples: Images that a denoiser of a diffusion model and its student generate at the end
            from the same noise, to be compared; 0 for none. 64 by default.
    """

    data: Data | None
    test: Data | None
    proxy: Data | Candidates | None
    generate_with: Generation | None
    samples: int | None


class Settings(NetworkOptions, MethodOptions, total=False):
    """All options that are no images."""


class PlanOptions(Settings, ImageOptions, total=False):
    """All options of a plan, apart from those that are arguments of their own."""


def options_of(options: Mapping[str, Any], kind: type) -> Any:
    """Return the options of one kind."""
    return {name: value for name, value in options.items() if name in kind.__annotations__}
