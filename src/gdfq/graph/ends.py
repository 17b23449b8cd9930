"""What a network does after its last layers: a softmax or sigmoid of logits, or a normalisation.

A softmax is invariant to a constant that is added to all logits, and it hides differences between
improbable classes. So a network that ends in one is divided in two: its body, which returns the
logits and is what a student learns and is compared by, and its end, which makes the outputs of the
logits. A quantized network computes both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from gdfq.graph import operators, queries
from gdfq.graph.outputs import HasOutputs, in_order, names_of
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import flat_module, tensors_of

Kind = Literal["values", "softmax", "log_softmax", "sigmoid", "unit_norm"]
"""What an output of the body is: values that are returned as they are, logits in front of a
softmax, log-softmax or sigmoid, or unit vectors."""

_NAMES = {
    "softmax": "probabilities",
    "log_softmax": "log_probabilities",
    "sigmoid": "probabilities",
}
_EXPONENTIAL_OF_LOGARITHM = operators.EXPONENTIAL, operators.LOGARITHM
_MIN_PROBABILITY = 1e-12
_MAX_NORM_ERROR = 1e-3
"""Distance of the norm of a unit vector from 1; float rounding is 1e-6."""


@dataclass(frozen=True, eq=False)
class Ends:
    """How the outputs of a network are made of those of its body.

    Attributes:
        kinds: The kind of each output of the body.
        sources: For each output of the network, the output of the body that it is made of.
        module: Maps the outputs of the body to those of the network; None if they are the same.
        dims: For each output of the body, the dimension of the softmax that follows, or None.
    """

    kinds: tuple[Kind, ...] = ()
    sources: tuple[int, ...] = ()
    module: fx.GraphModule | None = None
    dims: tuple[int | None, ...] = ()

    def softmax_dim(self, index: int) -> int | None:
        """Return the dimension of the softmax that follows an output of the body, or None."""
        return self.dims[index] if self.dims else None

    def apply(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of the network, given those of its body."""
        return list(outputs) if self.module is None else in_order(self.module(*outputs))

    @property
    def kind(self) -> Kind:
        """The kind of the body's only output; "values" if it has several."""
        return self.kinds[0] if len(self.kinds) == 1 else "values"


def describe(network: HasOutputs, ends: Ends) -> str:
    """Return in one sentence what is matched and measured of a network's outputs."""
    classes, names = network.classes, ", ".join(output_names(network, ends))
    kinds = set(ends.kinds) - {"values"}
    function = {"softmax": "softmax", "log_softmax": "softmax", "sigmoid": "sigmoid"}
    ending = " and ".join(sorted({function[kind] for kind in kinds if kind in function}))
    if classes is not None:
        logits = f"; the logits in front of the {ending} are matched and measured" if ending else ""
        return f"{names} of {classes} classes{logits}"
    if kinds == {"unit_norm"}:
        return (
            f"{names}, unit vectors (embeddings, not classes): matched and measured by their "
            "cosine; if they are logits of classes, use --classifier"
        )
    if kinds == {"sigmoid"}:
        return (
            f"{names} of independent decisions (a sigmoid, not classes): the logits in front of it "
            "are matched; measured are their relative error and equal decisions"
        )
    if ending:
        return f"{names}, matched by the logits in front of the {ending} (they are not classes)"
    return f"{names}, matched as they are (they are not classes)"


NO_ENDS = Ends()
"""Of a network of which nothing is known: it is its own body."""


def output_names(network: HasOutputs, ends: Ends) -> list[str]:
    """Return the names of a network's outputs in files, such as `logits` or `probabilities`."""
    default = "output" if network.classes is None else "logits"
    return names_of(network.outputs, _NAMES.get(ends.kind, default))


def body_names(network: HasOutputs, ends: Ends) -> list[str]:
    """Return a name for each output of the body: that of the first output that is made of it."""
    names = output_names(network, ends)
    if not ends.sources:
        return names
    return [names[ends.sources.index(i)] for i in range(len(ends.kinds))]


