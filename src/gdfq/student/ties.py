"""Scales on which no result lies at a tie between two codes.

A sum of two quantized tensors takes few values: one for each pair of codes. Some of them lie so
near the middle between two codes of the sum's own grid that float rounding decides, and runtimes
differ there. A change of the scale by a few millionths moves them off the middle.
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


def possible_results(node: fx.Node, first: Tensor, second: Tensor) -> Tensor | None:
    """Return all results of an operator on two quantized tensors, or None for other operators.

    Args:
        node: A node that calls an operator.
        first: All values of its first argument.
        second: All values of its second argument.
    """
    if node.kwargs or len(node.args) != 2:
        return None
    operation = _OPERATIONS.get(operators.name_of(node))
    if operation is None:
        return None
    return operation(first.double()[:, None], second.double()[None]).flatten()


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
