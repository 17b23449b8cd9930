"""Capture: any `nn.Module` becomes one flat graph of ATen operators.

`torch.export` is the tracer: it follows control flow that depends on shapes, treats functional
and module calls equally (a functional ReLU is a ReLU), gives one node per call of a shared module,
and keeps parameter names. Nothing after capture looks at the user's module again.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.errors import UsageError, first_line
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.tracing import exclusive_tracing
from gdfq.graph import operators
from gdfq.graph.canonicalize import DECOMPOSED, canonicalize
from gdfq.graph.inputs import IMAGES, InputSpec, image_shape, takes_images
from gdfq.graph.outputs import Structure, flattened, in_order, structure_of
from gdfq.graph.tensors import tensors_of


@dataclass(frozen=True)
class Captured:
    """A full-precision network as a graph: the teacher.

    network maps a tensor [N, *shape] for each of `inputs`, any N, to its outputs: one tensor, or a
    tuple of them, which `outputs` puts into the form that the user's network gives them. A
    classifier has one output, its logits [N, classes]; for any other network `classes` is None.
    The graph is in evaluation form, its tensors need no gradient, and its convolution weights lie
    in channels_last order.
    """

    network: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    classes: int | None
    outputs: Structure

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image, of a network that takes images alone.

        Raises:
            UsageError: The network takes several inputs, or integers.
        """
        return image_shape(self.inputs)

    @property
    def device(self) -> torch.device:
        tensors = tensors_of(self.network).values()
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def to(self, device: torch.device) -> "Captured":
        """Return the same teacher on a device."""
        return replace(self, network=self.network.to(device))

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


def capture(
    model: nn.Module, example_inputs: ExampleInputs, *, classifier: bool | None = None
) -> Captured:
    """Capture a network; `model` itself is left as it is.

    Args:
        model: The network; it must accept batches of any length.
        example_inputs: A tensor [N, *shape] for the network's one input, a tuple of tensors for
            its arguments in order, or a mapping of its arguments' names to tensors, N >= 1. Floats
            are in the network's normalised input space; integers stay integers.
        classifier: Whether its output is the logits of classes. By default one output [N, C],
            C >= 2, is taken for logits; a regression of that shape must say False.

    Raises:
        UsageError: The weights hold NaN or infinity, the network does not accept the inputs,
            cannot be traced, uses an operator outside `operators.ALLOWED`, returns anything but
            tensors [N, ...], alone or in tuples, lists and dictionaries, or is no classifier and
            must be.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"capture needs an nn.Module; got a {type(model).__name__}.")
    given = _by_name(model, example_inputs)
    _check_weights(model)
    with exclusive_tracing():  # a copy of a .pt2 file's program warns
        model = copy.deepcopy(model).cpu().float().eval()
    examples = _probes(given)
    specs = tuple(InputSpec.of(name, example) for name, example in examples.items())
    inputs = tuple(examples.values())
    # A lone tensor is passed by position: its argument may have any name, or none.
    arguments = (inputs, {}) if not isinstance(example_inputs, Mapping) else ((), examples)
    returned = _run_once(model, specs, *arguments)
    expected = flattened(returned)
    classes = _classes(expected, len(inputs[0]), classifier)
    graph_module = _export(model, *arguments)
    network = canonicalize(graph_module)
    _check_operators(network)
    with torch.no_grad():
        got = in_order(network(*inputs))
    for ours, theirs in zip(got, expected, strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
            raise UsageError(
                "a network in evaluation mode must give the same output each time; the captured "
                f"graph differs from the module by {float((ours - theirs).abs().max()):.3g}. "
                "Remove randomness or state from its forward."
            )
    return Captured(network, specs, classes, structure_of(returned))


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise UsageError(
                f"weights must be there; {name!r} is not initialised yet (a lazy module). "
                "Run the network once and load its weights first."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UsageError(
                f"weights must be finite; {name!r} holds NaN or infinity. Check the weights file."
            )


def _by_name(model: nn.Module, given: ExampleInputs) -> dict[str, Tensor]:
    """Return example inputs by name, in the order of the arguments of the network's forward.

    The one input of a network that takes images is called `images`, whatever its argument is.
    """
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


def _run_once(
    model: nn.Module,
    specs: Sequence[InputSpec],
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
) -> object:
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        if takes_images(specs):
            taken = f"an input of {'x'.join(map(str, specs[0].shape))}"
        else:
            taken = f"inputs {', '.join(map(str, specs))}"
        raise UsageError(
            f"the network must accept {taken}; it failed with: {first_line(error)}. "
            "Give the shape it was trained on (--input CxHxW, or example_input)."
        ) from error


def _classes(outputs: list[Tensor], images: int, classifier: bool | None) -> int | None:
    """Return the number of classes, or None for outputs that are not logits."""
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
    (first, *others) = outputs
    has_classes = not others and first.ndim == 2 and first.shape[1] >= 2
    if classifier and not has_classes:
        raise UsageError(
            "a classifier returns one tensor of logits [batch, classes], with two classes or "
            f"more; for {images} images this network returned {shapes}. Remove classifier."
        )
    return first.shape[1] if has_classes and classifier is not False else None


def _dynamic(
    model: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: Mapping[str, Tensor],
    dynamic: Mapping[int, Any],
) -> Any:
    """Return which dimensions of the inputs are dynamic, in the form that export expects."""
    if not kwargs:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            return ((dynamic,) * len(args),) if len(parameters) == 1 else (dynamic,) * len(args)
        return (dynamic,) * len(args)
    return dict.fromkeys(kwargs, dynamic)


def _export(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> fx.GraphModule:
    with exclusive_tracing():
        try:
            dynamic = {0: torch.export.Dim.DYNAMIC}
            program = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=_dynamic(model, args, kwargs, dynamic)
            )
            # Only attention is decomposed; the rest takes functional form: x.add_(y) is x + y.
            module = program.run_decompositions(DECOMPOSED).module(check_guards=False)
        except Exception as error:
            raise UsageError(
                "the network must be traceable by torch.export with any batch size; tracing "
                f"failed with: {first_line(error)}. "
                "Make its forward independent of the values and of the length of the batch."
            ) from error
    assert isinstance(module, fx.GraphModule)
    return module


def _check_operators(module: fx.GraphModule) -> None:
    unknown = sorted(
        {
            operators.name_of(node)
            for node in module.graph.nodes
            if node.op == "call_function" and operators.name_of(node) not in operators.ALLOWED
        }
    )
    if unknown:
        raise UsageError(
            "a network may use the operators of gdfq.graph.operators.ALLOWED; "
            f"this one also uses {', '.join(unknown)}. Replace them by equivalent ones, "
            "or report the network so that they can be added."
        )
