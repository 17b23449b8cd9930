"""Scales on which no result lies at a tie between two codes.

A sum of two quantized tensors takes few values: one for each pair of codes. So does a function of
one, such as a sigmoid: one for each code. Some of them lie so near the middle between two codes of
the result's own grid that float rounding decides, and runtimes differ there. A change of the scale
by a few millionths moves them off the middle.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from gdfq.functional.grid import code_bounds
from gdfq.graph import operators, queries

_CANDIDATE_COUNT, _RELATIVE_STRIDE = 64, 2.0**-20
"""Scales that are tried on each side, and their relative distance: 10^-4 at most in all."""
_SAFE_DISTANCE = 1e-4
"""In codes: float32 computes a sum of two tensors of 8 bits more exactly than that."""

_OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    operators.ADD: torch.add,
    operators.DIFFERENCE: torch.sub,
    operators.MULTIPLY: torch.mul,
}


def possible_results(node: fx.Node, *values: Tensor) -> Tensor | None:
    """Return all results of an operator on quantized tensors, or None for other operators.

    Args:
        node: A node that calls an operator.
        *values: All values of each tensor that it reads, in order.
    """
    name = operators.name_of(node)
    if len(values) == 1 and (name in operators.FUNCTIONS or name in operators.WITH_NUMBERS):
        first, *others = node.args
        only = isinstance(first, fx.Node) and not any(isinstance(one, fx.Node) for one in others)
        if not only or not callable(node.target):
            return None
        results: Tensor = node.target(values[0].double(), *others, **node.kwargs)
        return results
    operation = _OPERATIONS.get(name)
    if operation is None or node.kwargs or len(values) != 2 or len(node.args) != 2:
        return None
    rows, columns = (one.double() for one in values)
    return operation(rows[:, None], columns[None]).flatten()


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