def split(network: fx.GraphModule) -> tuple[fx.GraphModule, Ends]:
    """Divide a network into its body and its end.

    Args:
        network: A graph whose nodes know their shapes (`meta["val"]`).

    Returns:
        The body, which is the network itself if it has no end, and the end.
    """
    paths = [_path(node) for node in queries.outputs(network.graph)]
    bodies = list(dict.fromkeys(path.body for path in paths))
    chosen = [
        next((p for p in paths if p.body is body and p.kind != "values"), _Path(body))
        for body in bodies
    ]
    kinds = tuple(path.kind for path in chosen)
    sources = tuple(bodies.index(path.body) for path in paths)
    # Where an input itself would be the logits, the softmax is all that the network computes.
    if all(kind == "values" for kind in kinds) or any(b.op == "placeholder" for b in bodies):
        outputs = queries.outputs(network.graph)
        kinds = tuple(map(_kind_of_values, outputs))
        return network, Ends(kinds, tuple(range(len(outputs))))
    flat = [_flattens(body, [p for p in paths if p.body is body]) for body in bodies]
    end = _end(paths, bodies, flat)
    dims = tuple(
        1 if is_flat and path.dim is not None else path.dim
        for path, is_flat in zip(chosen, flat, strict=True)
    )
    return _body(network, bodies, flat), Ends(kinds, sources, end, dims)


def _kind_of_values(output: fx.Node) -> Kind:
    return "unit_norm" if normalises(output) else "values"


def joined(network: fx.GraphModule, ends: Ends) -> fx.GraphModule:
    """Return the graph of a body followed by its end: the inverse of `split`."""
    if ends.module is None:
        return network
    graph, new = fx.Graph(), Copy()
    new.graph = graph
    for node in network.graph.nodes:
        if node.op != "output":
            new[node] = new.of(node)
    outputs = [new[node] for node in queries.outputs(network.graph)]
    for place, node in zip(outputs, queries.inputs(ends.module.graph), strict=True):
        new[node] = place
    for node in ends.module.graph.nodes:
        if node.op == "output":
            new.output(new.mapped(node.args[0]))
        elif node.op != "placeholder":
            new[node] = new.of(node)
    return flat_module(graph, tensors_of(network))


def are_unit_vectors(values: Tensor) -> bool:
    """Return whether the rows of [N, C] have norm 1, apart from rows of zeros, and vary.

    One-hot rows, which are probabilities, do not count.
    """
    if values.ndim != 2 or values.shape[1] < 2:
        return False
    norms = values.double().norm(dim=1)
    rows, norms = values[norms > 0], norms[norms > 0]
    varied = len(rows) >= 2 and bool((rows - rows[0]).abs().max() > 0)
    is_unit = bool(((norms - 1).abs() < _MAX_NORM_ERROR).all())
    return is_unit and varied and not are_probabilities(rows)


def normalises(node: fx.Node) -> bool:
    """Return whether a node divides vectors [N, C] by their own Euclidean norm."""
    while operators.name_of(node) in operators.MOVES:
        node = node.all_input_nodes[0]
    name = operators.name_of(node)
    if name not in {operators.DIVIDE, operators.MULTIPLY} or len(node.args) != 2:
        return False
    candidates = [node.args] if name == operators.DIVIDE else [node.args, node.args[::-1]]
    return any(
        isinstance(x, fx.Node) and isinstance(norm, fx.Node) and _is_norm_of(norm, x)
        for x, norm in candidates
    )


def _is_norm_of(norm: fx.Node, x: fx.Node) -> bool:
    """Return whether a node is the norm of x over its last dimension, or the inverse of it."""
    is_sum = False
    while norm is not x:
        name = operators.name_of(norm)
        if name == operators.VECTOR_NORM:
            order = norm.args[1] if len(norm.args) > 1 else 2
            return norm.args[0] is x and bool(order == 2) and _over_last(norm, norm.args[2:3])
        if is_sum:
            squares = [(x,)] if name == operators.SQUARE else [(x, x), (x, 2)]
            return norm.args in squares
        if name == operators.SUM:
            is_sum = _over_last(norm, norm.args[1:2])
        sources = [n for n in norm.all_input_nodes if not queries.is_batch_size(n)]
        if (name not in operators.OF_NORMS and not is_sum) or len(sources) != 1:
            return False
        (norm,) = sources
    return False


def _over_last(node: fx.Node, dims: Sequence[Any]) -> bool:
    """Return whether a reduction is over the last dimension of its input [N, C] alone."""
    ndim = node.all_input_nodes[0].meta["val"].ndim
    return ndim == 2 and len(dims) == 1 and dims[0] in ([1], [-1], (1,), (-1,), 1, -1)


