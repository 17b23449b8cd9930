"""The network of a plan: loaded, captured, and how images become its inputs."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.data.class_names import ClassNames, of_outputs
from gdfq.data.preprocessing import PerChannel, Preprocessing, Resize, normalisation
from gdfq.data.tokens import Decode, Encode
from gdfq.data.vocabulary import Vocabulary
from gdfq.deploy.safetensors import STUDENT_FILE
from gdfq.diffusion.sampler import Sampler
from gdfq.errors import UsageError
from gdfq.execution.precision import find_device
from gdfq.execution.seeding import stream as random_stream
from gdfq.graph.capture import Captured, ExampleInputs, capture, check_tensors
from gdfq.graph.inputs import image_shape, takes_images
from gdfq.graph.wrappers import described, unwrapped
from gdfq.models.denoisers import Denoiser
from gdfq.models.loaded import names_of
from gdfq.models.registry import Loaded, load_model, weights_hash
from gdfq.plan.denoiser import Conditions, DenoiserOptions, captured_denoiser, check_inputs
from gdfq.plan.options import Model
from gdfq.quantized import QuantizedNetwork
from gdfq.student.integer_network import IntegerNetwork


@dataclass(frozen=True, eq=False)
class Network:
    """A captured network on its device, and how images become its inputs.

    Attributes:
        teacher: The captured network.
        preprocessing: From pixels to its inputs.
        assumed: The parts of the normalisation ("mean", "std") that are neither given nor known:
            0 and 1 were taken.
        weights_sha256: A hash of the weights, as the user's network has them.
        seconds: How long loading and capturing took.
        class_names: A name for each class, where the network says it.
        notes: What was taken of the weights file, for the user.
        capture_seconds: How long capturing alone took.
        sampler: How it is called, if it is a denoiser of a diffusion model.
        encode: The tokenizer of a language model, where it comes with one.
        decode: The text of its token ids.
    """

    teacher: Captured
    preprocessing: Preprocessing
    weights_sha256: str
    assumed: tuple[str, ...] = ()
    seconds: float = 0.0
    class_names: ClassNames | None = None
    notes: tuple[str, ...] = ()
    capture_seconds: float = 0.0
    sampler: Sampler | None = None
    encode: Encode | None = None
    decode: Decode | None = None


def resolve_network(
    model: Model,
    example_input: ExampleInputs | None = None,
    *,
    weights: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    resize: Resize | None = None,
    classifier: bool | None = None,
    device: str | torch.device = "auto",
    scheduler: str | Path | Mapping[str, Any] | None = None,
    sampling_steps: int | None = None,
    conditions: Conditions | None = None,
) -> Network:
    """Load and capture a network.

    Args:
        model: The network: a name as the command line takes it, a module, or a captured network.
        example_input: Inputs of one call of a module, whose shapes the network keeps.
        weights: See `NetworkOptions`, as for all that follow.
        input_shape: See `NetworkOptions`.
        mean: See `NetworkOptions`.
        std: See `NetworkOptions`.
        resize: See `NetworkOptions`.
        classifier: See `NetworkOptions`.
        device: See `NetworkOptions`.
        scheduler: See `NetworkOptions`.
        sampling_steps: See `NetworkOptions`.
        conditions: See `NetworkOptions`.

    Raises:
        UsageError: The network, its weights, its input or the device cannot be used.
    """
    started = time.perf_counter()
    on = find_device(device)
    normalisation(mean, std)  # refuses what can be no mean or std before a network is loaded
    if not isinstance(model, str | nn.Module | Captured):
        raise UsageError(
            "a model is an nn.Module, a network that gdfq.capture returned, or a name such as "
            f"timm:resnet18; got {described(model)}."
        )
    if isinstance(model, str):
        _refuse_saved(model)
    of_denoiser = DenoiserOptions.of(scheduler, sampling_steps, conditions)
    loaded = load_model(model, weights) if isinstance(model, str) else None
    _refuse_quantized(model if loaded is None else loaded.module)
    loaded_at = time.perf_counter()
    if example_input is not None:
        check_tensors(example_input)
    sampler = _sampler(of_denoiser, model, loaded, example_input, input_shape)
    if loaded is None:
        _check_of_module(weights, None if sampler is not None else input_shape)
    if loaded is None or sampler is not None or loaded.vocabulary is not None:
        captured = _captured(model, loaded, sampler, example_input, classifier)
        preprocessing = _preprocessing(captured, mean, std, resize)
    else:  # images, whose shape and normalisation its library may know
        _check_example_of_name(loaded, example_input, input_shape)
        shape, preprocessing = loaded.input(input_shape, mean, std)
        captured = capture(loaded.module, torch.zeros(1, *shape), classifier=classifier)
        preprocessing = replace(preprocessing, resize=resize or preprocessing.resize)
    is_of_pixels = sampler is None and takes_images(captured.inputs)
    assumed = _assumed(loaded, mean, std) if is_of_pixels else ()
    if takes_images(captured.inputs) and not assumed:
        captured = replace(captured, input_limits=preprocessing.limits)
    names = names_of(_module(model)) if loaded is None else loaded.class_names
    network = Network(
        teacher=captured.to(on),
        preprocessing=preprocessing,
        weights_sha256=weights_hash(_module(model if loaded is None else loaded.module)),
        assumed=assumed,
        seconds=time.perf_counter() - started,
        class_names=of_outputs(names, captured.classes),
        capture_seconds=time.perf_counter() - loaded_at,
        sampler=sampler,
    )
    if loaded is None:
        return network
    return replace(network, notes=loaded.notes, encode=loaded.encode, decode=loaded.decode)


def _check_of_module(weights: str | Path | None, input_shape: tuple[int, ...] | None) -> None:
    """Raise UsageError for options of a name where the network itself was given."""
    if weights is not None:
        raise UsageError(
            "weights are loaded into a model that is given by its name; the network itself was "
            f"given, and {weights}. Load them with load_state_dict, and remove weights."
        )
    if input_shape is not None:
        raise UsageError(
            "input_shape is for a model that is given by its name, and for denoisers; the network "
            "itself was given, and takes the shape of example_input. Remove input_shape."
        )


def _check_example_of_name(
    loaded: Loaded, example_input: ExampleInputs | None, input_shape: tuple[int, ...] | None
) -> None:
    """Raise UsageError for an example in the place of the shape that a name does not know."""
    if example_input is None or input_shape or loaded.input_shape:
        return
    shape: tuple[int, ...] = (3, 32, 32)
    if isinstance(example_input, Tensor) and example_input.ndim > 2:
        shape = tuple(example_input.shape[1:])
    raise UsageError(
        "the shape of one input must be known; this network does not define it, and example_input "
        f"is for a model that is a module. Give input_shape={shape} instead."
    )


def _refuse_saved(model: str) -> None:
    """Raise UsageError for the folder of a quantized network in the place of a model."""
    if os.path.isfile(os.path.join(model, STUDENT_FILE)):  # False for what can be no path
        raise UsageError(
            f"MODEL must be a network to quantize; {model} is a run of gdfq, already quantized. "
            "Give the network that it was made from; gdfq.load reads the folder."
        )


def _refuse_quantized(model: Model) -> None:
    """Raise UsageError for a network that gdfq made."""
    if isinstance(model, QuantizedNetwork | IntegerNetwork):
        raise UsageError(
            "a model must be a network of full precision; this network is already quantized. Give "
            "the network that it was made from."
        )


def _sampler(
    options: DenoiserOptions,
    model: Model,
    loaded: Loaded | None,
    example_input: ExampleInputs | None,
    input_shape: tuple[int, ...] | None,
) -> Sampler | None:
    """Return the sampler of a denoiser; None for any other network."""
    if loaded is not None:
        shape = input_shape or loaded.input_shape
        sampler = options.sampler(shape, loaded.scheduler, loaded.conditions)
        if sampler is None and isinstance(loaded.module, Denoiser):
            raise UsageError(
                "the denoiser of a diffusion model alone needs --scheduler, the "
                "scheduler_config.json of its pipeline; none was given. Give it, or the folder of "
                "the whole pipeline."
            )
        return sampler
    if isinstance(model, Captured):
        return options.sampler(input_shape or model.inputs[0].shape)
    first: Any = example_input
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    elif not isinstance(first, Tensor | None):
        first = first[0]
    return options.sampler(input_shape or (None if first is None else tuple(first.shape[1:])))


def _captured(
    model: Model,
    loaded: Loaded | None,
    sampler: Sampler | None,
    example_input: ExampleInputs | None,
    classifier: bool | None,
) -> Captured:
    """Return a network as it is captured: a denoiser, a language model, or a module."""
    if isinstance(model, Captured):
        if sampler is not None:
            check_inputs(model, sampler)
        return model
    module = model if loaded is None else loaded.module
    assert isinstance(module, nn.Module)
    if sampler is not None:
        is_named = not isinstance(example_input, Tensor | None)
        return captured_denoiser(module, sampler, example_input if is_named else None)
    if loaded is not None and loaded.vocabulary is not None:
        return _language_model(module, loaded.vocabulary)
    return capture(module, _example(example_input), classifier=classifier)


_CAPTURED_TOKENS = 128
"""Tokens of the sequences that a language model is captured with, as the memory budget counts."""


def _language_model(module: nn.Module, vocabulary: Vocabulary) -> Captured:
    """Capture a language model, with random tokens."""
    shape = 1, min(_CAPTURED_TOKENS, vocabulary.length)
    tokens = torch.randint(vocabulary.size, shape, generator=random_stream(0, "capture.tokens"))
    return capture(module, tokens, vocabulary=vocabulary)


def _preprocessing(
    teacher: Captured,
    mean: PerChannel | None,
    std: PerChannel | None,
    resize: Resize | None,
) -> Preprocessing:
    """From pixels to the inputs of a network; other inputs are given as the network takes them."""
    if takes_images(teacher.inputs):
        return Preprocessing.of(teacher.input_shape[0], mean, std, resize)
    if not (mean is None and std is None and resize is None):
        image_shape(
            teacher.inputs,
            needs="mean, std and resize need",
            advice="Remove them: data for this network are given as it takes them.",
        )
    return Preprocessing.of(1, None, None)


def _module(model: Model) -> nn.Module:
    """The module that holds the weights of a network."""
    assert not isinstance(model, str)
    return model.network if isinstance(model, Captured) else unwrapped(model)


def _example(example_input: ExampleInputs | None) -> ExampleInputs:
    if example_input is None:
        raise UsageError(
            "a network that is a module needs an example input, to be captured with; none was "
            "given. Give example_input, for instance torch.zeros(1, 3, 224, 224), or a tensor for "
            "each input by name."
        )
    return example_input


def _assumed(
    loaded: Loaded | None, mean: PerChannel | None, std: PerChannel | None
) -> tuple[str, ...]:
    """Parts of the normalisation that neither the user nor the network's library says."""
    if loaded is not None and loaded.preprocessing is not None:
        return ()
    return tuple(name for name, value in (("mean", mean), ("std", std)) if value is None)
