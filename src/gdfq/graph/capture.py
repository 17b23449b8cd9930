"""Capture: any `nn.Module` becomes one flat graph of ATen operators.

`torch.export` is the tracer: it follows control flow that depends on shapes, sees functional
and module calls alike (a functional ReLU is a ReLU), gives one node per call of a shared module,
and keeps parameter names. Nothing after capture looks at the user's module again.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.errors import UsageError, first_line
from gdfq.execution.seeding import stream as random_stream
from gdfq.execution.tracing import quiet_tracing
from gdfq.graph import operators
from gdfq.graph.inputs import InputSpec
from gdfq.graph.outputs import Structure, flattened, in_order, structure_of


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
        (first, *others) = self.inputs
        if others or first.kind == "integers":
            raise UsageError(
                "this needs a network that takes images alone, as one tensor of floats; this one "
                f"takes {', '.join(map(str, self.inputs))}. Give real inputs (--data, or data=...)."
            )
        return first.shape

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
    _simplify(graph_module)
    _fold_constants(graph_module)  # a weight may be written transposed
    _products_to_linear(graph_module.graph)
    _fold_constants(graph_module)
    graph_module.graph.eliminate_dead_code()
    network = flat_module(_renamed(graph_module.graph), tensors_of(graph_module))
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


def flat_module(graph: fx.Graph, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """A graph module over copies of `tensors`, in channels_last order, that need no gradient."""

    def prepared(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        copied = tensor.detach().clone(memory_format=layout)
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(copied, requires_grad=False) if is_parameter else copied

    used = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    unique = {id(tensors[name]): prepared(tensors[name]) for name in used}
    return fx.GraphModule({name: unique[id(tensors[name])] for name in used}, graph)


def tensors_of(module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph refers to, by the name it uses."""
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    return {name: _attribute(module, name) for name in names}


def _attribute(module: nn.Module, name: str) -> Tensor:
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


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
            module = program.run_decompositions(_DECOMPOSED).module(check_guards=False)
        except Exception as error:
            raise UsageError(
                "the network must be traceable by torch.export with any batch size; tracing "
                f"failed with: {first_line(error)}. "
                "Make its forward independent of the values and of the number of the images."
            ) from error
    assert isinstance(module, fx.GraphModule)
    return module


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    _dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ s + mask) V (arXiv 1706.03762): two products with quantizable inputs.

    Q [*, T, d], K [*, S, d], V [*, S, e] -> [*, T, e]; s is d^−½ unless given. The signature is
    that of `torch.nn.functional.scaled_dot_product_attention`.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (torch.stack([tensor] * groups, -3).flatten(-4, -3) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


_DECOMPOSED = {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _simplify(module: fx.GraphModule) -> None:
    """Bring equivalent spellings to one: batch norms, views, and operators that do nothing."""
    graph = module.graph
    aten = torch.ops.aten
    (output,) = graph.find_nodes(op="output")
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    tensors = tuple(node for node in returned if node is not None)
    output.args = (tensors[0] if len(tensors) == 1 else tensors,)
    # Export flattens inputs through pytree; a plain graph needs no such code.
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        name = operators.name_of(node)
        if name == "aten._native_batch_norm_legit_no_training.default":
            x, weight, bias, mean, variance, momentum, eps = node.args
            (first,) = (user for user in node.users if user.args[1] == 0)
            with graph.inserting_before(node):
                args = (x, weight, bias, mean, variance, False, momentum, eps, False)
                replacement = graph.call_function(aten.batch_norm.default, args)
            replacement.meta = dict(first.meta)
            first.replace_all_uses_with(replacement)
        elif name in {"aten.view.default", "aten._unsafe_view.default"}:
            node.target = aten.reshape.default  # a view fails on channels_last tensors
        elif name in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
        elif name in _FILLED and all(type(side) is int for side in node.meta["val"].shape):
            # Of the image it takes the device alone, and the mask that it begins can be folded.
            value = node.meta["val"]
            fill = _FILLED[name] if _FILLED[name] is not None else node.args[-1]
            with graph.inserting_before(node):
                replacement = graph.call_function(
                    aten.full.default, (list(value.shape), fill), {"dtype": value.dtype}
                )
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
        elif node.op == "call_function" and "assert" in name:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _renamed(graph: fx.Graph) -> fx.Graph:
    """The same graph with its operators named in order: conv2d, conv2d_1, ..."""
    new_graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), new.__getitem__)
        _, *packet = operators.name_of(node).split(".")
        name = packet[0] if packet else node.name
        new[node] = new_graph.create_node(node.op, node.target, args, kwargs, name)
        new[node].meta = dict(node.meta)
    return new_graph