@dataclass(frozen=True, eq=False)
class _Path:
    """The way from an output of the body to an output of the network.

    Attributes:
        body: The output of the body.
        nodes: The nodes after it, in order.
        kind: What the first of the functions of probability is.
        dim: The dimension of the body's output that its softmax is over, if it is one.
    """

    body: fx.Node
    nodes: tuple[fx.Node, ...] = ()
    kind: Kind = "values"
    dim: int | None = None

    @property
    def covers_all(self) -> bool:
        """Whether the first function takes all numbers of an image as one vector of logits."""
        shape = self.body.meta["val"].shape
        return self.dim is None or all(
            isinstance(side, int) and side == 1
            for dim, side in enumerate(shape)
            if dim not in {0, self.dim}
        )


def _path(output: fx.Node) -> _Path:
    """Return the longest path back to logits; an empty one without a softmax or sigmoid."""
    found, nodes = _Path(output), list[fx.Node]()
    for node in _backwards(output):
        nodes.insert(0, node)
        kind = _kind(node)
        later = set(map(operators.name_of, nodes[1:]))
        if kind == "softmax" and later & (operators.LOG_SOFTMAX | {operators.LOGARITHM}):
            kind = "log_softmax"
        elif kind == "log_softmax" and operators.EXPONENTIAL in later:
            kind = "softmax"
        if kind == "sigmoid" and later & operators.WITH_NUMBERS:
            return found  # a number in an interval, no probability
        if kind is not None:
            found = _Path(_data_input(node), tuple(nodes), kind, _softmax_dim(node))
    return _through_views(found)


def _backwards(node: fx.Node) -> Iterator[fx.Node]:
    """Return the nodes from an output back that an end may consist of."""
    while operators.name_of(node) in operators.END:
        sources = [n for n in node.all_input_nodes if not queries.is_batch_size(n)]
        if len(sources) != 1 or not isinstance(sources[0].meta.get("val"), Tensor):
            return
        if operators.name_of(node) in operators.WITH_NUMBERS and not _has_number(node):
            return
        yield node
        node = sources[0]


def _has_number(node: fx.Node) -> bool:
    """Return whether a node adds a number, or multiplies or divides by a positive one."""
    _, number, *others = node.args
    if not isinstance(number, int | float) or others:
        return False
    return operators.name_of(node) not in operators.SCALINGS or number > 0


def _kind(node: fx.Node) -> Kind | None:
    """Return the kind of a function of probability; None for any other node."""
    name = operators.name_of(node)
    if name in operators.SIGMOIDS:
        return "sigmoid"
    if not _softmax_dim(node):  # dimension 0 is the batch
        return None
    return "log_softmax" if name in operators.LOG_SOFTMAX else "softmax"


