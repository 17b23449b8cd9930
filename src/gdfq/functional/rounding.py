"""Weights that are fitted to wanted outputs, and rounding whose errors compensate one another.

For a layer y = W x with inputs x [K] and outputs y [R], in G groups that share nothing. Covariances
are over images and positions; a bias takes care of the means. Rounded weights are W_q = Δ q, with
numbers q of a grid and a scale Δ for each output, or for each block of columns of an output. Their
error is that of the outputs, with A = E[x xᵀ] + λ I:

    E(W_q) = (W_q − W) A (W_q − W)ᵀ        for each output
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.functional.grid import code_bounds, of_columns

Nearest = Callable[[Tensor], Tensor]
"""Returns for each number [G, R, ...] the nearest number of a grid whose scale is 1."""

_BLOCK_COLUMNS = 64
"""Columns that are rounded before the columns after them are updated together."""
_FINE_BITS = 8
"""Bits from which on a grid is so fine that neither scales nor codes are improved."""
_MULTIPLES = (0.9, 0.8, 0.7)
"""Multiples of the scales that are tried beside the scales themselves. All blocks of an output have
the same one."""


def fitted_weight(weight: Tensor, inputs: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
    """Return the weight W' that gives the wanted outputs best: argmin E|W' x − y|² + λ|W' − W|².

        W' = (E[y xᵀ] + λ W) (E[x xᵀ] + λ I)⁻¹

    Where the inputs say nothing, the weight stays.

    Args:
        weight: W [G, R, K].
        inputs: Covariance of the inputs, E[x xᵀ], [G, K, K].
        cross: Covariance of the wanted outputs with the inputs, E[y xᵀ], [G, R, K].
        ridge: λ > 0 of each group, [G].
    """
    λ = ridge[:, None, None]
    system = inputs + λ * torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device)
    solution: Tensor = torch.linalg.solve(system, (cross + λ * weight).mT)
    return solution.mT


def nearest_codes(zero_point: Tensor, bits: int) -> Nearest:
    """Return the rounding to q − z, with codes q of `bits` bits.

    Args:
        zero_point: z, such as [G, R, 1].
        bits: Bits of a code.
    """
    low, high = code_bounds(bits)
    return lambda units: (units + zero_point).clamp(low, high).round() - zero_point


def rounded_for_outputs(
    weight: Tensor, inputs: Tensor, ridge: Tensor, scale: Tensor, nearest: Nearest, bits: int
) -> tuple[Tensor, Tensor]:
    """Round a weight so that its outputs change little; return latent numbers and scales.

    Codes are found by `compensated`, with each of several multiples of the scales, and each output
    keeps the multiple of least error. Of the winner the codes are improved, the scales, and the
    codes again (`descended`, `refitted_scale`). The error is never above that of `compensated` with
    the given scales. Grids of 8 bits keep these scales and the codes that were found first.

    Args:
        weight: W [G, R, K].
        inputs: Covariance of the inputs, E[x xᵀ], [G, K, K].
        ridge: λ > 0 of each group, [G].
        scale: Δ > 0 to begin with, [G, R, B]: one for each of B blocks of ⌈K / B⌉ columns, of which
            the last may be smaller (`gdfq.functional.grid.block_size`).
        nearest: The rounding to the grid.
        bits: Bits of a code.

    Returns:
        - Latent numbers u [G, R, K]: `nearest(u)` is q.
        - Δ [G, R, B].
    """
    system = inputs.clone()
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    factor = inverse_factor(system)
    columns = weight.shape[2]
    steps = of_columns(scale, columns)
    latent = compensated(weight, factor, steps, nearest)
    if bits >= _FINE_BITS:
        return latent, scale
    least = output_error(weight, system, nearest(latent) * steps)
    start = scale
    for multiple in _MULTIPLES:
        tried = multiple * start
        steps = of_columns(tried, columns)
        found = compensated(weight, factor, steps, nearest)
        error = output_error(weight, system, nearest(found) * steps)
        better = (error < least)[:, :, None]
        latent, scale = torch.where(better, found, latent), torch.where(better, tried, scale)
        least = torch.minimum(error, least)
    del factor  # as large as A
    latent = descended(weight, system, of_columns(scale, columns), latent, nearest)
    scale = refitted_scale(weight, system, scale, nearest(latent))
    return descended(weight, system, of_columns(scale, columns), latent, nearest), scale


def output_error(weight: Tensor, system: Tensor, values: Tensor) -> Tensor:
    """Return the error (V − W) A (V − W)ᵀ of values V in place of W, of each output, [G, R].

    Args:
        weight: W [G, R, K].
        system: A [G, K, K].
        values: V [G, R, K].
    """
    apart = values - weight
    return ((apart @ system) * apart).sum(2)


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """The upper Cholesky factor U of A⁻¹, Uᵀ U = A⁻¹, with the columns of A in another order.

    Attributes:
        order: The columns, those of the largest diagonal elements of A first, [G, K].
        upper: U in this order, [G, K, K].
    """

    order: Tensor
    upper: Tensor


def inverse_factor(system: Tensor) -> InverseFactor:
    """Return the factor of A⁻¹ for a positive definite A [G, K, K]."""
    order = system.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    ordered = system.gather(1, order[:, :, None].expand_as(system))
    ordered = ordered.gather(2, order[:, None].expand_as(system))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return InverseFactor(order, torch.linalg.cholesky(inverse).mT)


def compensated(weight: Tensor, factor: InverseFactor, scale: Tensor, nearest: Nearest) -> Tensor:
    """Return latent numbers whose rounding changes the outputs little (GPTQ, arXiv 2210.17323).

    One column after the other is rounded, in the order of the factor, and the columns that are left
    change so that the error is the least possible: with the error e of column i,

        W_j ← W_j − e U_ij / U_ii        for all j after i

    Args:
        weight: W [G, R, K].
        factor: That of A⁻¹.
        scale: Δ of each column, [G, R, K].
        nearest: The rounding to the grid.

    Returns:
        W / Δ [G, R, K], each column as it was when it was rounded.
    """
    groups, rows, columns = weight.shape
    order, upper = factor.order, factor.upper
    left, steps = (x.gather(2, order[:, None].expand_as(weight)) for x in (weight, scale))
    latent = torch.empty_like(left)
    for start in range(0, columns, _BLOCK_COLUMNS):
        end = min(columns, start + _BLOCK_COLUMNS)
        errors = left.new_empty(groups, rows, end - start)
        for i in range(start, end):
            column, step = left[:, :, i : i + 1], steps[:, :, i : i + 1]
            units = column / step
            latent[:, :, i : i + 1] = units
            error = (column - nearest(units) * step) / upper[:, i : i + 1, i : i + 1]
            errors[:, :, i - start : i - start + 1] = error
            left[:, :, i + 1 : end] -= error * upper[:, i : i + 1, i + 1 : end]
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return latent.gather(2, order.argsort(1)[:, None].expand_as(latent))


def descended(
    weight: Tensor, system: Tensor, scale: Tensor, latent: Tensor, nearest: Nearest
) -> Tensor:
    """Return latent numbers of less error: each column in turn, given all others.

    The error is a parabola in the values V_i of a column, whose least value on the grid is the
    nearest one to its lowest point (coordinate descent, as in arXiv 2309.01885):

        V_i − ((V − W) A)_i / A_ii

    Args:
        weight: W [G, R, K].
        system: A [G, K, K].
        scale: Δ of each column, [G, R, K].
        latent: Latent numbers u [G, R, K]; V is Δ times their nearest numbers of the grid.
        nearest: The rounding to the grid.

    Returns:
        The lowest point of each column / Δ, when the column was rounded, [G, R, K].
    """
    groups, rows, columns = weight.shape
    values = nearest(latent) * scale
    slope = (values - weight) @ system
    power = system.diagonal(dim1=1, dim2=2)[:, None]
    latent = torch.empty_like(latent)
    for start in range(0, columns, _BLOCK_COLUMNS):
        end = min(columns, start + _BLOCK_COLUMNS)
        near = slope[:, :, start:end].clone()
        changes = near.new_empty(groups, rows, end - start)
        for i in range(start, end):
            column, step = values[:, :, i : i + 1], scale[:, :, i : i + 1]
            units = (column - near[:, :, i - start : i - start + 1] / power[:, :, i : i + 1]) / step
            latent[:, :, i : i + 1] = units
            change = nearest(units) * step - column
            changes[:, :, i - start : i - start + 1] = change
            near += change * system[:, i : i + 1, start:end]
        slope += changes @ system[:, start:end]
    return latent


def refitted_scale(weight: Tensor, system: Tensor, scale: Tensor, numbers: Tensor) -> Tensor:
    """Return scales of less error for given numbers of the grid, one block after the other.

    The error is a parabola in the scale Δ_b of a block of columns, with its lowest point at

        Δ_b − (V − W) A q_bᵀ / (q_b A q_bᵀ),        q_b: q in this block, 0 elsewhere

    A scale stays within half and twice of what it was: small blocks of correlated inputs could
    otherwise make up for one another with scales near 0 and far above it.

    Args:
        weight: W [G, R, K].
        system: A [G, K, K].
        scale: Δ > 0 of blocks of ⌈K / B⌉ columns, [G, R, B].
        numbers: q [G, R, K].
    """
    size = -(-weight.shape[2] // scale.shape[2])
    slope = (numbers * of_columns(scale, weight.shape[2]) - weight) @ system
    found = scale.clone()
    for block, part in enumerate(numbers.split(size, 2)):
        columns = slice(block * size, block * size + part.shape[2])
        image = part @ system[:, columns]
        curvature = (image[:, :, columns] * part).sum(2)
        change = -(slope[:, :, columns] * part).sum(2) / curvature
        old = scale[:, :, block]
        change = torch.where(curvature > 0, change.clamp(-0.5 * old, old), 0.0)
        found[:, :, block] += change
        slope += change[:, :, None] * image
    return found
