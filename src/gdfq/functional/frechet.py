"""The Fréchet distance of two sets of features."""

import torch
from torch import Tensor

from gdfq.errors import UsageError


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), of Gaussians fitted to two sets.

    That is the squared 2-Wasserstein distance of the Gaussians (arXiv 1706.08500). It is computed
    in float64; (Σ_a Σ_b)^½ has the trace of (Σ_a^½ Σ_b Σ_a^½)^½, which is symmetric.

    Args:
        a: Features [N, D] of the first set, N >= 2.
        b: Features [M, D] of the second set, M >= 2.

    Returns:
        A scalar, at least 0.

    Raises:
        UsageError: A set has fewer than two entries, or they are no vectors of one length.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UsageError(
            "a Fréchet distance needs two sets of at least two vectors of one length; got "
            f"{list(a.shape)} and {list(b.shape)}. Give features N x D, of two images or more."
        )
    a, b = a.double(), b.double()
    root = _root(_covariance(a))
    product = root @ _covariance(b) @ root
    # Its eigenvalues are those of Σ_a Σ_b; rounding makes some negative.
    overlap = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance: Tensor = means + a.var(0).sum() + b.var(0).sum() - 2 * overlap
    return distance.clamp_min(0)


def _covariance(x: Tensor) -> Tensor:
    """Return the covariance matrix [D, D] of vectors [N, D]."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root
