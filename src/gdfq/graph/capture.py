"""Capture: any `nn.Module` becomes one flat graph of ATen operators.

`torch.export` is the tracer: it follows control flow that depends on shapes, sees functional
and module calls alike (a functional ReLU is a ReLU), gives one node per call of a shared module,
and keeps parameter names. Nothing after capture looks at the user's module again.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from gdfq.errors import UsageError, first_line
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.tracing import quiet_tracing
from gdfq.graph import operators
from gdfq.graph.canonicalize import DECOMPOSED, canonicalize
from gdfq.graph.inputs import InputSpec, image_shape
from gdfq.graph.outputs import Structure, flattened, in_order, structure_of
from gdfq.graph.tensors import tensors_of


@dataclass(frozen=True)
class Captured:
    """A full-precision network as a graph: the teacher.

    network maps [N, *input_shape] for any N to its outputs: one tensor, or a tuple of them, which
    `outputs` puts into the form that the user's network gives them. A classifier has one output,
    its logits [N, classes]; for any other network `classes` is None. The graph is in evaluation
    form, its tensors need no gradient, and its convolution weights lie in channels_last order.
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
        """The same teacher on a device."""
        return replace(self, network=self.network.to(device))

    def logits(self, images: Tensor) -> Tensor | None:
        """The logits [N, classes] of images; None for a network whose outputs are not classes."""
        return None if self.classes is None else self.network(images)

    @property
    def batch_norms(self) -> tuple[fx.Node, ...]:
        """The batch-norm nodes that hold running statistics, in order of execution."""
        return tuple(
            node
            for node in self.network.graph.nodes
            if operators.name_of(node) == operators.BATCH_NORM
        )


def capture(model: nn.Module, example_input: Tensor, *, classifier: bool | None = None) -> Captured:
    """Capture a network; `model` itself is left as it is.

    example_input: [N, *input_shape], float, N >= 1, in the network's normalised input space.
    classifier: whether its output are logits of classes. By default one output [N, C], C >= 2,
        is taken for logits; a regression of that shape must say False.

    Raises UsageError when the weights hold NaN or infinity, the network does not accept the
    input, cannot be traced, uses an operator outside `operators.ALLOWED`, returns anything but
    tensors [N, ...], alone or in tuples, lists and dictionaries, or is no classifier and must be.
    """
    if not isinstance(model, nn.Module) or not isinstance(example_input, Tensor):
        raise UsageError(
            "capture needs an nn.Module and a tensor of example inputs; got a "
            f"{type(model).__name__} and a {type(example_input).__name__}."
        )
    _check_weights(model)
    with quiet_tracing():  # a copy of a .pt2 file's program warns
        model = copy.deepcopy(model).cpu().float().eval()
    example = example_input.detach().cpu().float()
    # Noise beside the example, which may be all zeros and then would compare biases alone. It
    # also makes a batch of two or more: export takes a batch of one for a constant.
    noise = torch.randn(example.shape, generator=random_stream(0, "capture.probe"))
    example = torch.cat([example, noise])
    returned = _run_once(model, example)
    expected = flattened(returned)
    classes = _classes(expected, len(example), classifier)
    graph_module = _export(model, example)
    network = canonicalize(graph_module)
    _check_operators(network)
    with torch.no_grad():
        got = in_order(network(example))
    for ours, theirs in zip(got, expected, strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
            raise UsageError(
                "a network in evaluation mode must give the same output each time; the captured "
                f"graph differs from the module by {float((ours - theirs).abs().max()):.3g}. "
                "Remove randomness or state from its forward."
            )
    return Captured(network, (InputSpec.of("images", example),), classes, structure_of(returned))


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


def _run_once(model: nn.Module, example: Tensor) -> object:
    shape = "x".join(map(str, example.shape[1:]))
    try:
        with torch.no_grad():
            return model(example)
    except Exception as error:
        raise UsageError(
            f"the network must accept an input of {shape}; it failed with: {first_line(error)}. "
            "Give the shape it was trained on (--input CxHxW, or example_input)."
        ) from error


def _classes(outputs: list[Tensor], images: int, classifier: bool | None) -> int | None:
    """The number of classes, or None for outputs that are no logits."""
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
            "Wrap it so that it returns such tensors alone."
        )
    (first, *others) = outputs
    has_classes = not others and first.ndim == 2 and first.shape[1] >= 2
    if classifier and not has_classes:
        raise UsageError(
            "a classifier returns one tensor of logits [batch, classes], with two classes or "
            f"more; for {images} images this network returned {shapes}. Leave classifier away."
        )
    return first.shape[1] if has_classes and classifier is not False else None


def _export(model: nn.Module, example: Tensor) -> fx.GraphModule:
    with quiet_tracing():
        try:
            dynamic = {0: torch.export.Dim.DYNAMIC}
            program = torch.export.export(model, (example,), dynamic_shapes=(dynamic,))
            # Only attention is decomposed; the rest takes functional form: x.add_(y) is x + y.
            module = program.run_decompositions(DECOMPOSED).module(check_guards=False)
        except Exception as error:
            raise UsageError(
                "the network must be traceable by torch.export with any batch size; tracing "
                f"failed with: {first_line(error)}. "
                "Make its forward independent of the values and of the number of the images."
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
