"""Language models in ONNX: activations with a scale for each token, multiplied as whole numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from gdfq.deploy.onnx.passes import inputs_of, remove_unused, replace_node
from gdfq.deploy.saturation import TOKEN_OFFSET
from gdfq.functional.grid import block_size, code_bounds

Array = np.ndarray[Any, Any]
Constant = Callable[[str, Array], ir.Value]
"""Returns the initializer of a name and a value."""


@dataclass(frozen=True, eq=False)
class RoundedTokens:
    """Rounded tokens as codes and scales.

    Attributes:
        codes: Whole numbers in floats, [..., K].
        scale: [..., 1].
        unsigned: The codes plus 128 in uint8.
        offset: 128 in uint8.
    """

    codes: ir.Value
    scale: ir.Value
    unsigned: ir.Value
    offset: ir.Value


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight as codes and scales.

    Attributes:
        codes: int8 [O, I].
        scale: [O]; None if there is one for each block of columns.
    """

    codes: ir.Value
    scale: ir.Value | None


def round_tokens(x: ir.Value, bits: int, constant: Constant) -> tuple[list[ir.Node], RoundedTokens]:
    """Return the nodes that round tokens (`gdfq.functional.grid.fake_quantize_tokens`).

    Args:
        x: Tokens [..., K].
        bits: Bits of a code.
        constant: Makes an initializer.

    Returns:
        The nodes, of which the last has the rounded tokens; their codes and scales.
    """
    nodes: list[ir.Node] = []

    def made(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def number(value: float) -> ir.Value:
        return constant(f"float.{value:g}", np.array(value, np.float32))

    last = constant("codes.last_axis", np.array([-1], np.int64))
    largest = made("ReduceMax", made("Abs", x), last, keepdims=1)
    found = made("Div", largest, number(code_bounds(bits)[1]))
    is_empty = made("Less", found, number(float(np.finfo(np.float32).tiny)))
    scale = made("Where", is_empty, number(1.0), found)
    codes = made("Round", made("Div", x, scale))
    unsigned = made("Cast", made("Add", codes, number(TOKEN_OFFSET)), to=ir.DataType.UINT8)
    made("Mul", codes, scale)
    offset = constant("codes.token_offset", np.array(TOKEN_OFFSET, np.uint8))
    return nodes, RoundedTokens(codes, scale, unsigned, offset)


def float_matrix(
    codes: ir.Value, base: str, steps: Array, columns: int, constant: Constant
) -> tuple[list[ir.Node], Matrix]:
    """Return the nodes that make floats of a weight, which a runtime computes when it loads a file.

    Args:
        codes: int8 [O, I].
        base: Beginning of the names of constants.
        steps: Scales [O, 1], or [O, B] of blocks of columns.
        columns: I.
        constant: Makes an initializer.

    Returns:
        The nodes, of which the last has the weight; its codes and scales.
    """
    scale = constant(f"{base}_scale", steps)
    numbers = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    nodes, factor, blocks = [numbers], scale, steps.shape[1]
    if blocks > 1:
        block_of = np.arange(columns) // block_size(columns, -(-columns // blocks))
        index = constant(f"codes.blocks_{columns}_{blocks}", block_of)
        nodes.append(ir.node("Gather", [scale, index], {"axis": 1}))
        factor = nodes[-1].outputs[0]
    nodes.append(ir.node("Mul", [numbers.outputs[0], factor]))
    return nodes, Matrix(codes, scale if blocks == 1 else None)


def multiply_codes(
    graph: ir.Graph,
    tokens: Mapping[ir.Value, RoundedTokens],
    matrices: Mapping[ir.Value, Matrix],
) -> None:
    """Let linear layers with one scale for each output channel multiply codes.

    x_q W_qᵀ = Δ_x (q_x q_Wᵀ) Δ_Wᵀ, where the product in brackets is one of whole numbers. Layers
    with a scale for each block of columns multiply floats.

    Args:
        graph: The graph, changed in place.
        tokens: Rounded tokens.
        matrices: Weights.
    """
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        x, turned = inputs_of(node)
        rounded, transpose = tokens.get(x), turned.producer()
        if rounded is None or transpose is None:
            continue
        matrix = matrices.get(inputs_of(transpose)[0])
        if matrix is None or matrix.scale is None:
            continue
        codes = ir.node("Transpose", [matrix.codes], transpose.attributes)
        scales = ir.node("Transpose", [matrix.scale], transpose.attributes)
        product = ir.node("MatMulInteger", [rounded.unsigned, codes.outputs[0], rounded.offset])
        numbers = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        by_token = ir.node("Mul", [numbers.outputs[0], rounded.scale])
        by_channel = ir.node("Mul", [by_token.outputs[0], scales.outputs[0]])
        made = [codes, scales, product, numbers, by_token, by_channel]
        replace_node(graph, node, made)
        _remove_chain(graph, turned)
    for value, rounded in tokens.items():
        remove_unused(graph, value)
        _remove_chain(graph, rounded.unsigned, steps=2)


def _remove_chain(graph: ir.Graph, value: ir.Value, steps: int = 4) -> None:
    """Remove what makes a value, and what makes that, as far as nothing else uses it."""
    maker = value.producer()
    if not steps or maker is None or value.uses() or value.is_graph_output():
        return
    inputs = inputs_of(maker)
    graph.remove(maker, safe=True)
    for source in inputs:
        _remove_chain(graph, source, steps - 1)
