"""Weights that are fitted to wanted outputs, and rounding whose errors compensate one another.

For a layer y = W x with inputs x [K] and outputs y [R], in G groups that share nothing. Covariances
are over images and positions; a bias takes care of the means.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gdfq.functional.grid import code_bounds

_BLOCK_COLUMNS = 64
"""Columns that are rounded before the columns after them are updated together."""


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


def compensated_codes(
    weight: Tensor, inputs: Tensor, ridge: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Return latent codes of `bits` bits whose rounding changes the outputs least.

    Args:
        weight: See `compensated`, as for `inputs` and `ridge`.
        inputs: Covariance of the inputs.
        ridge: λ of each group.
        scale: Δ [G, R, 1].
        zero_point: z [G, R, 1].
        bits: Bits of a code.

    Returns:
        W / Δ + z [G, R, K] as each column was when it was rounded: clamped to the bounds and
        rounded they are the codes.
    """
    low, high = code_bounds(bits)
    return compensated(
        weight,
        inputs,
        ridge,
        lambda column: column / scale + zero_point,
        lambda latent: (latent.clamp(low, high).round() - zero_point) * scale,
    )


def compensated(
    weight: Tensor,
    inputs: Tensor,
    ridge: Tensor,
    latent_of: Callable[[Tensor], Tensor],
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return latent numbers whose rounding changes the outputs least (GPTQ, arXiv 2210.17323).

    One column after the other is rounded, those of the largest inputs first, and the columns that
    are left change so that the error E|(W_q − W) x|² + λ|W_q − W|² is the least possible: with the
    upper Cholesky factor U of (E[x xᵀ] + λ I)⁻¹ and the error e of column i,

        W_j ← W_j − e U_ij / U_ii        for all j after i

    Args:
        weight: W [G, R, K].
        inputs: Covariance of the inputs, E[x xᵀ], [G, K, K].
        ridge: λ > 0 of each group, [G].
        latent_of: Returns the latent numbers of a column [G, R, 1], such as W / Δ.
        rounded: Returns the values on the grid of a column of latent numbers.

    Returns:
        The latent numbers [G, R, K] of each column as it was when it was rounded.
    """
    groups, rows, columns = weight.shape
    order = inputs.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    system = inputs.gather(1, order[:, :, None].expand_as(inputs))
    system = system.gather(2, order[:, None].expand_as(inputs))
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    upper: Tensor = torch.linalg.cholesky(inverse).mT
    left = weight.gather(2, order[:, None].expand_as(weight)).clone()
    latent = torch.empty_like(left)
    for start in range(0, columns, _BLOCK_COLUMNS):
        end = min(columns, start + _BLOCK_COLUMNS)
        errors = left.new_empty(groups, rows, end - start)
        for i in range(start, end):
            column = left[:, :, i : i + 1]
            latent[:, :, i : i + 1] = latent_of(column)
            error = column - rounded(latent[:, :, i : i + 1])
            error = error / upper[:, i : i + 1, i : i + 1]
            errors[:, :, i - start : i - start + 1] = error
            left[:, :, i + 1 : end] -= error * upper[:, i : i + 1, i + 1 : end]
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return latent.gather(2, order.argsort(1)[:, None].expand_as(latent))
