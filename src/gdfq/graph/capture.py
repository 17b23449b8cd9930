"""Capture: any `nn.Module` becomes one flat graph of ATen operators.

`torch.export` is the tracer: it follows control flow that depends on shapes, treats functional
and module calls equally (a functional ReLU is a ReLU), gives one node per call of a shared module,
and keeps parameter names. Nothing after capture looks at the user's module again.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.data.vocabulary import TOKENS, Vocabulary
from gdfq.errors import UsageError, first_line
from gdfq.execution.modes import without_modes_of_caller
from gdfq.execution.seeding import stream as random_stream
from gdfq.graph import operators
from gdfq.graph.allowed import check_constants, check_operators
from gdfq.graph.canonicalize import canonicalize
from gdfq.graph.classes import divided
from gdfq.graph.ends import NO_ENDS, Ends
from gdfq.graph.float32 import to_float32_
from gdfq.graph.inputs import (
    IMAGES,
    InputSpec,
    image_shape,
    vocabulary_of,
)
from gdfq.graph.outputs import Structure, built, flattened, in_order, structure_of
from gdfq.graph.tensors import tensors_of
from gdfq.graph.tracing import Arguments, Trial, trace
from gdfq.graph.wrappers import described, unwrapped


@dataclass(frozen=True)
class Captured:
    """A full-precision network as a graph: the teacher.

    network maps a tensor [N, *shape] for each of `inputs`, any N, to its outputs: one tensor, or a
    tuple of them. Where the user's network ends in a softmax or sigmoid, these are the logits in
    front of it, and `ends` makes what the user's network returns of them; `outputs` puts that into
    the form that the user's network gives it.
    A classifier has one output, its logits [N, classes]; for any other network `classes` is None.
    The graph is in evaluation form, its tensors need no gradient, and its convolution weights lie
    in channels_last order. `input_limits` are the lowest and the highest value of each channel of
    an image, where it is known how pixels are normalised.
    """

    network: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    classes: int | None
    outputs: Structure
    ends: Ends = NO_ENDS
    input_limits: tuple[tuple[float, float], ...] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image, of a network that takes images alone.

        Raises:
            UsageError: The network takes several inputs, or integers.
        """
        return image_shape(self.inputs)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The token ids of a language model; None for any other network."""
        return vocabulary_of(self.inputs)

    @property
    def device(self) -> torch.device:
        tensors = tensors_of(self.network).values()
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def to(self, device: torch.device) -> "Captured":
        """Return the same teacher on a device."""
        return replace(self, network=self.network.to(device))

    def returned(self, *inputs: Tensor) -> Any:
        """Return what the user's network returns for these inputs."""
        return built(self.outputs, self.ends.apply(in_order(self.network(*inputs))))

    def logits(self, *inputs: Tensor) -> Tensor | None:
        """Return the logits [N, classes], or None for a network whose outputs are not classes."""
        return None if self.classes is None else self.network(*inputs)

    @property
    def batch_norms(self) -> tuple[fx.Node, ...]:
        """The batch-norm nodes that hold running statistics, in order of execution."""
        return tuple(
            node
            for node in self.network.graph.nodes
            if operators.name_of(node) == operators.BATCH_NORM
        )


ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Example inputs of a network: one tensor, a tensor for each argument, or tensors by name."""


@without_modes_of_caller()
def capture(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    classifier: bool | None = None,
    vocabulary: Vocabulary | None = None,
) -> Captured:
    """Capture a network; `model` itself is left as it is.

    Args:
        model: The network; it must accept batches of any length. Wrappers such as DataParallel and
            those of `torch.compile` are taken off.
        example_inputs: A tensor [N, *shape] for the network's one input, a tuple of tensors for
            its arguments in order, or a mapping of its arguments' names to tensors, N >= 1. Floats
            are in the network's normalised input space; integers stay integers.
        classifier: Whether its output is the logits of classes, or their probabilities. By default
            one output [N, C], C >= 2, is taken for that, unless it is a sigmoid or consists of
            unit vectors; a regression of that shape must say False.
        vocabulary: Of a language model: token ids [N, L] -> logits of the next token [N, L, size],
            which no later token changes. It is captured for any length.

    Raises:
        UsageError: The weights hold NaN or infinity, the network does not accept the inputs,
            cannot be traced, uses an operator outside `operators.ALLOWED`, returns anything but
            tensors [N, ...], alone or in tuples, lists and dictionaries, is no classifier and must
            be, or is no language model and must be.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"capture needs an nn.Module; got {described(model)}.")
    model = unwrapped(model)
    given = _by_name(model, example_inputs)
    if vocabulary is not None:
        given = {TOKENS: _tokens(given, vocabulary)}
    _check_weights(model)
    examples = _probes(given)
    specs = tuple(InputSpec.of(name, x, vocabulary) for name, x in examples.items())
    inputs = tuple(examples.values())
    # A lone tensor is passed by position: its argument may have any name, or none.
    named = isinstance(example_inputs, Mapping)
    arguments = Arguments((), examples) if named else Arguments(inputs, {})
    trial = Trial(model)
    returned = trial.first(arguments, specs, len(next(iter(given.values()))))
    expected = flattened(returned)
    _check_outputs(expected, len(inputs[0]))
    if vocabulary is not None:
        _check_language_model(trial, arguments, expected, vocabulary)
    traced = trace(model, arguments, (0,) if vocabulary is None else (0, 1))
    check_constants(traced)
    precision = to_float32_(traced)
    network = canonicalize(traced)
    check_operators(network)
    _check_equal(network, trial, arguments, expected, precision)
    if vocabulary is not None:
        _check_equal_at_half(network, arguments, expected, precision)
    body, ends, classes = divided(network, expected, inputs, specs, classifier)
    return Captured(body, specs, classes, structure_of(returned), ends)


