"""Orthogonal matrices that spread outliers over all channels (QuaRot, arXiv 2404.00456)."""

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """Return the orthogonal Hadamard matrix of a power of two (Sylvester): ±1/√n, [n, n].

    Args:
        size: n, a power of two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    orthogonal: Tensor = matrix / len(matrix) ** 0.5
    return orthogonal


def random_factors(size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the factors A [m, m] and B [p, p] of a random rotation A ⊗ B of n = m p channels.

    p is the largest power of two that divides n. B is a Hadamard matrix whose rows have random
    signs, A a random orthogonal matrix.

    Args:
        size: n.
        draw: Randomness.
    """
    power = size & -size
    signs = torch.randint(2, (power, 1), generator=draw) * 2.0 - 1
    normal = torch.randn(size // power, size // power, generator=draw, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(normal)
    orthogonal = (orthogonal * upper.diagonal().sign()).contiguous()
    return orthogonal, signs.double() * hadamard(power)


def rotated(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return x (A ⊗ B): each vector as a matrix X [m, p] becomes Aᵀ X B.

    Args:
        x: [..., m p].
        left: A, [m, m].
        right: B, [p, p].
    """
    rows = x.unflatten(-1, (len(left), len(right)))
    turned: Tensor = left.mT @ rows @ right
    return turned.flatten(-2)
