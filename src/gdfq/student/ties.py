"""Scales on which no result lies at a tie between two codes.

A sum of two quantized tensors takes few values: one for each pair of codes. So does a function of
one, such as a sigmoid: one for each code, and whatever else computes a number from one number of
each of a few tensors. Some of them lie so near the middle between two codes of the result's own
grid that float rounding decides, and runtimes differ there. A change of the scale by a few
millionths moves them off the middle.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from gdfq.functional.grid import code_bounds
from gdfq.graph import operators, queries

_CANDIDATE_COUNT, _RELATIVE_STRIDE = 64, 2.0**-20
"""Scales that are tried on each side, and their relative distance: 10^-4 at most in all."""
_SAFE_DISTANCE = 1e-4
"""In codes: float32 computes a sum of two tensors of 8 bits more exactly than that."""

_MAX_RESULTS = 2**16
"""Those of two tensors of 8 bits."""


def possible_results(node: fx.Node, values_of: Callable[[fx.Node], Tensor | None]) -> Tensor | None:
    """Return all results of a function of tensors with few values, or None where there is none.

    The function may consist of several operators, each of which computes a number from one number
    of each tensor. A tensor that several of them read has the same value in all.

    Args:
        node: The node of the last operator.
        values_of: Returns all values that a tensor on a grid or a constant has, else None.

    Returns:
        The results [M] in float64, for all combinations of values.
    """
    if values_of(node) is not None:
        return None  # it only moves values of a grid
    inner, found, left = set[fx.Node](), dict[fx.Node, Tensor](), [node]
    while left:
        function = left.pop()
        if not operators.is_pointwise(function):
            return None
        inner.add(function)
        for source in function.all_input_nodes:
            if source in inner or source in found:
                continue
            values = values_of(source)
            if values is None:
                left.append(source)
            else:
                found[source] = values
    is_constant = all(source.op == "get_attr" for source in found)
    if is_constant or math.prod(values.numel() for values in found.values()) > _MAX_RESULTS:
        return None
    counts = [values.numel() for values in found.values()]
    results = {}
    for i, (source, values) in enumerate(found.items()):  # of several types, which meshgrid refuses
        shape = [-1 if i == j else 1 for j in range(len(counts))]
        wide = values.double() if values.is_floating_point() else values
        results[source] = wide.view(shape).expand(counts)
    for function in sorted(inner):
        arguments, keywords = fx.node.map_arg((function.args, function.kwargs), results.__getitem__)
        results[function] = _pointwise_form(function)(*arguments, **keywords)
    return results[node].flatten()


def _pointwise_form(node: fx.Node) -> Callable[..., Tensor]:
    """Return a node's operator, in a form that has one parameter for each number."""
    is_prelu = operators.name_of(node) == operators.PRELU
    form: Callable[..., Tensor] = torch._prelu_kernel if is_prelu else node.target  # type: ignore[assignment]
    return form


def clamped(node: fx.Node) -> fx.Node:
    """Return the node behind clamps."""
    while queries.is_clamp(node):
        node = queries.input_of(node)
    return node


def scale_off_ties(results: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return a scale, changed by 10^-4 at most, on which results lie off the middle of two codes.

    The nearest scale on which all keep their distance is taken, or the one with the largest.

    Args:
        results: All results [M].
        scale: A scalar.
        zero_point: A scalar.
        bits: Bits of a code.
    """
    lowest, highest = (float(bound - zero_point) for bound in code_bounds(bits))
    best, most = scale, -1.0
    for count in range(2 * _CANDIDATE_COUNT + 1):
        signed = (count + 1) // 2 * (1 if count % 2 else -1)
        candidate = (scale.double() * (1 + signed * _RELATIVE_STRIDE)).to(scale.dtype)
        steps = results / candidate.double()
        steps = steps[(steps > lowest) & (steps < highest)]
        distance = float((steps - steps.floor() - 0.5).abs().min()) if steps.numel() else 0.5
        if distance > most:
            best, most = candidate, distance
        if most >= _SAFE_DISTANCE:
            break
    return best