def _tokens(given: Mapping[str, Tensor], vocabulary: Vocabulary) -> Tensor:
    """Return the example of a language model's one input, two tokens or more of its vocabulary."""
    (tokens, *others) = given.values()
    if others or tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise UsageError(
            "a language model takes one tensor of token ids [N, L] with two tokens or more; got "
            f"{', '.join(f'{name} {list(x.shape)}' for name, x in given.items())}."
        )
    vocabulary.check(tokens)
    return tokens


def _check_language_model(
    trial: Trial, arguments: Arguments, expected: Sequence[Tensor], vocabulary: Vocabulary
) -> None:
    """Check that the output are logits of the next token, which no later token changes.

    Raises:
        UsageError: They are not.
    """
    shape = [*arguments.tensors[0].shape, vocabulary.size]
    if len(expected) != 1 or list(expected[0].shape) != shape:
        raise UsageError(
            f"a language model returns logits {shape} of the next token for each token; this one "
            f"returned {', '.join(str(list(x.shape)) for x in expected)}. Quantize a causal "
            "language model."
        )
    half = shape[1] // 2
    (found,) = flattened(trial(arguments.shortened(half)))
    if _largest_difference([found], [expected[0][:, :half]], torch.float32) is not None:
        raise UsageError(
            "a language model predicts each token from the earlier ones alone; the output of this "
            "one also depends on later ones, as that of an encoder. Quantize a causal language "
            "model."
        )


@torch.no_grad()
def _check_equal_at_half(
    network: fx.GraphModule,
    arguments: Arguments,
    expected: Sequence[Tensor],
    precision: torch.dtype,
) -> None:
    """Compare a captured language model with the module on sequences of half the length.

    Raises:
        UsageError: It returned something else.
    """
    half = arguments.tensors[0].shape[1] // 2
    found = in_order(network(*arguments.shortened(half).tensors))
    difference = _largest_difference(found, [expected[0][:, :half]], precision)
    if difference is not None:
        raise UsageError(
            "a language model must be capturable for any length; on sequences of half the length "
            f"the captured graph differs from the module by {difference:.3g}. Its attention "
            "depends on the length in a way that torch.export does not record."
        )


@torch.no_grad()
def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise UsageError(
                f"weights must be there; {name!r} is not initialised yet (a lazy module). "
                "Run the network once and load its weights first."
            )
        # A buffer may be a mask with infinity in it.
        is_mask = not isinstance(tensor, nn.Parameter) and not bool(tensor.isnan().any())
        if tensor.is_floating_point() and not is_mask and not bool(tensor.isfinite().all()):
            raise UsageError(
                f"weights must be finite; {name!r} holds NaN or infinity. Check the weights file."
            )


def check_tensors(given: object) -> None:
    """Raise UsageError for example inputs that are no tensors, such as a shape."""
    if isinstance(given, Tensor | Mapping):
        return
    parts = given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if all(isinstance(part, int) for part in parts):
        raise UsageError(
            f"example inputs must be tensors; got {given!r}. "
            "Give a tensor with the batch first, such as torch.zeros(1, 3, 224, 224)."
        )


def _by_name(model: nn.Module, given: ExampleInputs) -> dict[str, Tensor]:
    """Return example inputs by name, in the order of the arguments of the network's forward.

    The one input of a network that takes images is called `images`, whatever its argument is.
    """
    check_tensors(given)
    if isinstance(given, Tensor) and given.is_floating_point():
        examples: dict[str, Any] = {IMAGES: given}
    else:
        signature = inspect.signature(model.forward)
        try:
            if isinstance(given, Mapping):
                bound = signature.bind(**given)
            else:
                bound = signature.bind(*([given] if isinstance(given, Tensor) else given))
        except TypeError as error:
            raise UsageError(
                "example inputs must fit the arguments of the network's forward, "
                f"{', '.join(signature.parameters)}; they do not: {error}."
            ) from error
        examples = {}
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                examples |= {f"{name}_{i}": part for i, part in enumerate(value)}
            elif kind is inspect.Parameter.VAR_KEYWORD:
                examples |= value
            else:
                examples[name] = value
    wrong = [n for n, x in examples.items() if not isinstance(x, Tensor) or not x.ndim]
    if wrong or not examples or len({len(x) for x in examples.values()}) > 1:
        shapes = ", ".join(
            f"{name} {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            for name, x in examples.items()
        )
        raise UsageError(
            "capture needs a tensor [N, ...] for each input, with one N for all; "
            f"got {shapes or 'nothing'}."
        )
    return examples


