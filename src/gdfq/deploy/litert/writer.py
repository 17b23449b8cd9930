"""The `.tflite` file of an integer network, in the operators of LiteRT.

Activations and weights are int8. What the student adds as whole numbers and rounds once is one
operator of the file, which XNNPACK, LiteRT's library of kernels for processors, rounds as the
student does. Everything else is computed in floats, and rounded by `QUANTIZE`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.data.preprocessing import Preprocessing
from gdfq.deploy.litert import integers
from gdfq.deploy.litert.carriers import StoredCodes, carrier_of
from gdfq.deploy.litert.elementwise import clamped, for_each_image, normalised_pixels
from gdfq.deploy.litert.emitter import Emitter, NoFormError, Value
from gdfq.deploy.litert.flatbuffer import FileBuilder, FileTensor
from gdfq.deploy.litert.functions import FUNCTIONS
from gdfq.deploy.litert.layers import codes_layer, float_layer
from gdfq.deploy.litert.layout import Order, identity, in_file, usual
from gdfq.deploy.litert.moves import MOVES, joined, reshaped
from gdfq.deploy.litert.shapes import values_by_node
from gdfq.errors import UsageError
from gdfq.graph import operators, queries
from gdfq.graph.inputs import InputSpec
from gdfq.graph.operators import name_of, short_name
from gdfq.student.integer_form import counts_in_products, is_integer_layer, quantized_by
from gdfq.student.integer_network import IntegerNetwork

Shape = tuple[int, ...]
Held = Value | list[Value]
"""A tensor in the file, or several outputs of one operator."""


@dataclass(frozen=True, eq=False)
class WrittenFile:
    """A file, and how its tensors correspond to the network's.

    Attributes:
        data: Contents of the file.
        orders: The order of dimensions of each tensor of codes, by its name.
    """

    data: bytes
    orders: Mapping[str, Order]


def to_litert(
    network: IntegerNetwork,
    inputs: Sequence[InputSpec],
    metadata: Mapping[str, str],
    outputs: Sequence[str] = ("logits",),
    raw_input: Preprocessing | None = None,
) -> WrittenFile:
    """Return an integer network as a `.tflite` file, which takes batches of any length.

    Maps [N, C, H, W] are [N, H, W, C] in the file, inputs and outputs alike.

    Args:
        network: The integer network, on the CPU. Layers of floats stay floats.
        inputs: Specifications of its inputs.
        metadata: Metadata of the file.
        outputs: Names of the outputs.
        raw_input: Normalisation in the file, which then takes uint8 pixels.

    Raises:
        UsageError: The file has no form for an operator, or the LiteRT package is not installed.
    """
    return Writer(network, inputs, raw_input).run(metadata, outputs)


def unsupported(graph: fx.Graph) -> list[str]:
    """Return the operators of a graph that a file has no form for, each with its layer or node.

    Args:
        graph: The graph of a teacher or of an integer network. One without the shapes of its
            inputs is not judged here; its operators are refused when it is written.
    """
    inputs = queries.inputs(graph)
    module = graph.owning_module
    if module is None or not all("val" in node.meta for node in inputs):
        return []
    values = [node.meta["val"] for node in inputs]
    specs = [
        InputSpec(node.name, tuple(map(int, value.shape[1:])), value.dtype)
        for node, value in zip(inputs, values, strict=True)
    ]
    return Writer(IntegerNetwork(module), specs).refusals()


class Writer:
    """Writes a file; a tensor on a grid is held as codes, and as floats on demand.

    Attributes:
        is_dynamic: Whether the file takes batches of any length.
    """

    is_dynamic = True

    def __init__(
        self,
        network: IntegerNetwork,
        inputs: Sequence[InputSpec],
        raw_input: Preprocessing | None = None,
    ) -> None:
        self.graph = network.graph
        self.tensors = network.tensors
        self.specs = inputs
        self.raw_input = raw_input
        self.emit = Emitter(FileBuilder(is_dynamic=self.is_dynamic))
        self.known = values_by_node(network.module, inputs)
        self.carriers = {grid.node: carrier_of(grid) for grid in network.activations}
        self.layers = {layer.node: layer for layer in network.layers}
        self.codes: dict[fx.Node, Held] = {}
        self.floats: dict[fx.Node, Held] = {}
        self.constants = network.constants
        self.inputs: dict[str, FileTensor] = {}
        self.refused: list[str] = []

    def run(self, metadata: Mapping[str, str], names: Sequence[str]) -> WrittenFile:
        if refused := self.refusals():
            raise UsageError(
                "each operator of the network must have a form in a .tflite file; these have "
                f"none: {', '.join(refused)}. Export with --target onnx instead."
            )
        results: dict[str, FileTensor] = {}
        for name, node in zip(names, queries.outputs(self.graph), strict=True):
            taken = [*self.inputs.values(), *results.values()]
            results[name] = self._output(node, name, taken)
        orders = {
            carrier.name: value.order
            for node, carrier in self.carriers.items()
            if isinstance(value := self.codes.get(node), Value)
        }
        return WrittenFile(self.emit.file.pack(self.inputs, results, metadata), orders)

    def refusals(self) -> list[str]:
        """Write all operators, and return those that have no form."""
        specs = iter(self.specs)
        written: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in written or node.op == "output":
                continue
            if node.op == "placeholder":
                self._input(node, next(specs))
            elif node not in self.constants and isinstance(self.known[node], Tensor | tuple | list):
                written |= set(self._written(node))
        constant = [n for n in queries.outputs(self.graph) if n not in {*self.codes, *self.floats}]
        return [*self.refused, *(f"a constant output ({node.name!r})" for node in constant)]

    def _input(self, node: fx.Node, spec: InputSpec) -> None:
        shape = self._shape(node)
        dtype = str(torch.uint8 if self.raw_input else spec.dtype).removeprefix("torch.")
        value = self.emit.new(spec.name, shape, usual(len(shape)), dtype)
        self.inputs[spec.name] = value.tensor
        if self.raw_input:
            value = normalised_pixels(self.emit, value, self.raw_input)
        self.floats[node] = value

    def _output(self, node: fx.Node, name: str, taken: Sequence[FileTensor]) -> FileTensor:
        """Return an output under its name, in the usual order of its dimensions.

        Args:
            node: The output.
            name: Its name.
            taken: Tensors that are inputs or outputs already.
        """
        value = self._float(node)
        value = self.emit.in_order(value, usual(len(value.shape)))
        if value.tensor in taken:  # returned twice, or as it came
            value = self.emit.copied(value, name)
        self.emit.file.tensors[value.tensor.index].name = name
        return value.tensor

    # ------------------------------------------------------------------ nodes

    def _written(self, node: fx.Node) -> Sequence[fx.Node]:
        """Write a node, and return the nodes after it that are part of its operator.

        A node without a form is noted, and replaced by tensors that nothing writes.
        """
        try:
            return self._write(node)
        except NoFormError as error:
            if str(error):  # it is not the consequence of another
                self.refused.append(f"{self._title(node)} ({error})")
            known = self.known[node]
            made = [
                _stand_in(_shape_of(one))
                for one in (known if isinstance(known, tuple | list) else [known])
            ]
            self.floats[node] = made if isinstance(known, tuple | list) else made[0]
            return ()

    def _write(self, node: fx.Node) -> Sequence[fx.Node]:
        if node in self.carriers:
            self.codes[node] = self._quantized(node)
            return ()
        chain = quantized_by(node, self.tensors)
        if chain and (codes := self._rounded(node, chain)) is not None:
            self.codes[chain[-1]] = codes
            return chain
        move, sources = MOVES.get(short_name(node)), self._sources(node)
        if name_of(node) == operators.GETITEM:
            self._choose(node, sources[0])
        elif name_of(node) in operators.JOINS and self._are_on_one_grid(sources):
            self.codes[node] = self._joined(node, [self._codes(s) for s in _parts(node)])
        elif move is None or len(sources) != 1:
            self.floats[node] = self._computed(node)
        elif sources[0] in self.codes and queries.keeps_grid(node):
            self.codes[node] = self._moved(move, node, self._codes(sources[0]))
        else:
            self.floats[node] = self._moved(move, node, self._float(sources[0]))
        return ()

    def _title(self, node: fx.Node) -> str:
        """Return the name of a node's layer, or its own."""
        layer = self.layers.get(node)
        if layer is not None and layer.weight is not None:
            return layer.weight.name
        return queries.layer_name(node) if queries.has_weight(node) else node.name

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that a node reads, without constants and sizes."""
        sources = node.all_input_nodes
        return [source for source in sources if source in self.codes or source in self.floats]

    # ------------------------------------------------------------------ codes

    def _quantized(self, node: fx.Node) -> Value:
        x, carrier = queries.input_of(node), self.carriers[node]
        below = self._may_be_below(x, carrier)
        return self.emit.quantized(self._float(x), carrier, may_be_below=below)

    def _may_be_below(self, node: fx.Node, carrier: StoredCodes) -> bool:
        """Return whether values of a node may round to a number below a grid's lowest code."""
        return self._lowest(node) < carrier.low - carrier.scale / 2

    def _lowest(self, node: fx.Node) -> float:
        """Return a number that no value of a node is below."""
        source = queries.grid_source(node)
        if source in self.carriers:
            return self.carriers[source].low
        if queries.is_clamp(source):
            return max(queries.clamp_ends(source)[0], self._lowest(queries.input_of(source)))
        if short_name(source) in _NOT_NEGATIVE:
            return 0.0
        if queries.mean_of(source) is not None:
            return self._lowest(queries.input_of(source))
        return -torch.inf

    def _rounded(self, node: fx.Node, chain: Sequence[fx.Node]) -> Value | None:
        """Return the codes that an integer operator makes of codes, or None if there is none."""
        carrier, shape = self.carriers[chain[-1]], self._shape(node)
        if node in self.layers:
            return self._integer_layer(node, carrier) if self._adds_codes(node) else None
        if name_of(node) in operators.JOINS and len(chain) == 1:
            return self._joined(node, self._requantized(node, carrier), carrier)
        arguments = [a for a in node.args if isinstance(a, fx.Node)]
        if not arguments or not all(isinstance(self.codes.get(a), Value) for a in arguments):
            return None
        codes = [self._codes(source) for source in arguments]
        if short_name(node) in integers.ARITHMETIC and len(codes) == len(node.args) == 2:
            kind, (x, y) = short_name(node).upper(), codes
            if node.kwargs:
                return None
            return integers.arithmetic(self.emit, kind, x, y, shape, carrier)
        if (pool := queries.average_pooling_of(node)) is not None:
            return integers.average(self.emit, node.name, codes[0], shape, carrier, pool)
        return None

    def _adds_codes(self, node: fx.Node) -> bool:
        """Return whether a layer adds products of codes."""
        if is_integer_layer(node, self.tensors):
            return True
        layer, bias = self.layers[node], queries.bias_of(node)
        if layer.weight is None or layer.input is None or bias is None or node.kwargs:
            return False
        weight = queries.weight_of(node)
        return counts_in_products(bias, layer.input.node, weight, self.tensors)

    def _integer_layer(self, node: fx.Node, carrier: StoredCodes) -> Value | None:
        layer = self.layers[node]
        assert layer.weight is not None
        assert layer.input is not None
        if not integers.fits_layer(float(layer.weight.scale.max() * layer.input.scale), carrier):
            return None
        x = self._codes(queries.input_of(node))
        return codes_layer(self.emit, layer, x, self._shape(node), carrier)

    def _requantized(self, node: fx.Node, carrier: StoredCodes) -> list[Value]:
        """Return the parts of a concatenation, each rounded to the grid of the result."""
        parts = []
        for index, source in enumerate(_parts(node)):
            part = replace(carrier, name=f"{carrier.name}.{index}")
            below = self._may_be_below(source, carrier)
            parts.append(self.emit.quantized(self._float(source), part, may_be_below=below))
        return parts

    def _are_on_one_grid(self, nodes: Sequence[fx.Node]) -> bool:
        values = [self.codes.get(node) for node in nodes]
        grids = {value.grid if isinstance(value, Value) else None for value in values}
        return len(grids) == 1 and None not in grids

    # ----------------------------------------------------------------- values

    def _codes(self, node: fx.Node) -> Value:
        return _one(self.codes[node])

    def _float(self, node: fx.Node) -> Value:
        """Return a node's values as floats."""
        if node not in self.floats and node not in self.codes:
            raise NoFormError(f"an operator on {short_name(node) or 'a constant'}")
        if node not in self.floats:
            self.floats[node] = self.emit.dequantized(self._codes(node))
        return _one(self.floats[node])

    def _argument(self, node: fx.Node) -> Any:
        """Return an argument: a tensor of floats, a constant or a size."""
        if node in self.constants:
            return self.constants[node]
        known = self.known[node]
        return self._float(node) if isinstance(known, Tensor) else known

    def _shape(self, node: fx.Node) -> Shape:
        return _shape_of(self.known[node])

    # -------------------------------------------------------------- operators

    def _moved(self, move: Callable[..., Any], node: fx.Node, x: Value) -> Held:
        known = self.known[node]
        shapes = _shape_of(known) if isinstance(known, Tensor) else [*map(_shape_of, known)]
        if move is reshaped and self._feeds_linears(node) and _flattens(x.shape, shapes):
            return self.emit.flattened(self.emit.in_order(x, usual(4)), node.name)
        args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), self._argument)
        kwargs = {key: value for key, value in kwargs.items() if key not in _MEMORY}
        moved: Held = _called(move, self.emit, node.name, x, shapes, *args, **kwargs)
        return moved

    def _feeds_linears(self, node: fx.Node) -> bool:
        """Return whether linear layers alone read a node."""
        return bool(node.users) and all(
            name_of(user) in operators.LINEARS and queries.input_of(user) is node
            for user in node.users
        )

    def _choose(self, node: fx.Node, source: fx.Node) -> None:
        """Write one of several outputs."""
        index: Any = node.args[1]
        for held in (self.codes, self.floats):
            values = held.get(source)
            if isinstance(values, list):
                if index >= len(values):
                    raise NoFormError("the positions of largest values")
                held[node] = values[index]

    def _joined(
        self, node: fx.Node, parts: Sequence[Value], carrier: StoredCodes | None = None
    ) -> Value:
        shape = self._shape(node)
        dim = _dim(node) % len(shape)
        if name_of(node) != operators.CONCATENATE:  # a stack
            one = (*shape[:dim], 1, *shape[dim + 1 :])
            parts = [self.emit.reshaped(p, one, f"{node.name}.{i}") for i, p in enumerate(parts)]
        return joined(self.emit, carrier.name if carrier else node.name, parts, dim, shape)

    def _computed(self, node: fx.Node) -> Value:
        """Write an operator that computes floats."""
        if node in self.layers:
            return self._float_layer(node)
        if queries.is_clamp(node):
            ends = queries.clamp_ends(node)
            return clamped(self.emit, node.name, self._float(queries.input_of(node)), *ends)
        if name_of(node) in operators.JOINS:
            return self._joined(node, [self._float(source) for source in _parts(node)])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._argument)
        if name_of(node) == operators.EXPAND and isinstance(args[0], Tensor):
            anchor = self._float(queries.inputs(self.graph)[0])
            return for_each_image(self.emit, node.name, args[0], self._shape(node), anchor)
        function = FUNCTIONS.get(short_name(node))
        if function is None:
            raise NoFormError(f"{short_name(node) or name_of(node)}")
        value: Value = _called(function, self.emit, node.name, self._shape(node), *args, **kwargs)
        return value

    def _float_layer(self, node: fx.Node) -> Value:
        if queries.weight_of(node) not in self.constants:
            raise NoFormError("a layer whose weight is computed")
        layer, bias = self.layers[node], queries.bias_of(node)
        weight = self.constants[queries.weight_of(node)]
        values = None if bias is None else self.constants[bias]
        x = self._float(queries.input_of(node))
        return float_layer(self.emit, layer, weight, values, x, self._shape(node))


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the form of an operator, which may not know all of its arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise NoFormError("an operator with these arguments") from error
    return function(*args, **kwargs)


def _one(value: Held) -> Value:
    if isinstance(value, list):
        raise NoFormError("an operator on several tensors")
    return value


def _flattens(shape: Shape, result: Any) -> bool:
    """Return whether a map [N, C, H, W] becomes rows [N, C H W]."""
    return len(shape) == 4 and len(result) == 2 and result[0] == shape[0]


def _parts(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node joins."""
    parts: Any = node.args[0]
    return list(parts)


def _dim(node: fx.Node) -> int:
    """Return the dimension along which a node joins tensors."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(given)


def _stand_in(shape: Shape) -> Value:
    """Return a tensor for an operator without a form, so that those after it are judged, too."""
    return Value(FileTensor(0, in_file(shape), np.dtype(np.float32)), identity(len(shape)), shape)


def _shape_of(value: Tensor) -> Shape:
    return tuple(map(int, value.shape))


_NOT_NEGATIVE = frozenset({"sigmoid", "hardsigmoid", "softmax", "exp", "abs", "square", "sqrt"})
_MEMORY = frozenset({"memory_format", "implicit"})
"""Arguments that do not change values."""
