"""The `.tflite` file of an integer network for TFLite Micro: codes alone, batch 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from gdfq.deploy.litert.carriers import StoredCodes
from gdfq.deploy.litert.emitter import NoFormError, Value
from gdfq.deploy.litert.flatbuffer import FileTensor, Grid
from gdfq.deploy.litert.integers import ARITHMETIC
from gdfq.deploy.litert.layers import codes_layer
from gdfq.deploy.litert.layout import usual
from gdfq.deploy.litert.moves import as_map, padded_for
from gdfq.deploy.litert.windows import depthwise_options
from gdfq.deploy.litert.writer import Writer, WrittenFile
from gdfq.deploy.litert_micro.arithmetic import ONE, Shape, headroom, mean_scale, windows_of_average
from gdfq.graph import operators, queries
from gdfq.graph.inputs import InputSpec
from gdfq.graph.operators import name_of, short_name
from gdfq.student.integer_network import IntegerNetwork


def to_micro(
    network: IntegerNetwork,
    inputs: Sequence[InputSpec],
    metadata: Mapping[str, str],
    outputs: Sequence[str],
) -> WrittenFile:
    """Return an integer network as a `.tflite` file of int8 operators for one input.

    Args:
        network: The integer network, whose inputs and outputs are on grids.
        inputs: Specifications of its inputs.
        metadata: Metadata of the file.
        outputs: Names of the outputs.

    Raises:
        UsageError: The file has no form for an operator, or the LiteRT package is not installed.
    """
    return _MicroWriter(network, inputs).run(metadata, outputs)


class _MicroWriter(Writer):
    """Writes a file in which every tensor is codes."""

    is_dynamic = False

    def _input(self, node: fx.Node, spec: InputSpec) -> None:
        """Note an input, which the quantizer that reads it adds to the file."""
        quantizers = list(node.users)
        if len(quantizers) != 1 or quantizers[0] not in self.carriers:
            self.refused.append(f"an input that is read before it is rounded ({spec.name!r})")
            return
        carrier, shape = self.carriers[quantizers[0]], self._shape(node)
        value = self.emit.new(spec.name, shape, usual(len(shape)), np.int8, carrier.grid)
        self.inputs[spec.name] = value.tensor
        self.codes[quantizers[0]] = value

    def _output(self, node: fx.Node, name: str, taken: Sequence[FileTensor]) -> FileTensor:
        value = self._codes(node)
        value = self.emit.in_order(value, usual(len(value.shape)))
        if value.tensor in taken:
            value = self.emit.copied(value, name)
        self.emit.file.tensors[value.tensor.index].name = name
        return value.tensor

    def _codes(self, node: fx.Node) -> Value:
        """Return the codes of a node; what reads one without a form is its consequence."""
        if node not in self.codes:
            raise NoFormError("")
        return super()._codes(node)

    def _float(self, node: fx.Node) -> Value:
        raise NoFormError("" if node in self.floats else "an operator on floats")

    def _computed(self, node: fx.Node) -> Value:
        followed = any(source in self.floats for source in node.all_input_nodes)
        raise NoFormError("" if followed else f"{short_name(node) or name_of(node)} of floats")

    def _quantized(self, node: fx.Node) -> Value:
        if isinstance(known := self.codes.get(node), Value):  # an input
            return known
        x = queries.input_of(node)
        return self._on_grid(self._codes(x), x, self.carriers[node])

    def _on_grid(self, codes: Value, source: fx.Node, carrier: StoredCodes) -> Value:
        """Return codes in the codes of another grid.

        The sum with 0 shifts its terms by 20 bits, so that its first rounding is fine. `QUANTIZE`
        rounds codes themselves: on the way from 8 to 4 bits that changes many.
        """
        assert codes.grid is not None
        below = self._may_be_below(source, carrier)
        zero = np.full((1,) * len(codes.shape), codes.grid.zero_point, np.int8)
        term = self.emit.file.constant("zero", zero, codes.grid)
        shape = codes.shape, codes.order
        options = "AddOptions"
        return self.emit.integer("ADD", carrier, shape, [codes, term], options, may_be_below=below)

    def _rounded(self, node: fx.Node, chain: Sequence[fx.Node]) -> Value | None:
        carrier, shape = self.carriers[chain[-1]], self._shape(node)
        if node in self.layers:
            layer = self.layers[node]
            x = self._codes(queries.input_of(node))
            if not self._adds_codes(node):
                raise NoFormError("a layer of floats")
            return codes_layer(self.emit, layer, x, shape, carrier, headroom(layer))
        if name_of(node) in operators.JOINS and len(chain) == 1:
            return self._joined(node, self._requantized(node, carrier), carrier)
        terms = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if short_name(node) in ARITHMETIC:
            if len(terms) != len(node.args) or node.kwargs:
                raise NoFormError(f"{short_name(node)} of a constant")
            x, y = self.emit.aligned([self._codes(term) for term in terms])
            kind = short_name(node).upper()
            options = f"{kind.capitalize()}Options"
            return self.emit.integer(kind, carrier, (shape, x.order), [x, y], options)
        average = windows_of_average(node, self._shape(terms[0])) if terms else None
        if average is None:
            return None
        return self._average(node, self._codes(terms[0]), *average, shape, carrier)

    def _requantized(self, node: fx.Node, carrier: StoredCodes) -> list[Value]:
        parts: Any = node.args[0]
        return [
            self._on_grid(self._codes(part), part, _named(carrier, f"{carrier.name}.{index}"))
            for index, part in enumerate(parts)
        ]

    def _average(
        self,
        node: fx.Node,
        x: Value,
        windows: Any,
        count: float,
        shape: Shape,
        carrier: StoredCodes,
    ) -> Value:
        """Write an average: a depthwise convolution whose weights stand for 1 / count."""
        assert x.grid is not None
        mapped, padding = padded_for(self.emit, as_map(self.emit, x), windows, node.name)
        channels, scale = shape[1], mean_scale(count)
        ones = np.full((1, *windows.kernel, channels), ONE, np.int8)
        weight = self.emit.file.constant("ones", ones, Grid((scale,) * channels, dim=3))
        steps = Grid((scale * x.grid.scales[0],) * channels)
        bias = self.emit.file.constant("zeros", np.zeros(channels, np.int32), steps)
        result = (*shape[:2], *windows.counts)
        is_map = result == shape
        codes = self.emit.integer(
            "DEPTHWISE_CONV_2D",
            carrier if is_map else _named(carrier, f"{carrier.name}.map"),
            (result, mapped.order),
            [mapped, weight, bias],
            "DepthwiseConv2DOptions",
            may_be_below=self._may_be_below(node, carrier),
            **depthwise_options(windows, padding),
        )
        return codes if is_map else self.emit.reshaped(codes, shape, carrier.name)


def _named(carrier: StoredCodes, name: str) -> StoredCodes:
    return StoredCodes(name, carrier.lowest, carrier.grid, carrier.bits)