def _softmax_dim(node: fx.Node) -> int | None:
    """Return the dimension that a softmax is over, also exp(log p); None for any other node."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if (operators.name_of(node), operators.name_of(source)) == _EXPONENTIAL_OF_LOGARITHM:
        return 1 if node.meta["val"].ndim == 2 else None
    if operators.name_of(node) not in operators.SOFTMAX | operators.LOG_SOFTMAX:
        return None
    dim, value = node.args[1], _data_input(node).meta["val"]
    assert isinstance(dim, int)
    return int(dim % value.ndim)


def _data_input(node: fx.Node) -> fx.Node:
    (source,) = (n for n in node.all_input_nodes if not queries.is_batch_size(n))
    return source


def _through_views(path: _Path) -> _Path:
    """Let a path begin at logits [N, C] that are only reshaped before the softmax or sigmoid."""
    body, nodes = path.body, list(path.nodes)
    if path.kind == "values" or body.meta["val"].ndim == 2 or not path.covers_all:
        return path
    while operators.name_of(body) in operators.MOVES:
        sources = [n for n in body.all_input_nodes if not queries.is_batch_size(n)]
        if len(sources) != 1 or len(body.all_input_nodes) > 2:
            break
        nodes.insert(0, body)
        (body,) = sources
        value = body.meta.get("val")
        if not isinstance(value, Tensor):
            break
        if value.ndim == 2:
            return _Path(body, tuple(nodes), path.kind, path.dim and 1)
    return path


def _flattens(body: fx.Node, paths: Sequence[_Path]) -> bool:
    """Return whether logits [N, C, 1, 1] are of a network that returns [N, C]."""
    shape = body.meta["val"].shape
    wide = [side for side in shape[1:] if not (isinstance(side, int) and side == 1)]
    if not all(path.covers_all for path in paths):
        return False
    returned = [path.nodes[-1].meta["val"] if path.nodes else body.meta["val"] for path in paths]
    return len(shape) > 2 and len(wide) == 1 and all(value.ndim == 2 for value in returned)


def _body(network: fx.GraphModule, bodies: list[fx.Node], flat: list[bool]) -> fx.GraphModule:
    """Return the network up to its logits."""
    reshape = operators.resolve(operators.RESHAPE)

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if node.op != "output":
            return None
        returned = []
        for body, is_flat in zip(bodies, flat, strict=True):
            new = copy[body]
            if is_flat:
                value = body.meta["val"].flatten(1)
                new = copy.graph.call_function(reshape, (new, [-1, value.shape[1]]))
                new.meta["val"] = value
            returned.append(new)
        return copy.output(returned[0] if len(returned) == 1 else tuple(returned))

    graph = rewrite(network.graph, change)
    graph.eliminate_dead_code(lambda node: node.op in {"placeholder", "output"})
    return flat_module(graph, tensors_of(network))


def _end(paths: list[_Path], bodies: list[fx.Node], flat: list[bool]) -> fx.GraphModule:
    """Return the module from the logits to the network's outputs."""
    graph = fx.Graph()
    reshape, size = map(operators.resolve, (operators.RESHAPE, operators.BATCH_SIZE))
    placeholders = [graph.placeholder(f"logits_{i}") for i in range(len(bodies))]
    starts = {}
    for place, body, is_flat in zip(placeholders, bodies, flat, strict=True):
        sides = list(body.meta["val"].shape[1:])
        starts[body] = graph.call_function(reshape, (place, [-1, *sides])) if is_flat else place
    outputs = []
    for path in paths:
        place = placeholders[bodies.index(path.body)]
        new = {path.body: starts[path.body]}
        for node in path.nodes:
            for source in node.all_input_nodes:
                if source not in new:
                    new[source] = graph.call_function(size, (place, 0))
            new[node] = graph.node_copy(node, new.__getitem__)
        outputs.append(new[path.nodes[-1]] if path.nodes else place)
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return fx.GraphModule(nn.Module(), graph)


def are_probabilities(values: Tensor) -> bool:
    """Return whether the rows of [N, C], C >= 2, are probabilities of classes: they sum to 1."""
    if values.ndim != 2 or values.shape[1] < 2 or bool((values < 0).any()):
        return False
    return bool(((values.double().sum(1) - 1).abs() < _MAX_NORM_ERROR).all())


def with_logarithm(network: fx.GraphModule) -> fx.GraphModule:
    """Return the network of one output of probabilities p that computes exp(log p).

    The logarithms are logits, and `split` finds them: p = softmax(log p).
    """
    smallest, log, exp = map(
        operators.resolve, (operators.CLAMP_MIN, operators.LOGARITHM, operators.EXPONENTIAL)
    )

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if node.op != "output":
            return None
        (source,) = node.all_input_nodes
        new = copy[source]
        for function, arguments in ((smallest, (_MIN_PROBABILITY,)), (log, ()), (exp, ())):
            new = copy.graph.call_function(function, (new, *arguments))
            new.meta["val"] = source.meta["val"]
        return copy.output(new)

    return flat_module(rewrite(network.graph, change), tensors_of(network))


@torch.no_grad()
def with_unit_vectors(ends: Ends, outputs: Sequence[Tensor]) -> Ends:
    """Return the ends with the kinds of outputs corrected that are unit vectors for all images.

    Args:
        ends: The ends as the graph shows them.
        outputs: Outputs of the body for images that differ.
    """
    kinds = tuple[Kind, ...](
        "unit_norm" if kind == "values" and are_unit_vectors(output) else kind
        for kind, output in zip(ends.kinds, outputs, strict=True)
    )
    return replace(ends, kinds=kinds)