_IDENTITIES = frozenset(
    {
        "aten.alias.default",
        "aten.detach.default",
        "aten.dropout.default",  # captured in evaluation mode
        "aten.feature_dropout.default",
        "aten.alpha_dropout.default",
        "aten.lift_fresh_copy.default",
        "aten.contiguous.default",
    }
)


_FILLED = {
    "aten.new_zeros.default": 0,
    "aten.zeros_like.default": 0,
    "aten.new_ones.default": 1,
    "aten.ones_like.default": 1,
    "aten.new_full.default": None,
    "aten.full_like.default": None,
}
"""Operators that make a tensor of one number, which is their last argument where None is here."""


def _products_to_linear(graph: fx.Graph) -> None:
    """Write the product with a weight matrix, x @ W (+ b), as the linear layer that it is."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        bias, x, weight, *scales = {
            "aten.matmul.default": (None, *node.args),
            "aten.mm.default": (None, *node.args),
            "aten.addmm.default": (*node.args, *node.kwargs.values()),
        }.get(operators.name_of(node), (None, None, None))
        if scales or not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        if weight.meta["val"].ndim != 2:
            continue
        with graph.inserting_before(node):
            transposed = graph.call_function(aten.t.default, (weight,))  # folded afterwards
            linear = graph.call_function(aten.linear.default, (x, transposed, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
    graph.eliminate_dead_code()


def _fold_constants(module: fx.GraphModule) -> None:
    """Replace what depends on tensors of the network alone (weight standardisation, say).

    A constant that is made from parameters is one, and lies beside the largest of them.
    """
    graph = module.graph
    known: dict[fx.Node, Any] = {
        node: _attribute(module, str(node.target)) for node in graph.find_nodes(op="get_attr")
    }
    parameters: dict[fx.Node, list[fx.Node]] = {
        node: [node] for node, value in known.items() if isinstance(value, nn.Parameter)
    }
    for node in graph.nodes:
        inputs = node.all_input_nodes
        function: Any = node.target
        is_random = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        if node.op != "call_function" or is_random or not all(n in known for n in inputs):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            known[node] = function(*args, **kwargs)
        parameters[node] = [source for n in inputs for source in parameters.get(n, ())]
    for node in [n for n in known if n.op != "get_attr" and not all(u in known for u in n.users)]:
        value = known[node]
        if not isinstance(value, Tensor):
            continue  # numbers, and tuples of tensors: what is taken out of those folds
        sources = parameters[node] if value.is_floating_point() else []
        largest = max(sources, key=lambda source: known[source].numel(), default=None)
        kept = nn.Buffer(value) if largest is None else nn.Parameter(value)
        with graph.inserting_before(node):
            constant = graph.get_attr(_attach(module, largest, kept, default=node.name))
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()


def _attach(module: nn.Module, beside: fx.Node | None, value: Tensor, default: str) -> str:
    """Give a new tensor a name in the module that holds another, and return its whole path."""
    path, _, leaf = ("" if beside is None else str(beside.target)).rpartition(".")
    holder, name = module.get_submodule(path), f"folded_{leaf or default}"
    while hasattr(holder, name):
        name += "_"  # of one layer still
    setattr(holder, name, value)
    return f"{path}.{name}" if path else name


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
