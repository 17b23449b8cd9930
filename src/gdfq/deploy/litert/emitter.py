"""Operators of a `.tflite` file on tensors that know the order of their dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdfq.deploy.litert.carriers import StoredCodes
from gdfq.deploy.litert.flatbuffer import Array, FileBuilder, FileTensor, Grid
from gdfq.deploy.litert.layout import (
    Order,
    depends_on_batch,
    identity,
    in_file,
    permuted,
    regrouping,
    without_ones,
)


class NoFormError(Exception):
    """An operator that a file has no form for; its text names the operator."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network in the file.

    Attributes:
        tensor: The tensor of the file.
        order: The order of its dimensions (`gdfq.deploy.litert.layout`).
        shape: Its shape in the network, the batch being `layout.BATCH`.
        columns: For a map that was flattened in the file's order: the column of the network that
            each of its columns is.
    """

    tensor: FileTensor
    order: Order
    shape: tuple[int, ...]
    columns: Array | None = None

    @property
    def grid(self) -> Grid | None:
        """What its integers stand for; None for floats."""
        return self.tensor.grid

    def axis(self, dim: int) -> int:
        """Return the dimension of the file that a dimension of the network is."""
        return self.order.index(dim % len(self.shape))


@dataclass(frozen=True, eq=False)
class Emitter:
    """Writes operators to a file; each method returns the new tensor."""

    file: FileBuilder

    def new(
        self,
        name: str,
        shape: Sequence[int],
        order: Order,
        dtype: Any = np.float32,
        grid: Grid | None = None,
    ) -> Value:
        """Add a tensor that no operator writes yet, given its shape in the network."""
        if any(map(depends_on_batch, shape)):
            raise NoFormError("a tensor with a part of the batch")
        stored = in_file(permuted(shape, order))
        return Value(self.file.tensor(name, stored, dtype, grid), order, tuple(shape))

    def like(self, name: str, x: Value) -> Value:
        """Add a tensor with the shape and numbers of another."""
        return self.new(name, x.shape, x.order, x.tensor.dtype, x.grid)

    def carried(self, carrier: StoredCodes, shape: Sequence[int], order: Order) -> Value:
        """Add a tensor of codes."""
        return self.new(carrier.name, shape, order, np.int8, carrier.grid)

    def numbers(self, values: Sequence[int] | Array) -> FileTensor:
        """Add whole numbers, such as the dimensions of a mean."""
        return self.file.constant("numbers", np.array(values, dtype=np.int32))

    def constant(self, name: str, value: Tensor, like: Value) -> Value:
        """Add constant floats that broadcast against a tensor, in its order."""
        rank = len(like.shape)
        shape = (*(1,) * (rank - value.ndim), *value.shape)
        stored = value.detach().float().reshape(shape).permute(like.order)
        return Value(self.file.constant(name, stored.numpy()), like.order, shape)

    def scalar(self, number: float, like: Value) -> Value:
        """Add one float that broadcasts against a tensor."""
        return self.constant(f"{number:g}", torch.tensor(number), like)

    def operator(
        self,
        kind: str,
        result: Value,
        inputs: Sequence[Value | FileTensor | None],
        options: str | None = None,
        **values: object,
    ) -> Value:
        """Add an operator that writes `result`, and return it (see `FileBuilder.operator`)."""
        tensors = [x.tensor if isinstance(x, Value) else x for x in inputs]
        self.file.operator(kind, tensors, [result.tensor], options, **values)
        return result

    def unary(
        self, kind: str, name: str, x: Value, options: str | None = None, **values: object
    ) -> Value:
        """Apply a function of each number."""
        return self.operator(kind, self.like(name, x), [x], options, **values)

    def binary(self, kind: str, name: str, x: Value, y: Value) -> Value:
        """Apply a function of two float tensors, which broadcast."""
        x, y = self.aligned([x, y])
        shape = torch.broadcast_shapes(x.shape, y.shape)
        options = f"{kind.capitalize()}Options" if kind in {"ADD", "SUB", "MUL", "DIV"} else None
        return self.operator(kind, self.new(name, shape, x.order), [x, y], options)

    def aligned(self, values: Sequence[Value]) -> list[Value]:
        """Return tensors with one rank and one order, so that they broadcast as the network's."""
        rank = max(len(value.shape) for value in values)
        values = [self.of_rank(value, rank) for value in values]
        largest = max(values, key=lambda value: int(np.prod(value.shape, dtype=object)))
        return [self.in_order(value, largest.order) for value in values]

    def of_rank(self, x: Value, rank: int) -> Value:
        """Return a tensor with dimensions of length 1 in front, which must not hold the batch."""
        missing = rank - len(x.shape)
        if not missing:
            return x
        return self.reshaped(x, (*(1,) * missing, *x.shape), f"{self.name_of(x)}.broadcast")

    def in_order(self, x: Value, order: Order) -> Value:
        """Return a tensor with its dimensions in another order."""
        if x.order == order:
            return x
        name = f"{self.name_of(x)}.transpose"
        result = self.new(name, x.shape, order, x.tensor.dtype, x.grid)
        if without_ones(order, x.shape) == without_ones(x.order, x.shape):
            return self._reshape(x, result)
        return self.operator(
            "TRANSPOSE", result, [x, self.numbers([x.order.index(dim) for dim in order])]
        )

    def reshaped(self, x: Value, shape: Sequence[int], name: str) -> Value:
        """Return a tensor with another shape in the network."""
        orders = regrouping(x.shape, shape, x.order)
        x = self.in_order(x, orders.before)
        result = self.new(name, shape, orders.after, x.tensor.dtype, x.grid)
        return self._reshape(x, result)

    def flattened(self, x: Value, name: str) -> Value:
        """Return a map as rows in the order of the file, for a layer whose columns follow it."""
        batch, *rest = x.shape
        count = int(np.prod(rest))
        columns = np.arange(count).reshape(rest).transpose([dim - 1 for dim in x.order[1:]])
        result = self.new(name, (batch, count), identity(2), x.tensor.dtype, x.grid)
        return replace(self._reshape(x, result), columns=columns.reshape(-1))

    def copied(self, x: Value, name: str) -> Value:
        return self._reshape(x, self.like(name, x))

    def _reshape(self, x: Value, result: Value) -> Value:
        shape = list(result.tensor.shape)
        return self.operator(
            "RESHAPE", result, [x, self.numbers(shape)], "ReshapeOptions", newShape=shape
        )

    def name_of(self, x: Value) -> str:
        return str(self.file.tensors[x.tensor.index].name)

    def dequantized(self, x: Value) -> Value:
        """Return the numbers that codes stand for."""
        result = self.new(f"{self.name_of(x)}.float", x.shape, x.order)
        return self.operator("DEQUANTIZE", replace(result, columns=x.columns), [x])

    def quantized(self, x: Value, carrier: StoredCodes, *, may_be_below: bool) -> Value:
        """Return the codes of floats.

        Args:
            x: The floats.
            carrier: How to store the codes.
            may_be_below: Whether numbers may lie below that of the lowest code.
        """
        if may_be_below and not carrier.saturates:
            name = f"{carrier.name}.clip"
            if carrier.starts_at_zero:
                x = self.unary("RELU", name, x)
            else:
                x = self.binary("MAXIMUM", name, x, self.scalar(carrier.low, x))
        return self.operator("QUANTIZE", self.carried(carrier, x.shape, x.order), [x])

    def integer(
        self,
        kind: str,
        carrier: StoredCodes,
        result: tuple[Sequence[int], Order],
        inputs: Sequence[Value | FileTensor | None],
        options: str,
        *,
        may_be_below: bool = True,
        **values: object,
    ) -> Value:
        """Add an operator that rounds its result to codes.

        Args:
            kind: The operator.
            carrier: How to store the codes.
            result: Shape and order of the result.
            inputs: Its inputs.
            options: The name of its options.
            may_be_below: Whether numbers may lie below that of the lowest code.
            **values: The options.
        """
        codes = self.carried(carrier, *result)
        clips = may_be_below and not carrier.saturates
        fuses = clips and carrier.starts_at_zero and kind in _FUSES_RELU
        if kind in _FUSES_RELU:
            values["fusedActivationFunction"] = _RELU if fuses else _NO_ACTIVATION
        if not clips or fuses:
            return self.operator(kind, codes, inputs, options, **values)
        any_codes = self.new(f"{carrier.name}.any", *result, np.int8, carrier.grid)
        self.operator(kind, any_codes, inputs, options, **values)
        lowest = self.file.constant("lowest", np.array(carrier.lowest, np.int8), carrier.grid)
        return self.operator("MAXIMUM", codes, [any_codes, lowest])


_NO_ACTIVATION, _RELU = 0, 1
"""The schema's numbers of fused activation functions."""
_FUSES_RELU = frozenset({"ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MUL", "SUB"})