def _probes(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs to trace and compare with: the examples, followed by as many of noise.

    Examples that are all zeros would only compare biases. Integers, which may be indices of a
    table, are repeated. The batch has at least two entries, because export treats a batch of one
    as a constant.
    """
    draw = random_stream(0, "capture.probe")
    probes = {}
    for name, example in given.items():
        example = example.detach().cpu()
        if example.is_floating_point():
            example = example.float()
            other = torch.randn(example.shape, generator=draw)
        else:
            other = example.flip(0)
        probes[name] = torch.cat([example, other])
    return probes


def _check_outputs(outputs: list[Tensor], images: int) -> None:
    shapes = ", ".join(str(list(output.shape)) for output in outputs)
    fits = all(
        output.is_floating_point() and output.ndim and len(output) == images for output in outputs
    )
    if not all(output.numel() and output.isfinite().all() for output in outputs):
        raise UsageError(
            "each output must hold numbers, and finite ones; for noise the network returned "
            f"{shapes} with NaN, infinity or nothing in it. Check its weights and --input."
        )
    if not outputs or not fits:
        raise UsageError(
            "each output must be a tensor of floats with one entry for each image; for "
            f"{images} images the network returned {shapes or 'no tensor'}. "
            "Wrap it so that it returns only such tensors."
        )


_OTHER_COUNTS = (1, 3)
"""Numbers of entries with which a captured network is compared with the module, too."""


@torch.no_grad()
def _check_equal(
    network: fx.GraphModule,
    trial: Trial,
    arguments: Arguments,
    expected: Sequence[Tensor],
    precision: torch.dtype,
) -> None:
    """Compare a captured network with the module for several numbers of entries.

    Args:
        network: The captured network.
        trial: The module.
        arguments: What both are called with.
        expected: What the module returned for them.
        precision: The type of the lowest precision in which the module computes.

    Raises:
        UsageError: The module returned something else this time, or for another number of entries.
    """
    apart = _largest_difference(in_order(network(*arguments.tensors)), expected, precision)
    again = _largest_difference(flattened(trial(arguments)), expected, precision)
    if apart is not None or again is not None:
        changed = trial.changed_by(arguments)
        named = f"; a call changes {', '.join(changed)}, on which its output depends"
        raise UsageError(
            "a network in evaluation mode must give the same output each time; the captured graph "
            f"differs from the module by {apart or again or 0:.3g}{named if changed else ''}. "
            "Remove randomness or state from its forward."
        )
    for count in _OTHER_COUNTS:
        given = arguments.with_entries(count)
        try:
            ours = in_order(network(*given.tensors))
            theirs = flattened(trial(given))
        except Exception as error:
            if count == 1:  # such a module loses a dimension there, which the graph does not
                continue
            raise _depends_on_count(count, first_line(error)) from error
        if any(not tensor.ndim or len(tensor) != count for tensor in ours):
            raise _depends_on_count(count, "it loses the dimension of the batch")
        shapes = [list(tensor.shape) for tensor in theirs]
        if count == 1:  # squeeze() also removes the dimension of the batch
            theirs = [
                theirs_.view(ours_.shape) if theirs_.numel() == ours_.numel() else theirs_
                for ours_, theirs_ in zip(ours, theirs, strict=True)
            ]
        if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
            raise _depends_on_count(count, f"it returns {', '.join(map(str, shapes))}")
        difference = _largest_difference(ours, theirs, precision)
        if difference is not None:
            raise _depends_on_count(count, f"its output differs by {difference:.3g}")


_ROUNDINGS = 8
"""How often a relative error of half and quarter precision may add up inside a network."""


def _largest_difference(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], precision: torch.dtype
) -> float | None:
    """Return the largest difference of tensors, or None if rounding explains it."""

    def is_close(actual: Tensor, expected: Tensor) -> bool:
        if precision in (torch.float32, torch.float64):
            atol = 1e-4 * float(expected.abs().max())
            return torch.allclose(actual, expected, rtol=1e-3, atol=atol)
        limit = _ROUNDINGS * torch.finfo(precision).eps
        return bool((actual - expected).norm() <= limit * expected.norm())

    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
    if all(is_close(actual, expected) for actual, expected in pairs):
        return None
    return max(float((actual - expected).abs().max()) for actual, expected in pairs)


def _depends_on_count(count: int, found: str) -> UsageError:
    return UsageError(
        "the output of a network must not depend on the number of entries in the batch; with "
        f"{count} this one behaves differently: {found}. Make its forward independent of the "
        "length of the batch."
    )
