"""Images for networks without batch norms, from the diversity of their patches (PSAQ-ViT).

A transformer's attention outputs are similar for all patches of noise, and differ between the
patches of a natural image. Images are therefore optimised so that the patches of each attention's
output differ as much as possible (arXiv 2203.02250). Images are parametrised as in `spectral.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.errors import UsageError
from gdfq.execution.context import Context
from gdfq.execution.seeding import stream as random_stream
from gdfq.files.plain_values import tagged
from gdfq.functional.losses import patch_entropy
from gdfq.functional.moments import input_moments
from gdfq.graph import operators, queries
from gdfq.graph.blocks import block_ends, cuts, with_features
from gdfq.graph.capture import Captured
from gdfq.graph.recompute import BudgetedNetwork
from gdfq.optim import AdamConfig
from gdfq.sources.base import Source
from gdfq.sources.input_scale import InputStatistics
from gdfq.sources.spectral import SpectralOptimisation
from gdfq.sources.stream import Stream

_MAX_PATCHES = 64
"""Maximum patches that are compared; of more, evenly spaced ones."""


@tagged("PatchSource", renamed={"dc_power": "brightness", "channel_correlation": "grey"})
@dataclass(frozen=True)
class PatchSource(Source):
    """Images whose patches are optimised to differ, for networks without batch norms.

    Each batch follows Adam on −`patch_entropy`, the moments of the input and a focal class loss.
    The entropy is the mean over the outputs of all attentions. In a network without attention it is
    the mean over the features of its blocks, whose positions are the patches. Each channel of the
    images keeps mean 0 and standard deviation 1.

    Attributes:
        batch: Images per batch.
        iterations: Updates of each batch.
        optimizer: Optimizer of the Fourier coefficients.
        exponent: α of the amplitude spectrum 1/f^α at the start.
        dc_power: Share of the power at frequency 0 at the start.
        channel_correlation: Share of the power that the channels have in common at the start.
        class_weight: Weight of the class loss, for a network with classes.
        focus: Exponent γ of the focal class loss.
    """

    batch: int = 32
    iterations: int = 60
    optimizer: AdamConfig = AdamConfig(lr=0.1, betas=(0.8, 0.95))  # noqa: RUF009 (frozen)
    exponent: float = 1.5
    dc_power: float = 0.06
    channel_correlation: float = 0.85
    class_weight: float = 0.1
    focus: float = 2.0

    @property
    def within_limits(self) -> bool:
        """True: images are clipped to the range of pixels."""
        return True

    def stream(
        self,
        teacher: Captured,
        *,
        steps: int,
        context: Context = Context(),
    ) -> Stream:
        """Yield `steps` batches.

        Raises:
            UsageError: The inputs have no spatial axis, or the network has no patches.
        """
        nodes = patch_nodes(teacher.network.graph)
        if len(teacher.input_shape) < 2 or not nodes:
            raise UsageError(
                "the diversity of patches needs inputs with a spatial axis and attention or "
                f"feature maps inside; this network takes {list(teacher.input_shape)} and has "
                f"{len(nodes)} such tensors. Give real inputs instead (--data, or data=...)."
            )
        featured = with_features(teacher.network, nodes)
        names = {end.name for end in cuts(teacher.network)}
        ends = [node for node in featured.graph.nodes if node.name in names]
        network = BudgetedNetwork(featured, ends, context.memory, teacher.device)

        def knowledge(images: Tensor) -> tuple[Any, Tensor, dict[str, Tensor]]:
            outputs, features = network(images)
            groups = map(patches, nodes, features)
            entropy = torch.stack([patch_entropy(tokens) for tokens in groups]).mean()
            mean, variance = input_moments(images)
            scale = mean.square().mean() + (variance.sqrt() - 1).square().mean()
            return outputs, scale - entropy, {"entropy": entropy.detach()}

        draw = random_stream(context.seed, "patches.draw")
        return SpectralOptimisation(
            self, teacher, knowledge, steps, draw, context, InputStatistics.unit(teacher)
        ).stream()


def patch_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the outputs of all attentions, or without attention the features of the blocks."""
    attentions = [
        node
        for node in graph.nodes
        if operators.name_of(node) in operators.PRODUCTS and _weighs_values(node)
    ]
    return attentions or [node for node in block_ends(graph) if node.meta["val"].ndim > 2]


def _weighs_values(product: fx.Node) -> bool:
    return operators.name_of(queries.grid_source(queries.input_of(product))) in operators.SOFTMAX


def patches(node: fx.Node, feature: Tensor) -> Tensor:
    """Return the value of one of `patch_nodes` as patches [M, P, d], with P at most 64.

    Args:
        node: One of `patch_nodes`.
        feature: Its value: tokens [*, P, d], where each token of each head is a patch, or a feature
            map [N, d, *], where each position is a patch.
    """
    is_map = feature.ndim > 3 and operators.name_of(node) not in operators.PRODUCTS
    found = feature.flatten(2).transpose(1, 2) if is_map else feature.flatten(0, -3)
    return found[:, :: -(-found.shape[1] // _MAX_PATCHES)]
