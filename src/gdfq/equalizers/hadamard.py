"""Rotation: outliers of the residual stream are spread over all of its channels.

A root-mean-square norm without its weight commutes with a rotation, so that the rotation of the
stream folds into all that writes and reads it (QuaRot, arXiv 2404.00456, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.equalizers.base import StreamEqualizer
from gdfq.equalizers.structure import Structure, heads_of
from gdfq.equalizers.weights import BIAS, TABLE, WEIGHT, Changes
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.functional.rotations import random_factors
from gdfq.graph import operators
from gdfq.graph.capture import Captured
from gdfq.student.scheme import Scheme


@tagged("Hadamard")
@dataclass(frozen=True)
class Hadamard(StreamEqualizer):
    """A random Hadamard rotation of the residual stream, and of the inputs of its writers.

    With Q the rotation of the stream and γ the weight of a norm:

        E ← E Q;  W ← Qᵀ W, b ← Qᵀ b of writers;  W ← W diag(γ) Q of readers, γ ← 1

    The values of attention are rotated by one matrix for each head, which folds into the layers
    before and after it. The input of any other writer, such as the down projection, is rotated
    while the model runs, and its weight with it.
    """

    @torch.no_grad()
    def equal(
        self, teacher: Captured, scheme: Scheme, inputs: Sequence[Tensor], seed: int
    ) -> Captured:
        """Return the rotated teacher; `inputs` are not looked at."""
        del scheme, inputs
        structure = Structure.of(teacher.network.graph)
        changes = Changes(teacher)
        draw = random_stream(seed, "equalizer.rotation")
        factors = random_factors(structure.width, draw)
        rotation = torch.kron(*factors)
        rotate_stream_(changes, structure, rotation.to(teacher.device))
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for writer in structure.writers:
            heads = heads_of(writer)
            weight = changes.constant(writer, WEIGHT)
            size = weight.shape[1] if heads is None else heads.size
            if size not in made:  # one rotation for each width, so that its tensors are shared
                left, right = random_factors(size, draw)
                made[size] = left.to(teacher.device), right.to(teacher.device)
            own = torch.kron(*made[size])
            if heads is None:
                changes.inserted[writer] = operators.ROTATED, made[size]
                changes.set(writer, WEIGHT, weight @ own)
                continue
            changes.set(writer, WEIGHT, (weight.unflatten(1, (-1, size)) @ own).flatten(1))
            values = changes.constant(heads.values, WEIGHT)
            turned = own.mT @ values.unflatten(0, (-1, size))
            changes.set(heads.values, WEIGHT, turned.flatten(0, 1))
            if changes.has(heads.values, BIAS):
                bias = changes.constant(heads.values, BIAS).unflatten(0, (-1, size))
                changes.set(heads.values, BIAS, (bias @ own).flatten())
        return changes.applied()


def fold_norms_(changes: Changes, structure: Structure) -> None:
    """Fold the weights of all norms of the stream into the layers that read them."""
    for norm in structure.norms:
        if norm.weight is None:
            continue
        gamma = changes.tensor(norm.weight)
        for reader in norm.readers:
            changes.set(reader, WEIGHT, changes.constant(reader, WEIGHT) * gamma)
        if norm.node is not norm.plain:
            changes.skipped[norm.node] = norm.plain
        else:
            changes.set(norm.plain, 2, torch.ones_like(gamma))


def rotate_stream_(changes: Changes, structure: Structure, rotation: Tensor) -> None:
    """Rotate the residual stream, and fold the rotation into what writes and reads it.

    Args:
        changes: The changes of the teacher.
        structure: Its residual stream.
        rotation: Q, orthogonal, [C, C].
    """
    fold_norms_(changes, structure)
    for embedding in structure.embeddings:
        changes.set(embedding, TABLE, changes.constant(embedding, TABLE) @ rotation)
    for writer in structure.writers:
        changes.set(writer, WEIGHT, rotation.mT @ changes.constant(writer, WEIGHT))
        if changes.has(writer, BIAS):
            changes.set(writer, BIAS, changes.constant(writer, BIAS) @ rotation)
    for norm in structure.norms:
        for reader in norm.readers:
            changes.set(reader, WEIGHT, changes.constant(reader, WEIGHT) @ rotation)
