"""The weights of a language model, fitted to its teacher's outputs layer by layer, and rounded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.execution.context import Context
from gdfq.execution.progress import Listener, Step
from gdfq.graph import operators, queries
from gdfq.graph.capture import Captured
from gdfq.graph.memory import forward_images
from gdfq.graph.tensors import tensors_of
from gdfq.graph.walk import Inputs, PartsInterpreter
from gdfq.quantizers.base import WeightQuantizer
from gdfq.sources.base import split_inputs
from gdfq.student.build import Student
from gdfq.tuning.weight_fitting import can_be_fitted, fit_weight_


@torch.no_grad()
def fit_weights_(
    student: Student,
    teacher: Captured,
    inputs: Sequence[Tensor],
    context: Context = Context(),
) -> None:
    """Fit each weight to the teacher's outputs, given what the layers before it give, and round it.

    As `match_moments_` with `fit_weights`, but the means are fitted with all else, because layers
    of language models have no bias that could take care of them. Student and teacher run side by
    side, layer by layer: only the tensors that later nodes read are held, of one block at a time.

    Args:
        student: A student whose weight quantizers can be fitted, changed in place.
        teacher: The language model that it was built from.
        inputs: Token ids [N, L].
        context: Its budget of memory decides how many sequences pass together; its listener
            hears of each fitted layer.
    """
    at_once = forward_images(teacher.network.graph, context.memory, teacher.device)
    parts = split_inputs(inputs, at_once)
    _Fit(student.network, teacher.network, parts, context.listener).run_parts(parts)


class _Fit(PartsInterpreter):
    """Runs a student and fits each layer before it runs; the teacher runs beside it."""

    def __init__(
        self,
        network: fx.GraphModule,
        teacher: fx.GraphModule,
        parts: Sequence[Inputs],
        listener: Listener,
    ) -> None:
        super().__init__(network)
        self._listener = listener
        self._total = sum(self._quantizer(node) is not None for node in network.graph.nodes)
        self._done = 0
        self._weights = tensors_of(teacher)
        self._teacher = PartsInterpreter(teacher).nodes_of_parts(parts)

    def before(self, node: fx.Node, envs: Sequence[dict[fx.Node, Any]]) -> None:
        quantizer = self._quantizer(node)
        if quantizer is None:
            return
        self._fit(node, quantizer, envs)
        self._done += 1
        self._listener(Step("fit", self._done, self._total, {}))

    def _quantizer(self, node: fx.Node) -> WeightQuantizer | None:
        """Return what quantizes the weight of a node; None of any other node."""
        if operators.name_of(node) not in operators.WEIGHTED:
            return None
        found = self.submodules.get(queries.weight_name(node))
        return found if isinstance(found, WeightQuantizer) else None

    def _fit(
        self, node: fx.Node, quantizer: WeightQuantizer, envs: Sequence[dict[fx.Node, Any]]
    ) -> None:
        layer, targets = next(
            (own, [env[own] for env in found])
            for own, found in self._teacher
            if own.name == node.name
        )
        weight = self._weights[queries.weight_name(layer)]
        if not can_be_fitted(node, quantizer, weight):
            return
        given = [env[queries.input_of(node)] for env in envs]
        trusted = weight.new_ones(len(weight), dtype=torch.bool)
        fit_weight_(quantizer, node, weight, given, targets, trusted, centred=False)
        for env in envs:
            env[queries.weight_of(node)] = quantizer(weight)
