"""The graph that `torch.onnx.export` writes, in which the quantization operators stay opaque.

They are in the domain `gdfq`; `deploy.onnx.quantization` replaces them.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from gdfq.deploy.onnx.codes import stored_codes, stored_tokens
from gdfq.deploy.onnx.equivalents import with_equivalents
from gdfq.deploy.onnx.form import Form
from gdfq.deploy.onnx.passes import DOMAIN, inputs_of
from gdfq.errors import UsageError, first_line
from gdfq.execution.tracing import exclusive_tracing
from gdfq.functional import float_grid, grid
from gdfq.graph.inputs import InputSpec
from gdfq.graph.rewrite import Copy, rewrite
from gdfq.graph.tensors import flat_module
from gdfq.student.integer_network import IntegerNetwork

_OPSET = 21


def _symbol(
    name: str, value: Tensor, inputs: tuple[Tensor, ...], **attributes: int | str
) -> Tensor:
    """Return an operator of the domain `gdfq`, with the shape and type of `value`."""
    made: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        inputs,
        {**attributes},
        dtype=torch.float32,
        shape=value.shape,
        version=1,
    )
    return made


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    title: str,
    lowest: int,
    needs_clip: bool,
    adds_zero: bool,
) -> Tensor:
    return _symbol(
        "FakeQuantize",
        x,
        (x, scale, zero_point),
        bits=bits,
        title=title,
        lowest=lowest,
        needs_clip=int(needs_clip),
        adds_zero=int(adds_zero),
    )


def _fake_quantize_tokens(x: Tensor, bits: int, title: str) -> Tensor:
    return _symbol("FakeQuantizeTokens", x, (x,), bits=bits, title=title)


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return _symbol("Dequantize", codes, (codes, scale, zero_point), bits=bits)


def _dequantize_bias(codes: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return _symbol("DequantizeBias", codes, (codes, activation_scale, weight_scale))


def _fake_quantize_float(x: Tensor, scale: Tensor, form: str, title: str) -> Tensor:
    return _symbol("FakeQuantizeFloat", x, (x, scale), format=form, title=title)


def _dequantize_float(codes: Tensor, scale: Tensor, form: str) -> Tensor:
    return _symbol("DequantizeFloat", codes, (codes, scale), format=form)


_OPAQUE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    grid.fake_quantize: _fake_quantize,
    grid.fake_quantize_tokens: _fake_quantize_tokens,
    grid.dequantize: _dequantize,
    grid.dequantize_bias: _dequantize_bias,
    float_grid.fake_quantize_float: _fake_quantize_float,
    float_grid.dequantize_float: _dequantize_float,
}


def opaque(network: IntegerNetwork, form: Form) -> fx.GraphModule:
    """Return the network with quantization operators that tracing does not enter."""
    grids = {grid.node: grid for grid in network.activations}
    tokens = {tokens.node: tokens for tokens in network.tokens}
    stored, stored_by_token = stored_codes(network, form), stored_tokens(network)

    def change(copy: Copy, node: fx.Node) -> fx.Node | None:
        if node.target not in _OPAQUE:
            return None
        new = copy.of(node)
        new.target = _OPAQUE[node.target]
        if node in tokens:
            new.update_kwarg("title", stored_by_token[tokens[node].name].name)
        if node in grids:
            # Constants of equal value become one in the export, so they cannot tell the name.
            new.update_kwarg("title", grids[node].name)
            if grids[node].form is not None:
                return new
            codes = stored[grids[node].name]
            new.update_kwarg("lowest", codes.lowest)
            new.update_kwarg("needs_clip", codes.needs_clip)
            new.update_kwarg("adds_zero", codes.adds_zero)
        return new

    graph = with_equivalents(rewrite(network.graph, change))
    return flat_module(graph, network.tensors).eval()


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    """Return a context in which a logger only reports errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def exported(network: fx.GraphModule, inputs: Sequence[InputSpec]) -> ir.Model:
    """Return the network in ONNX, its quantization operators in a domain of their own."""
    examples = tuple(spec.zeros(2) for spec in inputs)  # a batch of one would become a constant
    try:
        with exclusive_tracing(), _only_errors("torch.onnx"):
            program = torch.onnx.export(
                network,
                examples,
                dynamo=True,
                opset_version=_OPSET,
                dynamic_shapes=tuple(map(_dynamic_sides, inputs)),
                verbose=False,
            )
    except Exception as error:
        raise UsageError(
            f"each operator of the network must have a form in ONNX; {_reason(error)}. "
            "Export with --target safetensors or pt2 instead."
        ) from error
    assert program is not None
    _register_constants(program.model.graph)
    return program.model


def _dynamic_sides(spec: InputSpec) -> dict[int, Any]:
    """Return the dimensions of an input that take any length: the batch, and that of tokens."""
    sides = {0: torch.export.Dim("batch")}
    if spec.vocabulary is not None:
        sides[1] = torch.export.Dim("length", min=2, max=spec.vocabulary.length)
    return sides


def _register_constants(graph: ir.Graph) -> None:
    """Register constants that the exporter's optimization left out of the graph.

    It does so with the bounds of a tensor that is clamped twice (onnxscript 0.7).
    """
    for node in graph:
        for value in inputs_of(node):
            if value is None or value.const_value is None or value.is_initializer():
                continue
            if value.producer() is None and not value.is_graph_input():
                while value.name in graph.initializers:
                    value.name = f"{value.name}_"
                graph.register_initializer(value)


def _reason(error: BaseException) -> str:
    """Return why an export failed: the node that it stopped at, and the first cause."""
    node, cause = "", error
    while True:
        found = re.search(r"node %(\w+)", str(cause))
        node = found[1] if found else node
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    operator = re.search(r"op='(aten\.\w+)'", str(cause))
    if node and operator:
        return f"{operator[1]} of {node!r} has none"
    where = f" at {node!r}" if node else ""
    return f"the export failed{where} with: {first_line(cause)}"
